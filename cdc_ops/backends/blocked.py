"""PyTorch over blocks of images and classes: nothing of size [B, M, K] exists, forward or backward.

Fusion is elementwise in the class, and everything else an opinion or its loss needs are row sums, so a block
of logits can be made, folded into the fused block and into its row's sums, and overwritten by the next
prompts'. The backward pass makes such blocks again; only the mean or the sum of losses of exp evidence by Dempster's
rule has its gradients made along with it, in blocks of all classes. Memory beyond inputs, outputs and gradients is, in
blocks: forward one for each prompt at hand, of which there are two (or all, where the whole problem is small), and one
for the fused opinion unless it is the output; backward 2 M + 1, and one for each prompt at hand; both at once M + 3.
Where gradients are made of logarithms, backward M + 3, and 2 for each prompt at hand, or 3 for the weighted rule. A
loss that needs no opinion but the prompts', as that of a single prompt, makes no fused one, forward or backward. In log
space, or for an activation, one more and 3 more for each prompt at hand, with squares 4, for the KL term 17.
The more a pass holds at once, the fewer classes a block gets: all of them together stay below [B, M, K], those of
fused_topk below [B, K], or below 4 MB where that is more (as long as K is a few hundred, so that K numbers are more
than the row sums of an image, and but for the KL term of one prompt, whose blocks of 64 classes may hold more).

Speed on a CPU comes from four things. A block, unless of all classes, stays in the cache between the matrix product and
its epilogue. Two prompts are multiplied at once, one by each half of the threads. They are fused in linear space: one
exponential for each logit, a power of 2, and one ``log1p`` for each class instead of a ``log1p`` for each logit; where
that would leave the range of the dtype, which the features' lengths, the block's largest logit or its row sums tell,
logarithms take over; likewise backward, where each logit takes the same exponential and a division. And text is
normalised by scaling its logits, not by making a normalised copy.

Blocks are made in :mod:`cdc_ops.backends.blocks`, summed up and fused in :mod:`cdc_ops.backends.block_sums`, and made
again backward in :mod:`cdc_ops.backends.block_slopes`; both at once in :mod:`cdc_ops.backends.block_loss`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdc_ops.backends import LossForm, Problem, loss_from_sums, refuse_second_derivatives
from cdc_ops.backends.block_loss import loss_and_gradients
from cdc_ops.backends.block_slopes import row_sums_backward
from cdc_ops.backends.block_sums import ALONE, Accumulator, Sums, row_sums, sweep
from cdc_ops.backends.blocks import EPS, Blocks, as_dtype
from cdc_ops.dirichlet import RowSums


class RowSumsFunction(torch.autograd.Function):
    """:func:`row_sums` as a differentiable function of image, text, scale, bias and the rule's weight."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        problem: Problem,
        sums: Sums,
        want_log_ratio: bool,
    ) -> tuple[Tensor | None, ...]:
        log_ratio, *results = row_sums(image, problem, sums, want_log_ratio, again=True)
        ctx.problem, ctx.sums, ctx.want_log_ratio = problem, sums, want_log_ratio
        # text, scale, bias, weight and target are read through the problem; saving guards them against changes in place
        ctx.save_for_backward(image, text, scale, bias, weight, sums.target, *results[:3])
        return log_ratio, *results

    @staticmethod
    def backward(
        ctx: Any, g_ratio: Tensor | None, g_total: Tensor, g_target: Tensor, g_square: Tensor, g_kl: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("backend='blocked' has", "; use backend='reference'")
        image, _, _, _, _, _, total, log_target, log_square = ctx.saved_tensors
        g_results = (g_total, g_target, g_square, g_kl)
        g_ratio = g_ratio if ctx.want_log_ratio else None
        results = (total, log_target, log_square)
        given = (image, ctx.problem, ctx.sums, results, g_results, g_ratio, ctx.needs_input_grad)
        return *row_sums_backward(*given), None, None, None


class LossFunction(torch.autograd.Function):
    """A loss whose gradients were made along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        problem: Problem,
        target: Tensor,
        loss: LossForm,
        made: tuple[Tensor, tuple[Tensor | None, ...]],
    ) -> Tensor:
        value, ctx.gradients = made
        ctx.given = problem, loss
        ctx.save_for_backward(image, text, scale, bias, weight, target)  # guards them against changes in place
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("backend='blocked' has", "; use backend='reference'")
        image, text, scale, bias, _, target = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # handed out; another backward pass through a retained graph makes its own
            problem, loss = ctx.given
            problem = replace(problem, text=text, scale=scale, bias=bias)
            made = loss_and_gradients(image, problem, target, loss, ctx.needs_input_grad[:5])
            assert made is not None
            _, gradients = made
        if float(grad) != 1:
            for x in gradients:
                if x is not None:
                    x.mul_(grad)
        return *gradients, None, None, None, None


def prepared_image(problem: Problem) -> Tensor:
    """Image features in the problem's dtype, normalised if asked; differentiable."""
    x = as_dtype(problem.image, problem.dtype)
    if not problem.normalize:
        return x
    if problem.image_norm is None or (torch.is_grad_enabled() and x.requires_grad):
        return F.normalize(x, dim=-1, eps=EPS)
    return x / as_dtype(problem.image_norm, x.dtype).clamp_min(EPS).unsqueeze(-1)


def differentiable_row_sums(
    problem: Problem, sums: Sums, want_log_ratio: bool, image: Tensor | None = None
) -> tuple[Any, ...]:
    """:func:`row_sums`, recorded by autograd where a gradient will be asked for."""
    if not sums.fused and problem.rule == "weighted":
        problem = replace(problem, rule="cumulative", weight=None)  # nothing is fused, so no weights need be made
    image = prepared_image(problem) if image is None else image
    inputs = problem.text, problem.scale, problem.bias, problem.weight
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (image, *inputs)):
        return RowSumsFunction.apply(image, *inputs, problem, sums, want_log_ratio)  # type: ignore[no-any-return]
    return row_sums(image, problem, sums, want_log_ratio)


