"""The evidential loss of one Dirichlet, written through four row sums so that any backend can supply them.

    log_target  ln(alpha_y / W)
    log_rest    ln(sum_{k != y} alpha_k / W)
    log_square  ln(sum_{k != y} (alpha_k / W)^2)          only for form "mse"
    kl_sum      sum_{k != y} kl_element(ln alpha_k)       only when kl_weight is not 0

The target never enters a sum it would dominate: the loss of a confident opinion is a function of what is
*not* on the target, and no two nearly equal numbers are subtracted.

Row sums of an opinion come from those of its shards, each over some of the classes (:func:`merged`).
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
REDUCTIONS = ("mean", "sum", "none")


class RowSums(NamedTuple):
    """See the module's docstring; all of shape [...] for opinions [..., K]."""

    log_target: Tensor
    log_rest: Tensor
    log_square: Tensor | None
    kl_sum: Tensor | None


def row_sums(log_ratio: Tensor, target: Tensor, classes: int, prior_weight: float, square: bool, kl: bool) -> RowSums:
    """The row sums of opinions about K ``classes``, over those in log_ratio [..., up to K].

    target [...] counts within log_ratio; -1 where it is none of these: log_target is then 0. log_rest holds the
    prior of all classes but the target, ``(K - 1) / K``, whatever part of them is in log_ratio.
    """
    K = classes
    here = (target >= 0).unsqueeze(-1)
    index = target.clamp_min(0).unsqueeze(-1)
    log_target = torch.where(here, log_alpha_ratio(log_ratio.gather(-1, index), K), 0.0).squeeze(-1)
    if K == 1:
        nothing = torch.full_like(log_target, -math.inf)
        return RowSums(log_target, nothing, nothing, torch.zeros_like(log_target))
    is_target = torch.zeros_like(log_ratio, dtype=torch.bool).scatter(-1, index, here)
    others = log_ratio.masked_fill(is_target, 0)
    log_rest = log_row_sum(others, constant=(K - 1) / K)
    if not square and not kl:
        return RowSums(log_target, log_rest, None, None)
    log_alpha = log_alpha_ratio(others, K)
    log_square = kl_sum = None
    if square:
        shift = shift_of(others)
        squares = torch.exp(2 * (log_alpha - shift)).masked_fill(is_target, 0)
        log_square = torch.log(squares.sum(-1)) + 2 * shift.squeeze(-1)
    if kl:
        kl_sum = kl_element(log_alpha + math.log(prior_weight)).masked_fill(is_target, 0).sum(-1)
    return RowSums(log_target, log_rest, log_square, kl_sum)


def merged(parts: RowSums, classes: int) -> RowSums:
    """Row sums [...] of opinions from those of their shards, [shards, ...]; each class is in one of these."""
    log_target, log_rest, log_square, kl_sum = parts
    if len(log_target) == 1:
        return RowSums._make(None if x is None else x[0] for x in parts)
    log_prior = math.log((classes - 1) / classes)  # in every shard's log_rest, and once in the sum
    return RowSums(
        log_target.sum(0),
        log_row_sum(log_rest - log_prior, 0) + log_prior,
        None if log_square is None else torch.logsumexp(log_square, 0),
        None if kl_sum is None else kl_sum.sum(0),
    )


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
    K = log_ratio.shape[-1]
    sums = row_sums(log_ratio, target, K, prior_weight, form == "mse", kl_weight != 0)
    return loss_from_row_sums(sums, K, prior_weight, form, kl_weight)


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """Mean, sum or none over all elements; the mean of nothing is refused."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if loss.numel() == 0:
        raise ValueError(
            "reduction must be 'sum' or 'none' for an empty batch, whose mean is undefined; got 'mean' and B = 0"
        )
    return loss.mean()
