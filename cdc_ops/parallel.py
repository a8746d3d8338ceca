"""Many classes: the fused operations with the classes sharded over the processes of a group.

Rank r holds the text features [M, K_r, D] of its own classes, any number of them; the classes of all ranks, in order of
rank, are the K classes. Image features, scale, bias and target are the same on every rank. To an opinion a shard adds
one log partition, or a few row sums, and that is all ranks tell each other. Numbers sent by each rank:

    every call                  how many classes it holds, and what must agree          22
    fused_opinion               log partitions of the prompts and the fused opinion     B (M + 1)
    fused_topk                  the same; log ratios and indices of its best k          B (M + 1 + 2 k)
    evidential_cross_entropy    two to four row sums of the prompts and the fused one   2 B (M + 1) to 4 B (M + 1)
    its backward pass           gradients of image, scale and bias that are asked for   B D or B M D, M, M
    rule "weighted"             log partitions of the prompts, and a gradient           B M, B M

Nothing grows with K. Results and gradients are those of one process, to rounding.

Results are of two kinds, as in other tensor-parallel models:

- the same on every rank (loss, uncertainty, conflict, top k): used in the same way on every rank, it counts once;
- of this rank's classes (log_ratio, belief, prob, evidence): what ranks make of them is added up.

So the gradient of text is that of this rank's classes, and those of image, scale and bias are whole on every rank:
nothing is left to be reduced. That image, scale and bias agree in value is not checked; with a batch of its own on
every rank, gather image features and targets first.

Source: operations that are conjugate in forward and backward pass: Shoeybi et al., "Megatron-LM", 2019. Shards of an
opinion combine by ``Z = 1 + sum_r (Z_r - 1)``: docs/mathematics.md, 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cdc_ops import checks
from cdc_ops.backends import Backend, LossForm, Problem, choose, loss_from_sums, refuse_second_derivatives
from cdc_ops.dirichlet import RowSums, merged
from cdc_ops.evidence import full_precision
from cdc_ops.fusion import confidence_weight
from cdc_ops.losses import make_loss_form
from cdc_ops.opinion import Opinion, belief_of, prob_of
from cdc_ops.similarity import FusedOpinion, TopK, make_problem
from cdc_ops.special import log_row_sum

__all__ = ["ShardedOpinion", "evidential_cross_entropy", "fused_opinion", "fused_topk"]


# ---- what ranks tell each other ---------------------------------------------------------------------------------


WHO = "class-parallel operations have"


def exchange(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x of every rank, [ranks, ...]."""
    every = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(every.unbind()), x.contiguous(), group=group)
    return every


class Gather(torch.autograd.Function):
    """:func:`exchange`, to be used in the same way by every rank: each then holds its own part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.rank = dist.get_rank(group)
        return exchange(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivatives(WHO)
        return grad[ctx.rank], None


class SumGradients(torch.autograd.Function):
    """Tensors that are the same on every rank, to be used with its own classes: gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives(WHO)
        # one message; half precision is not summed as such
        total = torch.cat([g.flatten().to(torch.promote_types(g.dtype, torch.float32)) for g in grads])
        dist.all_reduce(total, group=ctx.group)
        parts = total.split([g.numel() for g in grads])
        return None, *(part.view(g.shape).to(g.dtype) for part, g in zip(parts, grads, strict=True))


def shared(group: dist.ProcessGroup | None, *tensors: Tensor | None) -> list[Any]:
    """The tensors, the same on every rank; where they have gradients, these are summed over ranks."""
    learned = [x for x in tensors if x is not None and x.requires_grad]
    if not learned or not torch.is_grad_enabled():
        return list(tensors)
    copies = iter(SumGradients.apply(group, *learned))
    return [next(copies) if x is not None and x.requires_grad else x for x in tensors]


# ---- what ranks must agree on -----------------------------------------------------------------------------------


