"""From image and text features to one fused opinion, and to its k most believed classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cdc_ops import checks
from cdc_ops.backends import Problem, choose
from cdc_ops.evidence import ACTIVATIONS, evidence_from_log_ratio, full_precision
from cdc_ops.fusion import RULES, conflict_from_log_partition
from cdc_ops.opinion import Opinion, belief_of, prob_of


def make_problem(
    image: Tensor,
    text: Tensor,
    scale: float | Tensor,
    bias: float | Tensor | None,
    activation: str,
    rule: str,
    prior_weight: float | None,
    normalize: bool,
    readings: checks.Readings | None = None,
) -> Problem:
    """Check the arguments shared by the fused operations and bring them into one form.

    Their values are checked before this returns, or when the ``readings`` of the caller, who has more, are read.
    """
    mine = readings or checks.Readings()
    checks.one_of("activation", activation, ACTIVATIONS)
    checks.one_of("rule", rule, RULES)
    image, text = checks.features(image, text)
    dtype = checks.at_least_single(image.dtype, text.dtype)
    M, K = text.shape[:2]
    scale = checks.per_prompt("scale", scale, M, dtype, image.device, mine)
    bias = None if bias is None else checks.per_prompt("bias", bias, M, dtype, image.device, mine)
    image_norm, text_norm = checks.finite_lengths("image", image, mine), checks.finite_lengths("text", text, mine)
    if not normalize:
        checks.products(image_norm, text_norm, scale, mine)
    prior_weight = checks.prior_weight(prior_weight, K)
    if readings is None:
        mine.read()
    # lengths of lower precision would cost float64 its digits
    image_norm, text_norm = (
        x if normalize and x is not None and x.dtype == dtype else None for x in (image_norm, text_norm)
    )
    return Problem(
        image=image,
        text=text,
        scale=scale,
        bias=bias,
        activation=activation,
        rule=rule,
        prior_weight=prior_weight,
        classes=K,
        normalize=bool(normalize),
        dtype=dtype,
        image_norm=image_norm,
        text_norm=text_norm,
    )


@dataclass(frozen=True)
class FusedOpinion:
    """The opinion of M prompts together, kept in log space; everything else is derived when asked for.

    What :func:`fused_opinion` returns.

    Attributes:
        log_ratio: ``l_k = ln(1 + e_k / W)`` [B, K] of the fused opinion.
        log_partition: ``-ln u`` [B].
        prompt_log_partition: ``-ln u_m`` [B, M].
        prior_weight: ``W``.
        rule: the fusion rule.

    Source: as :func:`fused_opinion`; the log-space form is closed-form Dempster fusion (docs/mathematics.md, 1).

    >>> image, text = torch.eye(2), torch.eye(2).expand(3, 2, 2)
    >>> opinion = fused_opinion(image, text, scale=2.0, activation="relu")
    >>> opinion.evidence  # 2 ((1 + 2 / 2)^3 - 1) on the right class
    tensor([[14.,  0.],
            [ 0., 14.]])
    >>> opinion.belief[0], opinion.uncertainty[0], opinion.prob[0]
    (tensor([0.8750, 0.0000]), tensor(0.1250), tensor([0.9375, 0.0625]))
    """

    log_ratio: Tensor
    log_partition: Tensor
    prompt_log_partition: Tensor
    prior_weight: float
    rule: str = "dempster"

    @property
    def uncertainty(self) -> Tensor:
        """Vacuity ``u`` [B] of the fused opinion; may underflow to 0 where log_partition stays exact."""
        return torch.exp(-self.log_partition)

    @property
    def prompt_uncertainty(self) -> Tensor:
        """Vacuity ``u_m`` [B, M] of each prompt's own opinion."""
        return torch.exp(-self.prompt_log_partition)

    @property
    def belief(self) -> Tensor:
        """``b_k`` [B, K]; with the uncertainty, sums to one."""
        return belief_of(self.log_ratio, self.log_partition)

    @property
    def prob(self) -> Tensor:
        """Expected class probabilities ``b_k + u / K`` [B, K]."""
        return prob_of(self.belief, self.log_partition, self.log_ratio.shape[-1])

    @property
    def evidence(self) -> Tensor:
        """``e_k = W expm1(l_k)`` [B, K]; saturates at the largest finite number."""
        return evidence_from_log_ratio(self.log_ratio, self.prior_weight)

    @property
    def conflict(self) -> Tensor:
        """``1 - (prod_m u_m) / u`` [B] in [0, 1]: Dempster's conflict between the prompts.

        Raises:
            ValueError: the opinion was fused by another rule; use :func:`conflict` on the prompts' evidence.
        """
        if self.rule != "dempster":
            raise ValueError(
                f"conflict belongs to rule 'dempster'; this opinion was fused by {self.rule!r}: "
                "call cdc_ops.conflict on the evidence of the prompts"
            )
        return conflict_from_log_partition(self.log_partition, self.prompt_log_partition.sum(-1))

    def opinion(self) -> Opinion:
        """As an :class:`Opinion` [B, K], for its entropies and dissonance."""
        return Opinion(self.belief, self.uncertainty, self.prior_weight, self.log_partition)


