"""Running a protocol: every training once, every test once, each kept as soon as it is there."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cdc_models.clip import ClipBackbone
from cdc_models.data import ImageDataset, ImageReport, harmonic_mean
from cdc_models.engine import (
    AdapterError,
    Features,
    FitResult,
    adapter_info,
    calibrate,
    evaluate,
    extract_features,
    load_adapter,
    save_adapter,
)
from cdc_models.methods import Method
from cdc_models.protocols.plan import Cell, Target
from cdc_models.protocols.results import is_test
from cdc_models.provenance import git_commit, peak_memory, restart_peak_memory, versions
from cdc_models.recipes import Recipe, build, on_dataset, reader, train_on
from cdc_models.rows import Rows

__all__ = ["Runner"]

FIGURES = ("accuracy", "ece", "brier", "aurc", "aurc_uncertainty", "uncertainty_right", "uncertainty_wrong")
UNKNOWN = ("unknown_auroc", "unknown_auroc_prob")


@dataclass(frozen=True)
class Runner:
    """Trains and tests the cells of a protocol, and keeps what is finished in a folder.

    In the folder: results.jsonl, a line per test set; and adapters/, what was learned, or the checkpoint of the
    training under way. A second run goes on from there.

    Args:
        protocol: written into the results.
        datasets: by the names that the cells use.
        backbone: the CLIP. folder: of the run.
        workers, test_batch, checkpoint_every, compile, progress: as the arguments of `ImageLoader` and `train_on`.

    Raises:
        KeyboardInterrupt: from `run`, with finished results written and, within a training, its checkpoint.
    """

    protocol: str
    datasets: Mapping[str, ImageDataset]
    backbone: ClipBackbone
    folder: Path
    workers: int = 0
    test_batch: int = 100
    checkpoint_every: int = 0
    compile: bool = False
    progress: bool = True

    def run(
        self,
        cells: Sequence[Cell],
        recipes: Mapping[str, Recipe],
        on_done: Callable[[str, Cell, Target], None] = lambda label, cell, target: None,
    ) -> list[dict[str, Any]]:
        """Every recipe (by its label) on every cell; `on_done` is called as each test is there.

        Returns:
            A row per test: protocol, dataset, method (the label), seed, shots, split ("base", "new" or "test"),
            accuracy, H (of base and new), figures of calibration and uncertainty (also `calibrated_...`, after one
            temperature was fitted on the validation shots), numbers of images and of skipped ones, seconds, peak
            memory in bytes, versions, git commit, date, recipe, key.
        """
        rows = Rows(self.folder / "results.jsonl")
        (self.folder / "adapters").mkdir(parents=True, exist_ok=True)
        origin = {
            "backbone": self.backbone.name,
            "pretrained": self.backbone.pretrained,
            "versions": versions(self.backbone.device),
            "commit": git_commit(),
        }
        found: list[dict[str, Any]] = []
        for cell in cells:
            for label, how in recipes.items():
                keys = {target: self._key(how, cell, target) for target in cell.targets}
                missing = [target for target, key in keys.items() if not is_test(rows.rows.get(key))]
                for made in self._tests(how, cell, missing) if missing else ():
                    H = harmonic_mean(*(row["accuracy"] for row in made.values())) if len(made) > 1 else None
                    rows.add(
                        *(
                            {"key": keys[target], "protocol": self.protocol, "method": label, **row, "H": H, **origin}
                            for target, row in made.items()
                        )
                    )
                for target, key in keys.items():
                    found.append({**rows.rows[key], "method": label})
                    on_done(label, cell, target)
        return found

    def _tests(self, how: Recipe, cell: Cell, missing: Sequence[Target]) -> Iterator[dict[Target, dict[str, Any]]]:
        """Results that belong together: base and new, for their H; else one by one."""
        restart_peak_memory(self.backbone.device)  # the rows' memory is that of their own training and tests
        source = self.datasets[cell.source].few_shot(cell.shots, cell.seed)
        source = source if cell.half == "all" else source.half(cell.half)
        adapter = self._adapter(how, cell, source)
        try:
            raw, trained, fitted = load_adapter(adapter, self.backbone), adapter_info(adapter)["summary"], None
        except AdapterError as error:
            raise AdapterError(f"{error}; delete it to have it trained again") from error
        if len(source.val):
            fitted = load_adapter(adapter, self.backbone)  # a second copy, whose temperature is fitted
            calibrate(fitted, reader(source.val, self.backbone, self.test_batch, self.workers))
        facts = {"source": cell.source, "seed": cell.seed, "shots": cell.shots, "recipe": asdict(how), **trained}

        def test(target: Target, strangers: Features | None) -> tuple[dict[str, Any], Features]:
            started = time.perf_counter()
            data = self.datasets[target.dataset]
            data = data if target.half == "all" else data.half(target.half)
            loader = reader(data.test, self.backbone, self.test_batch, self.workers)
            asked = on_dataset(raw, data, how.options)
            features = extract_features(asked, loader, progress=self.progress)
            figures = _figures(asked, features, strangers)
            calibrated = _figures(on_dataset(fitted, data, how.options), features, strangers) if fitted else {}
            return {
                "dataset": target.dataset,
                "split": "test" if target.half == "all" else target.half,
                **figures,
                **{f"calibrated_{name}": calibrated.get(name) for name in figures},
                **facts,
                "images": loader.report.total,
                "skipped": len(loader.report.skipped),
                "skipped_images": [asdict(image) for image in loader.report.skipped],
                "seconds_test": time.perf_counter() - started,
                "peak_memory_bytes": peak_memory(self.backbone.device),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }, features

        if cell.half == "base":
            base, new = cell.targets
            of_new, strangers = test(new, None)
            of_base, _ = test(base, strangers)  # to the classifier of the base classes, the new ones are unknown
            yield {base: of_base, new: of_new}
        else:
            for target in missing:
                yield {target: test(target, None)[0]}

    def _adapter(self, how: Recipe, cell: Cell, data: ImageDataset) -> Path:
        """The file of a recipe's model, trained if it never was, with the facts of its training."""
        adapter = self.folder / "adapters" / f"{_digest(self._key(how, cell))}.safetensors"
        if not adapter.exists():
            model = build(how.method, how.options, self.backbone, data, cell.seed)
            result, report = FitResult(), ImageReport(len(data.train))
            checkpoint = adapter.with_suffix(".checkpoint")
            if learned := model.learned_parameters():
                result, report = train_on(
                    model,
                    data,
                    how.training,
                    seed=cell.seed,
                    workers=self.workers,
                    checkpoint=checkpoint,
                    checkpoint_every=self.checkpoint_every,
                    compile=self.compile,
                    progress=self.progress,
                )
            if result.interrupted:
                raise KeyboardInterrupt
            facts = {
                "seconds_train": result.seconds,
                "losses": result.losses,
                "learned": sum(p.numel() for p in learned.values()),
                "train_images": report.total,
                "train_skipped": [asdict(image) for image in report.skipped],
            }
            save_adapter(model, adapter, facts)
            checkpoint.unlink(missing_ok=True)
        return adapter

    def _key(self, how: Recipe, cell: Cell, target: Target | None = None) -> str:
        """What a result depends on: another recipe, draw, CLIP or test set; not what else is tested."""
        parts = [asdict(replace(cell, targets=())), None if target is None else asdict(target)]
        return json.dumps([self.protocol, self.backbone.fingerprint[:16], asdict(how), *parts], sort_keys=True)


def _figures(model: Method, features: Features, unknown: Features | None) -> dict[str, float | None]:
    """Figures of an evaluation, with None where there is nothing to count (JSON has no nan)."""
    numbers = evaluate(model, features, unknown=unknown, progress=False).numbers()
    values = {name: numbers[name] for name in (*FIGURES, *UNKNOWN)}
    return {name: None if value is None or math.isnan(value) else value for name, value in values.items()}


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]
