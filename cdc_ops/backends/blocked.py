"""PyTorch over blocks of images and classes: nothing of size [B, M, K] exists, forward or backward.

Fusion is elementwise in the class, and everything else an opinion or its loss needs are row sums, so a block
of logits can be made, folded into the fused block and into its row's sums, and overwritten by the next
prompts'. The backward pass makes such blocks again. Memory beyond inputs, outputs and gradients is two to four blocks
forward, up to three more for each prompt in log space or for an activation, and M + 9 backward; for each prompt 4 more
for squares, 17 for the KL term.
The more a pass holds at once, the fewer classes a block gets: all of them together stay below [B, M, K], those of
fused_topk below [B, K] (as long as K is a few hundred, so that K numbers are more than the row sums of an image, and
but for the KL term of one prompt, whose blocks of 64 classes may hold more).

Speed on a CPU comes from three things. A block stays in the cache between the matrix product and its
epilogue. Prompts are multiplied together in linear space, one ``exp`` for each logit and one ``log1p`` for each class
instead of a ``log1p`` for each logit; where that would leave the range of the dtype, which the block's largest
logit tells, logarithms take over. And text is normalised by scaling its logits, not by making a normalised
copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cdc_ops.backends import LossForm, Problem, loss_from_sums, refuse_second_derivatives
from cdc_ops.backends.blocks import EPS, LOG, LOG1P, Block, Blocks, Fusion, Group, exp_, spans
from cdc_ops.dirichlet import RowSums
from cdc_ops.fusion import confidence_weight
from cdc_ops.special import kl_element, kl_slope, softplus

Weights = list[Tensor | float]  # of each prompt in the fusion: a number, or [B, 1]
ONE = slice(0, 1)


class Sums(NamedTuple):
    """Which row sums are wanted; with a target they leave the target out."""

    target: Tensor | None  # [B]
    square: bool = False
    kl: bool = False

    @property
    def held(self) -> int:
        """How many blocks :meth:`Accumulator.add` has at once while it makes them."""
        return 17 if self.kl else 4 if self.square else 0


class Place(NamedTuple):
    """Where the targets of a block of images fall in a block of classes."""

    position: Tensor  # [b, 1], clamped into the block
    inside: Tensor  # [b, 1]

    @classmethod
    def of(cls, target: Tensor | None, rows: slice, columns: slice) -> Place | None:
        """The targets of the rows, or None without targets."""
        if target is None:
            return None
        local = target[rows].unsqueeze(1) - columns.start
        size = columns.stop - columns.start
        return cls(local.clamp(0, size - 1), (local >= 0) & (local < size))

    def take(self, block: Tensor) -> Tensor:
        """The values [..., b, 1] at the positions."""
        return block.gather(-1, self.position.expand(*block.shape[:-1], 1))

    def put(self, block: Tensor, value: Tensor | float) -> None:
        """Write a number, or [..., b, 1], at the targets that are inside."""
        old = self.take(block)
        value = value if isinstance(value, Tensor) else torch.full_like(old, value)
        block.scatter_(-1, self.position.expand_as(old), torch.where(self.inside, value, old))


class Accumulator:
    """Row sums of M + 1 opinions over blocks of classes; the last is the fused opinion."""

    def __init__(self, blocks: Blocks, sums: Sums) -> None:
        self.blocks, self.sums = blocks, sums
        # of every kind that is asked for, [g, b] by first opinion and first image
        self.parts: dict[str, dict[tuple[int, int], Tensor]] = {}

    def add(self, opinions: slice, rows: slice, columns: slice, block: Block) -> None:
        """Add a block of opinions, [g, b, k] or of one [b, k]; its values are left as they were."""

        def put(kind: str, here: Tensor, plus: Callable[[Tensor, Tensor], Tensor]) -> None:
            parts, key = self.parts.setdefault(kind, {}), (opinions.start, rows.start)
            here = here.view(-1, here.shape[-1])
            parts[key] = plus(parts[key], here) if key in parts else here

        classes = self.blocks.problem.classes
        place = Place.of(self.sums.target, rows, columns)
        if place is not None:
            kept = place.take(block.values)
            mine = Block(kept, block.kind).log_alpha(classes)
            put("log_target", torch.where(place.inside, mine, 0.0).squeeze(-1), torch.add)
            place.put(block.values, block.nothing)
        put("log_sum", block.log_sum(), torch.logaddexp)
        if self.sums.square or self.sums.kl:
            log_alpha = block.log_alpha(classes)
            if self.sums.kl:
                share = kl_element(log_alpha + self.blocks.log_w)
                if place is not None:
                    place.put(share, 0.0)
                put("kl_sum", share.sum(-1), torch.add)
            if self.sums.square:
                log_alpha.mul_(2)
                if place is not None:
                    place.put(log_alpha, -math.inf)
                put("log_square", torch.logsumexp(log_alpha, -1), torch.logaddexp)
        if place is not None:
            place.put(block.values, kept)

    def _whole(self, kind: str) -> Tensor:
        """The row sums of one kind [opinions, B]."""
        parts = self.parts.get(kind)
        if parts is None:  # no images
            return self.blocks.image.new_empty(self.blocks.M + 1, 0)
        opinions, images = (sorted(set(starts)) for starts in zip(*parts, strict=True))
        whole = [torch.cat([parts[first, row] for first in opinions]) for row in images]
        return whole[0] if len(whole) == 1 else torch.cat(whole, 1)

    def total(self) -> Tensor:
        """log_rest [B, opinions]: ``ln(sum_k v_k + (K - 1) / K)``, and ``ln(sum_k v_k + 1) = -ln u`` without a target.

        Evidence is that of the classes at hand; the prior is always that of all.
        """
        log_sum, classes = self._whole("log_sum"), self.blocks.problem.classes
        if self.sums.target is None:
            return softplus(log_sum).T
        if classes == 1:
            return log_sum.T
        constant = math.log((classes - 1) / classes)
        return softplus(log_sum - constant).add_(constant).T

    def results(self) -> tuple[Tensor | None, ...]:
        """log_rest (or ``-ln u``), log_target, log_square and kl_sum, each [B, M + 1] or None."""
        asked = (self.sums.target is not None, self.sums.square, self.sums.kl)
        others = zip(asked, ("log_target", "log_square", "kl_sum"), strict=True)
        return self.total(), *(self._whole(kind).T if wanted else None for wanted, kind in others)


def fusion_weights(blocks: Blocks) -> Weights:
    """The rule's weight of each prompt; for the weighted rule from a pass over all blocks."""
    rule, weight, M = blocks.problem.rule, blocks.problem.weight, blocks.M
    if rule != "weighted":
        return [1 / M if rule == "averaging" else 1.0] * M
    return as_weights(confidence_weight(sum_prompts(blocks), 1) if weight is None else weight)


