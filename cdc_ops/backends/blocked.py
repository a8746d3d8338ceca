"""PyTorch over blocks of images and classes: nothing of size [B, M, K] exists, forward or backward.

Fusion is elementwise in the class, and everything else an opinion or its loss needs are row sums, so a block
of logits can be made, folded into the fused block and into its row's sums, and overwritten by the next
prompt's. The backward pass makes the same blocks again. Memory beyond inputs, outputs and gradients is one
block (forward) or M + 5 blocks (backward) of at most ``BLOCK_ROWS x BLOCK_COLUMNS`` numbers.

Speed on a CPU comes from three things. A block stays in the cache between the matrix product and its
epilogue. The epilogue works in place on ``v = e / W`` and multiplies prompts together, ``q <- q + v + q v``,
which needs one ``exp`` for each logit and one ``log1p`` for each class instead of a ``log1p`` for each logit; where the
product would leave the range of the dtype (known from the block's largest logit), logarithms take over.
And the text is normalised by scaling the logits, not by a normalised copy of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cdc_ops.backends import LossForm, Problem
from cdc_ops.dirichlet import RowSums, loss_from_row_sums
from cdc_ops.fusion import confidence_weight
from cdc_ops.special import kl_element, kl_slope, softplus

BLOCK_ROWS = 256
BLOCK_COLUMNS = 1024
#: Running top-k sorts every block, so it takes smaller ones.
TOPK_COLUMNS = 512
#: F.normalize's floor for a length.
EPS = 1e-12


class Block(NamedTuple):
    """Evidence of one prompt, or fused, for a block of images and classes: ``v = e / W`` or its logarithm."""

    values: Tensor
    linear: bool
    bound: float  # no ln(1 + v) of the block is larger

    def log(self) -> Tensor:
        """``ln v``."""
        return torch.log(self.values) if self.linear else self.values


class Sums(NamedTuple):
    """What the row sums leave out and which are wanted."""

    target: Tensor | None  # [B]; None: an opinion without a target
    square: bool
    kl: bool


def limit(dtype: torch.dtype) -> float:
    """Largest ln(1 + v) that is handled in linear space: far enough from overflow to sum over any K."""
    return 0.65 * math.log(torch.finfo(dtype).max)


def spans(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``total``."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


class Blocks:
    """The problem cut into blocks: makes a block of logits, and the evidence in it."""

    def __init__(self, problem: Problem, image: Tensor, columns: int) -> None:
        self.problem, self.image = problem, image
        self.B, self.M, self.K = problem.sizes
        self.rows = max(1, min(BLOCK_ROWS, self.B))
        # few images: wider blocks, so that a block is worth its overhead
        self.columns = max(1, min(self.K, columns * max(1, BLOCK_ROWS // self.rows)))
        self.limit = limit(problem.dtype)
        self.scale = [float(s) for s in problem.scale]
        self.bias = [0.0] * self.M if problem.bias is None else [float(b) for b in problem.bias]
        self.log_w = math.log(problem.prior_weight)
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """A reusable block; its content is whatever was left there."""
        if name not in self.buffers:
            self.buffers[name] = self.image.new_empty(self.rows * self.columns)
        return self.buffers[name][: rows * columns].view(rows, columns)

    def text(self, m: int, columns: slice) -> Tensor:
        """Text features of one prompt and block of classes [k, D], not normalised."""
        return self.problem.text[m, columns].to(self.problem.dtype)

    def length(self, m: int, columns: slice) -> Tensor | None:
        """Lengths [k] to divide by, or None when features are taken as they are."""
        if not self.problem.normalize:
            return None
        norm = self.problem.text_norm
        length = torch.linalg.vector_norm(self.text(m, columns), dim=-1) if norm is None else norm[m, columns]
        return length.to(self.problem.dtype).clamp_min(EPS)

    def rows_of(self, m: int, rows: slice) -> Tensor:
        """Image features of one prompt and block of images [b, D]."""
        return self.image[rows] if self.image.dim() == 2 else self.image[rows, m]

    def product(self, m: int, rows: slice, text: Tensor, name: str) -> Tensor:
        """``<x, t>`` [b, k] into the buffer ``name``."""
        x = self.rows_of(m, rows)
        return torch.matmul(x, text.T, out=self.buffer(name, x.shape[0], text.shape[0]))

    def logits(self, m: int, product: Tensor, length: Tensor | None, out: Tensor) -> Tensor:
        """``z``, or for exp evidence ``ln v = z - ln W``, into ``out``."""
        constant = self.bias[m] - (self.log_w if self.problem.activation == "exp" else 0.0)
        if length is None:
            torch.mul(product, self.scale[m], out=out)
            return out.add_(constant) if constant else out
        factor = self.scale[m] / length
        return torch.addcmul(product.new_tensor(constant), product, factor, out=out)

    def evidence(self, z: Tensor) -> Block:
        """Evidence from :meth:`logits`, in place."""
        if self.problem.activation == "exp":
            top = float(z.amax())
            bound = math.log1p(math.exp(top)) if top < 30 else top
            if bound > self.limit or math.isnan(bound):
                return Block(z, False, bound)
            return Block(z.exp_(), True, bound)
        if self.problem.activation == "softplus":
            z = torch._C._nn.softplus(z, 1, 50, out=z)
        else:
            z = z.relu_()
        z.div_(self.problem.prior_weight)
        return Block(z, True, math.log1p(float(z.amax())))


class Fusion:
    """Folds the prompts' blocks into one. Dempster multiplies ``1 + v``; the other rules add ``weight v``."""

    def __init__(self, blocks: Blocks, out: Tensor) -> None:
        self.dempster = blocks.problem.rule == "dempster"
        self.limit = blocks.limit
        self.out = out  # where the linear part is kept
        self.linear: Block | None = None
        self.log: Tensor | None = None  # ln(1 + v) for Dempster, ln v for the others

    def _add_log(self, x: Tensor) -> None:
        if self.log is None:
            self.log = x
        elif self.dempster:
            self.log.add_(x)
        else:
            torch.logaddexp(self.log, x, out=self.log)

    def _retire(self) -> None:
        """Move the linear part to the logarithmic one."""
        if self.linear is not None:
            q = self.linear.values
            self._add_log(torch.log1p(q) if self.dempster else torch.log(q))
            self.linear = None

    def add(self, block: Block, weight: Tensor | float) -> None:
        """Fold in one prompt; the block's values are used up. weight: number or [b]; Dempster ignores it."""
        v = block.values
        column = weight.unsqueeze(-1) if isinstance(weight, Tensor) else weight
        if not block.linear:
            if self.dempster:
                self._add_log(softplus(v))
            elif isinstance(column, Tensor):
                self._add_log(v + torch.log(column))
            else:
                self._add_log(v + math.log(column))
            return
        if self.dempster:
            if self.linear is not None and self.linear.bound + block.bound > self.limit:
                self._retire()
            if self.linear is None:
                self.linear = Block(self.out.copy_(v), True, block.bound)
                return
            q = self.linear.values
            torch.addcmul(v, v, q, out=v)
        else:
            if isinstance(column, Tensor) or column != 1:
                v.mul_(column)
            if self.linear is None:
                self.linear = Block(self.out.copy_(v), True, block.bound)
                return
            q = self.linear.values
        self.linear = Block(q.add_(v), True, self.linear.bound + block.bound)

    def block(self) -> Block:
        """The fused evidence."""
        if self.log is None:
            assert self.linear is not None
            return self.linear
        log = self._logarithm()
        return Block(log + torch.log(-torch.expm1(-log)) if self.dempster else log, False, math.inf)

    def _logarithm(self) -> Tensor:
        self._retire()
        assert self.log is not None
        return self.log

    def log_ratio(self) -> Tensor:
        """``l = ln(1 + v)``, in ``out``; ends the fusion."""
        if self.log is None:
            assert self.linear is not None
            return torch.log1p(self.linear.values, out=self.out)
        log = self._logarithm()
        return self.out.copy_(log if self.dempster else softplus(log))


