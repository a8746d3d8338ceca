"""Gradients over blocks of classes, each of which is made again: the backward pass of the blocked backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdc_ops.backends import Problem
from cdc_ops.backends.block_sums import (
    Place,
    Sums,
    Weights,
    columns_of,
    fusion_weights,
    linear_space,
    sum_prompts,
    weights_at,
)
from cdc_ops.backends.blocks import EPS, LOG, LOG1P, Block, Blocks, Fusion, Group, exp_, log1p_exp, spans
from cdc_ops.fusion import confidence_weight
from cdc_ops.special import kl_slope, softplus

#: Opinions whose ``ln(1 + v)`` stays below this have gradients in linear space: neither v nor 1 / sum v nears the ends
#: of float32.
LARGEST = 60.0


def row_sums_backward(
    image: Tensor,
    problem: Problem,
    sums: Sums,
    results: Sequence[Tensor | None],
    g_results: Sequence[Tensor | None],
    g_ratio: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of image, text, scale, bias and weight, where needed, from those of the row sums and of log_ratio.

    results: log_rest, log_target and log_square as :func:`block_sums.row_sums` returned them; g_results: their
    gradients, and that of kl_sum.
    """
    total, log_target, _ = results
    assert total is not None
    B, M, K = problem.sizes
    bounds = linear_bounds(problem, sums, total, log_target)
    linear = bounds is not None
    if linear:
        held = 2 * M + sums.fused  # products and evidence; the fused opinion, then its gradient
        each = int(sums.fused)  # what a prompt has of that
    else:
        # products, made only once; the fused opinion, its gradient, and that of the block before
        held = M + (3 if sums.fused else 0)
        # logits, their gradient, and what comes by the weights
        each = sums.held + (3 if problem.rule == "weighted" else 2)
    whole = (B - 1) * M * K  # beside the lengths of text, which were kept
    blocks = Blocks(problem, image, held, each, whole, logarithms=not linear, linear=linear, again=True)
    given: Any = (None if x is None else columns_of(x) for x in (*results, *g_results))
    return gradients(RowSlopes(blocks, sums, bounds, *given), g_ratio, needs)


def linear_bounds(problem: Problem, sums: Sums, total: Tensor, log_target: Tensor | None) -> tuple[float, ...] | None:
    """Bounds on every opinion's ``ln(1 + v)``, if gradients can be made of v itself, without logarithms; else None.

    The row sums of the forward pass are such bounds. Of exp evidence by Dempster's rule, or where nothing is fused,
    ``dL/dz = v (G + F / (1 + v))`` with a number G for each image, the gradient with respect to v, and the fused log
    ratio's gradient F.
    """
    if not linear_space(problem, sums) or not len(total):
        return None
    largest = total if log_target is None else torch.maximum(total, log_target)
    bounds = tuple(log1p_exp(x) for x in largest.amax(0).tolist())
    return bounds if all(bound < LARGEST for bound in bounds[: problem.sizes[1]]) else None  # also for nan


