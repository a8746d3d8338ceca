"""The command line: a command is a function of typed settings, from which its flags, YAML and help follow."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from cdc_models import processes
from cdc_models.commands.evaluate import evaluate
from cdc_models.commands.predict import predict
from cdc_models.commands.protocol import PROTOCOL_COMMANDS
from cdc_models.commands.report import report
from cdc_models.commands.sample import sample
from cdc_models.commands.settings import RunFailed
from cdc_models.commands.train import train
from cdc_models.demo import demo
from cdc_models.methods import METHODS

__all__ = ["main"]

Command = Callable[..., Any]

COMMANDS: dict[str, Command | dict[str, Callable[..., None]]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "protocol": PROTOCOL_COMMANDS,
    "report": report,
    "sample": sample,
}
SHARED = ("train", "evaluate", "predict")
"""What several processes can do together."""

EXIT = (
    "Exit status: 0 done; 2 arguments or input that cannot be used, told in one sentence; 130 interrupted (train, "
    "predict, protocol and demo go on when given again); 1 anything else that went wrong."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; see `EXIT` for how it ends."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        # jsonargparse wants a value for a boolean; a bare switch means yes.
        switches = _switches(COMMANDS)
        given = [
            f"{argument}=true" if argument in switches and after not in ("true", "false") else argument
            for argument, after in zip_longest(given, given[1:])
        ]
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            parsed = _fill(_new("cdc", EXIT), COMMANDS).parse_args(given)
            if processes.launched() > 1 and parsed.command not in SHARED:  # without waiting for the others
                raise ValueError(f"{parsed.command} is the work of one process; several do {', '.join(SHARED)}")
            with processes.joined():
                _run(COMMANDS, parsed)
    except ArgumentError as error:
        _end(2, " ".join(str(error).split()))
    except KeyboardInterrupt as stop:
        _end(130, f"interrupted: {stop}" if str(stop) else "interrupted")
    except (ValueError, FileNotFoundError, ImportError) as error:
        _end(2, error)
    except (RunFailed, processes.FirstFailed, processes.OthersLost, OSError) as error:
        _end(1, error)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """A warning is a sentence on stderr, without the line of code that gave it."""
    print(f"cdc: warning: {message}", file=sys.stderr)


def _end(status: int, message: object) -> None:
    print(f"cdc: {message}", file=sys.stderr)
    raise SystemExit(status) from None


def _new(name: str | None, description: str) -> ArgumentParser:
    """A parser whose errors are raised, for `main` to tell in one sentence."""
    return ArgumentParser(prog=name, description=description, exit_on_error=False)


def _fill(parser: ArgumentParser, commands: dict[str, Any]) -> ArgumentParser:
    """A subcommand for each of the commands; a group of commands is one with subcommands of its own."""
    below = parser.add_subcommands(required=True, dest="command")
    for word, command in commands.items():
        if isinstance(command, dict):
            text = f"One of {', '.join(command)}."
            child = _new(None, text)
            below.add_subcommand(word, child, help=text)
            _fill(child, command)
        else:
            text = (inspect.getdoc(command) or "").split("\n\nArgs:")[0]
            below.add_subcommand(word, _parser(command, text), help=text.split("\n")[0])
    return parser


def _parser(command: Command, description: str) -> ArgumentParser:
    """Flags for every field of a command's settings, or for its plain arguments."""
    settings = _settings(command)
    parser = _new(None, f"{description}\n\n{EXIT}")
    parser.add_argument("--config", action="config", help="YAML file with the same names as the flags; flags win.")
    if settings:
        if any(f.name in ("options", "settings") for cls in settings.values() for f in fields(cls)):
            parser.epilog = "Options of the methods, with their defaults. " + " ".join(map(_options, METHODS))
        for cls in settings.values():
            parser.add_class_arguments(cls, None, as_group=True)
    else:
        parser.add_function_arguments(command, None, as_group=False)
    return parser


def _options(method: str) -> str:
    """The options of a method with their defaults, as a sentence."""
    parameters = list(inspect.signature(METHODS[method]).parameters.values())[2:]
    return f"{method}: {', '.join(f'{p.name}={json.dumps(p.default)}' for p in parameters)}."


def _settings(command: Command) -> dict[str, type]:
    """Argument -> settings class of a command; none for a command of plain arguments."""
    hints = get_type_hints(command)
    return {name: hints[name] for name in inspect.signature(command).parameters if is_dataclass(hints[name])}


def _switches(commands: dict[str, Any]) -> set[str]:
    """The flags of all boolean fields and arguments of commands."""
    found = set()
    for command in commands.values():
        if isinstance(command, dict):
            found |= _switches(command)
            continue
        kinds = [get_type_hints(kind) for kind in _settings(command).values()] or [get_type_hints(command)]
        found |= {f"--{name}" for hints in kinds for name, hint in hints.items() if hint is bool}
    return found


def _run(commands: dict[str, Any], parsed: Namespace) -> None:
    command, values = commands[parsed.command], parsed[parsed.command]
    if isinstance(command, dict):
        _run(command, values)
    elif settings := _settings(command):
        command(**{n: cls(**{f.name: values[f.name] for f in fields(cls)}) for n, cls in settings.items()})
    else:
        command(**{name: values[name] for name in inspect.signature(command).parameters})


if __name__ == "__main__":
    main()