class Accumulator:
    """Row sums [B, M + 1] over class blocks; the last column is the fused opinion's."""

    def __init__(self, blocks: Blocks, sums: Sums) -> None:
        self.K, self.log_w, self.sums = blocks.K, blocks.log_w, sums

        def column(value: float) -> Tensor:
            return blocks.image.new_full((blocks.B, blocks.M + 1), value)

        self.log_sum = column(-math.inf)
        self.log_target = column(0.0) if sums.target is not None else None
        self.log_square = column(-math.inf) if sums.square else None
        self.kl_sum = column(0.0) if sums.kl else None

    def add(self, m: int, rows: slice, columns: slice, block: Block) -> None:
        """Add one block of opinion m; the block's values are left as they were."""
        v = block.values
        place = Target.of(self.sums.target, rows, columns)
        if place is not None:
            assert self.log_target is not None
            kept = v.gather(1, place.index)
            alpha = kept + 1 / self.K if block.linear else torch.logaddexp(kept, self.uniform(kept))
            alpha = alpha.log() if block.linear else alpha
            self.log_target[rows, m] = torch.where(place.inside, alpha.squeeze(1), self.log_target[rows, m])
            nothing = 0.0 if block.linear else -math.inf
            place.put(v, torch.full_like(kept, nothing))
        here = v.sum(-1).log_() if block.linear else torch.logsumexp(v, -1)
        self.log_sum[rows, m] = torch.logaddexp(self.log_sum[rows, m], here)
        if self.log_square is not None or self.kl_sum is not None:
            log_alpha = log_alpha_of(block, self.K)
            if self.kl_sum is not None:
                share = kl_element(log_alpha + self.log_w)
                if place is not None:
                    place.put(share, torch.zeros_like(kept))
                self.kl_sum[rows, m] += share.sum(-1)
            if self.log_square is not None:
                log_alpha.mul_(2)
                if place is not None:
                    place.put(log_alpha, torch.full_like(kept, -math.inf))
                here = torch.logsumexp(log_alpha, -1)
                self.log_square[rows, m] = torch.logaddexp(self.log_square[rows, m], here)
        if place is not None:
            place.put(v, kept)

    def uniform(self, like: Tensor) -> Tensor:
        """``ln(1 / K)``."""
        return torch.full_like(like, -math.log(self.K))

    def total(self) -> Tensor:
        """``ln(sum alpha / W)`` over all classes, or over all but the target when there is one."""
        constant = 1.0 if self.sums.target is None else (self.K - 1) / self.K
        if constant == 0:
            return self.log_sum
        return torch.logaddexp(self.log_sum, torch.full_like(self.log_sum, math.log(constant)))


