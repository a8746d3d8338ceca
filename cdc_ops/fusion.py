"""Fusion of opinions: Dempster's rule in closed form, and three others of the same shape.

The state of an opinion here is its log ratio ``l_k = ln(1 + e_k / W)``, which is 0 for no evidence and grows
like the logarithm of the evidence: nothing overflows. Dempster's rule is then a plain sum over the opinions.
"""

import torch
from torch import Tensor

from cdc_ops import checks
from cdc_ops.backends import kernels
from cdc_ops.evidence import at_least_float32, evidence_from_log_ratio, log_ratio_from_evidence
from cdc_ops.special import log_row_sum

RULES = ("dempster", "cumulative", "averaging", "weighted")


def fuse_log_ratio(log_ratio: Tensor, dim: int, rule: str = "dempster") -> Tensor:
    """Fuse opinions given by their log ratios; the log-space form of :func:`fuse_evidence`.

    Args:
        log_ratio: ``l = ln(1 + e / W) >= 0``, shape [..., M, ..., K]; classes last.
        dim: the dimension of the M opinions (not the last).
        rule: ``"dempster"``, ``"cumulative"``, ``"averaging"`` or ``"weighted"``.

    Returns:
        The fused opinion's log ratio, shape of ``log_ratio`` without ``dim``.

    Raises:
        ValueError: log_ratio negative, not finite or without classes; dim or rule not as above.

    Source: the rules as in :func:`fuse_evidence`; in log ratios Dempster's is
    ``l_k = sum_m l_mk`` (docs/mathematics.md, 1).

    >>> fuse_log_ratio(torch.tensor([[200.0, 0.0], [100.0, 1.0]]), dim=0)  # evidence of e^300: fine
    tensor([300.,   1.])
    """
    checks.one_of("rule", rule, RULES)
    log_ratio = at_least_float32(checks.evidence(log_ratio, "[..., M, ..., K]", "log_ratio"))
    return fused_log_ratio(log_ratio, checks.source_dim(log_ratio, dim, "log_ratio"), rule)


def fused_log_ratio(log_ratio: Tensor, dim: int, rule: str, weight: Tensor | None = None) -> Tensor:
    """:func:`fuse_log_ratio` of arguments that are known to be right.

    weight: of the weighted rule, shape of log_ratio without the classes; None to make it from these classes.
    """
    if rule == "dempster":
        return log_ratio.sum(dim)
    if rule == "cumulative":
        return log_row_sum(log_ratio, dim)
    if rule == "averaging":
        return log_row_sum(log_ratio, dim, weight=1 / log_ratio.shape[dim])
    if weight is None:
        weight = confidence_weight(log_row_sum(log_ratio), dim)
    return log_row_sum(log_ratio, dim, weight=weight.unsqueeze(-1))


def confidence_weight(log_partition: Tensor, dim: int) -> Tensor:
    """Weights of weighted belief fusion, ``(1 - u_m) / sum_m (1 - u_m)``, from ``-ln u_m``; all vacuous: zeros."""
    confidence = -torch.expm1(-log_partition)
    return confidence / confidence.sum(dim, keepdim=True).clamp_min(torch.finfo(confidence.dtype).tiny)


