"""Launchers of the kernels around the fused opinion: ready-made evidence, the decoupling loss, losses of opinions."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from cdc_kernels.decoupling import decoupling_backward_kernel, decoupling_forward_kernel
from cdc_kernels.fusion import fuse_backward_kernel, fuse_forward_kernel
from cdc_kernels.launch import on_device, unit_last
from cdc_kernels.row_loss import row_loss_kernel

FUSE_BLOCK = 1024
LOSS_BLOCK = 128
#: A class's text features are held in registers by one program: at most so many numbers.
DECOUPLING_NUMBERS = 16384


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


def decoupling_numbers(M: int, D: int) -> int:
    """How many numbers one program holds for a class of M prompts: powers of two."""
    return int(triton.next_power_of_2(M) * triton.next_power_of_2(D))


def _decoupling_arguments(text: Tensor, squared: bool) -> dict[str, Any]:
    """What both decoupling kernels are told about text [M, K, D]."""
    M, _, D = text.shape
    numbers = decoupling_numbers(M, D)
    if numbers > DECOUPLING_NUMBERS:
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
        "BLOCK_M": triton.next_power_of_2(M),
        "BLOCK_D": triton.next_power_of_2(D),
        "num_warps": 4 if numbers <= 4096 else 8,
    }


def decoupling(text: Tensor, squared: bool) -> Tensor:
    """``sum_{m > n} cos(t_mk, t_nk)`` (or of its square) of each class [K]."""
    text = unit_last(text)
    out = text.new_empty(text.shape[1], dtype=torch.float32)
    with on_device(text):
        decoupling_forward_kernel[(text.shape[1],)](text, out, **_decoupling_arguments(text, squared))
    return out


def decoupling_backward(text: Tensor, grad: Tensor, squared: bool) -> Tensor:
    """Gradient [M, K, D] of :func:`decoupling`."""
    text = unit_last(text)
    g_text = torch.empty_like(text, memory_format=torch.contiguous_format)
    with on_device(text):
        decoupling_backward_kernel[(text.shape[1],)](
            text, grad.contiguous(), g_text, K=text.shape[1], **_decoupling_arguments(text, squared)
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
