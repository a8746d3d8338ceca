"""Plain PyTorch, any float dtype: short, differentiable by autograd, the oracle of every test."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cdc_ops.backends import LossForm, Problem, loss_from_sums
from cdc_ops.dirichlet import RowSums, row_sums
from cdc_ops.evidence import log_ratio_from_logits
from cdc_ops.fusion import fused_log_ratio
from cdc_ops.special import log_row_sum


def prompt_log_ratio(problem: Problem) -> Tensor:
    """``ln(1 + e_mk / W)`` [B, M, K]."""
    x, t = problem.image.to(problem.dtype), problem.text.to(problem.dtype)
    if problem.normalize:
        x, t = F.normalize(x, dim=-1), F.normalize(t, dim=-1)
    z = torch.einsum("bd,mkd->bmk" if x.dim() == 2 else "bmd,mkd->bmk", x, t)
    z = z * problem.scale[:, None]
    if problem.bias is not None:
        z = z + problem.bias[:, None]
    return log_ratio_from_logits(z, problem.activation, problem.prior_weight)


def fused_opinion(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`cdc_ops.backends`."""
    prompts = prompt_log_ratio(problem)
    fused = fused_log_ratio(prompts, 1, problem.rule, problem.weight)
    return fused, log_row_sum(fused), log_row_sum(prompts)


def fused_topk(problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`cdc_ops.backends`."""
    log_ratio, log_partition, prompt_log_partition = fused_opinion(problem)
    values, classes = log_ratio.topk(k, dim=-1)
    return classes, values, log_partition, prompt_log_partition


def evidential_loss(problem: Problem, target: Tensor, loss: LossForm) -> Tensor:
    """See :mod:`cdc_ops.backends`."""
    return loss.reduced(loss_from_sums(loss_sums(problem, target, loss), problem, loss))


def prompt_log_partition(problem: Problem) -> Tensor:
    """See :mod:`cdc_ops.backends`."""
    return log_row_sum(prompt_log_ratio(problem))


def loss_sums(problem: Problem, target: Tensor, loss: LossForm) -> RowSums:
    """See :mod:`cdc_ops.backends`."""
    opinions = [prompt_log_ratio(problem)]
    if loss.needs_fused(problem):
        opinions.append(fused_log_ratio(opinions[0], 1, problem.rule, problem.weight).unsqueeze(1))
    target = target.unsqueeze(1)
    parts = [
        row_sums(x, target.expand(x.shape[:2]), problem.classes, problem.prior_weight, loss.square, loss.kl)
        for x in opinions
    ]
    return RowSums._make(None if x[0] is None else torch.cat(x, 1) for x in zip(*parts, strict=True))
