"""Base-to-new comparisons on the bundled benchmark: which runs there are, running one, and keeping the results."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from inspect import Parameter, signature
from math import isfinite
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from cdc_models.clip import ClipBackbone, load_clip
from cdc_models.data import EmojiBenchmark, ImageSet, emoji_benchmark, harmonic_mean, test_transform, train_transform
from cdc_models.engine import Evaluation, calibrate, evaluate, extract_features, fit
from cdc_models.methods import METHODS, Method
from cdc_models.prompts import ENSEMBLE
from cdc_models.rows import Rows

__all__ = ["ABLATIONS", "SETTINGS", "Run", "Setting", "is_complete", "run_one", "train_one"]


@dataclass(frozen=True)
class Setting:
    """A method with its options and how it is trained on the bundled benchmark."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 0
    lr: float = 0.0035
    batch: int = 16


@dataclass(frozen=True)
class Run:
    """One class split with one draw of shots."""

    split: int
    seed: int
    task: str = "artist"
    partition: str = "test"
    shots: int = 16
    val_shots: int = 4


# Chosen on the two validation splits, whose classes appear in no reported split, with the same effort for every
# trained method (benches/tune.py; benches/results/tuning).
SETTINGS: dict[str, Setting] = {
    "zero-shot": Setting("zero_shot"),
    "zero-shot, 7 templates": Setting("zero_shot", {"templates": list(ENSEMBLE)}),
    "CoOp": Setting("coop", {"n_ctx": 4}, epochs=12, lr=0.01),
    "MaPLe": Setting("maple", {"depth": 3}, epochs=12, lr=0.01),
    "CDC": Setting("cdc", {"depth": 3}, epochs=12, lr=0.01),
}


# What the tables show of a run.
FIGURES = (
    "base",
    "new",
    "H",
    "ece_base",
    "ece_new",
    "aurc_base",
    "aurc_uncertainty_base",
    "unknown_auroc",
    "unknown_auroc_prob",
    "uncertainty_right",
    "uncertainty_wrong",
    "seconds_train",
)


def _without(**changes: Any) -> Setting:
    cdc = SETTINGS["CDC"]
    return Setting(cdc.method, {**cdc.options, **changes}, cdc.epochs, cdc.lr, cdc.batch)


ABLATIONS: dict[str, Setting] = {
    "CDC": SETTINGS["CDC"],
    "one template": _without(n_templates=1, views=["none"]),
    "no views": _without(views=None),
    "no decoupling loss": _without(weight_de=0.0),
    "no consistency loss": _without(weight_con=0.0),
    "no trusted classification": _without(trusted=False),
    "no evidence head": _without(evidence_head=False),
    "no image prompts": _without(image_prompts=False),
    "averaging, not Dempster": _without(rule="averaging"),
}


