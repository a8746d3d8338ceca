"""Triton kernels: fused forward and backward on a GPU, or in Triton's interpreter on a CPU.

The row sums of :mod:`cdc_ops.dirichlet` come from one operator and the losses of opinions from another; their
gradients are kernels too.
"""

from __future__ import annotations

import torch
from cdc_kernels import launch_small, ops
from torch import Tensor

from cdc_ops.backends import LossForm, Problem, weighted_sum
from cdc_ops.dirichlet import RowSums
from cdc_ops.fusion import confidence_weight, evidence_weight


def length(x: Tensor, norm: Tensor | None) -> Tensor:
    """``|x|`` over the last dimension, float32, without gradient: the kernels know what it depends on."""
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float32) if norm is None else norm


def arguments(problem: Problem) -> tuple[Tensor | None, ...]:
    """image, text, scale, bias and lengths, as the operators take them."""
    dtype = torch.promote_types(problem.image.dtype, problem.text.dtype)
    image, text = problem.image.to(dtype), problem.text.to(dtype)
    lengths: tuple[Tensor | None, Tensor | None] = (None, None)
    if problem.normalize:
        lengths = length(image, problem.image_norm), length(text, problem.text_norm)
    return image, text, problem.scale, problem.bias, *lengths


def rule_weight(problem: Problem, inputs: tuple[Tensor | None, ...]) -> Tensor | None:
    """The weighted rule's weights [B, M], differentiable through every prompt's own uncertainty."""
    if problem.rule != "weighted" or problem.weight is not None:
        return problem.weight
    return confidence_weight(sum_prompts(problem, inputs), 1)


def sum_prompts(problem: Problem, inputs: tuple[Tensor | None, ...]) -> Tensor:
    """``-ln u_m`` [B, M] alone."""
    options = problem.activation, "cumulative", problem.prior_weight, problem.classes, False, False, False, False
    _, sums = ops.row_sums(*inputs, None, None, *options)
    return sums[0, :-1].t()


def row_sums(
    problem: Problem, target: Tensor | None, square: bool, kl: bool, want_ratio: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    """log_ratio and row sums [4, M + 1, B]; the fused opinion last, zero without ``fused``."""
    inputs = arguments(problem)
    weight = rule_weight(problem, inputs) if fused else None
    rule = problem.rule if fused else "cumulative"  # the same kernels, whatever rule is not followed
    options = problem.activation, rule, problem.prior_weight, problem.classes, square, kl, want_ratio, fused
    return ops.row_sums(*inputs, weight, target, *options)


def fused_opinion(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`cdc_ops.backends`."""
    M = problem.sizes[1]
    ratio, sums = row_sums(problem, None, False, False, True, True)
    return ratio, sums[0, M], sums[0, :M].t()


def fused_topk(problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`cdc_ops.backends`."""
    M = problem.sizes[1]
    inputs = arguments(problem)
    weight = rule_weight(problem, inputs)
    options = problem.activation, problem.rule, problem.prior_weight, problem.classes, False, False
    classes, ratio, sums = ops.topk(*inputs, weight, None, *options, k)
    return classes, ratio, sums[0, M], sums[0, :M].t()


def evidential_loss(problem: Problem, target: Tensor, loss: LossForm) -> Tensor:
    """See :mod:`cdc_ops.backends`."""
    sums = target_sums(problem, target, loss)
    each, _ = ops.row_loss(sums, problem.classes, problem.prior_weight, loss.form, loss.kl_weight)
    return loss.reduced(weighted_sum(each.t(), problem, loss))


def target_sums(problem: Problem, target: Tensor, loss: LossForm) -> Tensor:
    """Row sums [4, M + 1, B] that leave the target out, the fused opinion last; [4, M, B] where none is needed."""
    fused = loss.needs_fused(problem)
    _, sums = row_sums(problem, target, loss.square, loss.kl, False, fused)
    return sums if fused else sums[:, :-1]


def prompt_log_partition(problem: Problem) -> Tensor:
    """See :mod:`cdc_ops.backends`."""
    return sum_prompts(problem, arguments(problem))


def loss_sums(problem: Problem, target: Tensor, loss: LossForm) -> RowSums:
    """See :mod:`cdc_ops.backends`."""
    sums = target_sums(problem, target, loss)
    log_rest, log_target, log_square, kl_sum = sums.transpose(1, 2)
    # no kernel writes the target's own where there is none
    log_target = torch.where(target.unsqueeze(1) >= 0, log_target, 0.0)
    return RowSums(log_target, log_rest, log_square if loss.square else None, kl_sum if loss.kl else None)


def fuse_evidence(evidence: Tensor, dim: int, rule: str, prior_weight: float) -> Tensor:
    """Fused evidence without ``dim``, float32. The weighted rule takes a second pass, which makes its weights."""
    if rule == "weighted":
        evidence = evidence * evidence_weight(evidence.float(), dim, prior_weight)
        rule = "cumulative"
    e = evidence.movedim(dim, -2)
    fused = ops.fuse_evidence(e.reshape(-1, *e.shape[-2:]), rule, prior_weight)
    return fused.view(*e.shape[:-2], e.shape[-1])


def takes_text(text: Tensor) -> bool:
    """Whether the decoupling kernel can hold a class's features."""
    return launch_small.decoupling_numbers(text.shape[0], text.shape[2]) <= launch_small.DECOUPLING_NUMBERS


def decoupling_sum(text: Tensor, squared: bool) -> Tensor:
    """Sum over classes and pairs m > n of the cosine, or of its square."""
    return ops.decoupling(text, squared).sum()
