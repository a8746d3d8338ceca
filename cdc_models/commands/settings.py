"""The settings that commands share, as typed objects; each field is a flag and a line of the YAML file."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, RenderableType

from cdc_models import processes

__all__ = ["Adaptation", "Backbone", "Cache", "Compute", "Data", "Draw", "Interrupted", "Model", "Output", "RunFailed"]


class RunFailed(Exception):
    """Something outside the arguments kept a command from its end; exit status 1."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything was saved; says how to go on. Exit status 130."""


@dataclass(frozen=True)
class Data:
    """Which images.

    Args:
        data: name of a dataset of the papers (such as OxfordPets), a folder of class-named folders, or a .csv, .tsv
            or .parquet file with columns path and label.
        root: for a name the folder of all datasets ("data"), for a table the folder of its images (its own).
        classes: for a folder or a table, the class names in the order wanted.
        template: text with one "{}" for the class name, instead of the dataset's own.
        half: all classes, or the base or new half of the base-to-new protocol.
        test_part: part of each class held out for testing, where the data has no test split.
        val_part: the same for validation.
        split_seed: of that draw.
    """

    data: str
    root: str | None = None
    classes: list[str] | None = None
    template: str | None = None
    half: Literal["all", "base", "new"] = "all"
    test_part: float = 0.2
    val_part: float = 0.1
    split_seed: int = 1


@dataclass(frozen=True)
class Draw:
    """Which of the training images.

    Args:
        shots: training images per class (and up to 4 for validation); 0: all there are.
        seed: of the draw of shots, the order of training and the random start.
    """

    shots: int = 16
    seed: int = 1


@dataclass(frozen=True)
class Backbone:
    """Which CLIP.

    Args:
        backbone: an open_clip name, or "bundled" for the small CLIP that comes with this package.
        pretrained: its weights: an open_clip tag, or a local file or folder ("bundled" has its own).
    """

    backbone: str = "ViT-B-16-quickgelu"
    pretrained: str = "openai"


@dataclass(frozen=True)
class Model:
    """Which classifier.

    Args:
        adapter: file that `cdc train` has written, or a hub repository "hf-hub:owner/name"; none: zero-shot CLIP.
        backbone: an open_clip name or "bundled"; none: the adapter's, or ViT-B-16-quickgelu.
        pretrained: its weights, an open_clip tag or a local file or folder; none: the adapter's, or "openai".
    """

    adapter: str | None = None
    backbone: str | None = None
    pretrained: str | None = None


@dataclass(frozen=True)
class Adaptation:
    """Which method.

    Args:
        method: what is learned.
        options: of the method, such as --options.depth 3; those left out have the defaults of its class.
        calibrate: fit one temperature on the validation images after training; they must be many enough for some
            to be answered wrongly, or the fit is sure of everything.
    """

    method: Literal["coop", "maple", "cdc"] = "cdc"
    options: dict[str, Any] = field(default_factory=dict)
    calibrate: bool = False


@dataclass(frozen=True)
class Cache:
    """Whether the images are encoded once, for methods that learn on the text side alone.

    Args:
        feature_cache: folder where image features of the training images are kept, for all epochs and for further runs;
            none: images are read and encoded at every step. Runs may share a folder.
        feature_draws: random crops and flips of each image that are encoded; an epoch takes one of them.
    """

    feature_cache: Path | None = None
    feature_draws: int = 5


@dataclass(frozen=True)
class Compute:
    """Where and how it is computed; changes no result beyond rounding.

    Args:
        device: such as "cuda:1"; "auto" takes a GPU if there is one. Several processes are given "cuda" or "auto", and
            each takes a GPU of its own.
        workers: processes that read images for each that computes, at most one a core; 0: none but that one.
        test_batch: images a step where nothing is learned; several processes share them, except in predict.
        checkpoint_every: steps between two checkpoints of training, besides the one after every epoch; 0: none.
        compile: run the steps of training through torch.compile, which takes a minute or more before the first one.
    """

    device: str = "auto"
    workers: int = 2
    test_batch: int = 100
    checkpoint_every: int = 100
    compile: bool = False

    @property
    def readers(self) -> int:
        """The processes that read images."""
        return min(self.workers, processes.cores())


@dataclass(frozen=True)
class Output:
    """What is printed; of several processes, by the first.

    Args:
        quiet: nothing for a person to read but errors.
        json: one JSON object on stdout, and nothing else there.
    """

    quiet: bool = False
    json: bool = False

    @property
    def progress(self) -> bool:
        """Whether progress bars are shown: to a person at a terminal."""
        return self.talks and Console().is_terminal

    @property
    def talks(self) -> bool:
        """Whether anything is said to a person."""
        return processes.is_first() and not (self.quiet or self.json)

    def say(self, what: RenderableType) -> None:
        """Print for a person."""
        if self.talks:
            Console(width=None if Console().is_terminal else 132).print(what, highlight=False)

    def status(self, what: str) -> AbstractContextManager[Any]:
        """Say what is being done while it lasts, where it cannot be counted."""
        return Console().status(what) if self.progress else nullcontext()

    def result(self, values: dict[str, Any]) -> None:
        """Print for a program."""
        if self.json and processes.is_first():
            print(json.dumps(values))
