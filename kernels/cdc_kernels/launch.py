"""Launchers: from checked tensors to the kernels of :mod:`cdc_kernels.fused_opinion`. No autograd here."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from cdc_kernels import configs
from cdc_kernels.configs import INTERPRETER, Config
from cdc_kernels.decoupling import decoupling_backward_kernel, decoupling_forward_kernel
from cdc_kernels.fused_opinion import finish_kernel, forward_kernel, image_kernel, text_kernel
from cdc_kernels.fusion import fuse_backward_kernel, fuse_forward_kernel
from cdc_kernels.row_loss import row_loss_kernel
from cdc_kernels.special import NOTHING

#: The loss's backward pass makes the fused log ratio again, for so many numbers (16 MB) of it at a time.
RATIO_NUMBERS = 2**22
#: The running top-k looks at so many classes at a time, and never at more than a quarter of them.
TOPK_COLUMNS = 4096
FINISH_ROWS, FINISH_TILES = 32, 32
FUSE_BLOCK = 1024
LOSS_BLOCK = 128
#: A class's text features are held in registers by one program: at most so many numbers.
DECOUPLING_NUMBERS = 16384


@dataclass(frozen=True)
class Inputs:
    """What every kernel of the family reads.

    image [B, D] or [B, M, D] and text [M, K, D] of one dtype; float32: scale and bias [M], inverse lengths [B]
    or [B, M] and [M, K] or None (features taken as they are), weight [B, M] of the weighted rule; target [B].
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    image_inverse: Tensor | None
    text_inverse: Tensor | None
    weight: Tensor | None
    target: Tensor | None
    activation: str
    rule: str
    prior_weight: float
    square: bool = False
    kl: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, M, K, D."""
        M, K, D = self.text.shape
        return self.image.shape[0], M, K, D

    def kind(self, kernel: str) -> str:
        """The kind of configuration a kernel needs."""
        return f"{kernel}_kl" if self.kl else kernel


def unit_last(x: Tensor) -> Tensor:
    """x with features next to each other in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@dataclass