class Claim(NamedTuple):
    """What a rank says of its arguments, in whole numbers."""

    refused: int = 0
    classes: int = 0
    images: int = 0
    image_dims: int = 0
    image_dtype: int = 0
    prompts: int = 0
    features: int = 0
    text_dtype: int = 0
    gradients: int = 0
    target: int = 0
    # numbers that stand for numbers and names
    scale: int = 0
    bias: int = 0
    activation: int = 0
    rule: int = 0
    prior_weight: int = 0
    normalize: int = 0
    k: int = 0
    form: int = 0
    kl_weight: int = 0
    prompt_weight: int = 0
    fused_weight: int = 0
    reduction: int = 0


#: What is said where ranks claim different things, and {} what they claim.
AGREE = {
    "images": "image must hold as many images B on every rank; got {}",
    "image_dims": "image must have as many dimensions on every rank; got {}",
    "image_dtype": "image must have the same dtype on every rank; got {}",
    "prompts": "text must hold as many prompts M on every rank; got {}",
    "features": "text must have the same feature size D on every rank; got {}",
    "text_dtype": "text must have the same dtype on every rank; got {}",
    "gradients": "image, text, scale and bias must require gradients on every rank or on none; got both",
    "target": "target must hold the same classes on every rank; got different ones",
}
#: The arguments of :func:`make_problem` after image and text.
ARGUMENTS = ("scale", "bias", "activation", "rule", "prior_weight", "normalize")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_number(option: object) -> int:
    """What stands for a number or a name; 1 and 1.0 are alike, and so are all tensors: of those shapes must agree."""
    if isinstance(option, Tensor):
        return 0
    number = isinstance(option, Real) and not isinstance(option, bool)
    return 1 + zlib.crc32(repr(float(option) if number else option).encode())  # type: ignore[arg-type]


def claim(problem: Problem, classes: int, target: Tensor | None, options: dict[str, object]) -> Claim:
    """Of arguments that are right by themselves."""
    tensors = problem.image, problem.text, problem.scale, problem.bias
    learned = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in tensors]
    return Claim(
        classes=classes,
        images=problem.sizes[0],
        image_dims=problem.image.dim(),
        image_dtype=DTYPES.index(problem.image.dtype),
        prompts=problem.sizes[1],
        features=problem.text.shape[2],
        text_dtype=DTYPES.index(problem.text.dtype),
        gradients=sum(2**i for i, yes in enumerate(learned) if yes),
        target=0 if target is None else checks.fingerprint(target),
        **{name: as_number(option) for name, option in options.items()},
    )


def agree(claims: list[Claim], rank: int, options: dict[str, object]) -> None:
    """All ranks accept their arguments and claim the same, or a ValueError, on every rank; options: of this one."""
    if refused := [rank for rank, c in enumerate(claims) if c.refused]:
        raise ValueError(f"the arguments were refused on rank {', '.join(map(str, refused))}; the error there says why")
    for name, sentence in AGREE.items():
        values = [getattr(c, name) for c in claims]
        if len(set(values)) > 1:
            values = [DTYPES[v] for v in values] if name.endswith("dtype") else values
            raise ValueError(sentence.format(", ".join(map(str, values)) + " on ranks 0, 1, .."))
    for name, option in options.items():
        others = [str(r) for r, c in enumerate(claims) if getattr(c, name) != getattr(claims[rank], name)]
        if others:
            here = f"{checks.came(option)} on rank {rank}"
            raise ValueError(f"{name} must be the same on every rank; got {here}, and not on {', '.join(others)}")
    if not any(c.classes for c in claims):
        raise ValueError("text must hold at least one class on some rank of the group; got none on any")