def batches(data: ImageSet, transform: v2.Transform, size: int, seed: int | None = None) -> DataLoader[tuple[Any, int]]:
    """Batches of an in-memory set, transformed image by image; shuffled by a generator of its own if seeded."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(data.with_transform(transform), batch_size=size, shuffle=seed is not None, generator=generator)


@lru_cache(maxsize=1)  # training and testing of one run read the same images
def benchmark_of(run: Run) -> EmojiBenchmark:
    """The images of a run."""
    return emoji_benchmark(
        run.split, run.seed, task=run.task, partition=run.partition, shots=run.shots, val_shots=run.val_shots
    )


def build(setting: Setting, backbone: ClipBackbone, classes: Sequence[str], seed: int) -> Method:
    """The method of a setting over these classes."""
    options = dict(setting.options)
    if setting.method != "zero_shot":
        options.setdefault("seed", seed)
    return METHODS[setting.method](backbone, classes, **options)


def train_one(setting: Setting, run: Run, backbone: ClipBackbone, *, progress: bool = True) -> Method:
    """Train a setting on the shots of a run, without touching its tests."""
    data = benchmark_of(run)
    model = build(setting, backbone, data.train.classes, run.seed)
    if setting.epochs:
        # A scene has had its random placement: crops as small as for photographs cut the object away, and cost
        # every method 5 to 10 points of base accuracy on the validation splits.
        transform = train_transform(backbone, scale=(0.9, 1.0))
        loader = batches(data.train, transform, setting.batch, run.seed)
        fit(model, loader, epochs=setting.epochs, lr=setting.lr, seed=run.seed, progress=progress)
    return model


def run_one(setting: Setting, run: Run, backbone: ClipBackbone, *, progress: bool = True) -> dict[str, Any]:
    """Train and test one setting: base and new accuracy, H, calibration before and after fitting it, unknown classes.

    Calibration is fitted on `val_shots` further images of each base class, for every method alike. Unknown
    classes: images of the new classes shown to the classifier of the base classes.
    """
    started = time.perf_counter()
    model = train_one(setting, run, backbone, progress=progress)
    seconds_train = time.perf_counter() - started
    data = benchmark_of(run)
    loader = partial(batches, transform=test_transform(backbone), size=200)
    read = partial(extract_features, model, progress=False)
    base_set, new_set = read(loader(data.base_test)), read(loader(data.new_test))
    raw_base = evaluate(model, base_set)
    raw_new = evaluate(model.with_classes(data.new_test.classes), new_set)
    calibrate(model, loader(data.val))
    base = evaluate(model, base_set, unknown=new_set)
    new = evaluate(model.with_classes(data.new_test.classes), new_set)
    return {
        "base": base.accuracy,
        "new": new.accuracy,
        "H": harmonic_mean(base.accuracy, new.accuracy),
        "uncalibrated": {
            "base": raw_base.accuracy,
            "new": raw_new.accuracy,
            "ece_base": raw_base.ece,
            "ece_new": raw_new.ece,
        },
        "ece_base": base.ece,
        "ece_new": new.ece,
        "brier_base": base.brier,
        "brier_new": new.brier,
        "aurc_base": base.aurc,
        "aurc_new": new.aurc,
        "aurc_uncertainty_base": base.aurc_uncertainty,
        "uncertainty_right": base.uncertainty_right,
        "uncertainty_wrong": base.uncertainty_wrong,
        "unknown_auroc": base.unknown_auroc,
        "unknown_auroc_prob": base.unknown_auroc_prob,
        "learned": sum(p.numel() for p in model.learned_parameters().values()),
        "seconds_train": seconds_train,
        "seconds": time.perf_counter() - started,
        "curves": {"base": curves(base), "new": curves(new)},
    }


def curves(evaluation: Evaluation, bins: int = 15, points: int = 20) -> dict[str, list[float]]:
    """Reliability (count, confidence and accuracy per bin) and accuracy at coverages 1/points .. 1."""
    confidence, guess = evaluation.prob.max(-1)
    correct = (guess == evaluation.targets).double()
    which = (confidence * bins).long().clamp(max=bins - 1)

    def total(values: Tensor) -> list[float]:
        return torch.zeros(bins, dtype=torch.float64).index_add_(0, which, values.double()).tolist()

    kept = correct[confidence.argsort(descending=True, stable=True)].cumsum(0)
    sizes = [max(1, round(len(kept) * (i + 1) / points)) for i in range(points)]
    return {
        "bin_count": total(torch.ones_like(correct)),
        "bin_confidence": total(confidence),
        "bin_correct": total(correct),
        "accuracy_at_coverage": [float(kept[n - 1]) / n for n in sizes],
    }


class Results(Rows):
    """Finished runs of a comparison.

    A result counts as done only for the same setting with the same defaults, the same run and the same weights.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        super().__init__(path)
        self.fingerprint = fingerprint

    def key(self, setting: Setting, run: Run) -> str:
        method = signature(METHODS[setting.method]).parameters
        defaults = {name: p.default for name, p in method.items() if p.default is not Parameter.empty}
        facts = {**asdict(setting), "options": {**defaults, **setting.options}}
        return json.dumps([self.fingerprint[:16], facts, asdict(run)], sort_keys=True)

    def get(self, label: str, setting: Setting, run: Run) -> dict[str, Any] | None:
        row = self.rows.get(self.key(setting, run))
        # label, run and setting are the caller's: what the row itself says of them may have been edited
        given = {"label": label, "run": asdict(run), "setting": asdict(setting)}
        return {**row, **given} if row is not None and is_complete(row) else None

    def keep(self, label: str, setting: Setting, run: Run, result: dict[str, Any]) -> None:
        row = {"key": self.key(setting, run), "label": label, "run": asdict(run), "setting": asdict(setting), **result}
        self.add(row)


def is_complete(row: dict[str, Any]) -> bool:
    """Whether a row has every figure of a table, and each is a number."""
    raw, curves = row.get("uncalibrated"), row.get("curves")
    if not (isinstance(raw, dict) and isinstance(curves, dict) and {"base", "new"} <= curves.keys()):
        return False
    figures = [row.get(name) for name in FIGURES] + [raw.get("ece_base")]
    return all(isinstance(x, float) and isfinite(x) for x in figures)


_worker_backbone: ClipBackbone | None = None


def _start_worker() -> None:
    global _worker_backbone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    _worker_backbone = load_clip("bundled")


def _work(setting: Setting, run: Run) -> dict[str, Any]:
    assert _worker_backbone is not None
    return run_one(setting, run, _worker_backbone, progress=False)


def compare(
    settings: dict[str, Setting],
    runs: Sequence[Run],
    results: Results,
    *,
    workers: int = 1,
    on_done: Callable[[str, Run], None] = lambda label, run: None,
) -> list[dict[str, Any]]:
    """Every setting on every run, with the bundled CLIP; what `results` already has is not done again.

    Runs are independent, so they are spread over `workers` processes of one thread each: for towers this small
    that is faster than threads, and `seconds_train` means seconds of one core. Each result is written as it comes.

    Args:
        settings: label -> setting. runs: splits and draws. results: where finished ones are kept.
        workers: processes.
        on_done: called with label and run as each is there.

    Raises:
        KeyboardInterrupt: after the finished results are written.
    """
    jobs = [(label, setting, run) for run in runs for label, setting in settings.items()]
    open_jobs = []
    for label, setting, run in jobs:
        if results.get(label, setting, run) is None:
            open_jobs.append((label, setting, run))
        else:
            on_done(label, run)
    if open_jobs:
        pool = ProcessPoolExecutor(
            min(workers, len(open_jobs)), mp_context=get_context("spawn"), initializer=_start_worker
        )
        try:
            futures = {pool.submit(_work, setting, run): (label, setting, run) for label, setting, run in open_jobs}
            for future in as_completed(futures):
                label, setting, run = futures[future]
                results.keep(label, setting, run, future.result())
                on_done(label, run)
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    found = [results.get(label, setting, run) for label, setting, run in jobs]
    return [row for row in found if row is not None]
