"""The command line: `cdc demo`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import CLI

from cdc_models.demo import demo

__all__ = ["main"]

COMMANDS = {"demo": demo}
SWITCHES = ("--ablation",)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; argument errors end with status 2 and one sentence, Ctrl-C with 130."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    # jsonargparse wants a value for a boolean; a bare switch means yes.
    given = [f"{argument}=true" if argument in SWITCHES else argument for argument in given]
    try:
        CLI(COMMANDS, args=given, as_positional=False, prog="cdc")
    except ValueError as error:
        print(f"cdc: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