# ---- one rank's part of a problem -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """This rank's part of a problem.

    Attributes:
        problem: of the whole opinion, with the text features of this rank's classes. A rank without classes takes
            part with one of zeros; nobody listens to what it says.
        group: the ranks.
        holders: those that have classes.
        first, size: this rank's classes are ``first`` to ``first + size``.
        target: class indices [B] within this shard, -1 for a class elsewhere; or None.
    """

    problem: Problem
    group: dist.ProcessGroup | None
    holders: list[int]
    first: int
    size: int
    target: Tensor | None

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank with classes, [shards, ...], to be used in the same way everywhere."""
        every: Tensor = Gather.apply(x, self.group)
        return every[self.holders]

    def weighted(self, backend: Backend) -> Problem:
        """The problem; for the weighted rule with its weights, which depend on each prompt's opinion of all classes."""
        if self.problem.rule != "weighted":
            return self.problem
        log_partition = log_row_sum(self.gather(backend.prompt_log_partition(self.problem)), 0)
        (weight,) = shared(self.group, confidence_weight(log_partition, 1))
        return replace(self.problem, weight=weight)


def make_shard(
    group: dist.ProcessGroup | None,
    image: Tensor,
    text: Tensor,
    arguments: tuple[Any, ...],
    backend: str | None,
    options: dict[str, object] | None = None,
    refuse: Callable[[], object] = lambda: None,
    targets: tuple[Tensor, ...] = (),
) -> Shard:
    """Check this rank's arguments, agree with the others, and find this rank's place among the classes.

    arguments: the others of :func:`make_problem`, in its order; options: what else must be the same on every rank;
    refuse: raises a ValueError if one of those is wrong; targets: one or none. What one rank refuses is an error on
    all: the others wait for this one.
    """
    check_group(group)
    empty = isinstance(text, Tensor) and text.dim() == 3 and text.shape[1] == 0
    mine, refusal, target = Claim(refused=1), None, None
    alike = dict(zip(ARGUMENTS, arguments, strict=True)) | (options or {})
    try:
        problem = make_problem(image, F.pad(text, (0, 0, 0, 1)) if empty else text, *arguments)
        for given in targets:
            target = checks.class_indices(given, [len(image)], image.device)
        choose(backend, problem)
        refuse()
        mine = claim(problem, 0 if empty else text.shape[1], target, alike)
    except ValueError as error:
        refusal = error  # raised when the other ranks, which wait for this one, know
    device = next((x.device for x in (image, text) if isinstance(x, Tensor)), None)
    claims = [Claim(*values) for values in exchange(torch.tensor(mine, device=device), group).tolist()]
    if refusal is not None:
        raise refusal
    rank = dist.get_rank(group)
    agree(claims, rank, alike)
    sizes = [c.classes for c in claims]
    K = sum(sizes)
    first, size = sum(sizes[:rank]), sizes[rank]
    if target is not None:
        here = checks.target(target, [len(image)], K, image.device) - first
        target = torch.where((here >= 0) & (here < size), here, -1)
    image, scale, bias = shared(group, problem.image, problem.scale, problem.bias)
    *_, prior_weight, _ = arguments
    W = checks.prior_weight(prior_weight, K)
    problem = replace(problem, image=image, scale=scale, bias=bias, prior_weight=W, classes=K)
    return Shard(problem, group, [r for r, n in enumerate(sizes) if n], first, size, target)


def check_group(group: object) -> None:
    """``group`` is None or a process group, and this process belongs to it."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "group must be a process group, and torch.distributed has none: call torch.distributed.init_process_group "
            f"first; got {group!r}"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a torch.distributed.ProcessGroup that this process is in, or None for all processes; "
            f"got {checks.came(group)}"
        )


# ---- the operations ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardedOpinion(FusedOpinion):
    """One rank's part of a :class:`cdc_ops.FusedOpinion` about K classes.

    log_ratio, belief, prob and evidence [B, K_r] are about this rank's classes; log_partition, uncertainty, their
    prompts' and conflict about all, the same on every rank.

    Attributes:
        classes: K.
        first_class: the index among all classes of this rank's first.
        group: the ranks.
    """

    classes: int = 0
    first_class: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def belief(self) -> Tensor:
        """``b_k`` [B, K_r]; over all ranks, with the uncertainty, sums to one."""
        (log_partition,) = shared(self.group, self.log_partition)
        return belief_of(self.log_ratio, log_partition)

    @property
    def prob(self) -> Tensor:
        """Expected probabilities ``b_k + u / K`` [B, K_r] of this rank's classes."""
        (log_partition,) = shared(self.group, self.log_partition)
        return prob_of(belief_of(self.log_ratio, log_partition), log_partition, self.classes)

    def opinion(self) -> Opinion:
        """Not to be had: entropies and dissonance need the belief in all classes in one place."""
        raise NotImplementedError("a sharded opinion has no Opinion: no rank holds the belief in all classes")


