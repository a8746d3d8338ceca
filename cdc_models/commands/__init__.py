"""The commands of `cdc`: each reads typed settings, does one thing with the library, and says what it did."""
