"""Row sums over blocks of classes, and the fused log ratio: the forward pass of the blocked backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cdc_ops.backends import Problem
from cdc_ops.backends.blocks import LINEAR, LOG1P, Block, Blocks, Fusion, spans
from cdc_ops.fusion import confidence_weight
from cdc_ops.special import kl_element, softplus

Weights = Tensor | float  # of the prompts in the fusion: [M, B, 1], or one number
ONE = slice(0, 1)


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

    def cut(self, block: Tensor, value: float = 0.0) -> Tensor:
        """The values [..., b, 1] at the positions; a number takes their place for targets that are inside."""
        kept = self.take(block)
        block.scatter_(-1, self.position.expand_as(kept), kept.masked_fill(self.inside, value))
        return kept

    def put(self, block: Tensor, value: Tensor) -> None:
        """Write values [..., b, 1] at the targets that are inside."""
        old = self.take(block)
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
            kept = place.cut(block.values, block.nothing)
            mine = Block(kept, block.kind).log_alpha(classes)
            put("log_target", torch.where(place.inside, mine, 0.0).squeeze(-1), torch.add)
        if self.linear:
            put("sum", block.values.sum(-1), torch.add)
        else:
            put("log_sum", block.log_sum(), torch.logaddexp)
        if self.sums.square or self.sums.kl:
            log_alpha = block.log_alpha(classes)
            if self.sums.kl:
                share = kl_element(log_alpha + self.blocks.log_w)
                if place is not None:
                    place.cut(share)
                put("kl_sum", share.sum(-1), torch.add)
            if self.sums.square:
                log_alpha.mul_(2)
                if place is not None:
                    place.cut(log_alpha, -math.inf)
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
            fusion = Fusion(blocks, blocks.place(rows, columns, log_ratio)) if fused else None
            place = Place.of(target, rows, columns)
            sums, kept = [], []
            for group in groups:
                product = blocks.product(group, rows, blocks.buffer("logits", group.prompts, rows, columns))
                to = product if fusion is None or group.prompts != ONE else fusion.out.unsqueeze(0)
                values = blocks.exponential(blocks.logits(group, product, to))
                if place is not None:
                    kept.append(place.cut(values))
                sums.append(values.sum(-1))
                if known:
                    bounds = [0.0] * len(values)
                else:
                    whole = sums[-1] if place is None else sums[-1] + kept[-1].squeeze(-1)
                    bounds = whole.amax(-1).log1p_().tolist()
                if not all(bound < blocks.limit for bound in bounds):  # also for nan
                    return None
                if fusion is not None:
                    for v, bound in zip(values.unbind(), bounds, strict=True):
                        fusion.add_linear(v, bound)
                    fusion.keep()
            total = torch.cat(sums)
            prompts[rows.start] = total if columns.start == 0 else prompts[rows.start].add_(total)
            if fusion is not None:
                if fusion.log is not None:
                    here = Block(fusion.log_ratio(), LOG1P).log_sum(spare=fusion.log)
                else:
                    here = fusion.out.sum(-1) if known else fusion.out.sum(-1).log_()
                    if log_ratio is not None:
                        fusion.log_ratio()
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