def fused_opinion(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`cdc_ops.backends`."""
    M = problem.sizes[1]
    log_ratio, total, *_ = differentiable_row_sums(problem, Sums(None), True)
    return log_ratio, total.select(1, M), total.narrow(1, 0, M)


def fused_topk(problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`cdc_ops.backends`; a running top-k over blocks of classes."""
    B, M, K = problem.sizes
    blocks = Blocks(problem, prepared_image(problem), 1, 1, B * K)
    accumulator = Accumulator(blocks, Sums(None))
    best: dict[int, tuple[Tensor, Tensor]] = {}  # values and classes so far, by first row of the block
    for rows, columns, fusion in sweep(blocks, accumulator):
        values, classes = fusion.log_ratio().topk(min(k, columns.stop - columns.start), dim=-1)
        classes += columns.start
        if columns.start:
            before = best[rows.start]
            values, classes = torch.cat([before[0], values], 1), torch.cat([before[1], classes], 1)
            values, order = values.topk(min(k, values.shape[1]), dim=-1)
            classes = classes.gather(1, order)
        best[rows.start] = values, classes
    blocks.close()
    none = blocks.image.new_empty(0, k)
    values = torch.cat([none] + [v for v, _ in best.values()])
    classes = torch.cat([none.long()] + [c for _, c in best.values()])
    total = accumulator.total()
    return classes, values, total[:, M], total[:, :M]


def evidential_loss(problem: Problem, target: Tensor, loss: LossForm) -> Tensor:
    """See :mod:`cdc_ops.backends`."""
    image, inputs = prepared_image(problem), (problem.text, problem.scale, problem.bias, problem.weight)
    needs = tuple(x is not None and x.requires_grad for x in (image, *inputs))
    # under torch.func's transforms the two passes say that they do not know them
    if torch.is_grad_enabled() and any(needs) and not torch._C._are_functorch_transforms_active():
        with torch.no_grad():
            made = loss_and_gradients(image, problem, target, loss, needs)
        if made is not None:
            return LossFunction.apply(image, *inputs, problem, target, loss, made)  # type: ignore[no-any-return]
    return loss.reduced(loss_from_sums(loss_sums(problem, target, loss, image), problem, loss))


def prompt_log_partition(problem: Problem) -> Tensor:
    """See :mod:`cdc_ops.backends`."""
    _, total, *_ = differentiable_row_sums(problem, ALONE, False)
    return total


def loss_sums(problem: Problem, target: Tensor, loss: LossForm, image: Tensor | None = None) -> RowSums:
    """See :mod:`cdc_ops.backends`; image: the prepared one, where it is made already."""
    sums = Sums(target, loss.square, loss.kl, loss.needs_fused(problem))
    _, total, log_target, *others = differentiable_row_sums(problem, sums, False, image)
    return RowSums(log_target, total, *others)
