"""The evidential loss of one Dirichlet, written through four row sums so that any backend can supply them.

    log_target  ln(alpha_y / W)
    log_rest    ln(sum_{k != y} alpha_k / W)
    log_square  ln(sum_{k != y} (alpha_k / W)^2)          only for form "mse"
    kl_sum      sum_{k != y} kl_element(ln alpha_k)       only when kl_weight is not 0

The target never enters a sum it would dominate: the loss of a confident opinion is a function of what is
*not* on the target, and no two nearly equal numbers are subtracted.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cdc_ops.special import (
    digamma_gap,
    kl_element,
    kl_total,
    log_alpha_ratio,
    log_row_sum,
    shift_of,
    softplus,
)

FORMS = ("digamma", "log", "mse")


class RowSums(NamedTuple):
    """See the module's docstring; all of shape [...] for opinions [..., K]."""

    log_target: Tensor
    log_rest: Tensor
    log_square: Tensor | None
    kl_sum: Tensor | None


def row_sums(log_ratio: Tensor, target: Tensor, prior_weight: float, form: str, kl: bool) -> RowSums:
    """The row sums of opinions with log ratio [..., K] and target [...]."""
    K = log_ratio.shape[-1]
    index = target.unsqueeze(-1)
    log_target = log_alpha_ratio(log_ratio.gather(-1, index), K).squeeze(-1)
    if K == 1:
        nothing = torch.full_like(log_target, -math.inf)
        return RowSums(log_target, nothing, nothing, torch.zeros_like(log_target))
    is_target = torch.zeros_like(log_ratio, dtype=torch.bool).scatter(-1, index, True)
    others = log_ratio.masked_fill(is_target, 0)
    log_rest = log_row_sum(others, constant=(K - 1) / K)
    if form != "mse" and not kl:
        return RowSums(log_target, log_rest, None, None)
    log_alpha = log_alpha_ratio(others, K)
    log_square = kl_sum = None
    if form == "mse":
        shift = shift_of(others)
        squares = torch.exp(2 * (log_alpha - shift)).masked_fill(is_target, 0)
        log_square = torch.log(squares.sum(-1)) + 2 * shift.squeeze(-1)
    if kl:
        kl_sum = kl_element(log_alpha + math.log(prior_weight)).masked_fill(is_target, 0).sum(-1)
    return RowSums(log_target, log_rest, log_square, kl_sum)


def loss_from_row_sums(sums: RowSums, classes: int, prior_weight: float, form: str, kl_weight: float) -> Tensor:
    """The loss [...] of each opinion from its row sums."""
    log_target, log_rest, log_square, kl_sum = sums
    log_w = math.log(prior_weight)
    if form == "digamma":
        loss = digamma_gap(log_target + log_w, log_rest + log_w)
    elif form == "log":
        loss = softplus(log_rest - log_target)
    else:
        assert log_square is not None
        log_total = torch.logaddexp(log_rest, log_target)
        miss = torch.sigmoid(log_rest - log_target)  # 1 - p_y
        rest_square = torch.exp(log_square - 2 * log_total)
        spread = miss * (2 - miss) - rest_square  # 1 - sum_k p_k^2
        loss = miss * miss + rest_square + spread * torch.sigmoid(-log_total - log_w)
    if kl_weight and classes > 1:
        assert kl_sum is not None
        loss = loss + kl_weight * (kl_total(softplus(log_rest + log_w), classes) + kl_sum)
    return loss


def dirichlet_loss(log_ratio: Tensor, target: Tensor, prior_weight: float, form: str, kl_weight: float) -> Tensor:
    """The loss [...] of opinions with log ratio [..., K]."""
    sums = row_sums(log_ratio, target, prior_weight, form, kl_weight != 0)
    return loss_from_row_sums(sums, log_ratio.shape[-1], prior_weight, form, kl_weight)