def as_weights(weight: Tensor) -> Weights:
    """[B, M] as one column for each prompt."""
    return list(weight.unsqueeze(-1).unbind(1))


def weights_at(weights: Weights, rows: slice) -> Weights:
    """The weights of a block of images."""
    return [w[rows] if isinstance(w, Tensor) else w for w in weights]


def sum_prompts(blocks: Blocks) -> Tensor:
    """``-ln u_m`` [B, M] alone."""
    accumulator = Accumulator(blocks, Sums(None))
    for columns in spans(blocks.K, blocks.columns):
        for group in blocks.groups_at(columns, blocks.lengths(columns)):
            for rows in spans(blocks.B, blocks.rows):
                z = blocks.product(group, rows, blocks.buffer("logits", group.prompts, rows, columns))
                block = blocks.evidence(group.prompts, blocks.logits(group, z, z))
                accumulator.add(group.prompts, rows, columns, block)
    return accumulator.total()[:, : blocks.M]


def sweep(
    blocks: Blocks, accumulator: Accumulator, log_ratio: Tensor | None = None
) -> Iterator[tuple[slice, slice, Fusion]]:
    """Once over all blocks, classes outside, images inside; the accumulator is complete after the last."""
    weights = fusion_weights(blocks)
    fused = slice(blocks.M, blocks.M + 1)
    for columns in spans(blocks.K, blocks.columns):
        groups = blocks.groups_at(columns, blocks.lengths(columns))
        for rows in spans(blocks.B, blocks.rows):
            out = blocks.buffer("fused", ONE, rows, columns)[0] if log_ratio is None else log_ratio[rows, columns]
            fusion = Fusion(blocks, out)
            here = weights_at(weights, rows)
            for group in groups:
                prompts = group.prompts
                product = blocks.product(group, rows, blocks.buffer("logits", prompts, rows, columns))
                # evidence of a first prompt by itself is made where the fused evidence will be
                z = blocks.logits(group, product, out.unsqueeze(0) if prompts == ONE else product)
                block = blocks.evidence(prompts, z)
                accumulator.add(prompts, rows, columns, block)
                fusion.add(block, here[prompts])
            accumulator.add(fused, rows, columns, fusion.block())
            yield rows, columns, fusion


