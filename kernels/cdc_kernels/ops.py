"""The kernels as ``torch.library`` operators: fake kernels for tracing, gradients for autograd.

They leave autocast alone: features are multiplied in their own dtype and summed in float32, so an autocast
region neither lowers nor raises anything here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cdc_kernels import launch, launch_small
from cdc_kernels.launch import Inputs

#: What :class:`cdc_kernels.launch.Inputs` holds, in its order; the operators take it apart into their arguments.
INPUTS = (
    "Tensor image, Tensor text, Tensor scale, Tensor? bias, Tensor? image_length, Tensor? text_length, "
    "Tensor? weight, Tensor? target, str activation, str rule, float prior_weight, "
    "int classes, bool square, bool kl"
)


def _register_gradient(op: Any, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """First derivatives of ``op``. The kernels of a backward pass are constants to autograd, so it is not recorded."""

    def once(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "backend='triton' has no second derivatives, which create_graph=True asks for; use backend='reference'"
            )
        return backward(ctx, *grads)

    op.register_autograd(once, setup_context=save)


@torch.library.custom_op(
    "cdc_kernels::row_sums",
    mutates_args=(),
    schema=f"({INPUTS}, bool want_ratio, bool fused) -> (Tensor log_ratio, Tensor sums)",
)
def row_sums(*arguments: Any) -> tuple[Tensor, Tensor]:
    """log_ratio [B, K] (empty unless wanted) and row sums [4, M + 1, B]; see :func:`cdc_kernels.launch.row_sums`."""
    *inputs, want_ratio, fused = arguments
    return launch.row_sums(Inputs(*inputs), want_ratio, fused)


@row_sums.register_fake
def _(image: Tensor, text: Tensor, scale: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    B, (M, K, _) = image.shape[0], text.shape
    want_ratio = others[-2]
    return scale.new_empty((B, K) if want_ratio else (0,)), scale.new_empty((4, M + 1, B))


@torch.library.custom_op(
    "cdc_kernels::row_sums_backward",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor planes, Tensor? ratio, Tensor? g_ratio, bool need_image, bool need_text, "
    "bool need_rows, bool fused) -> (Tensor g_image, Tensor g_text, Tensor g_rows)",
)
def row_sums_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and rows, empty where not needed; see :func:`cdc_kernels.launch.gradients`."""
    *inputs, planes, ratio, g_ratio, need_image, need_text, need_rows, fused = arguments
    g_ratio = None if g_ratio is None else launch.unit_last(g_ratio)
    return launch.gradients(Inputs(*inputs), planes, ratio, g_ratio, need_image, need_text, need_rows, fused)


