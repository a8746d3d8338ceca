"""Plain PyTorch, any float dtype: short, differentiable by autograd, the oracle of every test."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cdc_ops.backends import LossForm, Problem
from cdc_ops.dirichlet import dirichlet_loss
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
    fused = fused_log_ratio(prompts, 1, problem.rule)
    return fused, log_row_sum(fused), log_row_sum(prompts)


def fused_topk(problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`cdc_ops.backends`."""
    log_ratio, log_partition, prompt_log_partition = fused_opinion(problem)
    values, classes = log_ratio.topk(k, dim=-1)
    return classes, values, log_partition, prompt_log_partition


def evidential_loss(problem: Problem, target: Tensor, loss: LossForm) -> Tensor:
    """See :mod:`cdc_ops.backends`."""
    prompts = prompt_log_ratio(problem)
    fused = fused_log_ratio(prompts, 1, problem.rule)
    each = target.unsqueeze(1).expand(prompts.shape[:2])
    by_prompt = dirichlet_loss(prompts, each, problem.prior_weight, loss.form, loss.kl_weight).sum(1)
    together = dirichlet_loss(fused, target, problem.prior_weight, loss.form, loss.kl_weight)
    return loss.prompt_weight * by_prompt + loss.fused_weight * together
