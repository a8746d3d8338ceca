"""PyTorch over blocks of images and classes: nothing of size [B, M, K] exists, forward or backward.

Fusion is elementwise in the class, and everything else an opinion or its loss needs are row sums, so a block
of logits can be made, folded into the fused block and into its row's sums, and overwritten by the next
prompts'. The backward pass makes such blocks again. Memory beyond inputs, outputs and gradients is, in blocks: forward
one for each prompt at hand, of which there are two (or all, where the whole problem is small), and one for the fused
opinion unless it is the output; backward 2 M + 1, and one for each prompt at hand. Where gradients are made of
logarithms, backward M + 3, and 2 for each prompt at hand, or 3 for the weighted rule. A loss that needs no opinion but
the prompts', as that of a single prompt, makes no fused one, forward or backward. In log space, or for an activation,
one more and 3 more for each prompt at hand, with squares 4, for the KL term 17.
The more a pass holds at once, the fewer classes a block gets: all of them together stay below [B, M, K], those of
fused_topk below [B, K] (as long as K is a few hundred, so that K numbers are more than the row sums of an image, and
but for the KL term of one prompt, whose blocks of 64 classes may hold more).

Speed on a CPU comes from four things. A block stays in the cache between the matrix product and its
epilogue. Two prompts are multiplied at once, one by each half of the threads. They are fused in linear space: one
exponential for each logit, a power of 2, and one ``log1p`` for each class instead of a ``log1p`` for each logit; where
that would leave the range of the dtype, which the features' lengths, the block's largest logit or its row sums tell,
logarithms take over; likewise backward, where each logit takes the same exponential and a division. And text is normalised by scaling its logits, not by making a normalised copy.
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
from cdc_ops.backends.blocks import (
    EPS,
    LINEAR,
    LOG,
    LOG1P,
    Block,
    Blocks,
    Fusion,
    Group,
    as_dtype,
    exp_,
    log1p_exp,
    spans,
)
from cdc_ops.dirichlet import RowSums
from cdc_ops.fusion import confidence_weight
from cdc_ops.special import kl_element, kl_slope, softplus

Weights = Tensor | float  # of the prompts in the fusion: [M, B, 1], or one number
ONE = slice(0, 1)
#: Opinions whose ``ln(1 + v)`` stays below this have gradients in linear space: neither v nor 1 / sum v nears the ends
#: of float32.
LARGEST = 60.0


class Sums(NamedTuple):
    """Which row sums are wanted; with a target they leave the target out."""

    target: Tensor | None  # [B]
    square: bool = False
    kl: bool = False
    fused: bool = True  # of the fused opinion too, not of the prompts' alone

    @property
    def held(self) -> int:
        """How many blocks :meth:`Accumulator.add` has at once while it makes them."""
        return 17 if self.kl else 4 if self.square else 0


ALONE = Sums(None, fused=False)  # -ln u of the prompts


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

    def cut(self, block: Tensor) -> Tensor:
        """The values [..., b, 1] at the positions, which are 0 then for targets that are inside."""
        kept = self.take(block)
        block.scatter_(-1, self.position.expand_as(kept), kept.masked_fill(self.inside, 0.0))
        return kept

    def put(self, block: Tensor, value: Tensor | float) -> None:
        """Write a number, or [..., b, 1], at the targets that are inside."""
        old = self.take(block)
        value = value if isinstance(value, Tensor) else torch.full_like(old, value)
        block.scatter_(-1, self.position.expand_as(old), torch.where(self.inside, value, old))


class Accumulator:
    """Row sums of the prompts' opinions over blocks of classes, and last of the fused opinion if that is wanted."""

    def __init__(self, blocks: Blocks, sums: Sums) -> None:
        self.blocks, self.sums = blocks, sums
        # then every block is in linear space, and no sum over all classes can overflow
        self.linear = blocks.known_bounds is not None
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
        if self.linear:
            put("sum", block.values.sum(-1), torch.add)
        else:
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
            return self.blocks.image.new_empty(self.blocks.M + self.sums.fused, 0)
        opinions, images = (sorted(set(starts)) for starts in zip(*parts, strict=True))
        whole = [torch.cat([parts[first, row] for first in opinions]) for row in images]
        return whole[0] if len(whole) == 1 else torch.cat(whole, 1)

    def total(self) -> Tensor:
        """log_rest [B, opinions]: ``ln(sum_k v_k + (K - 1) / K)``, and ``ln(sum_k v_k + 1) = -ln u`` without a target.

        Evidence is that of the classes at hand; the prior is always that of all.
        """
        total = self._whole("sum" if self.linear else "log_sum")
        return log_rest(total, self.blocks.problem.classes, self.sums.target is not None, log=not self.linear).T

    def results(self) -> tuple[Tensor | None, ...]:
        """log_rest (or ``-ln u``), log_target, log_square and kl_sum, each [B, opinions] or None."""
        asked = (self.sums.target is not None, self.sums.square, self.sums.kl)
        others = zip(asked, ("log_target", "log_square", "kl_sum"), strict=True)
        return self.total(), *(self._whole(kind).T if wanted else None for wanted, kind in others)