class RowSlopes:
    """Gradients that arrive at the row sums, with the row sums themselves: all [opinions, B, 1] or None.

    bounds: see :func:`linear_bounds`.
    """

    def __init__(
        self, blocks: Blocks, sums: Sums, bounds: tuple[float, ...] | None, total: Tensor, *others: Tensor | None
    ) -> None:
        self.blocks, self.sums, self.bounds = blocks, sums, bounds
        self._whole = total, *others
        self._views: dict[tuple[int, int], tuple[Any, ...]] = {}
        self._factors: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def _here(self, opinions: slice, rows: slice) -> tuple[Any, ...]:
        """All of them for some opinions and images, which every block of classes asks for again."""
        key = opinions.start, rows.start
        if key not in self._views:
            self._views[key] = tuple(None if x is None else x[opinions, rows] for x in self._whole)
        return self._views[key]

    def at(self, opinions: slice, rows: slice, place: Place | None, block: Block, out: Tensor | None = None) -> Tensor:
        """Gradient [g, b, k] with respect to the values of opinions' block, ``ln v`` or ``ln(1 + v)``, into ``out``.

        That may be the block itself if only the sum of evidence is wanted.
        """
        total, log_target, log_square, g_total, g_target, g_square, g_kl = self._here(opinions, rows)
        lead = block.values
        mine = None if place is None else torch.exp(place.take(lead) - log_target).mul_(g_target)
        grad = exp_(torch.sub(lead, total, out=out)).mul_(g_total)
        if log_square is not None or self.sums.kl:
            log_alpha = block.log_alpha(self.blocks.problem.classes)
            if self.sums.kl:
                slope = kl_slope(log_alpha + self.blocks.log_w)
                grad.add_(slope.mul_(exp_(lead - log_alpha)).mul_(g_kl))
            if log_square is not None:
                log_alpha.add_(lead).sub_(log_square)
                grad.add_(exp_(log_alpha).mul_(2 * g_square))
        if place is not None and mine is not None:
            place.put(grad, mine)
        return grad

    def times(self, opinions: slice, rows: slice, place: Place | None, x: Tensor) -> Tensor:
        """x [g, b, k] times the gradient with respect to the evidence v of the same opinions, in place."""
        key = opinions.start, rows.start
        if key not in self._factors:
            total, log_target, _, g_total, g_target, *_ = self._here(opinions, rows)
            of_target = None if log_target is None else torch.exp(-log_target).mul_(g_target)
            self._factors[key] = torch.exp(-total).mul_(g_total), of_target
        factor, of_target = self._factors[key]
        if place is None or of_target is None:
            return x.mul_(factor)
        mine = place.take(x).mul_(of_target)
        place.put(x.mul_(factor), mine)
        return x


class FusedSlope(NamedTuple):
    """One block in the backward pass: every prompt's products, and the gradient of the fused log ratio, if any."""

    slopes: RowSlopes
    rows: slice
    columns: slice
    place: Place | None
    products: Tensor  # [M, b, k]
    evidence: Tensor | None  # v [M, b, k], where gradients are made of it
    groups: list[Group]
    lengths: Tensor | None
    weights: Weights
    log_ratio: Tensor | None  # [b, k], where they are made of logarithms
    grad: Tensor | None  # [1, b, k]

    @property
    def blocks(self) -> Blocks:
        return self.slopes.blocks

    def by_logits(self, group: Group, confidence: Confidence | None, g_weight: Tensor | None) -> Tensor:
        """Gradient [g, b, k] with respect to some prompts' logits; adds to ``g_weight`` [B, M]."""
        prompts, rows = group.prompts, self.rows
        if self.evidence is not None:
            return self._by_linear_logits(prompts, self.evidence[prompts])
        y, dy_dz = self.log_evidence(group)
        out = self.blocks.buffer("slopes", prompts, rows, self.columns)
        grad = self.slopes.at(prompts, rows, self.place, Block(y, LOG), out)
        if confidence is not None:
            grad.add_(confidence.at(prompts, rows, y))
        if g_weight is not None:
            g_weight[rows, prompts] += self.by_weight(y).T
        self.add_through_fusion(grad, prompts, y)
        return grad if dy_dz is None else grad.mul_(dy_dz)

    def _by_linear_logits(self, prompts: slice, v: Tensor) -> Tensor:
        """``v (G + F / (1 + v))`` in place of v [g, b, k]."""
        if self.grad is None:
            return self.slopes.times(prompts, self.rows, self.place, v)
        share = self.blocks.buffer("logits", prompts, self.rows, self.columns)
        torch.div(v, torch.add(v, 1, out=share), out=share)
        return self.slopes.times(prompts, self.rows, self.place, v).addcmul_(share, self.grad)

    def log_evidence(self, group: Group) -> tuple[Tensor, Tensor | None]:
        """``y = ln v`` [g, b, k] of some prompts, and dy/dz (None for 1)."""
        out = self.blocks.buffer("logits", group.prompts, self.rows, self.columns)
        z = self.blocks.logits(group, self.products[group.prompts], out)
        activation = self.blocks.problem.activation
        if activation == "exp":
            return z, None
        e = softplus(z) if activation == "softplus" else torch.relu(z)
        slope = torch.sigmoid(z) if activation == "softplus" else (z > 0).to(z.dtype)
        slope.div_(e.clamp_min(torch.finfo(z.dtype).tiny))
        return e.log_().sub_(self.blocks.log_w), slope

    def add_through_fusion(self, grad: Tensor, prompts: slice, y: Tensor) -> None:
        """Add to a gradient with respect to y of some prompts what comes by way of the fused opinion; uses y up."""
        if self.grad is None or self.log_ratio is None:
            return
        if self.blocks.problem.rule == "dempster":
            share = y.sigmoid_()
        else:
            share = exp_(y.sub_(self.log_ratio)).mul_(weights_at(self.weights, prompts, self.rows))
        grad.addcmul_(share, self.grad)

    def by_weight(self, y: Tensor) -> Tensor:
        """Gradient [g, b] with respect to the weights of the prompts whose ``y = ln v`` is given."""
        assert self.grad is not None and self.log_ratio is not None
        return exp_(y - self.log_ratio).mul_(self.grad).sum(-1)