class Target(NamedTuple):
    """Where the targets of a block of images fall in a block of classes."""

    index: Tensor  # [b, 1], clamped into the block
    inside: Tensor  # [b]

    @classmethod
    def of(cls, target: Tensor | None, rows: slice, columns: slice) -> Target | None:
        """The targets of the rows, or None without targets."""
        if target is None:
            return None
        local = target[rows] - columns.start
        size = columns.stop - columns.start
        return cls(local.clamp(0, size - 1).unsqueeze(1), (local >= 0) & (local < size))

    def put(self, block: Tensor, value: Tensor) -> None:
        """Write ``value`` [b, 1] at the targets that are inside."""
        block.scatter_(1, self.index, torch.where(self.inside.unsqueeze(1), value, block.gather(1, self.index)))


def log_alpha_of(block: Block, classes: int) -> Tensor:
    """``ln(alpha / W) = ln(v + 1 / K)``, a new block."""
    if block.linear:
        return (block.values + 1 / classes).log_()
    return torch.logaddexp(block.values, torch.full_like(block.values, -math.log(classes)))


def fusion_weight(blocks: Blocks) -> list[Tensor | float]:
    """The rule's weight of each prompt: a number, or for the weighted rule [B] from a pass of its own."""
    rule, M = blocks.problem.rule, blocks.M
    if rule != "weighted":
        return [1 / M if rule == "averaging" else 1.0] * M
    weight = confidence_weight(prompt_log_partition(blocks), 1)
    return list(weight.unbind(1))