def log_rest(total: Tensor, classes: int, without_target: bool, log: bool) -> Tensor:
    """``ln(x + (K - 1) / K)`` of the evidence x without the target, or ``ln(x + 1)`` of all; total: x or ``ln x``."""
    if not without_target:
        return softplus(total) if log else total.log1p_()
    if classes == 1:
        return total if log else total.log_()
    if not log:
        return total.sub_(1 / classes).log1p_()
    constant = math.log((classes - 1) / classes)
    return softplus(total - constant).add_(constant)


def fusion_weights(blocks: Blocks) -> Weights:
    """The rule's weight of each prompt; for the weighted rule from a pass over all blocks."""
    rule, weight = blocks.problem.rule, blocks.problem.weight
    if rule != "weighted":
        return 1 / blocks.M if rule == "averaging" else 1.0
    return columns_of(confidence_weight(sum_prompts(blocks).total(), 1) if weight is None else weight)


def columns_of(x: Tensor) -> Tensor:
    """[B, M], a number for each image and prompt, as [M, B, 1]."""
    return x.T.unsqueeze(-1)


def weights_at(weights: Weights, prompts: slice, rows: slice) -> Weights:
    """The weights of some prompts for a block of images."""
    return weights[prompts, rows] if isinstance(weights, Tensor) else weights


def sum_prompts(blocks: Blocks, sums: Sums = ALONE) -> Accumulator:
    """Row sums of the prompts' opinions alone."""
    accumulator = Accumulator(blocks, sums)
    for columns in spans(blocks.K, blocks.columns):
        for group in blocks.groups_at(columns, blocks.lengths(columns)):
            for rows in spans(blocks.B, blocks.rows):
                z = blocks.product(group, rows, blocks.buffer("logits", group.prompts, rows, columns))
                block = blocks.evidence(group.prompts, blocks.logits(group, z, z))
                accumulator.add(group.prompts, rows, columns, block)
    return accumulator


def sweep(
    blocks: Blocks, accumulator: Accumulator, log_ratio: Tensor | None = None
) -> Iterator[tuple[slice, slice, Fusion]]:
    """Once over all blocks, classes outside, images inside; the accumulator is complete after the last."""
    weights = fusion_weights(blocks)
    fused = slice(blocks.M, blocks.M + 1)
    for columns in spans(blocks.K, blocks.columns):
        groups = blocks.groups_at(columns, blocks.lengths(columns))
        for rows in spans(blocks.B, blocks.rows):
            out = blocks.place(rows, columns, log_ratio)
            fusion = Fusion(blocks, out)
            for group in groups:
                prompts = group.prompts
                product = blocks.product(group, rows, blocks.buffer("logits", prompts, rows, columns))
                # evidence of a first prompt by itself is made where the fused evidence will be
                z = blocks.logits(group, product, out.unsqueeze(0) if prompts == ONE else product)
                block = blocks.evidence(prompts, z)
                accumulator.add(prompts, rows, columns, block)
                fusion.add(block, weights_at(weights, prompts, rows))
            accumulator.add(fused, rows, columns, fusion.block())
            yield rows, columns, fusion


