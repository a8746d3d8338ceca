"""Where the fused operations are computed: one file per backend, all with the same functions.

A backend is a module with

    fused_opinion(problem)                 -> log_ratio [B, K], log_partition [B], prompt_log_partition [B, M]
    fused_topk(problem, k)                 -> classes [B, k], log_ratio [B, k], then as fused_opinion
    evidential_loss(problem, target, loss) -> loss of each image [B], reduced as the loss says

and, for a problem whose text holds only some of the classes (:mod:`cdc_ops.parallel`), the sums they rest on:

    prompt_log_partition(problem)          -> [B, M]
    loss_sums(problem, target, loss)       -> RowSums of the prompts' and of the fused opinion [B, M + 1]

all differentiable in image, text, scale, bias and weight (fused_topk need not be: nothing trains through it), all
computed in the problem's dtype. Arguments arrive checked, so a backend holds arithmetic and nothing else.

Only "reference" has second derivatives; the others refuse them, in the backward pass that would have to record them.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from cdc_ops import checks
from cdc_ops.dirichlet import RowSums, loss_from_row_sums, reduce

BACKENDS = ("reference", "blocked", "triton")
KERNEL_BACKENDS = ("reference", "triton")  # of operations on ready-made evidence or features
#: Kernels that hold evidence divide it by W in float32, where 2^100, the largest evidence of a logit, must fit.
LEAST_PRIOR_WEIGHT = 2.0**-20
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # found, not imported


class BackendUnavailableError(ValueError):
    """The backend asked for exists but cannot run here; a ValueError that names what is missing.

    >>> import cdc_ops
    >>> image, text = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 1, 2)
    >>> try:
    ...     cdc_ops.fused_opinion(image, text, scale=1.0, backend="triton")
    ... except cdc_ops.BackendUnavailableError as error:
    ...     print(str(error)[:37])
    backend='triton' cannot run here: its
    """


def refuse_second_derivatives(who: str, instead: str = "") -> None:
    """To be called in a backward pass written by hand: autograd would take what it computes for constants.

    who: with its verb, such as "these operations have"; instead: what to do, appended.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{who} no second derivatives, which create_graph=True asks for{instead}")


@dataclass(frozen=True)
class Problem:
    """What every fused operation starts from, checked: features, and how a logit becomes an opinion.

    image [B, D] or [B, M, D] and text [M, K, D] in the caller's dtypes; scale and bias [M] in ``dtype``. Text may
    hold a shard of the opinion's ``classes``: what is summed over classes is then summed over the shard, what depends
    on their number is the whole opinion's.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    activation: str
    rule: str
    prior_weight: float
    classes: int
    normalize: bool
    dtype: torch.dtype
    # lengths [B] or [B, M] of image and [M, K] of text, without gradient, where the checks have made them
    image_norm: Tensor | None = None
    text_norm: Tensor | None = None
    # weights [B, M] of the rule "weighted"; None: from the prompts' uncertainty about the classes at hand
    weight: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, M, K."""
        return self.image.shape[0], self.text.shape[0], self.text.shape[1]


@dataclass(frozen=True)
class LossForm:
    """Which evidential loss: the form, the weights of its parts, and its reduction over images."""

    form: str
    kl_weight: float
    prompt_weight: float
    fused_weight: float
    reduction: str

    def reduced(self, each: Tensor) -> Tensor:
        """The loss of all images from that of each [B]."""
        return reduce(each, self.reduction)

    def needs_fused(self, problem: Problem) -> bool:
        """Whether it needs the fused opinion's row sums apart from the prompts'. A single prompt's are the same."""
        return self.fused_weight != 0 and (problem.sizes[1] > 1 or problem.weight is not None)

    @property
    def square(self) -> bool:
        """Whether it needs the sum of squares."""
        return self.form == "mse"

    @property
    def kl(self) -> bool:
        """Whether it needs the sum of the KL."""
        return self.kl_weight != 0


