"""Where a run of training stands, as one file, so that it can be cut off anywhere and go on to the same end.

A checkpoint holds what was learned, the optimiser's state, the random states, and the place in the data: which epoch,
and how many of its batches are done. The order of an epoch's batches is not stored but drawn again, from the random
states of its beginning.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdc_models.engine.files import read_tensors, write_tensors
from cdc_models.methods.base import Method

__all__ = ["Checkpoint", "CheckpointError", "Position", "Randomness"]

FORMAT = 1


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

    def write(self, states: dict[str, Tensor]) -> None:
        """Put states back that :meth:`read` gave."""
        torch.set_rng_state(states["torch"])
        version, *words = states["python"].tolist()
        random.setstate(
            (version, tuple(words), states["python_gauss"].tolist()[0] if len(states["python_gauss"]) else None)
        )
        *keys, position, has_gauss = states["numpy"].tolist()
        cached = states["numpy_gauss"].item()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        for i, generator in enumerate(self.generators):
            if f"loader{i}" in states:
                generator.set_state(states[f"loader{i}"])
        if self.device is not None and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


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
            OSError: if it cannot be written; an earlier checkpoint is untouched.
        """
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.model.learned_parameters().items()}
        for name, p in self.model.learned_parameters().items():
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
        tensors |= {f"now.{name}": state for name, state in self.randomness.read().items()}
        tensors |= {f"epoch_start.{name}": state for name, state in epoch_start.items()}
        metadata = {"run": json.dumps(self.run), "position": json.dumps(asdict(position))}
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
            run, position = json.loads(metadata["run"]), Position(**json.loads(metadata["position"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint: {self.path} cannot be used: {error}; delete it to start over, or give another path"
            ) from error
        expected = json.loads(json.dumps(self.run))
        if differences := [key for key in {**expected, **run} if expected.get(key) != run.get(key)]:
            told = "; ".join(f"{k}: {_short(run.get(k))} there, {_short(expected.get(k))} here" for k in differences)
            raise CheckpointError(
                f"checkpoint: {self.path} belongs to another run ({told}); delete it to start over, or give another"
                " path"
            )
        learned = self.model.learned_parameters()
        with torch.no_grad():
            for name, p in learned.items():
                p.copy_(tensors[f"model.{name}"])
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, key, parameter = name.split(".", 2)
                p = learned[parameter]
                self.optimizer.state[p][key] = value.to(p.device)

        def states(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        return position, states("epoch_start."), states("now.")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
