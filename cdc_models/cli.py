"""The command line: `cdc demo`."""

from __future__ import annotations

import sys

from jsonargparse import CLI

from cdc_models.demo import demo

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run a command; argument errors end with status 2 and one sentence."""
    try:
        CLI({"demo": demo}, args=arguments, as_positional=False, prog="cdc")
    except ValueError as error:
        print(f"cdc: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
