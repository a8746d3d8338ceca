"""Where a run of training stands, as one file, so that it can be cut off anywhere and go on to the same end.

A checkpoint holds what was learned, the optimiser's state, the random states, and the place in the data: which epoch,
and how many of its batches are done. The order of an epoch's batches is not stored but drawn again, from the random
states of its beginning. Of several processes the random states of each are there, and the first one writes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdc_models import processes
from cdc_models.engine.files import from_json, read_tensors, write_tensors
from cdc_models.methods.base import Method

__all__ = ["Checkpoint", "CheckpointError", "Position", "Randomness"]

FORMAT = 3


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or belongs to another run."""


@dataclass
class Position:
    """How far training has come.

    Attributes:
        epoch, batch: the epoch under way and how many of its batches are done.
        steps: optimiser steps in all.
        losses: mean loss of every finished epoch; total, seen: sum of losses and images of the one under way.
    """

    epoch: int = 0
    batch: int = 0
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    total: float = 0.0
    seen: int = 0

    def __post_init__(self) -> None:
        counts = {"epoch": self.epoch, "batch": self.batch, "steps": self.steps, "seen": self.seen}
        if wrong := {n: c for n, c in counts.items() if type(c) is not int or c < 0}:
            raise ValueError(f"position: expected counts >= 0, got {wrong}")
        numbers = [self.total, *self.losses] if isinstance(self.losses, list) else [None]
        if len(numbers) != self.epoch + 1 or not all(type(x) in (int, float) for x in numbers):
            raise ValueError(f"position: expected a total and a loss of each of {self.epoch} epochs, got {self}")

    def end_epoch(self) -> float:
        """Move to the next epoch; the mean loss of the one that ended."""
        self.losses.append(self.total / max(self.seen, 1))
        self.epoch, self.batch, self.total, self.seen = self.epoch + 1, 0, 0.0, 0
        return self.losses[-1]


class Randomness:
    """The random states that training reads: torch's (and of a GPU), Python's, numpy's, and the loader's generators."""

    def __init__(self, loader: object, device: torch.device) -> None:
        # a DataLoader's own generator, and that of a sampler which it was given
        batches = getattr(loader, "batch_sampler", None)
        owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
        found = (getattr(owner, "generator", None) for owner in owners)
        self.generators = list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
        self.device = device if device.type == "cuda" else None

    def read(self) -> dict[str, Tensor]:
        """The states now, as tensors."""
        version, words, gauss = random.getstate()
        _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        states = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor([version, *words], dtype=torch.int64),
            "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
            "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss], dtype=torch.int64),
            "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        }
        states |= {f"loader{i}": generator.get_state() for i, generator in enumerate(self.generators)}
        if self.device is not None:
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def check(self, states: dict[str, Tensor]) -> None:
        """Raise an exception unless :meth:`write` can put these states back; nothing is changed.

        A GPU's state may be missing or left over: a run may go on on another device.
        """
        expected = self.read()
        # Between two numbers of a pair that Python's gauss draws, one is kept; else none is.
        pair = states.get("python_gauss")
        if pair is not None and pair.shape in ((0,), (1,)):
            expected["python_gauss"] = torch.empty(pair.shape, dtype=torch.float64)
        if "cuda" not in states or self.device is None:
            expected.pop("cuda", None)
            states = {name: state for name, state in states.items() if name != "cuda"}
        _check_like(states, expected)
        torch.Generator().set_state(states["torch"])
        random.Random().setstate(_python_state(states))
        np.random.RandomState().set_state(_numpy_state(states))
        for i, generator in enumerate(self.generators):
            torch.Generator(generator.device).set_state(states[f"loader{i}"])

    def write(self, states: dict[str, Tensor]) -> None:
        """Put states back that :meth:`read` gave."""
        torch.set_rng_state(states["torch"])
        random.setstate(_python_state(states))
        np.random.set_state(_numpy_state(states))
        for i, generator in enumerate(self.generators):
            generator.set_state(states[f"loader{i}"])
        if self.device is not None and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


def _python_state(states: dict[str, Tensor]) -> tuple[Any, ...]:
    version, *words = states["python"].tolist()
    return version, tuple(words), states["python_gauss"].tolist()[0] if len(states["python_gauss"]) else None


def _numpy_state(states: dict[str, Tensor]) -> tuple[Any, ...]:
    *keys, position, has_gauss = states["numpy"].tolist()
    return "MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()


