"""A loss and its gradients in one pass over blocks of images: no product is made again for a backward pass.

A mean or a sum says beforehand what each image's loss counts for, so gradients can be made along with it, as fused
linear cross-entropies do (Hsu et al., Liger Kernel, 2024). That takes blocks of all classes, and is done where the
default, exp evidence by Dempster's rule, stays in linear space; everything else takes the two passes of
:mod:`cdc_ops.backends.block_sums` and :mod:`cdc_ops.backends.block_slopes`, whose formulas these are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cdc_ops.backends import LossForm, Problem, weighted_sum
from cdc_ops.backends.block_slopes import LARGEST, take_off_length, through_products
from cdc_ops.backends.block_sums import Sums, linear_space, log_rest
from cdc_ops.backends.blocks import (
    LEAST_COLUMNS,
    LINEAR,
    LOG1P,
    Block,
    Blocks,
    Fusion,
    Group,
    cut_of_all_classes,
    exp_,
    spans,
)
from cdc_ops.special import digamma_gap_and_slopes, softplus

#: Smaller scales' gradients do not follow from that of text, which they make as small.
LEAST_SCALE = 2.0**-20


def loss_and_gradients(
    image: Tensor, problem: Problem, target: Tensor, loss: LossForm, needs: tuple[bool, ...]
) -> tuple[Tensor, tuple[Tensor | None, ...]] | None:
    """The loss, and its gradients by image, text, scale, bias and weight where needed; None if it takes two passes.

    image: normalised already, in the problem's dtype. Each gradient is summed in one fixed order: deterministic.
    """
    sums = Sums(target, loss.square, loss.kl, loss.needs_fused(problem))
    if loss.reduction == "none" or problem.text.dtype != problem.dtype or not linear_space(problem, sums):
        return None
    _, by_text, by_scale, *_ = needs
    if by_scale and not (by_text and min(map(abs, problem.scale.tolist())) >= LEAST_SCALE):
        return None
    B, M, K = problem.sizes
    held = M + sums.fused + min(M, 2)  # evidence, the fused opinion, and room to work
    cut = cut_of_all_classes(B, M, K, held)
    if cut is None:
        return None
    blocks = Blocks(problem, image, held, 0, 0, linear=True, chosen=cut)
    lengths = blocks.lengths(slice(0, K))
    groups = blocks.groups_at(slice(0, K), lengths)
    gradients = Gradients(problem, image, needs)
    share = 1 / B if loss.reduction == "mean" else 1.0
    # what each opinion counts for, from the loss of opinions whose own loss is 1 or 0
    each_alone = torch.eye(M + sums.fused, dtype=image.dtype, device=image.device)
    counts = weighted_sum(each_alone, problem, loss).view(-1, 1, 1)
    losses = []
    for rows in spans(B, blocks.rows):
        opinions = Opinions.of(blocks, groups, rows, target[rows], sums.fused)
        if opinions is None:
            blocks.close(keep=False)  # what comes then needs memory of its own
            return None
        each, by_rest, by_target = opinions.loss(problem, loss.form, counts, share)
        losses.append(each)
        by_fused = opinions.by_fused(by_rest, by_target)
        for group in groups:
            gradients.add(group, rows, opinions.by_logits(group.prompts, by_rest, by_target, by_fused))
    results = gradients.results(lengths, blocks.buffer("work", groups[0].prompts, slice(0, blocks.rows), slice(0, K)))
    blocks.close()
    return loss.reduced(torch.cat(losses)), results


class Gradients:
    """Gradients of the features, scale and bias, where needed, from those of logits. None needs the products again."""

    def __init__(self, problem: Problem, image: Tensor, needs: tuple[bool, ...]) -> None:
        self.problem = problem
        self.image = torch.zeros_like(image) if needs[0] else None
        # the first images write, others add
        self.text = torch.empty_like(problem.text, memory_format=torch.contiguous_format) if needs[1] else None
        self.scale = torch.zeros_like(problem.scale) if needs[2] else None
        self.bias = torch.zeros_like(problem.scale) if needs[3] else None

    def add(self, group: Group, rows: slice, grad: Tensor) -> None:
        """What comes by the logits [g, b, K] of some prompts and images; ``grad`` is used up."""
        if self.bias is not None:
            self.bias[group.prompts] += grad.sum((1, 2))
        through_products(group, rows, grad, self.image, self.text)

    def results(self, lengths: Tensor | None, work: Tensor) -> tuple[Tensor | None, ...]:
        """Those of image, text, scale, bias and weight, after the last images. work: a block to be written to.

        lengths [M, K]: that text is to be divided by. The product of text with its gradient, before its length has had
        its share, is the scale with its own.
        """
        if self.text is not None and (self.scale is not None or lengths is not None):
            work, (M, K, D) = work.view(-1), self.text.shape
            for some in spans(K, max(LEAST_COLUMNS, work.numel() // (M * D))):
                text, grad = self.problem.text[:, some], self.text[:, some]
                room = work[: grad.numel()].view(grad.shape) if grad.numel() <= work.numel() else None
                along = torch.mul(grad, text, out=room).sum(-1)
                if self.scale is not None:
                    self.scale += along.sum(1) / self.problem.scale
                if lengths is not None:
                    take_off_length(grad, text, along, lengths[:, some])
        return self.image, self.text, self.scale, self.bias, None


class Opinions(NamedTuple):
    """Opinions about a block of images: every prompt's evidence, the fused opinion, and row sums without the target."""

    evidence: Tensor  # v [M, b, K], 0 for the target
    of_target: Tensor  # v of the target [M, b, 1]
    fused: Tensor | None  # [b, K], 0 for the target: v of the fused opinion, or ln(1 + v)
    logarithm: bool  # whether it is that
    log_rest: Tensor  # [opinions, b, 1], the fused one last
    log_target: Tensor  # [opinions, b, 1]
    target: Tensor  # [M, b, 1]
    work: Tensor  # [g, b, K], to be written to

    @classmethod
    def of(cls, blocks: Blocks, groups: list[Group], rows: slice, target: Tensor, fused: bool) -> Opinions | None:
        """Those of some images; None if a prompt's evidence leaves linear space."""
        classes, prompts, every = blocks.problem.classes, slice(0, blocks.M), slice(0, blocks.K)
        evidence = blocks.buffer("evidence", prompts, rows, every)
        work = blocks.buffer("work", groups[0].prompts, rows, every)
        index = target.view(1, -1, 1).expand(blocks.M, -1, 1)
        kept, sums = [], []
        for group in groups:
            here, mine = evidence[group.prompts], index[group.prompts]
            values = blocks.exponential(blocks.logits(group, blocks.product(group, rows, here), here))
            kept.append(values.gather(-1, mine))
            sums.append(values.scatter_(-1, mine, 0.0).sum(-1, keepdim=True))
        of_target, rest = torch.cat(kept), torch.cat(sums)
        bounds = (rest + of_target).amax((1, 2)).log1p_().tolist()
        if not all(bound < LARGEST for bound in bounds):  # also for nan
            return None
        log_target = Block(of_target, LINEAR).log_alpha(classes)
        total = log_rest(rest, classes, True, log=False)
        if not fused:
            return cls(evidence, of_target, None, False, total, log_target, index, work)
        fusion = Fusion(blocks, blocks.place(rows, every), spare=work[1])
        for v, bound in zip(evidence.unbind(), bounds, strict=True):
            fusion.add_linear(v, bound, work[0])
        logarithm = fusion.log is not None
        if logarithm:
            both = log_rest(Block(fusion.log_ratio(), LOG1P).log_sum(work[0]), classes, True, log=True)
        else:
            both = log_rest(fusion.out.sum(-1), classes, True, log=False)
            if logarithm := not float(both.amax()) < LARGEST:
                fusion.log_ratio()
        of_both = Block(of_target.log1p().sum(0, keepdim=True), LOG1P).log_alpha(classes)
        total, log_target = torch.cat([total, both.view(1, -1, 1)]), torch.cat([log_target, of_both])
        return cls(evidence, of_target, fusion.out, logarithm, total, log_target, index, work)

    def loss(self, problem: Problem, form: str, counts: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each image [b]; the gradients of their sum times ``share`` by log_rest and by log_target.

        counts [opinions, 1, 1]: what each opinion counts for.
        """
        if form == "digamma":
            log_w = math.log(problem.prior_weight)
            each, by_target, by_rest = digamma_gap_and_slopes(self.log_target + log_w, self.log_rest + log_w)
        else:
            gap = self.log_rest - self.log_target
            each, by_rest = softplus(gap), torch.sigmoid(gap)
            by_target = -by_rest
        return (each * counts).sum((0, 2)), by_rest.mul_(counts * share), by_target.mul_(counts * share)

    def by_fused(self, by_rest: Tensor, by_target: Tensor) -> Tensor | None:
        """The loss's gradient by the fused log ratio ``l`` [b, K], in its place: ``exp(l - log_rest)`` times that."""
        if self.fused is None:
            return None
        if self.logarithm:
            grad = exp_(self.fused.sub_(self.log_rest[-1])).mul_(by_rest[-1])
        else:
            grad = self.fused.add_(1).mul_(torch.exp(-self.log_rest[-1]).mul_(by_rest[-1]))
        mine = torch.exp(self.of_target.log1p().sum(0) - self.log_target[-1]).mul_(by_target[-1])
        return grad.scatter_(-1, self.target[0], mine)

    def by_logits(self, prompts: slice, by_rest: Tensor, by_target: Tensor, by_fused: Tensor | None) -> Tensor:
        """The loss's gradient by some prompts' logits [g, b, K], in their evidence's place: ``v (G + F / (1 + v))``.

        G: the gradient by the evidence v itself, a number for each image but for its target; F: by the fused log ratio.
        """
        v, index, mine = self.evidence[prompts], self.target[prompts], self.of_target[prompts]
        v.scatter_(-1, index, mine)
        part = None
        if by_fused is not None:
            part = self.work[: len(v)]
            torch.div(v, torch.add(v, 1, out=part), out=part)
        v.mul_(torch.exp(-self.log_rest[prompts]).mul_(by_rest[prompts]))
        v.scatter_(-1, index, torch.exp(-self.log_target[prompts]).mul_(by_target[prompts]).mul_(mine))
        return v if part is None or by_fused is None else v.addcmul_(part, by_fused)