@dataclass(frozen=True)
class TopK:
    """The k most believed classes of each image, most believed first. What :func:`fused_topk` returns.

    Attributes:
        classes: class indices [B, k].
        prob, belief: expected probability and belief of these classes [B, k].
        uncertainty: vacuity [B] of the fused opinion.
        prompt_uncertainty: vacuity [B, M] of each prompt's own opinion.

    >>> top = fused_topk(torch.eye(3)[:1], torch.eye(3).expand(2, 3, 3), 2, scale=3.0, activation="relu")
    >>> top.classes[:, 0], top.belief, top.uncertainty
    (tensor([0]), tensor([[0.7500, 0.0000]]), tensor([0.2500]))
    """

    classes: Tensor
    prob: Tensor
    belief: Tensor
    uncertainty: Tensor
    prompt_uncertainty: Tensor

    @classmethod
    def of(
        cls, classes: Tensor, log_ratio: Tensor, log_partition: Tensor, prompt_log_partition: Tensor, total: int
    ) -> TopK:
        """From log ratios [B, k] of these of ``total`` classes, and log partitions over all."""
        belief = belief_of(log_ratio, log_partition)
        prob = prob_of(belief, log_partition, total)
        return cls(classes, prob, belief, torch.exp(-log_partition), torch.exp(-prompt_log_partition))


def fused_opinion(
    image: Tensor,
    text: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    activation: str = "exp",
    rule: str = "dempster",
    prior_weight: float | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> FusedOpinion:
    """Every prompt's opinion about every image, fused into one.

    Logits ``z_mk = scale_m <x, t_mk> + bias_m`` become evidence ``e = activation(z)`` and opinions with prior
    weight W; the rule fuses the M opinions. Everything stays in log space: finite, values and gradients, at
    CLIP's scale of 100 (where evidence reaches 1e43 and its product over prompts 1e170) as for no evidence.

    Args:
        image: ``x`` [B, D], or [B, M, D] when every prompt has its own image features. B may be 0.
        text: ``t`` [M, K, D].
        scale: number, scalar tensor, or one per prompt [M]; no larger than 2^100, about 1e30.
        bias: likewise, or None for 0.
        activation: ``"exp"``, ``"softplus"`` or ``"relu"``.
        rule: ``"dempster"``, ``"cumulative"``, ``"averaging"`` or ``"weighted"``; see :func:`fuse_evidence`.
        prior_weight: ``W``, default K.
        normalize: divide image and text features by their length first. As in :func:`torch.nn.functional.normalize`,
            a length below 1e-12 counts as 1e-12: zero features stay zero, and all but zero ones stay small. Without,
            the logits must lie within the dtype.
        backend: ``"reference"`` (plain PyTorch, holds [B, M, K]), ``"blocked"`` (never holds [B, M, K], forward
            or backward), ``"triton"`` (fused kernels), or None: triton on a GPU that can run it, else blocked; while
            ``torch.compile`` traces, reference.

    Returns:
        :class:`FusedOpinion` with log_ratio [B, K], uncertainty [B], prompt_uncertainty [B, M] and, derived when
        asked for, belief, prob, evidence, conflict. float64 if an input is float64, else float32, also for
        half-precision inputs and under autocast. Differentiable in image, text, scale and bias.

    Raises:
        ValueError: shapes that do not fit, no class or prompt, features not floating or not finite, features whose
            length overflows (from about 1e19 in float32) or, with normalize False, lengths whose product times scale
            is beyond 2^100, scale or bias not within 2^100, prior_weight not between 2^-100 and 2^100, mixed devices,
            unknown activation, rule or backend. Which value checks cost what: :class:`value_checks`.
        NotImplementedError: in a backward pass with ``create_graph=True``; only backend "reference" has second
            derivatives.

    Source: opinions: Sensoy et al., NeurIPS 2018; Dempster fusion of views: Han et al., ICLR 2021, here in
    closed form (docs/mathematics.md, 1). That CDC fuses its prompts this way: Zhang et al., NeurIPS 2024.

    >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> text = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]])
    >>> opinion = fused_opinion(image, text, scale=2.0)
    >>> opinion.prob.argmax(-1), opinion.uncertainty.shape, opinion.prompt_uncertainty.shape
    (tensor([0, 1]), torch.Size([2]), torch.Size([2, 2]))
    """
    problem = make_problem(image, text, scale, bias, activation, rule, prior_weight, normalize)
    with full_precision(image.device):
        log_ratio, log_partition, prompts = choose(backend, problem).fused_opinion(problem)
    return FusedOpinion(log_ratio, log_partition, prompts, problem.prior_weight, rule)


def fused_topk(
    image: Tensor,
    text: Tensor,
    k: int,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    activation: str = "exp",
    rule: str = "dempster",
    prior_weight: float | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> TopK:
    """The k most believed classes of the fused opinion; with backend "blocked" nothing of size [B, K] exists.

    Args:
        k: how many classes, 1 to K. The rest as in :func:`fused_opinion`. Ties are broken arbitrarily.

    Returns:
        :class:`TopK` with classes, prob, belief [B, k], uncertainty [B], prompt_uncertainty [B, M].
        For inference: no gradients.

    Raises:
        ValueError: as :func:`fused_opinion`; k outside 1..K.

    Source: as :func:`fused_opinion`. Belief and expected probability order the classes alike, and so does the log
    ratio, which is why a running top-k over blocks of classes is exact.

    >>> image, text = torch.eye(3)[:2], torch.eye(3).expand(2, 3, 3)
    >>> fused_topk(image, text, 1, scale=5.0).classes
    tensor([[0],
            [1]])
    """
    problem = make_problem(image, text, scale, bias, activation, rule, prior_weight, normalize)
    checks.how_many("k", k, problem.classes)
    with torch.no_grad(), full_precision(image.device):
        return TopK.of(*choose(backend, problem).fused_topk(problem, k), problem.classes)