def fused_slopes(slopes: RowSlopes, g_ratio: Tensor | None, weights: Weights) -> Iterator[FusedSlope]:
    """Every block again, classes outside, images inside."""
    blocks = slopes.blocks
    every, fused = slice(0, blocks.M), slice(blocks.M, blocks.M + 1)
    for columns in spans(blocks.K, blocks.columns):
        lengths = blocks.lengths(columns)
        groups = blocks.groups_at(columns, lengths)
        for rows in spans(blocks.B, blocks.rows):
            place = Place.of(slopes.sums.target, rows, columns)
            products = blocks.buffer("products", every, rows, columns)
            evidence = log_ratio = grad = None
            if slopes.bounds is not None:
                evidence = blocks.buffer("evidence", every, rows, columns)
                for group in groups:
                    product = blocks.product(group, rows, products[group.prompts])
                    blocks.exponential(blocks.logits(group, product, evidence[group.prompts]))
                if slopes.sums.fused:
                    grad = linear_fused_slope(slopes, rows, columns, place, evidence)
            else:
                fusion = Fusion(blocks, blocks.place(rows, columns)) if slopes.sums.fused else None
                for group in groups:
                    prompts = group.prompts
                    product = blocks.product(group, rows, products[prompts])
                    if fusion is not None:
                        z = blocks.logits(group, product, blocks.buffer("logits", prompts, rows, columns))
                        fusion.add(blocks.evidence(prompts, z), weights_at(weights, prompts, rows))
                if fusion is not None:
                    log_ratio = fusion.log_ratio()
                    grad = slopes.at(fused, rows, place, Block(log_ratio.unsqueeze(0), LOG1P))
            if grad is not None and g_ratio is not None:
                grad.add_(g_ratio[rows, columns])
            yield FusedSlope(
                slopes, rows, columns, place, products, evidence, groups, lengths, weights, log_ratio, grad
            )


def linear_fused_slope(slopes: RowSlopes, rows: slice, columns: slice, place: Place | None, values: Tensor) -> Tensor:
    """Gradient [1, b, k] with respect to the log ratio of evidence v [M, b, k] fused by Dempster's rule; v is kept."""
    blocks, bounds = slopes.blocks, slopes.bounds
    assert bounds is not None
    fused, fusion = slice(blocks.M, blocks.M + 1), Fusion(blocks, blocks.place(rows, columns))
    step = blocks.buffer("logits", blocks.groups[0], rows, columns)[0]
    for v, bound in zip(values.unbind(), bounds[:-1], strict=True):
        fusion.add_linear(v, bound, step)
    if fusion.log is None and fusion.linear is not None and bounds[-1] < LARGEST:
        return slopes.times(fused, rows, place, torch.add(fusion.linear, 1, out=fusion.out).unsqueeze(0))
    block = Block(fusion.log_ratio().unsqueeze(0), LOG1P)
    return slopes.at(fused, rows, place, block, block.values)


class Confidence:
    """The weighted rule's own gradient: its weights, where not given, depend on every prompt's uncertainty."""

    def __init__(self, slopes: RowSlopes, g_ratio: Tensor | None) -> None:
        log_partition = sum_prompts(slopes.blocks).total()
        weight = confidence_weight(log_partition, 1)
        self.weights = columns_of(weight)
        g_weight = torch.zeros_like(weight)
        for fused in fused_slopes(slopes, g_ratio, self.weights):
            for group in fused.groups:
                y, _ = fused.log_evidence(group)
                g_weight[fused.rows, group.prompts] += fused.by_weight(y).T
        with torch.enable_grad():
            x = log_partition.detach().requires_grad_()
            (g_log_partition,) = torch.autograd.grad(confidence_weight(x, 1), x, g_weight)
        self.log_partition, self.g_log_partition = columns_of(log_partition), columns_of(g_log_partition)

    def at(self, prompts: slice, rows: slice, y: Tensor) -> Tensor:
        """Gradient with respect to ``y = ln v`` of some prompts by way of their weights."""
        return exp_(y - self.log_partition[prompts, rows]).mul_(self.g_log_partition[prompts, rows])


