"""From logits to evidence: the three activations, in linear and in log space."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from cdc_ops import checks
from cdc_ops.special import largest_log, softplus

ACTIVATIONS = ("exp", "softplus", "relu")


def at_least_float32(x: Tensor) -> Tensor:
    """Half and bfloat16 become float32; float32 and float64 stay: evidence is never computed in half precision."""
    return x.float() if x.dtype.itemsize < 4 else x


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast; nothing at all, which is faster, where there is none."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def evidence_from_logits(logits: Tensor, activation: str = "exp") -> Tensor:
    """Evidence ``e = activation(z) >= 0``.

    Args:
        logits: ``z`` [...], any float dtype (half precision is computed and returned in float32).
        activation: ``"exp"``, ``"softplus"`` or ``"relu"``. ``exp`` saturates at the largest finite number;
            where logits are that large, stay in log space: :func:`fused_opinion` and
            :func:`evidential_cross_entropy` never form the evidence.

    Returns:
        Evidence [...], shape of ``logits``.

    Raises:
        ValueError: logits not floating or not finite, unknown activation.

    Source: Sensoy, Kaplan, Kandemir, "Evidential Deep Learning to Quantify Classification Uncertainty",
    NeurIPS 2018 (relu); Han et al., "Trusted Multi-View Classification", ICLR 2021 (softplus).

    >>> evidence_from_logits(torch.tensor([-1.0, 0.0, 2.0]), "relu")
    tensor([0., 0., 2.])
    """
    checks.one_of("activation", activation, ACTIVATIONS)
    z = at_least_float32(checks.floating("logits", logits, "[...]"))
    checks.finite("logits", z)
    if activation == "exp":
        return torch.exp(z.clamp(max=largest_log(z.dtype)))
    return softplus(z) if activation == "softplus" else torch.relu(z)


def log_ratio_from_logits(z: Tensor, activation: str, prior_weight: float) -> Tensor:
    """``l = ln(1 + e / W)`` straight from the logits: for exp evidence ``softplus(z - ln W)``, at any z."""
    if activation == "exp":
        return softplus(z - math.log(prior_weight))
    return log_ratio_from_evidence(softplus(z) if activation == "softplus" else torch.relu(z), prior_weight)


def log_ratio_from_evidence(e: Tensor, prior_weight: float) -> Tensor:
    """``l = ln(1 + e / W)``; as ``ln e - ln W`` where the quotient would overflow, which takes a W below 1."""
    if prior_weight >= 1:
        return torch.log1p(e / prior_weight)
    most = 0.5 * prior_weight * torch.finfo(e.dtype).max
    large = torch.log(e.clamp_min(most)) - math.log(prior_weight)
    return torch.where(e < most, torch.log1p(e.clamp_max(most) / prior_weight), large)


def evidence_from_log_ratio(log_ratio: Tensor, prior_weight: float) -> Tensor:
    """``e = W expm1(l)``, saturating at the largest finite number; as ``exp(l + ln W)`` where expm1 would overflow."""
    most, log_w = largest_log(log_ratio.dtype), math.log(prior_weight)
    e = prior_weight * torch.expm1(log_ratio.clamp(max=most - max(log_w, 0.0)))
    if prior_weight >= 1:
        return e
    return torch.where(log_ratio < most, e, torch.exp((log_ratio + log_w).clamp(max=most)))