def fused_opinion(
    image: Tensor,
    text: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    activation: str = "exp",
    rule: str = "dempster",
    prior_weight: float | None = None,
    normalize: bool = True,
    backend: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> ShardedOpinion:
    """:func:`cdc_ops.fused_opinion` with the classes sharded over ranks; every rank of the group must call it.

    Args:
        image: ``x`` [B, D] or [B, M, D], the same on every rank, as are scale and bias.
        text: ``t`` [M, K_r, D], this rank's classes; K_r may differ between ranks and be 0.
        scale, bias, activation, rule, normalize, backend: as :func:`cdc_ops.fused_opinion`.
        prior_weight: ``W``, default K, the number of classes on all ranks.
        group: the ranks, default all; with NCCL tensors must be on this rank's GPU.

    Returns:
        :class:`ShardedOpinion`: log_ratio, belief, prob, evidence [B, K_r]; uncertainty [B] and prompt_uncertainty
        [B, M] of all classes. Differentiable, first derivatives only. A backward pass through it must be run by every
        rank, too.

    Raises:
        ValueError: as :func:`cdc_ops.fused_opinion`, on every rank if on one; shapes, dtypes or arguments that differ
            between ranks; no class on any; no process group, or one without this process.
        NotImplementedError: in a backward pass with ``create_graph=True``.

    Source: see :mod:`cdc_ops.parallel`.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # one rank, to show it
    >>> image, text = torch.eye(3)[:2], torch.eye(3).expand(2, 3, 3)
    >>> opinion = fused_opinion(image, text, scale=5.0)
    >>> opinion.prob.shape, opinion.uncertainty.shape, opinion.classes, opinion.first_class
    (torch.Size([2, 3]), torch.Size([2]), 3, 0)
    >>> dist.destroy_process_group()
    """
    arguments = scale, bias, activation, rule, prior_weight, normalize
    shard = make_shard(group, image, text, arguments, backend)
    with full_precision(image.device):
        chosen = choose(backend, shard.problem)
        log_ratio, log_partition, prompts = chosen.fused_opinion(shard.weighted(chosen))
        whole = log_row_sum(shard.gather(torch.cat([log_partition.unsqueeze(1), prompts], 1)), 0)
    W, K = shard.problem.prior_weight, shard.problem.classes
    return ShardedOpinion(
        log_ratio[:, : shard.size], whole[:, 0], whole[:, 1:], W, rule, classes=K, first_class=shard.first, group=group
    )


def fused_topk(
    image: Tensor,
    text: Tensor,
    k: int,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    activation: str = "exp",
    rule: str = "dempster",
    prior_weight: float | None = None,
    normalize: bool = True,
    backend: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> TopK:
    """:func:`cdc_ops.fused_topk` with the classes sharded over ranks; every rank of the group must call it.

    Args:
        k: how many classes, 1 to K; a rank may hold fewer. The rest as :func:`fused_opinion`.

    Returns:
        :class:`cdc_ops.TopK`, the same on every rank; classes are indices among all. For inference: no gradients.

    Raises:
        ValueError: as :func:`fused_opinion`; k outside 1..K.

    Source: see :mod:`cdc_ops.parallel`.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> image, text = torch.eye(3)[:2], torch.eye(3).expand(2, 3, 3)
    >>> fused_topk(image, text, 1, scale=5.0).classes
    tensor([[0],
            [1]])
    >>> dist.destroy_process_group()
    """
    arguments = scale, bias, activation, rule, prior_weight, normalize
    with torch.no_grad(), full_precision(getattr(image, "device", torch.device("cpu"))):
        shard = make_shard(group, image, text, arguments, backend, {"k": k})
        checks.how_many("k", k, shard.problem.classes)
        chosen = choose(backend, shard.problem)
        here = min(k, shard.problem.text.shape[1])
        classes, log_ratio, log_partition, prompts = chosen.fused_topk(shard.weighted(chosen), here)
        # a rank with fewer than k classes fills up with a log ratio below all others
        log_ratio, classes = F.pad(log_ratio, (0, k - here), value=-1.0), F.pad(classes + shard.first, (0, k - here))
        log_partition = log_row_sum(shard.gather(torch.cat([log_partition.unsqueeze(1), prompts], 1)), 0)
        best, order = shard.gather(log_ratio).transpose(0, 1).flatten(1).topk(k)
        classes = shard.gather(classes).transpose(0, 1).flatten(1).gather(1, order)
        return TopK.of(classes, best, log_partition[:, 0], log_partition[:, 1:], shard.problem.classes)


def evidential_cross_entropy(
    image: Tensor,
    text: Tensor,
    target: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    activation: str = "exp",
    rule: str = "dempster",
    form: str = "digamma",
    kl_weight: float = 0.0,
    prompt_weight: float = 1.0,
    fused_weight: float = 1.0,
    prior_weight: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """:func:`cdc_ops.evidential_cross_entropy` with the classes sharded over ranks; every rank must call it.

    Args:
        image, text, scale, bias, activation, rule, prior_weight, normalize, backend, group: as :func:`fused_opinion`.
        target: indices [B] among all K classes, the same on every rank.
        form, kl_weight, prompt_weight, fused_weight, reduction: as :func:`cdc_ops.evidential_cross_entropy`.

    Returns:
        Scalar, or [B] for reduction "none"; the same on every rank. Every rank must run its backward pass: it leaves
        the gradient of its own classes in text, and the whole gradient in image, scale and bias.

    Raises:
        ValueError: as :func:`fused_opinion` and :func:`cdc_ops.evidential_cross_entropy`; another target on some rank.
        NotImplementedError: as :func:`fused_opinion`.

    Source: see :mod:`cdc_ops.parallel`.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> image, text = torch.eye(2), torch.eye(2).expand(3, 2, 2)
    >>> right = evidential_cross_entropy(image, text, torch.tensor([0, 1]), scale=5.0)
    >>> wrong = evidential_cross_entropy(image, text, torch.tensor([1, 0]), scale=5.0)
    >>> bool(right < wrong)
    True
    >>> dist.destroy_process_group()
    """
    arguments = scale, bias, activation, rule, prior_weight, normalize

    options: dict[str, Any] = {
        "form": form,
        "kl_weight": kl_weight,
        "prompt_weight": prompt_weight,
        "fused_weight": fused_weight,
        "reduction": reduction,
    }

    def loss_form() -> LossForm:
        return make_loss_form(**options)

    shard = make_shard(group, image, text, arguments, backend, options, loss_form, (target,))
    loss = loss_form()
    assert shard.target is not None
    with full_precision(image.device):
        chosen = choose(backend, shard.problem)
        sums = chosen.loss_sums(shard.weighted(chosen), shard.target, loss)
        parts = iter(shard.gather(torch.stack([x for x in sums if x is not None])).unbind(1))
        whole = merged(RowSums._make(None if x is None else next(parts) for x in sums), shard.problem.classes)
        return loss.reduced(loss_from_sums(whole, shard.problem, loss))
