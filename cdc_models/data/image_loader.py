"""Batches of labelled images that go on past files which cannot be read, and say which those were."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from cdc_models.data.image_list import ImageList
from cdc_models.data.image_report import ImageReport, SkippedImage
from cdc_models.data.listing import DatasetError
from cdc_models.data.open_image import BadImageError
from cdc_models.processes import check_part
from cdc_models.seeds import as_seed, check_seed

__all__ = ["ImageLoader", "scan"]

Batch = tuple[Tensor, Tensor]


class ImageLoader:
    """Batches (images [B, 3, H, W], targets [B]) for `fit`, `evaluate` and `predict`.

    An image that raises `BadImageError` is left out, its batch is shorter by it, and `report` lists it, whether
    it was read here or in a worker process. A batch of nothing but such images is left out.

    With a seed, order and random transforms of a pass follow from the state of `generator` at its beginning alone:
    not from the number of workers, nor from other users of torch's global generator. Each pass moves the generator
    on.

    Args:
        dataset: items (tensor, label); for an `ImageList` that means a transform.
        batch_size: images per batch.
        seed: shuffles, and seeds the transforms; None: in order, and random transforms draw from torch's generator.
        num_workers: processes that read; 0: this one.
        drop_last: leave out a last batch that is not full, unless it is the only one, as the published training
            loaders do.
        pin_memory: for faster copies to a GPU.
        part: (r, n) gives process r of n its share of every batch, also of the last: the shares of all processes are
            the batches of one process, in order. A share may be empty, and is given as tensors of no elements.

    Attributes:
        report: the images skipped so far. generator: where a seeded loader draws from; else None.

    Raises:
        ValueError: for a batch size, a number of workers, a seed or a part out of range.
        DatasetError: during a pass, if not one of its images can be read and there are no other processes.

    Example:
        >>> images = torch.zeros(5, 3, 8, 8)
        >>> loader = ImageLoader([(image, 0) for image in images], batch_size=2, seed=1)
        >>> [len(targets) for _, targets in loader], str(loader.report)
        ([2, 2, 1], 'all 5 images can be read')
    """

    def __init__(
        self,
        dataset: Dataset[tuple[Any, int]] | Sequence[tuple[Any, int]],
        batch_size: int,
        *,
        seed: int | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size, num_workers: expected at least 1 and 0, got {batch_size}, {num_workers}")
        check_part(part)
        if seed is not None:
            check_seed(seed)
        self.part = part
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.report = ImageReport(len(cast(Sized, dataset)))
        self.drop_last, self.pin_memory = drop_last and self.report.total >= batch_size, pin_memory

    def __len__(self) -> int:
        """Batches in a pass, if no batch is left out."""
        images = self.report.total
        return images // self.batch_size if self.drop_last else -(-images // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # Drawn here and not when the first batch is asked for: resumed training puts the generator back, makes the
        # iterator, and moves the generator on.
        if self.generator is None:
            return self._batches(range(self.report.total), None)
        order = torch.randperm(self.report.total, generator=self.generator).tolist()
        return self._batches(order, int(torch.randint(2**62, (), generator=self.generator)))

    def _batches(self, order: Sequence[int], draw: int | None) -> Iterator[Batch]:
        nothing = True
        for batch, skipped in read_batches(
            self.dataset, order, self.batch_size, self.num_workers, draw, self.drop_last, self.pin_memory, self.part
        ):
            for image in skipped:
                self.report.add(image)
            if batch is not None:
                nothing = False
                yield batch
            elif self.part[1] > 1:  # others may have something of this batch, and wait
                yield torch.empty(0), torch.empty(0, dtype=torch.int64)
        if nothing and self.part[1] == 1 and len(self.report.skipped) == self.report.total > 0:
            raise DatasetError(f"no image can be read: {self.report}; the first is {self.report.skipped[0]}")


class _Readable(Dataset[Any]):
    """The items of a dataset, or what was wrong with them; transforms seeded by draw and index."""

    def __init__(self, dataset: Any, draw: int | None) -> None:
        self.dataset, self.draw = dataset, draw

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int] | SkippedImage:
        with nullcontext() if self.draw is None else _Seeded(self.draw + index):
            try:
                return self.dataset[index]
            except BadImageError as error:
                return SkippedImage.of(error)


class _Seeded(AbstractContextManager[None]):
    """torch's generator on the CPU under a seed, and back where it was."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.default_generator.manual_seed(as_seed(self.seed))

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.state)


def read_batches(
    dataset: Dataset[Any] | Sequence[Any],
    order: Sequence[int],
    batch_size: int,
    num_workers: int,
    draw: int | None = None,
    drop_last: bool = False,
    pin_memory: bool = False,
    part: tuple[int, int] = (0, 1),
) -> DataLoader[Any]:
    """Pairs of a batch (None if nothing of it can be read) and what was skipped of it, in order.

    draw: seeds the transforms together with each item's index; None: they draw from torch's generator.
    part: (r, n): of each batch, only share r of n.
    """
    rank, count = part
    starts = range(0, len(order) - (batch_size - 1 if drop_last else 0), batch_size)
    batches = [list(order[start : start + batch_size]) for start in starts]
    return DataLoader(
        _Readable(dataset, draw),
        batch_sampler=[b[len(b) * rank // count : len(b) * (rank + 1) // count] for b in batches],
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_leave_ctrl_c_to_the_parent,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),  # it seeds workers; without one, torch's own would be drawn from
    )


def _leave_ctrl_c_to_the_parent(worker: int) -> None:
    """A terminal's Ctrl-C reaches readers too; they must outlive it, for the step under way to be finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(samples: list[Any]) -> tuple[Batch | None, list[SkippedImage]]:
    skipped = [sample for sample in samples if isinstance(sample, SkippedImage)]
    good = [sample for sample in samples if not isinstance(sample, SkippedImage)]
    if good and isinstance(good[0][0], Image.Image):
        raise ValueError("dataset: expected images as tensors, got PIL images; give the list a transform")
    return (tuple(default_collate(good)) if good else None), skipped


def scan(images: ImageList, *, num_workers: int = 0, progress: bool = True) -> ImageReport:
    """Decode every image once and report those that cannot be used, for `ImageList.without`.

    Args:
        images: the list; its transform is not applied.
        num_workers: processes that read; 0: this one.
        progress: show a progress bar.

    Example:
        >>> images = ImageList("photos", [("no/such.jpg", 0)], ["no"])
        >>> report = scan(images, progress=False)
        >>> print(report, len(images.without(report)))
        1 of 1 images skipped: 1 missing 0
    """
    report = ImageReport(len(images))
    batches = read_batches(images.with_transform(_nothing), range(len(images)), 16, num_workers)
    for _, skipped in track(batches, "checking images", transient=True) if progress else batches:
        for image in skipped:
            report.add(image)
    return report


def _nothing(image: Image.Image) -> Tensor:
    return torch.empty(0)