def linear_space(problem: Problem, sums: Sums) -> bool:
    """Whether the row sums and their gradients can be made without logarithms, unless evidence is too large."""
    return problem.activation == "exp" and (problem.rule == "dempster" or not sums.fused) and not sums.held


def linear_sums(
    blocks: Blocks, target: Tensor | None, fused: bool, log_ratio: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """log_rest (or ``-ln u``) and log_target, [B, opinions], of exp evidence by Dempster's rule; None on overflow.

    What :func:`sweep` makes too, in fewer calls and without the lines that choose them: a CPU's product has pushed
    those out of the cache, and to run them takes some per cent of its time. Row sums, which are needed anyway, bound
    the evidence. Where the product over all prompts could overflow, as at CLIP's scale of 100, what it has come to
    becomes a logarithm and the product begins anew. A target's evidence is taken out of every prompt, so that it is in
    no sum, and fused apart.

    fused: whether the last opinion is the fused one; log_ratio [B, K]: where to write its log ratio, if that is wanted.
    """
    known = blocks.known_bounds is not None  # then nothing overflows
    classes = blocks.problem.classes
    prompts: dict[int, Tensor] = {}  # sum_k v_k [M, b] by the first of the images
    last: dict[int, Tensor] = {}  # of the fused opinion [b]; a logarithm, if not known
    targets: dict[int, Tensor] = {}  # log_target [opinions, b]
    for columns in spans(blocks.K, blocks.columns):
        groups = blocks.groups_at(columns, blocks.lengths(columns))
        for rows in spans(blocks.B, blocks.rows):
            out = blocks.place(rows, columns, log_ratio) if fused else None
            place = Place.of(target, rows, columns)
            q, log, reached, sums, kept = None, None, 0.0, [], []
            for group in groups:
                product = blocks.product(group, rows, blocks.buffer("logits", group.prompts, rows, columns))
                to = product if out is None or group.prompts != ONE else out.unsqueeze(0)
                values = blocks.exponential(blocks.logits(group, product, to))
                if place is not None:
                    kept.append(place.cut(values))
                sums.append(values.sum(-1))
                if known:
                    bounds = [0.0] * len(values)
                else:
                    whole = sums[-1] if place is None else sums[-1] + kept[-1].squeeze(-1)
                    bounds = whole.amax(-1).log1p_().tolist()
                for v, bound in zip(values.unbind(), bounds, strict=True):
                    if not bound < blocks.limit:  # also for nan
                        return None
                    if out is None:
                        continue
                    reached += bound  # no ln(1 + q) is larger
                    if q is not None and reached >= blocks.limit:
                        log = blocks.log1p_(q.clone(), False) if log is None else log.add_(blocks.log1p_(q, False))
                        q, reached = out.copy_(v), bound
                    else:
                        q = v if q is None else torch.add(q, v.addcmul_(v, q), out=out)
            total = torch.cat(sums)
            prompts[rows.start] = total if columns.start == 0 else prompts[rows.start].add_(total)
            if out is not None:
                here = out.sum(-1)
                if log_ratio is not None or log is not None:
                    blocks.log1p_(out, idle=True)
                if log is not None:
                    here = Block(out.add_(log), LOG1P).log_sum(spare=log)
                elif not known:
                    here.log_()
                before = last.get(rows.start)
                last[rows.start] = here if before is None else (torch.add if known else torch.logaddexp)(here, before)
            if place is not None:
                v = torch.cat(kept)
                lead = Block(v, LINEAR).log_alpha(classes)
                if fused:
                    lead = torch.cat([lead, Block(v.log1p_().sum(0, keepdim=True), LOG1P).log_alpha(classes)])
                here = lead.masked_fill_(~place.inside, 0.0).squeeze(-1)
                targets[rows.start] = here if columns.start == 0 else targets[rows.start].add_(here)
    if not prompts:  # no images
        nothing = blocks.image.new_empty(0, blocks.M + fused)
        return nothing, None if target is None else nothing
    apart = target is not None
    total = log_rest(side_by_side(prompts), classes, apart, log=False)
    if fused:
        total = torch.cat([total, log_rest(side_by_side(last), classes, apart, log=not known).unsqueeze(0)])
    return total.T, side_by_side(targets).T if apart else None


def side_by_side(parts: dict[int, Tensor]) -> Tensor:
    """Results [..., b] for one block of images after the other as [..., B]."""
    first, *others = parts.values()
    return torch.cat([first, *others], -1) if others else first


def row_sums(
    image: Tensor, problem: Problem, sums: Sums, want_log_ratio: bool, again: bool = False
) -> tuple[Tensor | None, ...]:
    """The row sums of :mod:`cdc_ops.dirichlet`, and log_ratio [B, K] if asked.

    image is normalised already, in the problem's dtype. Without a target the row sums are just ``-ln u``. The
    last column of each is the fused opinion's, if that is wanted. again: whether a backward pass will follow.
    """
    held, whole = int(sums.fused and not want_log_ratio), math.prod(problem.sizes)
    B, _, K = problem.sizes
    log_ratio = image.new_empty(B, K) if want_log_ratio else None
    if linear_space(problem, sums):
        blocks = Blocks(problem, image, held, 1, whole, linear=True, again=again)
        made = linear_sums(blocks, sums.target, sums.fused, log_ratio)
        blocks.close(keep=made is not None)  # the sweep's blocks are smaller
        if made is not None:
            return log_ratio, *made, None, None
    blocks = Blocks(problem, image, held, 1 + sums.held, whole)
    if not sums.fused:
        results = sum_prompts(blocks, sums).results()
        blocks.close()
        return None, *results
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
        log_ratio, *results = row_sums(image, problem, sums, want_log_ratio, again=True)
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
        problem, sums = ctx.problem, ctx.sums
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
        row_sums = (total, log_target, log_square, g_total, g_target, g_square, g_kl)
        given: Any = (None if x is None else columns_of(x) for x in row_sums)
        slopes = RowSlopes(blocks, sums, bounds, *given)
        g_ratio = g_ratio if ctx.want_log_ratio else None
        return *gradients(blocks, slopes, g_ratio, ctx.needs_input_grad), None, None, None


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


def fused_slopes(blocks: Blocks, slopes: RowSlopes, g_ratio: Tensor | None, weights: Weights) -> Iterator[FusedSlope]:
    """Every block again, classes outside, images inside."""
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
    fused, out = slice(blocks.M, blocks.M + 1), blocks.place(rows, columns)
    step = blocks.buffer("logits", blocks.groups[0], rows, columns)[0]
    q, reached, log = values[0], bounds[0], None
    for v, bound in zip(values[1:].unbind(), bounds[1:-1], strict=True):
        if reached + bound < blocks.limit:
            q, reached = torch.add(q, torch.addcmul(v, v, q, out=step), out=out), reached + bound
            continue
        part = blocks.log1p_(q.clone(), idle=True)
        q, reached, log = v, bound, part if log is None else log.add_(part)
    if log is None and bounds[-1] < LARGEST:
        return slopes.times(fused, rows, place, torch.add(q, 1, out=out).unsqueeze(0))
    log_ratio = blocks.log1p_(out.copy_(q) if q is not out else q, idle=True)
    if log is not None:
        log_ratio.add_(log)
    block = Block(log_ratio.unsqueeze(0), LOG1P)
    return slopes.at(fused, rows, place, block, block.values)


class Confidence:
    """The weighted rule's own gradient: its weights, where not given, depend on every prompt's uncertainty."""

    def __init__(self, blocks: Blocks, slopes: RowSlopes, g_ratio: Tensor | None) -> None:
        log_partition = sum_prompts(blocks).total()
        weight = confidence_weight(log_partition, 1)
        self.weights = columns_of(weight)
        g_weight = torch.zeros_like(weight)
        for fused in fused_slopes(blocks, slopes, g_ratio, self.weights):
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


def gradients(
    blocks: Blocks, slopes: RowSlopes, g_ratio: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of image, text, scale, bias and weight. Each is summed in one fixed order: deterministic."""
    problem = blocks.problem
    g_image = torch.zeros_like(blocks.image) if needs[0] else None
    # every block of classes is written first, then added to; without images nothing is
    fresh = torch.empty_like if blocks.B else torch.zeros_like
    g_text = fresh(problem.text, memory_format=torch.contiguous_format) if needs[1] else None
    g_scale = torch.zeros_like(problem.scale) if needs[2] else None
    g_bias = torch.zeros_like(problem.scale) if needs[3] else None
    g_weight = torch.zeros_like(problem.weight) if problem.weight is not None and needs[4] else None
    own_weights = problem.rule == "weighted" and problem.weight is None
    confidence = Confidence(blocks, slopes, g_ratio) if own_weights else None
    weights = fusion_weights(blocks) if confidence is None else confidence.weights
    # of text [M, k, D] for the current block of classes, but for what its length brings (where the dtype allows, inside
    # g_text), and sum_b <x_b, t> dL/dz_b [M, k], from which that follows
    g_here = along = None
    for fused in fused_slopes(blocks, slopes, g_ratio, weights):
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
            if g_here is not None or g_image is not None:
                grad.mul_(group.factor)  # by <x, t>
            if g_here is not None:
                beta = 0 if rows.start == 0 else 1
                g_here[prompts].baddbmm_(grad.transpose(1, 2), group.image[:, rows], beta=beta)
            if g_image is not None:
                text = group.text.transpose(1, 2)
                if g_image.dim() == 2:
                    g_image[rows].addbmm_(grad, text)
                else:
                    g_image[rows, prompts].transpose(0, 1).baddbmm_(grad, text)
        if g_text is not None and g_here is not None and rows.stop == blocks.B:
            if along is not None and lengths is not None:
                for group in fused.groups:
                    here = along[group.prompts].mul_(group.factor.squeeze(1)), lengths[group.prompts]
                    take_off_length(g_here[group.prompts], group.text.transpose(1, 2), *here)
            if g_here.dtype != g_text.dtype:
                g_text[:, columns] = g_here
    blocks.close()
    return g_image, g_text, g_scale, g_bias, g_weight


def take_off_length(grad: Tensor, text: Tensor, along: Tensor, lengths: Tensor) -> None:
    """Take off a gradient [g, k, D] what would change the lengths of text; along: its products with text [g, k]."""
    share = along / (lengths * lengths)
    share.mul_(lengths > EPS)  # a shorter vector is divided by the constant EPS
    grad.addcmul_(text, share.unsqueeze(-1), value=-1)


def prepared_image(problem: Problem) -> Tensor:
    """Image features in the problem's dtype, normalised if asked; differentiable."""
    x = as_dtype(problem.image, problem.dtype)
    if not problem.normalize:
        return x
    if problem.image_norm is None or (torch.is_grad_enabled() and x.requires_grad):
        return F.normalize(x, dim=-1, eps=EPS)
    return x / as_dtype(problem.image_norm, x.dtype).clamp_min(EPS).unsqueeze(-1)


def differentiable_row_sums(problem: Problem, sums: Sums, want_log_ratio: bool) -> tuple[Any, ...]:
    """:func:`row_sums`, recorded by autograd where a gradient will be asked for."""
    if not sums.fused and problem.rule == "weighted":
        problem = replace(problem, rule="cumulative", weight=None)  # nothing is fused, so no weights need be made
    image, inputs = prepared_image(problem), (problem.text, problem.scale, problem.bias, problem.weight)
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
    return loss_from_sums(loss_sums(problem, target, loss), problem, loss)


def prompt_log_partition(problem: Problem) -> Tensor:
    """See :mod:`cdc_ops.backends`."""
    _, total, *_ = differentiable_row_sums(problem, ALONE, False)
    return total


def loss_sums(problem: Problem, target: Tensor, loss: LossForm) -> RowSums:
    """See :mod:`cdc_ops.backends`."""
    sums = Sums(target, loss.square, loss.kl, loss.needs_fused(problem))
    _, total, log_target, *others = differentiable_row_sums(problem, sums, False)
    return RowSums(log_target, total, *others)
