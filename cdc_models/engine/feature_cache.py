"""Image features on disk, for methods whose image side does not learn: computed once, reused by every run."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from cdc_models.clip.checks import check_count
from cdc_models.data.image_list import ImageList
from cdc_models.data.image_loader import read_batches
from cdc_models.data.image_report import ImageReport, SkippedImage
from cdc_models.data.listing import DatasetError
from cdc_models.data.transforms import Views
from cdc_models.engine.checks import check_method
from cdc_models.engine.evaluate import Features
from cdc_models.engine.files import from_json, read_tensors, write_tensors
from cdc_models.methods.base import Method
from cdc_models.seeds import check_seed

__all__ = ["CachedFeatures", "FeatureLoader", "cache_features"]

FORMAT = 2

Shard = tuple[dict[str, Tensor], list[SkippedImage]]
"""Features and the places of their images in the list; and the images left out."""


@dataclass(frozen=True)
class CachedFeatures:
    """Image features of N images under V random draws of their transform.

    Attributes:
        image: [V, N, D], or [V, N, M, D] where every template has its own augmentation.
        targets: int64 [N].
        report: the images that could not be read, and are not among the N.
        computed: how many of its shards were computed now; the others came from the disk.
        damaged: files that were not what they should be, and were computed again.
    """

    image: Tensor
    targets: Tensor
    report: ImageReport
    computed: int
    damaged: tuple[str, ...] = ()

    def features(self, draw: int = 0) -> Features:
        """One draw, for `evaluate` and `calibrate`. Raises ValueError for one that there is not."""
        if isinstance(draw, bool) or not isinstance(draw, int) or not 0 <= draw < len(self.image):
            raise ValueError(f"draw: expected a whole number in [0, {len(self.image)}), got {draw!r}")
        return Features(self.image[draw], self.targets)


class FeatureLoader:
    """Batches (features [B, D] or [B, M, D], targets [B]) for `fit`: shuffled, each image under one of its V draws.

    Order and draws follow from the state of `generator`, so that checkpoints of `fit` resume to the same bits.
    `drop_last` leaves out a last batch that is not full, unless it is the only one, as in `ImageLoader`.

    Raises:
        ValueError: for what `cache_features` did not give, a batch size below 1, or what is no seed.

    Example:
        >>> cached = CachedFeatures(torch.zeros(2, 5, 8), torch.zeros(5, dtype=torch.long), ImageReport(5), 0)
        >>> [tuple(x.shape) for x, _ in FeatureLoader(cached, batch_size=3, seed=1)]
        [(3, 8), (2, 8)]
    """

    def __init__(self, cached: CachedFeatures, batch_size: int, seed: int, *, drop_last: bool = False) -> None:
        if not isinstance(cached, CachedFeatures):
            raise ValueError(f"cached: expected what cache_features gives, got {type(cached).__name__}")
        check_count("batch_size", batch_size)
        check_seed(seed)
        self.cached, self.batch_size, self.report = cached, batch_size, cached.report
        self.drop_last = drop_last and len(cached.targets) >= batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        images = len(self.cached.targets)
        return images // self.batch_size if self.drop_last else -(-images // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draws, images = self.cached.image.shape[:2]
        order = torch.randperm(images, generator=self.generator)
        draw = torch.randint(draws, (images,), generator=self.generator)
        return self._batches(order, draw)

    def _batches(self, order: Tensor, draw: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in order.split(self.batch_size)[: len(self)]:
            yield self.cached.image[draw[rows], rows], self.cached.targets[rows]


def cache_features(
    model: Method,
    images: ImageList,
    folder: str | os.PathLike[str],
    *,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    shard: int = 1024,
    progress: bool = True,
) -> CachedFeatures:
    """Image features of a list of images, from the folder where they are there already.

    One safetensors file holds a shard of images under one draw. Its name is a hash of everything that its content
    follows from: the backbone's weights and dtype, the method's views, the transform as it prints itself, seed and
    draw, and of each image the path, size and times of last change, of the content and of the file itself; the second
    cannot be set back, so that a file put in another's place is noticed whatever it claims. Copied images, and those
    whose owner or mode has changed, are computed again, and so is what older versions of this library have left. So a
    file of anything else is never found, let alone used; one that is damaged is noticed by its own hash and computed
    again. Delete the folder to get its space back.

    Args:
        model: a method whose image side does not learn (ZeroShot, CoOp, CDC without image prompts).
        images: with a transform; a transform that prints an address, as a lambda does, is never found again.
        folder: of the cache; made if it is not there.
        draws: V, how often a random transform is drawn for each image.
        seed: of these draws.
        batch_size, num_workers: for reading and encoding.
        shard: images in a file.
        progress: show a progress bar.

    Raises:
        ValueError: for a method whose image side learns, a list that is empty or without transform, counts below 1.
        DatasetError: if not one image can be read.
        OSError: if the folder cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cdc_models import ZeroShot, load_clip
        >>> from cdc_models.data import test_transform
        >>> model = ZeroShot(load_clip("bundled"), ["dusk", "dawn"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("blue", "orange"):
        ...         Image.new("RGB", (60, 60), name).save(Path(folder, f"{name}.png"))
        ...     images = ImageList(folder, [("blue.png", 0), ("orange.png", 1)], ["dusk", "dawn"])
        ...     images = images.with_transform(test_transform(model.backbone))
        ...     first, second = (cache_features(model, images, Path(folder, "cache"), progress=False) for _ in range(2))
        >>> first.image.shape, first.computed, second.computed
        (torch.Size([1, 2, 128]), 1, 0)
    """
    check_method(model)
    if not model.frozen_image:
        raise ValueError(f"model: {type(model).__name__} learns on its image side; its features change at every step")
    if not isinstance(images, ImageList):
        raise ValueError(f"images: expected an ImageList, got {type(images).__name__}")
    if images.transform is None:
        raise ValueError(
            "images: expected a list with a transform, such as images.with_transform(test_transform(clip))"
        )
    for argument, count in (("draws", draws), ("batch_size", batch_size), ("shard", shard)):
        check_count(argument, count)
    check_count("num_workers", num_workers, low=0)
    check_seed(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = ImageReport(len(images))
    computed, damaged, stacked = 0, [], []
    pieces = [range(start, min(start + shard, len(images))) for start in range(0, len(images), shard)]
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("image features", total=len(pieces) * draws)
        for draw in range(draws):
            found = []
            for rows in pieces:
                path = folder / f"{_key(model, images, rows, seed, draw)}.safetensors"
                kept = None
                try:
                    kept = _read(path)
                except ValueError:
                    damaged.append(str(path))
                if kept is None:
                    kept = _compute(model, images, rows, seed, draw, batch_size, num_workers, path)
                    computed += 1
                tensors, skipped = kept
                found.append((tensors["image"].float(), tensors["rows"]))
                for image in skipped:
                    report.add(image)
                bar.advance(task)
            places = torch.cat([rows for _, rows in found])
            if len(places) == 0:
                raise DatasetError(f"no image can be read: {report}; the first is {report.skipped[0]}")
            stacked.append(torch.cat([features for features, _ in found]))
    return CachedFeatures(torch.stack(stacked), images.targets[places], report, computed, tuple(damaged))


def _key(model: Method, images: ImageList, rows: Sequence[int], seed: int, draw: int) -> str:
    files = []
    for row in rows:
        try:
            stat = os.stat(images.path(row))
            files.append([images.paths[row], stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
        except OSError:
            files.append([images.paths[row], None, None, None])
    views = None if model.views is None else model.views.names
    encoder = [model.backbone.fingerprint, str(model.backbone.dtype), views]
    facts = [FORMAT, encoder, repr(images.transform), images.orient, seed, draw, rows[0], str(images.root), files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]


def _read(path: Path) -> Shard | None:
    """A shard from the disk; None if there is none, ValueError if it is not what it should be."""
    if not path.exists():
        return None
    tensors, metadata = read_tensors(path)
    if metadata.get("key") != path.stem or set(tensors) != {"image", "rows"}:
        raise ValueError(f"{path} is not the file that it is called")
    try:
        return tensors, [SkippedImage(**each) for each in from_json(metadata["skipped"])]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say which images it leaves out") from error


@torch.no_grad()
def _compute(
    model: Method, images: ImageList, rows: range, seed: int, draw: int, batch_size: int, num_workers: int, path: Path
) -> Shard:
    features, kept, skipped = [], [], []
    # every image of every draw has its own seed, whatever the batch and the number of workers
    first = (seed * 1_000_003 + draw) * 2**31
    numbered = _Numbered(images.with_transform(_Viewed(images.transform, model.views)))
    for batch, left_out in read_batches(numbered, rows, batch_size, num_workers, first):
        skipped += left_out
        if batch is not None:
            features.append(model.image_features(batch[0].to(model.backbone.device)).cpu())
            kept.append(batch[1])
    empty = torch.empty(0, model.backbone.embed_dim)
    tensors = {"image": torch.cat(features or [empty]), "rows": torch.cat(kept or [torch.empty(0, dtype=torch.long)])}
    told = json.dumps([asdict(image) for image in skipped])
    write_tensors(path, tensors, {"key": path.stem, "skipped": told})
    return tensors, skipped


class _Viewed:
    """A transform, and then what each template makes of its result: [3, H, W] or [M, 3, H, W]."""

    def __init__(self, transform: Any, views: Views | None) -> None:
        # a copy: images are read on the CPU, and the method's own views stay where they are
        self.transform, self.views = transform, copy.deepcopy(views).cpu() if views is not None else None

    def __call__(self, image: Any) -> Tensor:
        x = self.transform(image)
        return x if self.views is None else self.views(x.unsqueeze(0)).squeeze(0)


class _Numbered(Dataset[tuple[Any, int]]):
    """The images with their place in the list instead of their label."""

    def __init__(self, images: ImageList) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index][0], index
