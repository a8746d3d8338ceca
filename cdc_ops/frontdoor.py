"""Front-door adjustment on tensors: the effect of x on y through a mediator, free of hidden confounding."""

import torch
from torch import Tensor

from cdc_ops import checks
from cdc_ops.evidence import at_least_float32, full_precision


def frontdoor_adjust(
    semantic_given_x: Tensor, class_given_semantic_x: Tensor, x_weight: Tensor | None = None
) -> Tensor:
    """``P(y | do(x)) = sum_s P(s | x) sum_x' P(y | s, x') P(x')``.

    Args:
        semantic_given_x: ``P(s | x)`` [B, S] for the B inputs asked about.
        class_given_semantic_x: ``P(y | s, x')`` [N, S, K] for the N inputs x' that stand for the population
            (the batch itself, a memory bank; see :class:`FrontDoorAggregator`).
        x_weight: ``P(x')`` [N], not negative; scaled to sum to one. Default: uniform.

    Returns:
        ``P(y | do(x))`` [B, K]. Rows sum to one when the two conditionals do.

    Raises:
        ValueError: shapes that do not fit, mixed devices, values negative or not finite, weights all zero.

    Source: Pearl, "Causal diagrams for empirical research", Biometrika 1995. That CDC's semantics s are the
    prompts m is design of the method; the marginals offered here are **our reading**.

    >>> semantic = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    >>> classes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> frontdoor_adjust(semantic, classes)
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    p_s, p_y = conditionals(semantic_given_x, class_given_semantic_x, "N")
    if p_y.shape[0] == 0:
        raise ValueError(f"class_given_semantic_x must have shape [N, S, K] without a zero; got {checks.came(p_y)}")
    if x_weight is not None:
        x_weight = at_least_float32(checks.floating("x_weight", x_weight, "[N]"))
        if list(x_weight.shape) != [p_y.shape[0]]:
            raise ValueError(f"x_weight must have shape [{p_y.shape[0]}]; got {checks.came(x_weight)}")
        checks.same_device("semantic_given_x", p_s, x_weight=x_weight)
        checks.positive_sum("x_weight", x_weight)
    with full_precision(p_s.device):
        if x_weight is None:
            marginal = p_y.mean(0)
        else:
            share = x_weight / x_weight.amax()  # whose sum cannot overflow
            marginal = torch.einsum("n,nsk->sk", (share / share.sum()).to(p_y.dtype), p_y)
        return p_s @ marginal


def own_mixture(semantic_given_x: Tensor, class_given_semantic_x: Tensor) -> Tensor:
    """``sum_s P(s | x) P(y | s, x)`` [B, K] from [B, S] and [B, S, K]: the adjustment where x' is x itself."""
    p_s, p_y = conditionals(semantic_given_x, class_given_semantic_x, "B")
    if p_y.shape[0] != p_s.shape[0]:
        raise ValueError(
            f"class_given_semantic_x must have shape [B, S, K] to match semantic_given_x {list(p_s.shape)}; "
            f"got {checks.came(p_y)}"
        )
    with full_precision(p_s.device):
        return torch.einsum("bs,bsk->bk", p_s, p_y)


def conditionals(semantic_given_x: object, class_given_semantic_x: object, inputs: str) -> tuple[Tensor, Tensor]:
    """``P(s | x)`` [B, S] and ``P(y | s, x)`` [``inputs``, S, K], checked, in one dtype of at least 32 bits."""
    p_s = at_least_float32(checks.floating("semantic_given_x", semantic_given_x, "[B, S]"))
    p_y = at_least_float32(checks.floating("class_given_semantic_x", class_given_semantic_x, f"[{inputs}, S, K]"))
    checks.dims("semantic_given_x", p_s, [2], "[B, S]")
    checks.dims("class_given_semantic_x", p_y, [3], f"[{inputs}, S, K]")
    if 0 in p_y.shape[1:]:
        raise ValueError(
            f"class_given_semantic_x must have shape [{inputs}, S, K] without a zero; got {checks.came(p_y)}"
        )
    if p_s.shape[1] != p_y.shape[1]:
        raise ValueError(
            f"semantic_given_x must have shape [B, {p_y.shape[1]}] to match class_given_semantic_x "
            f"{list(p_y.shape)}; got {checks.came(p_s)}"
        )
    checks.same_device("semantic_given_x", p_s, class_given_semantic_x=p_y)
    checks.nonnegative("semantic_given_x", p_s)
    checks.nonnegative("class_given_semantic_x", p_y)
    dtype = torch.promote_types(p_s.dtype, p_y.dtype)
    return p_s.to(dtype), p_y.to(dtype)