def prompt_log_partition(blocks: Blocks) -> Tensor:
    """``-ln u_m`` [B, M] alone."""
    accumulator = Accumulator(blocks, Sums(None, False, False))
    for columns in spans(blocks.K, blocks.columns):
        for m in range(blocks.M):
            text, length = blocks.text(m, columns), blocks.length(m, columns)
            for rows in spans(blocks.B, blocks.rows):
                product = blocks.product(m, rows, text, "logits")
                block = blocks.evidence(blocks.logits(m, product, length, product))
                accumulator.add(m, rows, columns, block)
    return accumulator.total()[:, : blocks.M]


def sweep(blocks: Blocks, sums: Sums, log_ratio: Tensor | None) -> Iterator[tuple[slice, slice, Fusion, Accumulator]]:
    """Go over all blocks once, yielding each fused block; the accumulator is complete after the last."""
    accumulator = Accumulator(blocks, sums)
    weight = fusion_weight(blocks)
    for columns in spans(blocks.K, blocks.columns):
        prompts = [(blocks.text(m, columns), blocks.length(m, columns)) for m in range(blocks.M)]
        for rows in spans(blocks.B, blocks.rows):
            size = rows.stop - rows.start, columns.stop - columns.start
            out = blocks.buffer("fused", *size) if log_ratio is None else log_ratio[rows, columns]
            fusion = Fusion(blocks, out)
            for m, (text, length) in enumerate(prompts):
                product = blocks.product(m, rows, text, "logits")
                block = blocks.evidence(blocks.logits(m, product, length, product))
                accumulator.add(m, rows, columns, block)
                w = weight[m]
                fusion.add(block, w[rows] if isinstance(w, Tensor) else w)
            accumulator.add(blocks.M, rows, columns, fusion.block())
            yield rows, columns, fusion, accumulator
    if blocks.B == 0:
        yield slice(0, 0), slice(0, 0), Fusion(blocks, blocks.buffer("fused", 0, 0)), accumulator