def loss_from_sums(sums: RowSums, problem: Problem, loss: LossForm) -> Tensor:
    """The loss of each image [B] from the row sums of its opinions [B, M + 1], the fused one last if it is needed."""
    return weighted_sum(
        loss_from_row_sums(sums, problem.classes, problem.prior_weight, loss.form, loss.kl_weight), problem, loss
    )


def weighted_sum(each: Tensor, problem: Problem, loss: LossForm) -> Tensor:
    """The loss of each image [B] from those of its opinions [B, M + 1], or [B, M] where no fused one is needed."""
    M = problem.sizes[1]
    if not loss.needs_fused(problem):
        return (loss.prompt_weight + (loss.fused_weight if M == 1 else 0.0)) * each.sum(1)
    prompts, fused = each.split([M, 1], 1)  # slices' gradients are C++ that Inductor 2.11 gets wrong
    return loss.prompt_weight * prompts.sum(1) + loss.fused_weight * fused.squeeze(1)


class Backend(Protocol):
    """The interface; see the module's docstring."""

    def fused_opinion(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]: ...

    def fused_topk(self, problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def evidential_loss(self, problem: Problem, target: Tensor, loss: LossForm) -> Tensor: ...

    def prompt_log_partition(self, problem: Problem) -> Tensor: ...

    def loss_sums(self, problem: Problem, target: Tensor, loss: LossForm) -> RowSums:
        """Of the prompts' opinions and of the fused one, if that is needed: [B, M + 1] or [B, M].

        A target of -1 is none of the classes at hand: its log_target is 0.
        """
        ...


def choose(name: str | None, problem: Problem) -> Backend:
    """The backend called ``name``; None picks the best for this problem.

    None means "triton" on a CUDA or ROCm device where its kernels can run, else "blocked"; and "reference" while
    ``torch.compile`` traces, which fuses the plain formulas itself.
    """
    if name is None:
        name = "reference" if torch.compiler.is_compiling() else "blocked"
        if name == "blocked" and problem.image.device.type == "cuda" and _why_not_these_kernels(problem) is None:
            name = "triton"
    checks.one_of("backend", name, BACKENDS)
    if name == "triton":
        _refuse(_why_not_these_kernels(problem))
        from cdc_ops.backends import triton

        return cast(Backend, triton)
    if name == "reference":
        from cdc_ops.backends import reference

        return cast(Backend, reference)
    from cdc_ops.backends import blocked

    return cast(Backend, blocked)


def kernels(name: str | None, x: Tensor, prior_weight: float = 1.0) -> ModuleType | None:
    """The backend "triton" if an operation on ready-made ``x`` goes there, or None for plain PyTorch.

    These operations know two backends, "reference" and "triton"; None picks as in :func:`choose`.
    """
    why = _why_not_triton(x.device, x.dtype, prior_weight)
    if name is None:
        runs = x.device.type == "cuda" and why is None and not torch.compiler.is_compiling()
        name = "triton" if runs else "reference"
    checks.one_of("backend", name, KERNEL_BACKENDS)
    if name == "reference":
        return None
    _refuse(why)
    from cdc_ops.backends import triton

    return triton


def _refuse(why: str | None) -> None:
    if why is not None:
        raise BackendUnavailableError(f"backend='triton' cannot run here: {why}; use another backend or None")


def _why_not_these_kernels(problem: Problem) -> str | None:
    # exp evidence is never formed: any prior weight will do
    held = 1.0 if problem.activation == "exp" else problem.prior_weight
    return _why_not_triton(problem.image.device, problem.dtype, held)


def _why_not_triton(device: torch.device, dtype: torch.dtype, prior_weight: float) -> str | None:
    """One sentence why the kernels cannot run here with evidence of this prior weight, or None."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    if dtype == torch.float64:
        return "its kernels compute in float32, and an input is float64"
    if prior_weight < LEAST_PRIOR_WEIGHT:
        return f"its kernels take a prior_weight of at least 2^-20 for evidence in float32; got {prior_weight:g}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU, where Triton only runs interpreted (TRITON_INTERPRET=1, for tests)"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type!r}, and its kernels are for CUDA and ROCm devices"
    return None