class Call:
    """The arguments the kernels share, by name."""

    tensors: dict[str, Any]
    sizes: dict[str, int]
    numbers: dict[str, float]
    flags: dict[str, Any]
    interpreted: bool

    @classmethod
    def of(cls, i: Inputs) -> Call:
        """From inputs; what is absent becomes a flag and a pointer nobody follows."""
        B, M, K, D = i.sizes
        x, t, dummy = unit_last(i.image), unit_last(i.text), i.scale
        interpreted = configs.interpreted(forward_kernel)
        xi = dummy if i.image_inverse is None else i.image_inverse
        per_prompt = x.dim() == 3
        rule_share = -math.log(M) if i.rule == "averaging" else 0.0
        tf32 = x.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        return cls(
            tensors={
                "x_ptr": x,
                "t_ptr": t,
                "scale_ptr": i.scale.contiguous(),
                "bias_ptr": dummy if i.bias is None else i.bias.contiguous(),
                "xi_ptr": xi,
                "ti_ptr": dummy if i.text_inverse is None else i.text_inverse.contiguous(),
                "weight_ptr": dummy if i.weight is None else i.weight.t().contiguous(),
                "target_ptr": dummy if i.target is None else i.target.contiguous(),
            },
            sizes={
                "B": B,
                "M": M,
                "K": K,
                "D": D,
                "x_b": x.stride(0),
                "x_m": x.stride(1) if per_prompt else 0,
                "t_m": t.stride(0),
                "t_k": t.stride(1),
                "xi_b": xi.stride(0),
                "xi_m": xi.stride(1) if xi.dim() == 2 else 0,
            },
            numbers={
                "log_w": math.log(i.prior_weight),
                "log_share": rule_share,
                "log_share_of_class": -math.log(K),
            },
            flags={
                "ACTIVATION": i.activation,
                "RULE": i.rule,
                "TARGET": i.target is not None,
                "SQUARE": i.square,
                "KL": i.kl,
                "HAS_BIAS": i.bias is not None,
                "NORMALIZE": i.image_inverse is not None,
                "UPCAST": interpreted,
                "PRECISION": "tf32" if tf32 else "ieee",
            },
            interpreted=interpreted,
        )

    @property
    def dummy(self) -> Tensor:
        """A tensor to point at where nothing is read or written."""
        return self.tensors["scale_ptr"]  # type: ignore[no-any-return]

    def tile(self, config: Config) -> dict[str, Any]:
        """The configuration as launch arguments."""
        return {
            "EVEN_D": self.sizes["D"] % config.features == 0,
            "BLOCK_B": config.images,
            "BLOCK_K": config.classes,
            "BLOCK_D": config.features,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def gradient_flags(self) -> dict[str, Any]:
        """How gradients are multiplied: bf16 as it is, float16 through tf32, float32 like the logits."""
        dtype = self.tensors["x_ptr"].dtype
        bf16 = dtype == torch.bfloat16 and not self.interpreted
        half = dtype == torch.float16 and not self.interpreted
        return {"HALF": "bf16" if bf16 else "", "GRAD_PRECISION": "tf32" if half else self.flags["PRECISION"]}


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch where the tensors are, whatever the current device."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(x.device).device(x.device)  # type: ignore[no-any-return]


def run_forward(
    call: Call, *, ratio: Tensor | None, partial: Tensor | None, sums: Tensor | None, config: Config,
    first: int, last: int, tile0: int, tiles: int, fused: bool,
) -> None:  # fmt: skip
    """Launch the forward kernel on classes first .. last."""
    B = call.sizes["B"]
    grid = (triton.cdiv(B, config.images) * triton.cdiv(last - first, config.classes),)
    forward_kernel[grid](
        **call.tensors,
        ratio_ptr=call.dummy if ratio is None else ratio,
        partial_ptr=call.dummy if partial is None else partial,
        log_target_ptr=call.dummy if sums is None else sums[1],
        **call.sizes,
        first=first,
        last=last,
        tile0=tile0,
        tiles=tiles,
        ratio_b=0 if ratio is None else ratio.stride(0),
        **call.numbers,
        FUSED=fused,
        SUMS=sums is not None,
        RATIO=ratio is not None,
        **call.flags,
        **call.tile(config),
    )


def run_finish(call: Call, partial: Tensor, sums: Tensor, opinions: int) -> None:
    """Launch the reduction of partial row sums."""
    B, K = call.sizes["B"], call.sizes["K"]
    log_others = 0.0
    if call.flags["TARGET"]:
        log_others = math.log((K - 1) / K) if K > 1 else float(NOTHING.value)
    finish_kernel[(triton.cdiv(B, FINISH_ROWS), opinions)](
        partial,
        sums,
        B,
        sums.shape[1],
        partial.shape[2],
        log_others,
        TARGET=call.flags["TARGET"],
        SQUARE=call.flags["SQUARE"],
        KL=call.flags["KL"],
        BLOCK_B=FINISH_ROWS,
        BLOCK_T=FINISH_TILES,
        num_warps=4,
    )


def row_sums(i: Inputs, want_ratio: bool, fused: bool = True) -> tuple[Tensor, Tensor]:
    """log_ratio [B, K] (or empty) and row sums [4, M + 1, B]: see :mod:`cdc_kernels.fused_opinion`.

    Without ``fused`` only the prompts' opinions are summed up; the last row is zero.
    """
    B, M, K, _ = i.sizes
    ratio = i.scale.new_empty((B, K) if want_ratio else (0,))
    sums = i.scale.new_empty((4, M + 1, B)) if fused else i.scale.new_zeros((4, M + 1, B))
    if B == 0:
        return ratio, sums
    call = Call.of(i)
    planes = 3 if i.square or i.kl else 1

    def launch(config: Config) -> Tensor:
        tiles = triton.cdiv(K, config.classes)
        partial = i.scale.new_empty((planes, M + 1, tiles, B))
        run_forward(
            call, ratio=ratio if want_ratio else None, partial=partial, sums=sums, config=config,
            first=0, last=K, tile0=0, tiles=tiles, fused=fused,
        )  # fmt: skip
        return partial

    with on_device(i.image):
        partial = launch(INTERPRETER if call.interpreted else configs.pick(i.kind("forward"), i.image, i.sizes, launch))
        run_finish(call, partial, sums, M + 1 if fused else M)
    return ratio, sums


def topk(i: Inputs, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Classes [B, k], their log_ratio [B, k], and row sums [4, M + 1, B]; [B, K] never exists."""
    B, M, K, _ = i.sizes
    sums = i.scale.new_empty((4, M + 1, B))
    values = i.scale.new_empty((B, 0))
    classes = torch.empty((B, 0), dtype=torch.int64, device=i.image.device)
    if B == 0:
        return classes.new_empty((0, k)), values.new_empty((0, k)), sums
    call = Call.of(i)
    config = (
        INTERPRETER
        if call.interpreted
        else configs.default("forward", configs.architecture(i.image.device), i.image.element_size())
    )
    columns = triton.cdiv(max(k, min(TOPK_COLUMNS, triton.cdiv(K, 4))), config.classes) * config.classes
    tiles = triton.cdiv(K, config.classes)
    partial = i.scale.new_empty((1, M + 1, tiles, B))
    ratio = i.scale.new_empty((B, min(columns, K)))
    with on_device(i.image):
        for first in range(0, K, columns):
            last = min(first + columns, K)
            run_forward(
                call, ratio=ratio, partial=partial, sums=sums, config=config,
                first=first, last=last, tile0=first // config.classes, tiles=tiles, fused=True,
            )  # fmt: skip
            best, where = ratio[:, : last - first].topk(min(k, last - first), dim=1)
            values, classes = torch.cat([values, best], 1), torch.cat([classes, where + first], 1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            classes = classes.gather(1, order)
        run_finish(call, partial, sums, M + 1)
    return classes, values, sums


def gradients(
    i: Inputs, planes: Tensor, ratio: Tensor | None, g_ratio: Tensor | None,
    need_image: bool, need_text: bool, need_rows: bool, fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of image (float32), text, and rows [3, M, B] (of scale, bias and weight, before the sum over images).

    planes [7, M + 1, B]: total, log_target, log_square, then the gradients by these and by kl_sum. Without a
    ratio the fused log ratio is made again, a chunk of classes at a time. What is not needed comes back empty.
    """
    B, M, K, D = i.sizes
    g_image = i.scale.new_empty(i.image.shape if need_image else (0,))
    g_text = i.text.new_empty(i.text.shape if need_text else (0,))
    g_rows = i.scale.new_empty((3, M, B) if need_rows else (0,))
    if B == 0:
        return g_image, g_text.zero_(), g_rows
    call = Call.of(i)
    planes = planes.contiguous()
    config = INTERPRETER
    forward_config = INTERPRETER
    if not call.interpreted:
        arch = configs.architecture(i.image.device)
        config = configs.default(i.kind("gradient"), arch, i.image.element_size())
        forward_config = configs.default("forward", arch, i.image.element_size())
    columns = K
    chunk = None if fused else call.dummy.unsqueeze(0)
    if ratio is None and fused:
        columns = min(K, max(config.classes, RATIO_NUMBERS // B // config.classes * config.classes))
        chunk = i.scale.new_empty((B, columns))
    shared = i.image.dim() == 2
    slices = triton.cdiv(D, config.out)
    with on_device(i.image):
        for first in range(0, K, columns):
            last = min(first + columns, K)
            if ratio is None and fused:
                run_forward(
                    call, ratio=chunk, partial=None, sums=None, config=forward_config,
                    first=first, last=last, tile0=0, tiles=0, fused=True,
                )  # fmt: skip
            here = chunk if ratio is None else ratio[:, first:last]
            assert here is not None
            common = {
                **call.tensors,
                "planes_ptr": planes,
                "ratio_ptr": here,
                "g_ratio_ptr": call.dummy if g_ratio is None else g_ratio,
                **call.sizes,
                "first": first,
                "last": last,
                "ratio_b": here.stride(0),
                "g_ratio_b": 0 if g_ratio is None else g_ratio.stride(0),
                **call.numbers,
                "FUSED": fused,
                "G_RATIO": g_ratio is not None,
                **call.flags,
                **call.gradient_flags(),
                **call.tile(config),
                "OUT_D": config.out,
            }
            if need_image or need_rows:
                groups = 1 if shared and need_image else M
                image_kernel[(triton.cdiv(B, config.images), groups, slices if need_image else 1)](
                    g_image_ptr=g_image,
                    g_rows_ptr=g_rows,
                    group=M // groups,
                    gi_b=g_image.stride(0),
                    gi_m=0 if shared or not need_image else g_image.stride(1),
                    FEATURES=need_image,
                    ROWS=need_rows,
                    ADD=first > 0,
                    **common,
                )
            if need_text:
                text_kernel[(triton.cdiv(last - first, config.classes), M, slices)](g_text_ptr=g_text, **common)
    return g_image, g_text, g_rows


def _fuse_numbers(evidence: Tensor, rule: str, prior_weight: float) -> dict[str, Any]:
    """What both fusion kernels are told about evidence [N, M, K]."""
    N, M, K = evidence.shape
    e_n, e_m, e_k = evidence.stride()
    top = math.log(torch.finfo(torch.float32).max) - 1e-4 - math.log(max(prior_weight, 1.0))
    return {
        "M": M,
        "K": K,
        "total": N * K,
        "e_n": e_n,
        "e_m": e_m,
        "e_k": e_k,
        "log_w": math.log(prior_weight),
        "log_share": -math.log(M) if rule == "averaging" else 0.0,
        "top": top,
        "RULE": rule,
        "BLOCK": FUSE_BLOCK,
    }


def fuse_evidence(evidence: Tensor, rule: str, prior_weight: float) -> Tensor:
    """Evidence [N, M, K] of any float dtype up to 32 bits and any strides to fused evidence [N, K], float32."""
    N, _, K = evidence.shape
    out = evidence.new_empty((N, K), dtype=torch.float32)
    if out.numel():
        with on_device(evidence):
            grid = (triton.cdiv(N * K, FUSE_BLOCK),)
            fuse_forward_kernel[grid](evidence, out, **_fuse_numbers(evidence, rule, prior_weight))
    return out


def fuse_evidence_backward(evidence: Tensor, grad: Tensor, rule: str, prior_weight: float) -> Tensor:
    """Gradient [N, M, K] of :func:`fuse_evidence`."""
    N, _, K = evidence.shape
    g_e = torch.empty_like(evidence, memory_format=torch.contiguous_format)
    if g_e.numel():
        with on_device(evidence):
            grid = (triton.cdiv(N * K, FUSE_BLOCK),)
            numbers = _fuse_numbers(evidence, rule, prior_weight)
            fuse_backward_kernel[grid](evidence, grad.contiguous(), g_e, **numbers)
    return g_e


def _decoupling_numbers(text: Tensor, squared: bool) -> dict[str, Any]:
    """What both decoupling kernels are told about text [M, K, D]."""
    M, _, D = text.shape
    rows, columns = triton.next_power_of_2(M), triton.next_power_of_2(D)
    if rows * columns > DECOUPLING_NUMBERS:
        raise ValueError(
            f"text must have at most {DECOUPLING_NUMBERS} numbers a class (M and D rounded up to powers of two) for "
            f"the decoupling kernel; got M = {M}, D = {D}"
        )
    return {
        "M": M,
        "D": D,
        "t_m": text.stride(0),
        "t_k": text.stride(1),
        "SQUARED": squared,
        "BLOCK_M": rows,
        "BLOCK_D": columns,
        "num_warps": 4 if rows * columns <= 4096 else 8,
    }


def decoupling(text: Tensor, squared: bool) -> Tensor:
    """``sum_{m > n} cos(t_mk, t_nk)`` (or of its square) of each class [K]."""
    text = unit_last(text)
    out = text.new_empty(text.shape[1], dtype=torch.float32)
    with on_device(text):
        decoupling_forward_kernel[(text.shape[1],)](text, out, **_decoupling_numbers(text, squared))
    return out


def decoupling_backward(text: Tensor, grad: Tensor, squared: bool) -> Tensor:
    """Gradient [M, K, D] of :func:`decoupling`."""
    text = unit_last(text)
    g_text = torch.empty_like(text, memory_format=torch.contiguous_format)
    with on_device(text):
        decoupling_backward_kernel[(text.shape[1],)](
            text, grad.contiguous(), g_text, K=text.shape[1], **_decoupling_numbers(text, squared)
        )
    return g_text


def row_loss(sums: Tensor, classes: int, prior_weight: float, form: str, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Loss [R, B] of each opinion from row sums [4, R, B], and its gradient [4, R, B] by these."""
    sums = sums.contiguous()
    loss, grad = sums.new_empty(sums.shape[1:]), torch.empty_like(sums)
    if loss.numel():
        with on_device(sums):
            row_loss_kernel[(triton.cdiv(loss.numel(), LOSS_BLOCK),)](
                sums,
                loss,
                grad,
                loss.numel(),
                classes,
                math.log(prior_weight),
                kl_weight,
                FORM=form,
                KL=kl_weight != 0 and classes > 1,
                BLOCK=LOSS_BLOCK,
            )
    return loss, grad