class RowSumsFunction(torch.autograd.Function):
    """(image, text, scale, bias) -> the row sums of :mod:`cdc_ops.dirichlet` and, if asked, log_ratio [B, K].

    image is normalised already, in the problem's dtype; everything else is as in the problem. Without a target
    the row sums are just ``-ln u``; the last column of each is the fused opinion's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        problem: Problem,
        sums: Sums,
        want_log_ratio: bool,
    ) -> tuple[Tensor | None, ...]:
        blocks = Blocks(problem, image, BLOCK_COLUMNS)
        log_ratio = image.new_empty(blocks.B, blocks.K) if want_log_ratio else None
        accumulator = None
        for _, _, fusion, accumulator in sweep(blocks, sums, log_ratio):  # noqa: B007
            if want_log_ratio and blocks.B:
                fusion.log_ratio()
        assert accumulator is not None
        total = accumulator.total()
        ctx.problem, ctx.sums, ctx.want_log_ratio = problem, sums, want_log_ratio
        results = (total, accumulator.log_target, accumulator.log_square, accumulator.kl_sum)
        ctx.save_for_backward(image, text, scale, bias, *results)
        return log_ratio, *results

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_ratio: Tensor | None, g_total: Tensor, g_target: Tensor, g_square: Tensor, g_kl: Tensor
    ) -> tuple[Tensor | None, ...]:
        image, text, scale, bias, total, log_target, log_square, _ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        problem = ctx.problem
        blocks = Blocks(problem, image, BLOCK_COLUMNS)
        slopes = RowSlopes(blocks, ctx.sums, total, log_target, log_square, g_total, g_target, g_square, g_kl)
        return (
            *gradients(blocks, slopes, g_ratio if ctx.want_log_ratio else None, needs),
            None,
            None,
            None,
        )


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

    def at(self, m: int, rows: slice, columns: slice, lead: Tensor, block: Block) -> Tensor:
        """Gradient [b, k] with respect to ``ln v`` (lead = ln v), or to ``ln(1 + v)`` (lead = ln(1 + v))."""

        def column(x: Tensor) -> Tensor:
            return x[rows, m].unsqueeze(1)

        grad = torch.exp(lead - column(self.total)).mul_(column(self.g_total))
        if self.log_square is not None or self.sums.kl:
            log_alpha = log_alpha_of(block, self.blocks.K)
            if self.sums.kl:
                assert self.g_kl is not None
                slope = kl_slope(log_alpha + self.blocks.log_w)
                grad.add_(slope.mul_(torch.exp(lead - log_alpha)).mul_(column(self.g_kl)))
            if self.log_square is not None:
                assert self.g_square is not None
                log_alpha.add_(lead).sub_(column(self.log_square))
                grad.add_(log_alpha.exp_().mul_(2 * column(self.g_square)))
        place = Target.of(self.sums.target, rows, columns)
        if place is not None:
            assert self.log_target is not None and self.g_target is not None
            mine = torch.exp(lead.gather(1, place.index) - column(self.log_target))
            place.put(grad, mine * column(self.g_target))
        return grad


def gradients(
    blocks: Blocks, slopes: RowSlopes, g_ratio: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image, text, scale and bias; blocks are made again, each gradient has one owner."""
    problem, M = blocks.problem, blocks.M
    g_image = torch.zeros_like(blocks.image) if needs[0] else None
    g_text = torch.zeros_like(problem.text, memory_format=torch.contiguous_format) if needs[1] else None
    g_scale = torch.zeros_like(problem.scale) if needs[2] else None
    g_bias = torch.zeros_like(problem.scale) if needs[3] else None
    confidence = Confidence(blocks) if problem.rule == "weighted" else None
    if confidence is not None:
        for rows, columns, fused in fused_slopes(blocks, slopes, g_ratio, confidence.weight):
            confidence.collect(rows, columns, fused)
        confidence.finish()
    weight = fusion_weight(blocks) if confidence is None else confidence.weight
    text_sum: list[Tensor] = []
    for rows, columns, fused in fused_slopes(blocks, slopes, g_ratio, weight):
        if rows.start == 0:
            text_sum = []
        for m in range(M):
            z, y, dz = fused.prompt(m)
            grad = fused.through_fusion(m, y)
            grad.add_(slopes.at(m, rows, columns, y, Block(y, False, math.inf)))
            if confidence is not None:
                grad.add_(confidence.at(m, rows, y))
            if dz is not None:
                grad.mul_(dz)
            del z
            if g_bias is not None:
                g_bias[m] += grad.sum()
            text, length = fused.text[m]
            product = fused.product[m]
            if g_scale is not None:
                cosine_sum = (product.mul_(grad)).sum(0)
                g_scale[m] += (cosine_sum if length is None else cosine_sum / length).sum()
            if g_text is not None:
                here = grad.T @ blocks.rows_of(m, rows)
                if rows.start == 0:
                    text_sum.append(here)
                else:
                    text_sum[m].add_(here)
                if rows.stop == blocks.B:
                    g_text[m, columns] = through_length(text_sum[m], text, length).mul_(blocks.scale[m])
            if g_image is not None:
                grad.mul_(blocks.scale[m]) if length is None else grad.mul_(blocks.scale[m] / length)
                if g_image.dim() == 2:
                    g_image[rows].addmm_(grad, text)
                else:
                    g_image[rows, m] += grad @ text
    return g_image, g_text, g_scale, g_bias


