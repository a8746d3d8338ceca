"""Blocks of images and classes: how the blocked backend makes evidence and folds prompts together, in place.

A block is at most ``BLOCK_ROWS`` images by about ``BLOCK_COLUMNS`` classes, small enough to stay in a core's cache from
the matrix product to the last row sum; or by all classes, where a loss makes its gradients along with itself. Two
prompts' blocks are made at once where there is room: half of the threads then multiplies for each of them, which is
faster than all of them cutting up one small product, and makes fewer calls.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cdc_ops.backends import Problem
from cdc_ops.special import log_alpha_ratio, map_constants, softplus

BLOCK_ROWS = 256
BLOCK_COLUMNS = 1024
#: Below this a block is not worth its overhead, nor its memory worth saving.
LEAST_COLUMNS = 64
#: Numbers that all blocks together may hold in any case (4 MB in float32): cutting up less saves nobody anything.
FLOOR = 2**20
#: Numbers that blocks of all classes may hold at most (32 MB in float32): larger ones gain nothing.
CEILING = 2**23
#: Where there is room for fewer images, blocks of all classes are not worth it: narrow ones twice take no longer.
LEAST_ROWS = 64
#: A row of a block holds whole vectors (and cache lines) of the CPU, which its matrix products like.
VECTOR = 16
LOG2_E = math.log2(math.e)
#: F.normalize's floor for a length.
EPS = 1e-12

#: A block kept between calls: touching fresh memory costs a CPU more than any step of the epilogue.
_idle: dict[torch.dtype, Tensor] = {}

LINEAR, LOG, LOG1P = "v", "ln v", "ln(1 + v)"


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which takes its time to find nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def exp_(x: Tensor) -> Tensor:
    """``exp`` in place, never below the smallest normal number: subnormal numbers cost a CPU a hundredfold."""
    return x.clamp_(min=math.log(torch.finfo(x.dtype).tiny) + 1e-3).exp_()


def exp2_(x: Tensor) -> Tensor:
    """``2^x`` in place, likewise."""
    return x.clamp_(min=math.log2(torch.finfo(x.dtype).tiny) + 1e-3).exp2_()


class Block(NamedTuple):
    """Evidence of prompts, or fused, [..., b, k]: values are ``v = e / W``, ``ln v`` or ``ln(1 + v)``."""

    values: Tensor
    kind: str
    bound: float = math.inf  # no ln(1 + v) of the block is larger

    @property
    def nothing(self) -> float:
        """The value that stands for no evidence."""
        return -math.inf if self.kind == LOG else 0.0

    def log_sum(self, spare: Tensor | None = None) -> Tensor:
        """``ln sum_k v_k`` [..., b]; spare: a block that may be written to."""
        x = self.values
        if self.kind == LINEAR:
            return x.sum(-1).log_()
        if self.kind == LOG:
            return torch.logsumexp(x, -1)
        top = x.amax(-1, keepdim=True)
        if x.shape[-1] * math.exp(-float(top.amin())) < 0.05:
            # every row holds much evidence: the K ones of sum exp(l) - K can be taken off afterwards
            ones = x.shape[-1] * torch.exp(-top.squeeze(-1))
            return exp_(torch.sub(x, top, out=spare)).sum(-1).sub_(ones).log_().add_(top.squeeze(-1))
        shift = (top - 30).clamp_min_(0)
        total = torch.sub(x, shift, out=spare).expm1_().sub_(torch.expm1(-shift)).sum(-1)
        return total.log_() + shift.squeeze(-1)

    def log_alpha(self, classes: int) -> Tensor:
        """``ln(alpha / W) = ln(v + 1 / K)``, a new block."""
        if self.kind == LINEAR:
            return (self.values + 1 / classes).log_()
        if self.kind == LOG:
            return torch.logaddexp(self.values, torch.full_like(self.values, -math.log(classes)))
        return log_alpha_ratio(self.values, classes)


def spans(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``total``."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def even_step(total: int, most: int) -> int:
    """A step of at most ``most`` (but for rounding) whose spans of ``total`` are of one size, but for the last."""
    step = math.ceil(total / math.ceil(total / most))
    return min(total, math.ceil(step / VECTOR) * VECTOR)


class Cut(NamedTuple):
    """How a problem is cut: images and classes of a block, and the prompts whose blocks are made at once."""

    rows: int
    columns: int
    groups: tuple[slice, ...]


@functools.lru_cache
def cut(B: int, M: int, K: int, held: int, each: int, whole: int) -> Cut:
    """The largest blocks that stay below ``whole`` numbers together, or ``FLOOR``; no narrower than is worth it."""
    whole = max(whole, FLOOR)
    rows = max(1, min(BLOCK_ROWS, B))
    # few images: wider blocks, so that each is worth its overhead
    most = BLOCK_COLUMNS * (BLOCK_ROWS // rows)

    def room(prompts: int) -> int:
        return 4 * whole // (5 * ((held + each * prompts) * rows + 6 * M))

    def columns(prompts: int) -> int:
        return even_step(K, min(most, max(LEAST_COLUMNS, room(prompts))))

    def products(prompts: int) -> int:
        return math.ceil(M / prompts) * math.ceil(K / columns(prompts))

    choices, large = [1], 2 * BLOCK_ROWS * BLOCK_COLUMNS
    if M >= 2 and room(2) >= min(K, LEAST_COLUMNS):
        choices.append(2)
    if M * rows * K <= large and room(M) >= K:
        choices.append(M)
    together = min(choices, key=products)
    return Cut(rows, columns(together), tuple(spans(M, together)))


@functools.lru_cache
def cut_of_all_classes(B: int, M: int, K: int, held: int) -> Cut | None:
    """Blocks of all classes, ``held`` of them below [B, M, K] or ``FLOOR`` together; None if of too few images."""
    most = min(BLOCK_ROWS, min(9 * max(B * M * K, FLOOR) // 10, CEILING) // (held * K))
    if most < min(B, LEAST_ROWS) or B == 0:
        return None
    return Cut(math.ceil(B / math.ceil(B / most)), K, tuple(spans(M, min(M, 2))))


class Group(NamedTuple):
    """Prompts whose blocks are made at once, and what they bring to a block of classes."""

    prompts: slice
    image: Tensor  # [g, B, D] of all images
    text: Tensor  # [g, D, k], not normalised
    factor: Tensor  # [g, 1, k] that <x, t> is multiplied by to give z
    constant: Tensor  # [g, 1, 1] that is added then


class Reach(NamedTuple):
    """How far evidence goes, by numbers alone: |cos| <= 1 bounds the logits of normalised features."""

    limit: float  # largest ln(1 + v) kept in linear space: a row sum of these cannot overflow
    known_bounds: tuple[float, ...] | None  # on each prompt's ln(1 + v), if they rule overflow out
    may_underflow: bool  # exp of a logit


@functools.lru_cache
def reach(
    scale: tuple[float, ...], bias: tuple[float, ...] | None, activation: str, prior_weight: float, terms: int,
    dtype: torch.dtype, normalize: bool,
) -> Reach:  # fmt: skip
    """The reach of prompts with these scales and biases; terms: of the sums that must not overflow."""
    # log1p of more than 1e38 (float64: 1e307) is inf with a SLEEF of before November 2024 (its issue 473)
    limit = math.log(torch.finfo(dtype).max) - math.log(terms) - 3
    if not normalize:
        return Reach(limit, None, True)
    exp = activation == "exp"
    subtracted = math.log(prior_weight) if exp else 0.0
    bounds, may_underflow = [], False
    for size, c in zip(map(abs, scale), bias or (0.0,) * len(scale), strict=True):
        top = size + c - subtracted
        bounds.append(log1p_exp(top) if exp else math.log1p((max(top, 0) + 1) / prior_weight))
        may_underflow |= c - subtracted - size < math.log(torch.finfo(dtype).tiny) + 1
    return Reach(limit, tuple(bounds) if sum(bounds) < limit else None, may_underflow)


class Blocks:
    """A problem cut into blocks, with the buffers they are made in.

    ``held``: how many blocks a pass has at once beside its prompts' logits, and ``each``: how many for each prompt
    whose evidence is made, logits included, when it is made in linear space; with the lengths and factors of
    their classes they stay below ``whole`` numbers. ``logarithms``: whether a pass uses logits, not only evidence;
    ``linear``: whether it makes evidence in linear space only; ``again``: whether a backward pass will make it again.
    ``chosen``: a cut that all ``held`` blocks fit.

    On a CPU a block is a millisecond's work and every PyTorch call a few microseconds, so views are made once.
    """

    def __init__(
        self,
        problem: Problem,
        image: Tensor,
        held: int,
        each: int,
        whole: int,
        *,
        logarithms: bool = False,
        linear: bool = False,
        again: bool = False,
        chosen: Cut | None = None,
    ) -> None:
        self.problem, self.image = problem, image
        map_constants(os.getpid())
        self.B, self.M, self.K = problem.sizes
        self.log_w = math.log(problem.prior_weight)
        numbers = tuple(problem.scale.tolist()), None if problem.bias is None else tuple(problem.bias.tolist())
        terms = self.K * (self.M if problem.rule == "cumulative" else 1)
        self.limit, self.known_bounds, self.may_underflow = reach(
            *numbers, problem.activation, problem.prior_weight, terms, problem.dtype, problem.normalize
        )
        #: exp evidence that stays in linear space is made of powers of 2: a CPU has them in half the time. But their
        #: logits are rounded in another way, and a backward pass that makes large ones again needs the same numbers
        powers = self.known_bounds is not None or (linear and not again)
        self.binary = problem.activation == "exp" and not logarithms and powers
        #: what a logit is multiplied by
        self.unit = LOG2_E if self.binary else 1.0
        if chosen is None and (problem.activation != "exp" or self.known_bounds is None):
            # an activation, or a step in log space, makes blocks of its own
            held, each = held + 1, each if linear else each + 3
        self.rows, self.columns, self.groups = chosen or cut(self.B, self.M, self.K, held, each, whole)
        n, subtracted = len(self.groups), self.log_w if problem.activation == "exp" else 0.0
        if problem.bias is None:
            self._constants = (problem.scale.new_full((1, 1, 1), -subtracted * self.unit),) * n
        else:
            self._constants = (problem.bias - subtracted).mul_(self.unit).view(-1, 1, 1).chunk(n)
        each_image = image.expand(self.M, *image.shape) if image.dim() == 2 else image.transpose(0, 1)
        self._images = each_image.chunk(n)
        self._memory: dict[str, Tensor] = {}
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        # popping from a dict is atomic: no two threads, and no two problems in one thread, share a block
        self._spare = _idle.pop(problem.dtype, None) if image.device.type == "cpu" else None
        if chosen is not None:  # then all of them are taken at once, to be left for the next call if they are not large
            size = held * (self.rows * self.columns + VECTOR)
            if self._spare is None or self._spare.numel() < size:
                self._spare = None
                self._spare = image.new_empty(size)
        self._kept = self._spare

    def close(self, keep: bool = True) -> None:
        """Hand a block back for the next call, or nothing."""
        usable = [
            x for x in (self._kept, self._memory.get("logits"))
            if type(x) is Tensor and x.device.type == "cpu" and not x.is_inference() and x.numel() <= FLOOR
        ]  # fmt: skip
        if keep and usable:
            _idle.clear()  # one block at most outlives a call
            _idle[self.problem.dtype] = max(usable, key=Tensor.numel)
        self._spare = self._kept = None
        self._memory.clear()
        self._buffers.clear()

    def buffer(self, name: str, *place: slice) -> Tensor:
        """Reusable blocks [g, b, k] for prompts, images and classes; they hold whatever was left there."""
        sizes = tuple([part.stop - part.start for part in place])
        key = name, sizes
        if key not in self._buffers:
            size = math.prod(sizes)
            if name not in self._memory or self._memory[name].numel() < size:
                self._memory[name] = self._take(size)  # the first block is the largest
            self._buffers[key] = self._memory[name][:size].view(sizes)
        return self._buffers[key]

    def _take(self, size: int) -> Tensor:
        """Memory that an earlier call left, as far as it goes, then new memory.

        In whole cache lines: a library's products of the same numbers elsewhere in a line differ in their last bits.
        """
        if self._spare is None or self._spare.numel() < size:
            return self.image.new_empty(size)
        taken, self._spare = self._spare[:size], self._spare[math.ceil(size / VECTOR) * VECTOR :]
        return taken

    def classes(self, x: Tensor, columns: slice) -> Tensor:
        """Classes of x [M, K, ...]."""
        return x if self.columns == self.K else x[:, columns]

    def lengths(self, columns: slice) -> Tensor | None:
        """Lengths [M, k] that text is to be divided by, or None when features are taken as they are."""
        if not self.problem.normalize:
            return None
        norm = self.problem.text_norm
        if norm is not None:
            return as_dtype(self.classes(norm, columns), self.problem.dtype).clamp_min(EPS)
        text = self.classes(self.problem.text, columns)
        return torch.linalg.vector_norm(text, dim=-1, dtype=self.problem.dtype).clamp_min_(EPS)

    def groups_at(self, columns: slice, lengths: Tensor | None) -> list[Group]:
        """Every group, for a block of classes whose lengths are given."""
        text = as_dtype(self.classes(self.problem.text, columns), self.problem.dtype).transpose(1, 2)
        scale, n = self.problem.scale.view(-1, 1, 1), len(self.groups)
        # without lengths written out: PyTorch vectorises a row, not a broadcast number
        factor = scale.repeat(1, 1, text.shape[2]) if lengths is None else scale / lengths.unsqueeze(1)
        return list(map(Group, self.groups, self._images, text.chunk(n), factor.chunk(n), self._constants))

    def product(self, group: Group, rows: slice, out: Tensor) -> Tensor:
        """``<x, t>`` [g, b, k] into ``out``."""
        return torch.bmm(group.image if self.rows == self.B else group.image[:, rows], group.text, out=out)

    def logits(self, group: Group, product: Tensor, out: Tensor) -> Tensor:
        """Logits z (for exp evidence ``ln v = z - ln W``), times the unit, from products [g, b, k], into ``out``."""
        return torch.addcmul(group.constant, product, group.factor, value=self.unit, out=out)

    def place(self, rows: slice, columns: slice, whole: Tensor | None = None) -> Tensor:
        """Where a fused block [b, k] is made: in the whole [B, K], or in a buffer."""
        if whole is None:
            return self.buffer("fused", slice(0, 1), rows, columns)[0]
        return whole if whole.shape == (rows.stop - rows.start, columns.stop - columns.start) else whole[rows, columns]

    def exponential(self, z: Tensor) -> Tensor:
        """``v`` of exp evidence from :meth:`logits`, in place."""
        if self.binary:
            return exp2_(z) if self.may_underflow else z.exp2_()
        return exp_(z) if self.may_underflow else z.exp_()

    def evidence(self, prompts: slice, z: Tensor) -> Block:
        """Evidence from :meth:`logits`, in place."""
        known = None if self.known_bounds is None else max(self.known_bounds[prompts])
        if self.problem.activation == "exp":
            bound = log1p_exp(float(z.amax())) if known is None else known
            if not bound < self.limit:  # also for nan
                return Block(z, LOG, bound)
            return Block(self.exponential(z), LINEAR, bound)
        e = softplus(z) if self.problem.activation == "softplus" else z.relu_()
        bound = math.log1p(float(e.amax()) / self.problem.prior_weight) if known is None else known
        if not bound < self.limit:
            return Block(e.log_().sub_(self.log_w), LOG, bound)
        return Block(e.div_(self.problem.prior_weight), LINEAR, bound)


def log1p_exp(x: float) -> float:
    """``ln(1 + exp(x))`` of a number."""
    return x if x > 40 else math.log1p(math.exp(x))


class Fusion:
    """Folds one prompt after another into one block. Dempster multiplies ``1 + v``, the other rules add ``weight v``.

    As long as nothing can overflow, the product is kept as ``q = prod (1 + v) - 1`` by ``q <- q + v + q v``, exact
    for tiny evidence too. What would overflow is moved into a second part kept as a logarithm.
    """

    def __init__(self, blocks: Blocks, out: Tensor, spare: Tensor | None = None) -> None:
        self.dempster = blocks.problem.rule == "dempster"
        # bounds that are known for every prompt rule out that all of them together overflow
        self.limit = blocks.limit if blocks.known_bounds is None else math.inf
        self.out = out  # [b, k] where the linear part will be
        self.spare = spare  # where the logarithmic part will be, or None for new memory
        self.linear: Tensor | None = None
        self.bound = 0.0  # no ln(1 + v) of the linear part is larger
        self.log: Tensor | None = None  # ln(1 + v) for Dempster, ln v for the others

    def add(self, block: Block, weights: Tensor | float) -> None:
        """Fold in blocks [g, b, k], whose values are used up. weights: [g, b, 1] or a number; Dempster has none."""
        if block.kind == LINEAR:
            values = block.values if self.dempster else block.values.mul_(weights)
            for v in values.unbind():
                self.add_linear(v, block.bound)
        elif self.dempster:
            self._add_logs(softplus(block.values))
        else:
            self._add_logs(block.values + (weights.log() if isinstance(weights, Tensor) else math.log(weights)))
        self.keep()

    def add_linear(self, v: Tensor, bound: float, step: Tensor | None = None) -> None:
        """Fold in evidence [b, k], weighted already; used up, unless there is a block ``step`` to work in."""
        if self.dempster and self.bound + bound >= self.limit:
            self._retire()
        if self.linear is None:
            self.linear, self.bound = v, bound
            return
        more = torch.addcmul(v, v, self.linear, out=v if step is None else step) if self.dempster else v
        self.linear, self.bound = torch.add(self.linear, more, out=self.out), self.bound + bound

    def keep(self) -> None:
        """Move a linear part that still lies in the prompts' blocks to where it stays."""
        if self.linear is not None and self.linear.data_ptr() != self.out.data_ptr():
            self.linear = self.out.copy_(self.linear)

    def _add_logs(self, logs: Tensor) -> None:
        for x in logs.unbind():
            if self.log is None:
                self.log = x
            elif self.dempster:
                self.log.add_(x)
            else:
                torch.logaddexp(self.log, x, out=self.log)

    def _retire(self) -> None:
        """Move the linear part into the logarithmic one."""
        if self.linear is None:
            return
        free = self.spare if self.log is None else self.out  # what becomes the logarithmic part stays
        log = torch.log1p(self.linear, out=free) if self.dempster else torch.log(self.linear, out=free)
        self._add_logs(log.unsqueeze(0))
        self.linear = None

    def block(self) -> Block:
        """The fused evidence [b, k]."""
        if self.log is None and self.linear is not None:
            return Block(self.linear, LINEAR, self.bound)
        self._retire()
        assert self.log is not None
        return Block(self.log, LOG1P if self.dempster else LOG)

    def log_ratio(self) -> Tensor:
        """``l = ln(1 + v)`` [b, k], in ``out``; ends the fusion."""
        if self.linear is not None and (self.dempster or self.log is None):
            log_ratio = torch.log1p(self.linear, out=self.out)
            return log_ratio if self.log is None else log_ratio.add_(self.log)
        self._retire()
        assert self.log is not None
        return self.out.copy_(self.log if self.dempster else softplus(self.log))