def gradients(slopes: RowSlopes, g_ratio: Tensor | None, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of image, text, scale, bias and weight. Each is summed in one fixed order: deterministic."""
    blocks, problem = slopes.blocks, slopes.blocks.problem
    g_image = torch.zeros_like(blocks.image) if needs[0] else None
    # every block of classes is written first, then added to; without images nothing is
    fresh = torch.empty_like if blocks.B else torch.zeros_like
    g_text = fresh(problem.text, memory_format=torch.contiguous_format) if needs[1] else None
    g_scale = torch.zeros_like(problem.scale) if needs[2] else None
    g_bias = torch.zeros_like(problem.scale) if needs[3] else None
    g_weight = torch.zeros_like(problem.weight) if problem.weight is not None and needs[4] else None
    own_weights = problem.rule == "weighted" and problem.weight is None
    confidence = Confidence(slopes, g_ratio) if own_weights else None
    weights = fusion_weights(blocks) if confidence is None else confidence.weights
    # of text [M, k, D] for the current block of classes, but for what its length brings (where the dtype allows, inside
    # g_text), and sum_b <x_b, t> dL/dz_b [M, k], from which that follows
    g_here = along = None
    for fused in fused_slopes(slopes, g_ratio, weights):
        rows, columns, lengths = fused.rows, fused.columns, fused.lengths
        if g_text is not None and rows.start == 0:
            g_here = g_text[:, columns]
            if g_here.dtype != problem.dtype:
                g_here = torch.empty_like(g_here, dtype=problem.dtype)
            along = None if lengths is None else torch.zeros_like(lengths)
        for group in fused.groups:
            prompts = group.prompts
            grad = fused.by_logits(group, confidence, g_weight)
            if g_bias is not None:
                g_bias[prompts] += grad.sum((1, 2))
            if g_scale is not None or along is not None:
                by_class = fused.products[prompts].mul_(grad).sum(1)
                if g_scale is not None:
                    g_scale[prompts] += (by_class if lengths is None else by_class / lengths[prompts]).sum(1)
                if along is not None:
                    along[prompts] += by_class
            through_products(group, rows, grad, g_image, g_here)
        if g_text is not None and g_here is not None and rows.stop == blocks.B:
            if along is not None and lengths is not None:
                for group in fused.groups:
                    here = along[group.prompts].mul_(group.factor.squeeze(1)), lengths[group.prompts]
                    take_off_length(g_here[group.prompts], group.text.transpose(1, 2), *here)
            if g_here.dtype != g_text.dtype:
                g_text[:, columns] = g_here
    blocks.close()
    return g_image, g_text, g_scale, g_bias, g_weight


def through_products(group: Group, rows: slice, grad: Tensor, g_image: Tensor | None, g_text: Tensor | None) -> None:
    """Add what comes by the logits [g, b, k] of some prompts and images to the features' gradients; uses ``grad`` up.

    g_image: of all images; g_text [M, k, D]: of the classes at hand, which the first images write.
    """
    if g_image is None and g_text is None:
        return
    grad.mul_(group.factor)  # by <x, t>
    if g_text is not None:
        beta = 0 if rows.start == 0 else 1
        g_text[group.prompts].baddbmm_(grad.transpose(1, 2), group.image[:, rows], beta=beta)
    if g_image is not None:
        text = group.text.transpose(1, 2)
        if g_image.dim() == 2:
            g_image[rows].addbmm_(grad, text)
        else:
            g_image[rows, group.prompts].transpose(0, 1).baddbmm_(grad, text)


def take_off_length(grad: Tensor, text: Tensor, along: Tensor, lengths: Tensor) -> None:
    """Take off a gradient [g, k, D] what would change the lengths of text; along: its products with text [g, k]."""
    share = along / (lengths * lengths)
    share.mul_(lengths > EPS)  # a shorter vector is divided by the constant EPS
    grad.addcmul_(text, share.unsqueeze(-1), value=-1)
