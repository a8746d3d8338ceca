"""`cdc train`: learn an adapter from labelled images."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from cdc_models import processes
from cdc_models.commands.parts import backbone_of, dataset_of
from cdc_models.commands.run_folder import resolved, start_run, write_json
from cdc_models.commands.settings import Adaptation, Backbone, Cache, Compute, Data, Draw, Interrupted, Output
from cdc_models.data import ImageDataset, ImageReport
from cdc_models.engine import calibrate, save_adapter
from cdc_models.provenance import git_commit, peak_memory, versions
from cdc_models.recipes import Training, build, cached_training, check_cached, reader, report_of, train_on

__all__ = ["Folder", "train"]


@dataclass(frozen=True)
class Folder:
    """Where to.

    Args:
        out: folder for adapter.safetensors, config.yaml, report.json and the checkpoint; the same command goes on
            from what is there.
    """

    out: Path = Path("runs/train")


def train(
    data: Data,
    draw: Draw,
    backbone: Backbone,
    adaptation: Adaptation,
    training: Training,
    cache: Cache,
    folder: Folder,
    compute: Compute,
    output: Output,
) -> None:
    """Train an adapter on labelled images.

    Writes adapter.safetensors, config.yaml (every setting as it was used; --config takes it back), report.json (losses,
    skipped images, time, memory, versions) and checkpoint.safetensors. Cut off anywhere, the same command goes on from
    the last checkpoint and ends with the same adapter (on a CPU, bitwise the same tensors).
    """
    started = time.perf_counter()
    with output.status("listing images"):
        dataset = dataset_of(data, draw)
    if adaptation.calibrate and not len(dataset.val):
        raise ValueError(
            f"calibrate: expected validation images in {dataset.name}, got none; where a class has few images, "
            f"val_part={data.val_part} may round to none"
        )
    if processes.is_first():
        _warn_of_empty_classes(dataset)
    with output.status("loading CLIP"):
        clip = backbone_of(backbone.backbone, backbone.pretrained, compute)
    model = build(adaptation.method, adaptation.options, clip, dataset, draw.seed)
    if cache.feature_cache is not None:
        check_cached(model, cache.feature_draws)
    settings = (data, draw, backbone, adaptation, training, cache, folder, compute, output)
    start_run(folder.out, resolved(*settings, options=model.options))
    checkpoint = folder.out / "checkpoint.safetensors"
    cached = None
    if cache.feature_cache is not None:
        cached = cached_training(
            model,
            dataset,
            training,
            cache.feature_cache,
            draws=cache.feature_draws,
            seed=draw.seed,
            batch=compute.test_batch,
            workers=compute.readers,
            progress=output.progress,
        )
    result, report = train_on(
        model,
        dataset,
        training,
        seed=draw.seed,
        workers=compute.readers,
        checkpoint=checkpoint,
        checkpoint_every=compute.checkpoint_every,
        compile=compute.compile,
        cached=cached,
        progress=output.progress,
    )
    if result.interrupted:
        raise Interrupted(f"stopped after step {result.steps}; the same command goes on from {checkpoint}")
    likelihood, held_out = None, ImageReport(0)
    if adaptation.calibrate:
        loader = reader(dataset.val, clip, compute.test_batch, compute.readers)
        with output.status("fitting how sure it is"):
            likelihood = calibrate(model, loader)
        held_out = report_of(loader)
    if not processes.is_first():
        return
    images = {"train": report.to_dict(), "validation": held_out.to_dict()}
    adapter = folder.out / "adapter.safetensors"
    summary = {
        "data": dataset.name,
        "split_seed": data.split_seed,
        "test_part": data.test_part,
        "val_part": data.val_part,
        "shots": draw.shots,
        "seed": draw.seed,
        "half": data.half,
        "losses": result.losses,
    }
    save_adapter(model, adapter, summary)
    values = {
        "adapter": str(adapter),
        "data": dataset.name,
        "classes": len(dataset.classes),
        "images": images,
        "learned": sum(p.numel() for p in model.learned_parameters().values()),
        "steps": result.steps,
        "losses": result.losses,
        "validation_nll": likelihood,
        "feature_cache": cached and {"computed": cached.computed, "damaged": list(cached.damaged)},
        "seconds_train": result.seconds,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(clip.device),
        "versions": versions(clip.device),
        "commit": git_commit(),
    }
    write_json(folder.out / "report.json", values)
    output.result(values)
    loss = f", loss {result.losses[-1]:.3f}" if result.losses else ""
    output.say(
        f"{adapter}: {adaptation.method} on {len(dataset.train)} images of {len(dataset.classes)} classes"
        f"{loss}, {values['seconds']:.0f} s"
    )
    for name, part in (("training", report), ("validation", held_out)):
        if part.skipped:
            output.say(f"{name}: {part}; listed in {folder.out / 'report.json'}")


def _warn_of_empty_classes(dataset: ImageDataset) -> None:
    """Warn of classes that a classifier would have and nothing was learned about."""
    filled = set(dataset.train.targets.tolist())
    if empty := [name for label, name in enumerate(dataset.classes) if label not in filled]:
        warnings.warn(
            f"no training images of {len(empty)} of the {len(dataset.classes)} classes of {dataset.name}: "
            f"{', '.join(empty[:10])}{', ...' if len(empty) > 10 else ''}; the classifier knows these by name alone",
            stacklevel=3,
        )