def row_sums(image: Tensor, problem: Problem, sums: Sums, want_log_ratio: bool) -> tuple[Tensor | None, ...]:
    """The row sums of :mod:`cdc_ops.dirichlet`, and log_ratio [B, K] if asked.

    image is normalised already, in the problem's dtype. Without a target the row sums are just ``-ln u``. The
    last column of each is the fused opinion's.
    """
    held = 0 if want_log_ratio else 1
    blocks = Blocks(problem, image, held, 1 + sums.held, math.prod(problem.sizes))
    log_ratio = image.new_empty(blocks.B, blocks.K) if want_log_ratio else None
    accumulator = Accumulator(blocks, sums)
    for _, _, fusion in sweep(blocks, accumulator, log_ratio):
        if want_log_ratio:
            fusion.log_ratio()
    blocks.close()
    return log_ratio, *accumulator.results()


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
        log_ratio, *results = row_sums(image, problem, sums, want_log_ratio)
        ctx.problem, ctx.sums, ctx.want_log_ratio = problem, sums, want_log_ratio
        # text, scale, bias and weight are read through the problem; saving them guards against changes in place
        ctx.save_for_backward(image, text, scale, bias, weight, *results[:3])
        return log_ratio, *results

    @staticmethod
    def backward(
        ctx: Any, g_ratio: Tensor | None, g_total: Tensor, g_target: Tensor, g_square: Tensor, g_kl: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("backend='blocked' has", "; use backend='reference'")
        image, _, _, _, _, total, log_target, log_square = ctx.saved_tensors
        held = ctx.problem.sizes[1] + 7 + ctx.sums.held  # every prompt's products, to be made only once
        blocks = Blocks(ctx.problem, image, held, 1, math.prod(ctx.problem.sizes), logarithms=True)
        slopes = RowSlopes(blocks, ctx.sums, total, log_target, log_square, g_total, g_target, g_square, g_kl)
        g_ratio = g_ratio if ctx.want_log_ratio else None
        return *gradients(blocks, slopes, g_ratio, ctx.needs_input_grad), None, None, None


class RowSlopes(NamedTuple):
    """Gradients that arrive at the row sums, with the row sums themselves: all [B, M + 1] or None."""

    blocks: Blocks
    sums: Sums
    total: Tensor
    log_target: Tensor | None
    log_square: Tensor | None
    g_total: Tensor
    g_target: Tensor | None
    g_square: Tensor | None
    g_kl: Tensor | None

    def at(self, m: int, rows: slice, columns: slice, block: Block) -> Tensor:
        """Gradient [b, k] with respect to the block's values, ``ln v`` or ``ln(1 + v)``."""

        def column(x: Tensor) -> Tensor:
            return x[rows, m].unsqueeze(1)

        lead = block.values
        grad = exp_(lead - column(self.total)).mul_(column(self.g_total))
        if self.log_square is not None or self.sums.kl:
            log_alpha = block.log_alpha(self.blocks.problem.classes)
            if self.sums.kl:
                assert self.g_kl is not None
                slope = kl_slope(log_alpha + self.blocks.log_w)
                grad.add_(slope.mul_(exp_(lead - log_alpha)).mul_(column(self.g_kl)))
            if self.log_square is not None:
                assert self.g_square is not None
                log_alpha.add_(lead).sub_(column(self.log_square))
                grad.add_(exp_(log_alpha).mul_(2 * column(self.g_square)))
        place = Place.of(self.sums.target, rows, columns)
        if place is not None:
            assert self.log_target is not None and self.g_target is not None
            mine = torch.exp(place.take(lead) - column(self.log_target))
            place.put(grad, mine * column(self.g_target))
        return grad


class FusedSlope(NamedTuple):
    """One block in the backward pass: every prompt's products, and the gradient of the fused log ratio."""

    blocks: Blocks
    rows: slice
    columns: slice
    products: Tensor  # [M, b, k]
    prompts: list[Group]  # each by itself
    lengths: Tensor | None
    weights: Weights
    log_ratio: Tensor
    grad: Tensor

    def prompt(self, m: int) -> tuple[Tensor, Tensor | None]:
        """``y = ln v`` of one prompt, and dy/dz (None for 1)."""
        one = self.prompts[m]
        out = self.blocks.buffer("logits", ONE, self.rows, self.columns)
        z = self.blocks.logits(one, self.products[one.prompts], out)[0]
        activation = self.blocks.problem.activation
        if activation == "exp":
            return z, None
        e = softplus(z) if activation == "softplus" else torch.relu(z)
        slope = torch.sigmoid(z) if activation == "softplus" else (z > 0).to(z.dtype)
        slope.div_(e.clamp_min(torch.finfo(z.dtype).tiny))
        return e.log_().sub_(self.blocks.log_w), slope

    def through_fusion(self, m: int, y: Tensor) -> Tensor:
        """Gradient with respect to y of prompt m by way of the fused opinion."""
        if self.blocks.problem.rule == "dempster":
            return torch.sigmoid(y).mul_(self.grad)
        return exp_(y - self.log_ratio).mul_(self.grad).mul_(self.weights[m])

    def by_weight(self, y: Tensor) -> Tensor:
        """Gradient [b] with respect to the weight of the prompt whose ``y = ln v`` is given."""
        return exp_(y - self.log_ratio).mul_(self.grad).sum(1)


def fused_slopes(blocks: Blocks, slopes: RowSlopes, g_ratio: Tensor | None, weights: Weights) -> Iterator[FusedSlope]:
    """Every block again, classes outside, images inside."""
    for columns in spans(blocks.K, blocks.columns):
        lengths = blocks.lengths(columns)
        groups = blocks.groups_at(columns, lengths)
        each = [one for group in groups for one in group.each()]
        for rows in spans(blocks.B, blocks.rows):
            products = blocks.buffer("products", slice(0, blocks.M), rows, columns)
            fusion = Fusion(blocks, blocks.buffer("fused", ONE, rows, columns)[0])
            here = weights_at(weights, rows)
            for group in groups:
                prompts = group.prompts
                product = blocks.product(group, rows, products[prompts])
                z = blocks.logits(group, product, blocks.buffer("logits", prompts, rows, columns))
                fusion.add(blocks.evidence(prompts, z), here[prompts])
            log_ratio = fusion.log_ratio()
            grad = slopes.at(blocks.M, rows, columns, Block(log_ratio, LOG1P))
            if g_ratio is not None:
                grad.add_(g_ratio[rows, columns])
            yield FusedSlope(blocks, rows, columns, products, each, lengths, here, log_ratio, grad)


class Confidence:
    """The weighted rule's own gradient: its weights, where not given, depend on every prompt's uncertainty."""

    def __init__(self, blocks: Blocks, slopes: RowSlopes, g_ratio: Tensor | None) -> None:
        self.log_partition = sum_prompts(blocks)
        weight = confidence_weight(self.log_partition, 1)
        self.weights = as_weights(weight)
        g_weight = torch.zeros_like(weight)
        for fused in fused_slopes(blocks, slopes, g_ratio, self.weights):
            for m in range(blocks.M):
                y, _ = fused.prompt(m)
                g_weight[fused.rows, m] += fused.by_weight(y)
        with torch.enable_grad():
            x = self.log_partition.detach().requires_grad_()
            (self.g_log_partition,) = torch.autograd.grad(confidence_weight(x, 1), x, g_weight)

    def at(self, m: int, rows: slice, y: Tensor) -> Tensor:
        """Gradient with respect to ``y = ln v`` of prompt m by way of its weight."""
        grad = exp_(y - self.log_partition[rows, m].unsqueeze(1))
        return grad.mul_(self.g_log_partition[rows, m].unsqueeze(1))


def gradients(
    blocks: Blocks, slopes: RowSlopes, g_ratio: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of image, text, scale, bias and weight. Each is summed in one fixed order: deterministic."""
    problem = blocks.problem
    g_image = torch.zeros_like(blocks.image) if needs[0] else None
    g_text = torch.zeros_like(problem.text, memory_format=torch.contiguous_format) if needs[1] else None
    g_scale = torch.zeros_like(problem.scale) if needs[2] else None
    g_bias = torch.zeros_like(problem.scale) if needs[3] else None
    g_weight = torch.zeros_like(problem.weight) if problem.weight is not None and needs[4] else None
    own_weights = problem.rule == "weighted" and problem.weight is None
    confidence = Confidence(blocks, slopes, g_ratio) if own_weights else None
    weights = fusion_weights(blocks) if confidence is None else confidence.weights
    # of normalised text [k, D] for the current block of classes; where the dtype allows, inside g_text
    g_unit: list[Tensor] = []
    for fused in fused_slopes(blocks, slopes, g_ratio, weights):
        rows, columns = fused.rows, fused.columns
        if rows.start == 0:
            g_unit = text_sums(g_text, fused.prompts, columns)
        for m, one in enumerate(fused.prompts):
            y, dy_dz = fused.prompt(m)
            grad = slopes.at(m, rows, columns, Block(y, LOG)).add_(fused.through_fusion(m, y))
            if confidence is not None:
                grad.add_(confidence.at(m, rows, y))
            if g_weight is not None:
                g_weight[rows, m] += fused.by_weight(y)
            if dy_dz is not None:
                grad.mul_(dy_dz)
            text, images = one.text[0].T, one.image[0, rows]
            length = None if fused.lengths is None else fused.lengths[m]
            if g_bias is not None:
                g_bias[m] += grad.sum()
            if g_scale is not None:
                by_class = fused.products[m].mul_(grad).sum(0)
                g_scale[m] += (by_class if length is None else by_class.div_(length)).sum()
            if g_text is not None:
                g_unit[m].addmm_(grad.T, images)
                if rows.stop == blocks.B:
                    mine = through_length(g_unit[m], text, length).mul_(problem.scale[m])
                    if mine.dtype != g_text.dtype:
                        g_text[m, columns] = mine
            if g_image is not None:
                grad.mul_(one.factor[0])
                mine = g_image[rows] if g_image.dim() == 2 else g_image[rows, m]
                mine.addmm_(grad, text)
    blocks.close()
    return g_image, g_text, g_scale, g_bias, g_weight


def text_sums(g_text: Tensor | None, prompts: list[Group], columns: slice) -> list[Tensor]:
    """Zeros [k, D] for each prompt to sum the gradient of its text in: part of g_text, unless in half precision."""
    if g_text is None:
        return []
    if g_text.dtype == prompts[0].text.dtype:
        return list(g_text[:, columns].unbind())
    return [torch.zeros_like(one.text[0].T) for one in prompts]


def through_length(grad: Tensor, text: Tensor, length: Tensor | None) -> Tensor:
    """Gradient [k, D] of normalised text to gradient of text, in place."""
    if length is None:
        return grad
    along = torch.linalg.vecdot(grad, text).div_(length * length)
    along.mul_(length > EPS)  # a shorter vector is divided by the constant EPS
    return grad.addcmul_(text, along.unsqueeze(1), value=-1).div_(length.unsqueeze(1))


def prepared_image(problem: Problem) -> Tensor:
    """Image features in the problem's dtype, normalised if asked; differentiable."""
    x = problem.image.to(problem.dtype)
    if not problem.normalize:
        return x
    if problem.image_norm is None or (torch.is_grad_enabled() and x.requires_grad):
        return F.normalize(x, dim=-1, eps=EPS)
    return x / problem.image_norm.to(x.dtype).clamp_min(EPS).unsqueeze(-1)


def differentiable_row_sums(problem: Problem, sums: Sums, want_log_ratio: bool) -> tuple[Any, ...]:
    """:func:`row_sums`, recorded by autograd where a gradient will be asked for."""
    image, inputs = prepared_image(problem), (problem.text, problem.scale, problem.bias, problem.weight)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (image, *inputs)):
        return RowSumsFunction.apply(image, *inputs, problem, sums, want_log_ratio)  # type: ignore[no-any-return]
    with torch.no_grad():
        return row_sums(image, problem, sums, want_log_ratio)


def fused_opinion(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`cdc_ops.backends`."""
    M = problem.sizes[1]
    log_ratio, total, *_ = differentiable_row_sums(problem, Sums(None), True)
    return log_ratio, total[:, M], total[:, :M]


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
    return loss_from_sums(loss_sums(problem, target, loss), problem, loss)


def prompt_log_partition(problem: Problem) -> Tensor:
    """See :mod:`cdc_ops.backends`; of whatever rule needs no weights, for it is not looked at."""
    _, total, *_ = differentiable_row_sums(replace(problem, rule="cumulative"), Sums(None), False)
    return total[:, :-1]


def loss_sums(problem: Problem, target: Tensor, loss: LossForm) -> RowSums:
    """See :mod:`cdc_ops.backends`."""
    _, total, log_target, *others = differentiable_row_sums(problem, Sums(target, loss.square, loss.kl), False)
    return RowSums(log_target, total, *others)