@row_sums_backward.register_fake
def _(image: Tensor, text: Tensor, scale: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_image, need_text, need_rows, _ = others
    return (
        scale.new_empty(image.shape if need_image else (0,)),
        text.new_empty(text.shape if need_text else (0,)),
        scale.new_empty((3, text.shape[0], image.shape[0]) if need_rows else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, rule, prior_weight, classes, square, kl, want_ratio, fused = inputs
    ctx.options = activation, rule, prior_weight, classes, square, kl
    ctx.want_ratio, ctx.fused = want_ratio, fused
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g_ratio: Tensor | None, g_sums: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, ratio, sums = ctx.saved_tensors
    image, bias = tensors[0], tensors[3]
    needs = ctx.needs_input_grad
    g_sums = torch.zeros_like(sums) if g_sums is None else g_sums
    need_rows = needs[2] or needs[3] or needs[6]
    g_image, g_text, g_rows = row_sums_backward(
        *tensors, *ctx.options, torch.cat([sums[:3], g_sums]),
        ratio if ctx.want_ratio else None, g_ratio if ctx.want_ratio else None,
        bool(needs[0]), bool(needs[1]), bool(need_rows), ctx.fused,
    )  # fmt: skip
    return (
        g_image.to(image.dtype) if needs[0] else None,
        g_text if needs[1] else None,
        g_rows[0].sum(1) if needs[2] else None,
        g_rows[1].sum(1) if needs[3] and bias is not None else None,
        None,
        None,
        g_rows[2].t() if needs[6] else None,
        *(None,) * 9,
    )


_register_gradient(row_sums, _backward, _save)


@torch.library.custom_op("cdc_kernels::row_loss", mutates_args=())
def row_loss(sums: Tensor, classes: int, prior_weight: float, form: str, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Evidential loss [R, B] from row sums [4, R, B], and its gradient by them; see :mod:`cdc_kernels.row_loss`."""
    return launch_small.row_loss(sums, classes, prior_weight, form, kl_weight)


@row_loss.register_fake
def _(sums: Tensor, classes: int, prior_weight: float, form: str, kl_weight: float) -> tuple[Tensor, Tensor]:
    return sums.new_empty(sums.shape[1:]), torch.empty_like(sums, memory_format=torch.contiguous_format)


def _save_row_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_row_loss(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None, None]:
    (by_sums,) = ctx.saved_tensors
    return by_sums * grad, None, None, None, None


_register_gradient(row_loss, _backward_row_loss, _save_row_loss)


@torch.library.custom_op(
    "cdc_kernels::topk",
    mutates_args=(),
    schema=f"({INPUTS}, int k) -> (Tensor classes, Tensor log_ratio, Tensor sums)",
)
def topk(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Classes and log_ratio [B, k] and row sums [4, M + 1, B]; see :func:`cdc_kernels.launch.topk`."""
    *inputs, k = arguments
    return launch.topk(Inputs(*inputs), k)


@topk.register_fake
def _(image: Tensor, text: Tensor, scale: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, M, k = image.shape[0], text.shape[0], others[-1]
    classes = torch.empty((B, k), dtype=torch.int64, device=image.device)
    return classes, scale.new_empty((B, k)), scale.new_empty((4, M + 1, B))


@torch.library.custom_op("cdc_kernels::fuse_evidence", mutates_args=())
def fuse_evidence(evidence: Tensor, rule: str, prior_weight: float) -> Tensor:
    """Fused evidence [N, K] of [N, M, K], rules dempster, cumulative, averaging; one pass over memory."""
    if rule not in ("dempster", "cumulative", "averaging"):
        raise ValueError(f"rule must be 'dempster', 'cumulative' or 'averaging'; got {rule!r}")
    return launch_small.fuse_evidence(evidence, rule, prior_weight)


@fuse_evidence.register_fake
def _(evidence: Tensor, rule: str, prior_weight: float) -> Tensor:
    N, _, K = evidence.shape
    return evidence.new_empty((N, K), dtype=torch.float32)


@torch.library.custom_op("cdc_kernels::fuse_evidence_backward", mutates_args=())
def fuse_evidence_backward(evidence: Tensor, grad: Tensor, rule: str, prior_weight: float) -> Tensor:
    """Gradient of :func:`fuse_evidence`."""
    return launch_small.fuse_evidence_backward(evidence, grad, rule, prior_weight)


@fuse_evidence_backward.register_fake
def _(evidence: Tensor, grad: Tensor, rule: str, prior_weight: float) -> Tensor:
    return torch.empty_like(evidence, memory_format=torch.contiguous_format)


def _save_evidence(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    evidence, ctx.rule, ctx.prior_weight = inputs
    ctx.save_for_backward(evidence)


def _backward_evidence(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (evidence,) = ctx.saved_tensors
    return fuse_evidence_backward(evidence, grad, ctx.rule, ctx.prior_weight), None, None


_register_gradient(fuse_evidence, _backward_evidence, _save_evidence)


@torch.library.custom_op("cdc_kernels::decoupling", mutates_args=())
def decoupling(text: Tensor, squared: bool) -> Tensor:
    """``sum_{m > n} cos(t_mk, t_nk)`` (or of its square) of each class [K] of text [M, K, D]; one read of text."""
    return launch_small.decoupling(text, squared)


@decoupling.register_fake
def _(text: Tensor, squared: bool) -> Tensor:
    return text.new_empty(text.shape[1], dtype=torch.float32)


@torch.library.custom_op("cdc_kernels::decoupling_backward", mutates_args=())
def decoupling_backward(text: Tensor, grad: Tensor, squared: bool) -> Tensor:
    """Gradient of :func:`decoupling`."""
    return launch_small.decoupling_backward(text, grad, squared)


@decoupling_backward.register_fake
def _(text: Tensor, grad: Tensor, squared: bool) -> Tensor:
    return torch.empty_like(text, memory_format=torch.contiguous_format)


def _save_text(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    text, ctx.squared = inputs
    ctx.save_for_backward(text)


def _backward_text(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (text,) = ctx.saved_tensors
    return decoupling_backward(text, grad, ctx.squared), None


_register_gradient(decoupling, _backward_text, _save_text)