def fuse_evidence(
    evidence: Tensor,
    dim: int,
    rule: str = "dempster",
    prior_weight: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Fuse M opinions, given by their evidence, into one.

    With ``e_mk`` the evidence of opinion m for class k and ``u_m = W / (sum_k e_mk + W)``:

    - ``"dempster"``: ``1 + e_k / W = prod_m (1 + e_mk / W)``, Dempster's rule for opinions with mass on singletons
      and the whole frame, all M at once: associative, commutative, neutral element ``e = 0``, O(M K).
    - ``"cumulative"``: ``e_k = sum_m e_mk`` (independent sources).
    - ``"averaging"``: ``e_k = mean_m e_mk`` (dependent sources).
    - ``"weighted"``: ``e_k = sum_m e_mk (1 - u_m) / sum_m (1 - u_m)``, all vacuous gives 0.

    Args:
        evidence: [..., M, ..., K], not negative; classes last. Half precision is computed in float32.
        dim: the dimension of the M opinions (not the last).
        rule: see above.
        prior_weight: ``W``, default K. (Only Dempster's and the weighted rule depend on it.)
        backend: ``"reference"`` (plain PyTorch), ``"triton"`` (one pass over memory; the weighted rule two), or None:
            triton on a GPU that can run it, else reference. Triton takes float32 and a prior_weight of at least 2^-20.

    For sources of limited reliability, :func:`discount` first: ``fuse_evidence(discount(evidence, r), dim)``.

    Returns:
        Fused evidence, shape of ``evidence`` without ``dim``. Dempster's evidence grows as a product: it
        saturates at the largest finite number; stay in log space (:func:`fuse_log_ratio`) beyond.

    Raises:
        ValueError: evidence negative, not finite or without classes; dim, rule or prior_weight not as above.
        NotImplementedError: as :func:`fused_opinion`.

    Source: Dempster's rule: Shafer 1976; the closed form is checked against the pairwise rule of Han et al.,
    ICLR 2021 and against py-dempster-shafer in the tests. Weighted: van der Heijden, Kopp, Kargl, "Multi-source
    fusion operations in subjective logic", FUSION 2018.

    >>> fuse_evidence(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), dim=0, prior_weight=2.0)
    tensor([5.5000, 1.0000])
    """
    checks.one_of("rule", rule, RULES)
    evidence = checks.evidence(evidence, "[..., M, ..., K]")
    dim = checks.source_dim(evidence, dim)
    W = checks.prior_weight(prior_weight, evidence.shape[-1])
    triton = kernels(backend, evidence, W)
    if triton is not None:
        return triton.fuse_evidence(evidence, dim, rule, W)
    e = at_least_float32(evidence)
    if rule == "dempster":
        return evidence_from_log_ratio(log_ratio_from_evidence(e, W).sum(dim), W)
    # the others are sums of evidence, which need no logarithms
    if rule == "weighted":
        e = e * evidence_weight(e, dim, W)
    elif rule == "averaging":
        e = e / e.shape[dim]
    return e.sum(dim).clamp(max=torch.finfo(e.dtype).max)


def evidence_weight(e: Tensor, dim: int, prior_weight: float) -> Tensor:
    """:func:`confidence_weight` of evidence, to multiply it with: ``1 - u = E / (E + W)`` where ``E = sum_k e_k``."""
    total = e.sum(-1, keepdim=True).clamp(max=torch.finfo(e.dtype).max)
    # times W where that is large, so that no confidence underflows
    confidence = total / (1 + total / prior_weight) if prior_weight >= 1 else total / (total + prior_weight)
    return confidence / confidence.sum(dim, keepdim=True).clamp_min(torch.finfo(e.dtype).tiny)


def conflict(evidence: Tensor, dim: int, prior_weight: float | None = None) -> Tensor:
    """Mass that Dempster's rule assigns to the empty set: how much the M opinions contradict each other.

    ``conflict = 1 - (prod_m u_m) / u`` in [0, 1], with u the uncertainty of the Dempster-fused opinion.
    Zero for a single opinion, for vacuous opinions, and for opinions that all back the same one class.

    Args:
        evidence: [..., M, ..., K], not negative; classes last.
        dim: the dimension of the M opinions (not the last).
        prior_weight: ``W``, default K.

    Returns:
        Shape of ``evidence`` without ``dim`` and without the class dimension.

    Raises:
        ValueError: as :func:`fuse_evidence`.

    Source: Shafer 1976 (weight of conflict); closed form as in :func:`fuse_evidence`.

    >>> conflict(torch.tensor([[8.0, 0.0], [0.0, 8.0]]), dim=0)
    tensor(0.6400)
    """
    e = at_least_float32(checks.evidence(evidence, "[..., M, ..., K]"))
    dim = checks.source_dim(e, dim)
    W = checks.prior_weight(prior_weight, e.shape[-1])
    log_ratio = log_ratio_from_evidence(e, W)
    separate = log_row_sum(log_ratio).sum(dim)
    return conflict_from_log_partition(log_row_sum(log_ratio.sum(dim)), separate)


def conflict_from_log_partition(fused: Tensor, separate: Tensor) -> Tensor:
    """``1 - (prod_m u_m) / u`` from ``fused = -ln u`` and ``separate = -sum_m ln u_m``."""
    return (-torch.expm1(fused - separate)).clamp(0, 1)


def discount(evidence: Tensor, reliability: Tensor | float, prior_weight: float | None = None) -> Tensor:
    """Shafer's discounting: trust an opinion only as far as its source is reliable.

    Belief ``b' = r b`` and uncertainty ``u' = 1 - r + r u``, written in evidence:
    ``e' = W r b / (1 - r + r u)``. r = 1 changes nothing, r = 0 gives the vacuous opinion.

    Args:
        evidence: [..., K], not negative; classes last.
        reliability: ``r`` in [0, 1], a number or a tensor that broadcasts to [...] (for [B, M, K]: [M] or [B, M]).
        prior_weight: ``W``, default K.

    Returns:
        Discounted evidence, shape of ``evidence``.

    Raises:
        ValueError: evidence as in :func:`fuse_evidence`; reliability outside [0, 1] or of another shape.

    Source: Shafer, "A Mathematical Theory of Evidence", 1976, chapter 11.

    >>> discount(torch.tensor([6.0, 0.0]), 0.5)
    tensor([1.2000, 0.0000])
    """
    e = at_least_float32(checks.evidence(evidence))
    K = e.shape[-1]
    W = checks.prior_weight(prior_weight, K)
    if isinstance(reliability, Tensor):
        checks.floating("reliability", reliability, "[...] without the classes")
        checks.same_device("evidence", e, reliability=reliability)
        r = reliability.to(e.dtype)
        try:
            fits = torch.broadcast_shapes(r.shape, e.shape[:-1]) == e.shape[:-1]
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"reliability must broadcast to {list(e.shape[:-1])}; got {checks.came(reliability)}")
        checks.within("reliability", r, 0.0, 1.0)
    else:
        value = checks.number("reliability", reliability)
        r = e.new_tensor(value)
        checks.within("reliability", r, 0.0, 1.0)
    # e' = e r / ((1 - r) S / W + r), with the root of S / W, because S / W may leave the dtype's range
    root = torch.exp(-0.5 * log_row_sum(log_ratio_from_evidence(e, W))).unsqueeze(-1)
    share = r.unsqueeze(-1) / ((1 - r.unsqueeze(-1)) / root + r.unsqueeze(-1) * root)
    kept = share * root
    # as may the part that is kept of overwhelming evidence, though not what it leaves
    return torch.where(kept > torch.finfo(e.dtype).tiny, e * kept, e * root * share)
