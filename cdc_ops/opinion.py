"""A subjective opinion: belief per class plus the uncertainty that is left, and what can be read off it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cdc_ops import checks
from cdc_ops.evidence import at_least_float32, log_ratio_from_evidence
from cdc_ops.special import digamma_excess, largest_log, log_row_sum

# Pairwise balance needs K x K numbers per opinion; this many are held at a time.
_PAIR_BLOCK = 2**22


@dataclass(frozen=True)
class Opinion:
    """Belief ``b`` [..., K] and uncertainty ``u`` [...] with ``sum_k b_k + u = 1``: a Dirichlet in other letters.

    Attributes:
        belief: ``b_k = e_k / S``.
        uncertainty: vacuity ``u = W / S``.
        prior_weight: ``W``, the weight of the prior; None stands for K (then ``alpha = e + 1``).
        log_partition: ``-ln u`` [...], or None to take it from u, which underflows from e = 1e38 W in float32.

    Source: Josang, "Subjective Logic", 2016; Sensoy et al., NeurIPS 2018.

    >>> opinion = Opinion.from_evidence(torch.tensor([6.0, 0.0]))
    >>> opinion.belief, opinion.uncertainty, opinion.prob
    (tensor([0.7500, 0.0000]), tensor(0.2500), tensor([0.8750, 0.1250]))
    """

    belief: Tensor
    uncertainty: Tensor
    prior_weight: float | None = None
    log_partition: Tensor | None = None

    @classmethod
    def from_evidence(cls, evidence: Tensor, prior_weight: float | None = None) -> Opinion:
        """The opinion that evidence [..., K] supports; finite for any finite evidence and prior weight.

        Raises:
            ValueError: evidence negative, not finite or without classes; prior_weight not between 2^-100 and 2^100.
        """
        e = at_least_float32(checks.evidence(evidence))
        W = checks.prior_weight(prior_weight, e.shape[-1])
        return cls._from_log_ratio(log_ratio_from_evidence(e, W), prior_weight)

    @classmethod
    def from_log_ratio(cls, log_ratio: Tensor, prior_weight: float | None = None) -> Opinion:
        """The opinion with log ratio ``l = ln(1 + e / W)`` [..., K]: evidence of any size.

        Raises:
            ValueError: log_ratio negative, not finite or without classes; prior_weight not between 2^-100 and 2^100.

        >>> Opinion.from_log_ratio(torch.tensor([300.0, 0.0])).belief
        tensor([1., 0.])
        """
        log_ratio = at_least_float32(checks.evidence(log_ratio, name="log_ratio"))
        checks.prior_weight(prior_weight, log_ratio.shape[-1])
        return cls._from_log_ratio(log_ratio, prior_weight)

    @classmethod
    def _from_log_ratio(cls, log_ratio: Tensor, prior_weight: float | None) -> Opinion:
        log_partition = log_row_sum(log_ratio)
        return cls(belief_of(log_ratio, log_partition), torch.exp(-log_partition), prior_weight, log_partition)

    @property
    def weight(self) -> float:
        """``W`` as a number."""
        return float(self.belief.shape[-1]) if self.prior_weight is None else float(self.prior_weight)

    @property
    def log_strength(self) -> Tensor:
        """``ln S`` of the Dirichlet strength ``S = sum_k alpha_k = W / u`` [...]."""
        log_partition = self.log_partition
        if log_partition is None:
            log_partition = -torch.log(self.uncertainty.clamp_min(torch.finfo(self.uncertainty.dtype).tiny))
        return log_partition + math.log(self.weight)

    @property
    def evidence(self) -> Tensor:
        """``e = S b`` [..., K]; saturates at the largest finite number."""
        # S may exceed the dtype's range where S b does not: its root is multiplied twice
        dtype = self.belief.dtype
        root = torch.exp((self.log_strength / 2).clamp(max=largest_log(dtype))).unsqueeze(-1)
        return (self.belief * root * root).clamp(max=torch.finfo(dtype).max)

    @property
    def alpha(self) -> Tensor:
        """Dirichlet parameters ``e + W / K`` [..., K]."""
        return self.evidence + self.weight / self.belief.shape[-1]

    @property
    def prob(self) -> Tensor:
        """Expected class probabilities ``b + u / K`` [..., K]."""
        return self.belief + self.uncertainty.unsqueeze(-1) / self.belief.shape[-1]

    def entropy(self) -> Tensor:
        """Entropy of the expected class probabilities [...], in nats: total predictive uncertainty."""
        p = self.prob
        return -(p * torch.log(p.clamp_min(torch.finfo(p.dtype).tiny))).sum(-1)

    def expected_entropy(self) -> Tensor:
        """Mean entropy of the class probabilities under the Dirichlet [...], in nats: data uncertainty.

        ``psi(S + 1) - sum_k p_k psi(alpha_k + 1)``.
        """
        return (self.entropy() - self.mutual_information()).clamp_min(0)

    def mutual_information(self) -> Tensor:
        """Entropy of the mean minus mean entropy [...], in nats: what more evidence could still settle.

        ``sum_k p_k (psi(alpha_k + 1) - ln alpha_k) - (psi(S + 1) - ln S)``, free of large cancelling terms.
        """
        p = self.prob.clamp_min(torch.finfo(self.belief.dtype).tiny)
        inverse_total = torch.exp(-self.log_strength)  # and 1 / alpha_k = 1 / (S p_k)
        gain = (p * digamma_excess(inverse_total.unsqueeze(-1) / p)).sum(-1)
        return (gain - digamma_excess(inverse_total)).clamp_min(0)

    def dissonance(self) -> Tensor:
        """Uncertainty from beliefs that contradict each other [...], in [0, 1].

        ``sum_k b_k (sum_{j != k} b_j Bal(j, k)) / (sum_{j != k} b_j)`` with
        ``Bal(j, k) = 1 - |b_j - b_k| / (b_j + b_k)``: 0 for one backed class, 1 for two fully and equally backed.

        Source: Josang, Cho, Chen, "Uncertainty characteristics of subjective opinions", FUSION 2018.

        >>> Opinion.from_evidence(torch.tensor([1e6, 1e6, 0.0])).dissonance()
        tensor(1.0000)
        """
        b = self.belief
        K = b.shape[-1]
        tiny = torch.finfo(b.dtype).tiny
        step = max(1, _PAIR_BLOCK // max(1, b.numel()))
        result = torch.zeros_like(self.uncertainty)
        for start in range(0, K, step):
            mine = b[..., start : start + step]
            size = mine.shape[-1]
            x, y = mine.unsqueeze(-1), b.unsqueeze(-2)
            other = torch.ones(size, K, dtype=b.dtype, device=b.device)
            other = other - torch.eye(size, K, dtype=b.dtype, device=b.device).roll(start, -1)
            balance = 2 * torch.minimum(x, y) / (x + y).clamp_min(tiny)
            weighed = (y * balance * other).sum(-1)
            result = result + (mine * weighed / (y * other).sum(-1).clamp_min(tiny)).sum(-1)
        return result


def belief_of(log_ratio: Tensor, log_partition: Tensor) -> Tensor:
    """``b = (e / W) u`` from ``l`` [..., K] and ``-ln u`` [...], exact for tiny and for enormous evidence."""
    return -torch.expm1(-log_ratio) * torch.exp(log_ratio - log_partition.unsqueeze(-1))


def prob_of(belief: Tensor, log_partition: Tensor, classes: int) -> Tensor:
    """``p = b + u / K`` from belief [..., any of the K classes] and ``-ln u`` [...]."""
    return belief + (torch.exp(-log_partition) / classes).unsqueeze(-1)
