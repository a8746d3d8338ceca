"""Evaluation: how often a method is right, and whether it knows when it is not."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sized
from dataclasses import dataclass, fields

import torch
from rich.progress import track
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from cdc_models import processes
from cdc_models.engine.checks import check_everything, check_loader, check_method, pair_of
from cdc_models.methods.base import Method

__all__ = ["Evaluation", "Features", "area_under_risk_coverage", "evaluate", "extract_features"]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy, calibration and the worth of the uncertainty on one labelled set.

    Attributes:
        accuracy: part of right answers, in [0, 1].
        ece: expected calibration error of the largest probability, 15 equal bins, l1 (Guo et al., ICML 2017).
        brier: sum over classes of squared error, mean over images, in [0, 2] (Brier 1950).
        aurc: area under the risk-coverage curve when the least probable answers are refused first; lower is
            better (Geifman et al., ICLR 2019).
        aurc_uncertainty: the same when the highest `uncertainty` is refused first. For softmax methods the two
            are one; vacuity says how little evidence there is, not which of two likely classes is right.
        uncertainty_right, uncertainty_wrong: mean uncertainty of right and of wrong answers (nan if there are none).
        unknown_auroc: how well `uncertainty` tells images of unknown classes from known ones, both shown to the
            same K-class classifier; 0.5 is chance; None if no unknown images were given.
        unknown_auroc_prob: the same by one minus the largest probability.
        count: number of images. seconds: wall time.
        prob [N, K], uncertainty [N], targets [N]: the records, on the CPU, for plots.
    """

    accuracy: float
    ece: float
    brier: float
    aurc: float
    aurc_uncertainty: float
    uncertainty_right: float
    uncertainty_wrong: float
    unknown_auroc: float | None
    unknown_auroc_prob: float | None
    count: int
    seconds: float
    prob: Tensor
    uncertainty: Tensor
    targets: Tensor

    def numbers(self) -> dict[str, float | int | None]:
        """The figures without the records, for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("prob", "uncertainty", "targets")}


def area_under_risk_coverage(uncertainty: Tensor, correct: Tensor) -> float:
    """Mean over coverages of the error among the least uncertain part.

    Args:
        uncertainty: [N], any real numbers. correct: bool [N].

    Images of equal uncertainty are refused together: each counts with the mean error of its group, so the order
    in which ties arrive does not matter.

    Source: Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation", ICLR 2019.

    Example:
        >>> area_under_risk_coverage(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([True, True, False]))
        0.1111111111111111
    """
    values, group = torch.unique(uncertainty.double(), return_inverse=True)
    wrong = torch.zeros(len(values), dtype=torch.float64).index_add_(0, group, (~correct).double())
    size = torch.zeros(len(values), dtype=torch.float64).index_add_(0, group, torch.ones_like(uncertainty).double())
    smoothed = (wrong / size)[group][uncertainty.argsort()]
    return float((smoothed.cumsum(0) / torch.arange(1, len(smoothed) + 1)).mean())


@dataclass(frozen=True)
class Features:
    """Image features of a whole set, so that several evaluations pass through the image tower once.

    Attributes:
        image: [N, D], or [N, M, D] where templates have their own.
        targets: int64 [N].
    """

    image: Tensor
    targets: Tensor


Labelled = Iterable[tuple[Tensor, Tensor]] | Features
"""Images with targets: a loader, or features taken from one."""


@torch.no_grad()
def extract_features(model: Method, loader: Labelled, *, progress: bool = True, what: str = "images") -> Features:
    """Image features of everything a loader yields; features are passed through.

    They stay valid for the same image prompts: after `calibrate`, and for `with_classes`.

    In a process group, a loader with a `part`, such as `ImageLoader(..., part=processes.part())`, is read by all
    processes together, and each has the features of all images in the order of one process. A loader without is taken
    to be everything, and every process reads it.

    Args:
        model: any method.
        loader: yields (images [B, 3, H, W], targets [B]); or features, which are checked and brought to the device of
            the method's backbone.
        progress: show a progress bar.
        what: what the progress bar and errors call the images.

    Raises:
        ValueError: for an empty loader, batches that are not (images, targets), images that do not fit the backbone,
            features of another shape, dtype or number of targets, or not finite, the part of another process, or a
            DistributedSampler, which repeats images.

    Example:
        >>> from cdc_models import ZeroShot, load_clip
        >>> model = ZeroShot(load_clip("bundled"), ["cat", "dog"])
        >>> features = extract_features(model, [(torch.zeros(2, 3, 48, 48), torch.tensor([0, 1]))], progress=False)
        >>> features.image.shape, features.targets
        (torch.Size([2, 128]), tensor([0, 1]))
    """
    check_method(model)
    if isinstance(loader, Features):
        return _checked(model, loader, what)
    check_loader(loader)
    model.eval()
    total = len(loader) if isinstance(loader, Sized) else None
    progress = progress and processes.is_first()
    batches = track(loader, f"reading {what}", total=total, transient=True) if progress else loader
    device, shared = model.backbone.device, check_everything(loader)
    pairs, sizes = [], []
    for x, y in map(pair_of, batches):
        sizes.append(len(y))
        if len(x) or not shared:  # else this process has no image of a batch that others have
            pairs.append((model.image_features(x.to(device)).float(), y))
    if shared:
        pairs = _of_everyone(pairs, sizes, device)
    if not pairs:
        raise ValueError(f"loader: expected at least one batch of {what}, got none")
    return _checked(model, Features(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])), what)


def _checked(model: Method, features: Features, what: str) -> Features:
    """The features on the device of the method's backbone, or one clear sentence for what are none."""
    image = features.image
    if isinstance(image, Tensor):
        if len(image) == 0:
            raise ValueError(f"loader: expected features of at least one of the {what}, got {list(image.shape)}")
        image = image.to(model.backbone.device)
    model.check_features(image)
    return Features(image.float(), features.targets)