def through_length(grad: Tensor, text: Tensor, length: Tensor | None) -> Tensor:
    """Gradient [k, D] of normalised text to gradient of text, in place."""
    if length is None:
        return grad
    unit = text / length.unsqueeze(1)
    along = (grad * unit).sum(1).mul_(length > EPS)  # a shorter vector is divided by the constant EPS
    return grad.sub_(unit.mul_(along.unsqueeze(1))).div_(length.unsqueeze(1))


class FusedSlope(NamedTuple):
    """One block in the backward pass: the raw products of all prompts, and the gradient of the fused block."""

    blocks: Blocks
    product: list[Tensor]
    text: list[tuple[Tensor, Tensor | None]]
    weight: list[Tensor | float]
    log_ratio: Tensor
    grad: Tensor  # with respect to log_ratio

    def prompt(self, m: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits z, ``y = ln v`` and ``dy/dz`` (None for 1) of one prompt."""
        product, (_, length) = self.product[m], self.text[m]
        z = self.blocks.logits(m, product, length, self.blocks.buffer("logits", *product.shape))
        activation = self.blocks.problem.activation
        if activation == "exp":
            return z, z, None
        tiny = torch.finfo(z.dtype).tiny
        e = softplus(z) if activation == "softplus" else torch.relu(z)
        dz = (torch.sigmoid(z) if activation == "softplus" else (z > 0).to(z.dtype)).div_(e.clamp_min(tiny))
        return z, torch.log(e).sub_(self.blocks.log_w), dz

    def through_fusion(self, m: int, y: Tensor) -> Tensor:
        """Gradient with respect to y of prompt m by way of the fused opinion."""
        if self.blocks.problem.rule == "dempster":
            return torch.sigmoid(y).mul_(self.grad)
        w = self.weight[m]
        factor = torch.exp(y - self.log_ratio).mul_(self.grad)
        return factor.mul_(w.unsqueeze(1) if isinstance(w, Tensor) else w)


def fused_slopes(
    blocks: Blocks, slopes: RowSlopes, g_ratio: Tensor | None, weight: list[Tensor | float]
) -> Iterator[FusedSlopeAt]:
    """Every block with the gradient of its fused opinion; classes outside, images inside."""
    for columns in spans(blocks.K, blocks.columns):
        prompts = [(blocks.text(m, columns), blocks.length(m, columns)) for m in range(blocks.M)]
        for rows in spans(blocks.B, blocks.rows):
            size = rows.stop - rows.start, columns.stop - columns.start
            fusion = Fusion(blocks, blocks.buffer("fused", *size))
            product = []
            here = [w[rows] if isinstance(w, Tensor) else w for w in weight]
            for m, (text, length) in enumerate(prompts):
                product.append(blocks.product(m, rows, text, f"product {m}"))
                z = blocks.logits(m, product[m], length, blocks.buffer("logits", *size))
                fusion.add(blocks.evidence(z), here[m])
            # ln v is needed only for the losses that look at single classes; ln(1 + v) always
            needs_block = slopes.sums.kl or slopes.log_square is not None
            log_v = fusion.block().log().clone() if needs_block else fusion.out
            log_ratio = fusion.log_ratio()
            grad = slopes.at(blocks.M, rows, columns, log_ratio, Block(log_v, False, math.inf))
            if g_ratio is not None:
                grad.add_(g_ratio[rows, columns])
            yield rows, columns, FusedSlope(blocks, product, prompts, here, log_ratio, grad)


FusedSlopeAt = tuple[slice, slice, FusedSlope]


class Confidence:
    """The weighted rule's own gradient: its weights depend on every prompt's uncertainty."""

    def __init__(self, blocks: Blocks) -> None:
        self.log_partition = prompt_log_partition(blocks)
        self.weight: list[Tensor | float] = list(confidence_weight(self.log_partition, 1).unbind(1))
        self.g_weight = torch.zeros_like(self.log_partition)
        self.g_log_partition = self.g_weight

    def collect(self, rows: slice, columns: slice, fused: FusedSlope) -> None:
        """First pass: the gradient of each prompt's weight is a row sum."""
        for m in range(self.log_partition.shape[1]):
            _, y, _ = fused.prompt(m)
            self.g_weight[rows, m] += torch.exp(y - fused.log_ratio).mul_(fused.grad).sum(1)

    def finish(self) -> None:
        """From the weights to ``-ln u_m``."""
        with torch.enable_grad():
            x = self.log_partition.detach().requires_grad_()
            (self.g_log_partition,) = torch.autograd.grad(confidence_weight(x, 1), x, self.g_weight)

    def at(self, m: int, rows: slice, y: Tensor) -> Tensor:
        """Gradient with respect to ``y = ln v`` of prompt m by way of its weight."""
        log_partition = self.log_partition[rows, m].unsqueeze(1)
        return torch.exp(y - log_partition).mul_(self.g_log_partition[rows, m].unsqueeze(1))


def prepared_image(problem: Problem) -> Tensor:
    """Image features in the problem's dtype, normalised if asked; differentiable."""
    x = problem.image.to(problem.dtype)
    return F.normalize(x, dim=-1, eps=EPS) if problem.normalize else x


def fused_opinion(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`cdc_ops.backends`."""
    log_ratio, total, *_ = RowSumsFunction.apply(
        prepared_image(problem),
        problem.text,
        problem.scale,
        problem.bias,
        problem,
        Sums(None, False, False),
        True,
    )
    M = problem.sizes[1]
    return log_ratio, total[:, M], total[:, :M]


def fused_topk(problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`cdc_ops.backends`; a running top-k over blocks of classes."""
    blocks = Blocks(problem, prepared_image(problem), TOPK_COLUMNS)
    B, M, _ = problem.sizes
    best = [blocks.image.new_empty(0, k)] * len(list(spans(B, blocks.rows)))
    classes = [torch.empty(0, k, dtype=torch.long, device=blocks.image.device)] * len(best)
    accumulator = None
    for rows, columns, fusion, accumulator in sweep(blocks, Sums(None, False, False), None):
        if B == 0:
            break
        i = rows.start // blocks.rows
        values, index = fusion.log_ratio().topk(min(k, columns.stop - columns.start), dim=-1)
        index += columns.start
        if columns.start:
            values, index = torch.cat([best[i], values], 1), torch.cat([classes[i], index], 1)
            values, order = values.topk(min(k, values.shape[1]), dim=-1)
            index = index.gather(1, order)
        best[i], classes[i] = values, index
    assert accumulator is not None
    total = accumulator.total()
    if B == 0:
        empty = blocks.image.new_empty(0, k)
        return empty.long(), empty, total[:, M], total[:, :M]
    return torch.cat(classes), torch.cat(best), total[:, M], total[:, :M]


def evidential_loss(problem: Problem, target: Tensor, loss: LossForm) -> Tensor:
    """See :mod:`cdc_ops.backends`."""
    _, M, K = problem.sizes
    sums = Sums(target, loss.form == "mse", loss.kl_weight != 0)
    _, total, log_target, log_square, kl_sum = RowSumsFunction.apply(
        prepared_image(problem), problem.text, problem.scale, problem.bias, problem, sums, False
    )
    rows = RowSums(log_target, total, log_square, kl_sum)
    each = loss_from_row_sums(rows, K, problem.prior_weight, loss.form, loss.kl_weight)
    return loss.prompt_weight * each[:, :M].sum(1) + loss.fused_weight * each[:, M]