def _check_like(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError unless the tensors have the names, shapes and dtypes of those expected."""

    def kind(t: Tensor | None) -> str:
        return "missing" if t is None else f"{t.dtype} {list(t.shape)}"

    for name in sorted(tensors.keys() | expected.keys()):
        there, here = kind(tensors.get(name)), kind(expected.get(name))
        if there != here:
            raise ValueError(f"{name} is {there}, expected {here if name in expected else 'no such tensor'}")


class Checkpoint:
    """The checkpoint file of one run.

    Args:
        path: the file; its folder must exist.
        model, optimizer, randomness: what is saved and put back.
        run: what makes this run this run, as JSON holds it; another run's checkpoint is refused.
    """

    def __init__(
        self, path: Path, model: Method, optimizer: torch.optim.Optimizer, randomness: Randomness, run: dict[str, Any]
    ) -> None:
        self.path, self.model, self.optimizer, self.randomness = path, model, optimizer, randomness
        self.run = {
            "format": FORMAT,
            "method": model.name,
            "options": model.options,
            "backbone": model.backbone.fingerprint,
            "classes": list(model.class_names),
            **run,
        }

    def save(self, position: Position, epoch_start: dict[str, Tensor]) -> None:
        """Write the run as it stands; `epoch_start`: the random states before the epoch's first batch was drawn.

        Raises:
            OSError: if it cannot be written; an earlier checkpoint is untouched. FirstFailed: in other processes, then.
        """
        states = {f"now.{name}": state for name, state in self.randomness.read().items()}
        states |= {f"epoch_start.{name}": state for name, state in epoch_start.items()}
        everyone = processes.gather_tensors(states)
        processes.on_first(lambda: self._write(position, everyone))

    def _write(self, position: Position, everyone: list[dict[str, Tensor]]) -> None:
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.model.learned_parameters().items()}
        for name, p in self.model.learned_parameters().items():
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
        for rank, states in enumerate(everyone):
            tensors |= {_of_process(rank) + name: state for name, state in states.items()}
        metadata = {
            "run": json.dumps(self.run),
            "position": json.dumps(asdict(position)),
            # a parameter has state once it had a gradient: what is to be there cannot be told from the model
            "optimizer": json.dumps([name for name in tensors if name.startswith("optimizer.")]),
        }
        write_tensors(self.path, tensors, metadata)

    def load(self) -> tuple[Position, dict[str, Tensor], dict[str, Tensor]] | None:
        """Put model and optimiser back; the position, and the random states at the epoch's start and now.

        None where there is no file.

        Raises:
            CheckpointError: damaged, or of another run; model and optimiser are untouched.
        """
        if not self.path.exists():
            return None
        try:
            tensors, metadata = read_tensors(self.path)
            run, position = from_json(metadata["run"]), Position(**from_json(metadata["position"]))
            optimizer_names = from_json(metadata["optimizer"]) if run["format"] == FORMAT else []
        except (ValueError, KeyError, TypeError) as error:
            raise self._unusable(error) from error
        here = json.loads(json.dumps(self.run))
        if told := differences(run, here, {**here, **run}):
            raise CheckpointError(
                f"checkpoint: {self.path} belongs to another run ({told}); delete it to start over, or give another"
                " path"
            )
        learned = self.model.learned_parameters()

        def states(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        own, count = processes.part()
        epoch_start, now = states(f"{_of_process(own)}epoch_start."), states(f"{_of_process(own)}now.")
        try:
            wanted: dict[str, Tensor] = {f"model.{name}": p for name, p in learned.items()}
            # SGD keeps tensors like the parameter they are of
            wanted |= {name: learned[name.split(".", 2)[2]] for name in optimizer_names}
            of_all = tuple(_of_process(rank) + kind for rank in range(count) for kind in ("epoch_start.", "now."))
            wanted |= {n: t for n, t in tensors.items() if n.startswith(of_all)}
            _check_like(tensors, wanted)
            self.randomness.check(epoch_start)
            self.randomness.check(now)
        except Exception as error:  # random states are refused with whatever their generator throws
            raise self._unusable(error) from error
        with torch.no_grad():
            for name, p in learned.items():
                p.copy_(tensors[f"model.{name}"])
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, key, parameter = name.split(".", 2)
                p = learned[parameter]
                self.optimizer.state[p][key] = value.to(p.device)

        return position, epoch_start, now

    def _unusable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"checkpoint: {self.path} cannot be used: {error}; delete it to start over, or give another path"
        )


def _of_process(rank: int) -> str:
    """What the names of a process's random states begin with."""
    return f"process{rank}." if rank else ""


def differences(there: dict[str, Any], here: dict[str, Any], names: Iterable[str]) -> str:
    """What of these names two runs differ in, as a sentence's part; empty if in nothing."""
    differ = [name for name in names if there.get(name) != here.get(name)]
    return "; ".join(f"{n}: {_short(there.get(n))} there, {_short(here.get(n))} here" for n in differ)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