def _of_everyone(
    pairs: list[tuple[Tensor, Tensor]], sizes: list[int], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """The shares that all processes have of each batch, in the order of the images; `sizes`: of this process's."""
    message = {"sizes": torch.tensor(sizes, dtype=torch.int64)}
    if pairs:
        message |= {"image": torch.cat([x for x, _ in pairs]), "targets": torch.cat([y for _, y in pairs])}
    turns = []
    for theirs in processes.gather_tensors(message):
        sizes = theirs["sizes"].tolist()
        if "image" in theirs:
            turns.append(
                list(zip(theirs["image"].to(device).split(sizes), theirs["targets"].split(sizes), strict=True))
            )
    return [share for batch in zip(*turns, strict=True) for share in batch]


@torch.no_grad()
def _predict_all(model: Method, features: Features, batch: int = 1024) -> tuple[Tensor, Tensor]:
    """Probabilities [N, K] and uncertainty [N], on the CPU."""
    text = model.cached_text_features()
    said = [model.predict_features(x, text) for x in features.image.split(batch)]
    # A probability of 1 may come out a rounding step larger, and torchmetrics takes anything above 1 for logits.
    prob = torch.cat([p.prob.float().cpu() for p in said]).clamp(0, 1)
    return prob, torch.cat([p.uncertainty.float().cpu() for p in said])


def _auroc(known: Tensor, unknown: Tensor) -> float:
    score = torch.cat([known, unknown]).double()
    is_unknown = torch.cat([torch.zeros(len(known)), torch.ones(len(unknown))]).long()
    # AUROC asks for the order only, and torchmetrics wants scores in [0, 1]: ranks keep every difference.
    ranks = torch.unique(score, return_inverse=True)[1].double()
    return float(binary_auroc(ranks / max(float(ranks.max()), 1.0), is_unknown))


def evaluate(
    model: Method,
    loader: Labelled,
    *,
    unknown: Labelled | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a method on labelled images and, if given, its reaction to images of unknown classes.

    Several processes may share the images, see `extract_features`: then each returns the figures of all of them.

    Args:
        model: a method over the classes that the targets count.
        loader: yields (images [B, 3, H, W], targets [B]); or features from `extract_features`.
        unknown: likewise, images of none of the model's classes; their targets may be any numbers.
        progress: show progress bars.

    Raises:
        ValueError: for what `extract_features` refuses, or targets that are not integers in [0, K), one for each image.

    Base-to-new: evaluate base and new classes each for themselves; `harmonic_mean` of the two accuracies is their H.

    Example:
        >>> from cdc_models import ZeroShot, evaluate, harmonic_mean, load_clip
        >>> model = ZeroShot(load_clip("bundled"), ["cat", "dog"])
        >>> images = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        >>> base_loader, new_loader = ([(part, torch.tensor([0, 1, 0, 1]))] for part in images.split(4))
        >>> base = evaluate(model, base_loader, unknown=new_loader, progress=False)
        >>> new = evaluate(model.with_classes(["cow", "horse"]), new_loader, progress=False)
        >>> base.count, 0 <= base.unknown_auroc <= 1, new.unknown_auroc
        (4, True, None)
        >>> 0 <= harmonic_mean(base.accuracy, new.accuracy) <= 1
        True
    """
    started = time.perf_counter()
    features = extract_features(model, loader, progress=progress, what="images of known classes")
    prob, uncertainty = _predict_all(model, features)
    targets = model.check_targets(features.image, features.targets).cpu()
    count = prob.shape[1]
    correct = prob.argmax(-1) == targets
    doubt = 1 - prob.double().amax(-1)
    by_uncertainty = by_prob = None
    if unknown is not None:
        strangers = extract_features(model, unknown, progress=progress, what="images of unknown classes")
        strange_prob, strange_uncertainty = _predict_all(model, strangers)
        by_uncertainty = _auroc(uncertainty, strange_uncertainty)
        by_prob = _auroc(doubt, 1 - strange_prob.double().amax(-1))
    ece = 0.0
    if count > 1:
        ece = float(multiclass_calibration_error(prob, targets, num_classes=count, n_bins=15, norm="l1"))
    one_hot = torch.nn.functional.one_hot(targets, count)
    return Evaluation(
        accuracy=float(correct.double().mean()),
        ece=ece,
        brier=float((prob.double() - one_hot).square().sum(-1).mean()),
        aurc=area_under_risk_coverage(doubt, correct),
        aurc_uncertainty=area_under_risk_coverage(uncertainty, correct),
        uncertainty_right=float(uncertainty[correct].double().mean()),
        uncertainty_wrong=float(uncertainty[~correct].double().mean()),
        unknown_auroc=by_uncertainty,
        unknown_auroc_prob=by_prob,
        count=len(targets),
        seconds=time.perf_counter() - started,
        prob=prob,
        uncertainty=uncertainty,
        targets=targets,
    )
