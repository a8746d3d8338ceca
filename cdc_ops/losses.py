"""Losses: evidential cross-entropy over prompts, decoupling of templates, consistency with the class."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cdc_ops import checks
from cdc_ops.backends import LossForm, choose, kernels
from cdc_ops.dirichlet import FORMS, REDUCTIONS, dirichlet_loss, reduce
from cdc_ops.evidence import at_least_float32, full_precision, log_ratio_from_evidence
from cdc_ops.similarity import make_problem

KINDS = ("cosine", "cosine_squared")


def make_loss_form(form: str, kl_weight: float, prompt_weight: float, fused_weight: float, reduction: str) -> LossForm:
    """Check the arguments that say which evidential loss."""
    checks.one_of("form", form, FORMS)
    checks.one_of("reduction", reduction, REDUCTIONS)
    return LossForm(
        form=form,
        kl_weight=checks.number("kl_weight", kl_weight, low=0.0),
        prompt_weight=checks.number("prompt_weight", prompt_weight, low=0.0),
        fused_weight=checks.number("fused_weight", fused_weight, low=0.0),
        reduction=reduction,
    )


def evidential_cross_entropy(
    image: Tensor,
    text: Tensor,
    target: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    activation: str = "exp",
    rule: str = "dempster",
    form: str = "digamma",
    kl_weight: float = 0.0,
    prompt_weight: float = 1.0,
    fused_weight: float = 1.0,
    prior_weight: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Trusted cross-entropy: the evidential loss of every prompt's opinion and of the fused one.

    ``prompt_weight * sum_m L(alpha_m) + fused_weight * L(alpha)`` where L is, with target y and ``S = sum_k alpha_k``,

    - form ``"digamma"``: ``psi(S) - psi(alpha_y)``, the expected cross-entropy under the Dirichlet;
    - form ``"log"``: ``ln S - ln alpha_y``, type-II maximum likelihood;
    - form ``"mse"``: ``sum_k (y_k - p_k)^2 + p_k (1 - p_k) / (S + 1)``;

    plus ``kl_weight * KL(Dir(a~) || Dir(1))`` with ``a~ = y + (1 - y) alpha``. Computed from log evidence and,
    for the target, from what lies off it: values and gradients are finite and accurate when the model is
    confident (p = 0.999999, scale 100). The KL grows only like ``K ln S`` once its linear terms are
    cancelled in closed form, so it too is finite for any evidence; its rounding error in float32 is about
    1e-7 K.

    Backend "blocked" makes the gradients of a mean or a sum along with it (for activation "exp", rule "dempster", no KL
    and form "digamma" or "log") and holds them until its backward pass: take the loss under ``torch.no_grad`` where
    none will follow.

    Args:
        image, text, scale, bias, activation, rule, prior_weight, normalize, backend: as :func:`fused_opinion`.
        target: class indices [B], integers in [0, K).
        form: ``"digamma"``, ``"log"`` or ``"mse"``.
        kl_weight: weight of the KL term, not negative; TMC anneals it from 0 to 1.
        prompt_weight, fused_weight: weights of the two parts, not negative. With fused_weight 0 nothing is fused.
        reduction: over images: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        Scalar, or [B] for reduction "none". An empty batch gives 0 for "sum", [0] for "none".

    Raises:
        ValueError: as :func:`fused_opinion`; target of another shape, not integer or out of range; a weight
            negative or not finite; unknown form or reduction; reduction "mean" of an empty batch.
        NotImplementedError: as :func:`fused_opinion`.

    Source: Sensoy et al., NeurIPS 2018 (equations 3 to 5 and the KL); the sum over views and the fused opinion:
    Han et al., ICLR 2021. That CDC's trusted cross-entropy has this shape is **our reading**.

    >>> image, text = torch.eye(2), torch.eye(2).expand(3, 2, 2)
    >>> right = evidential_cross_entropy(image, text, torch.tensor([0, 1]), scale=5.0)
    >>> wrong = evidential_cross_entropy(image, text, torch.tensor([1, 0]), scale=5.0)
    >>> bool(right < wrong)
    True
    """
    loss = make_loss_form(form, kl_weight, prompt_weight, fused_weight, reduction)
    readings = checks.Readings()
    problem = make_problem(image, text, scale, bias, activation, rule, prior_weight, normalize, readings)
    B, _, K = problem.sizes
    target = checks.target(target, [B], K, image.device, readings)
    readings.read()
    with full_precision(image.device):
        return choose(backend, problem).evidential_loss(problem, target, loss)


def dirichlet_cross_entropy(
    evidence: Tensor,
    target: Tensor,
    *,
    form: str = "digamma",
    kl_weight: float = 0.0,
    prior_weight: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The evidential loss of ready-made evidence: one term of :func:`evidential_cross_entropy`.

    For opinions that do not come from image and text features, such as the views of a multi-view classifier.

    Args:
        evidence: [..., K], not negative; classes last.
        target: class indices [...], integers in [0, K).
        form, kl_weight, prior_weight, reduction: as :func:`evidential_cross_entropy`.

    Returns:
        Scalar, or [...] for reduction "none".

    Raises:
        ValueError: as :func:`fuse_evidence` and :func:`evidential_cross_entropy`.

    Source: Sensoy et al., NeurIPS 2018.

    >>> dirichlet_cross_entropy(torch.tensor([[8.0, 0.0]]), torch.tensor([0]), form="log")
    tensor(0.1054)
    """
    checks.one_of("form", form, FORMS)
    checks.one_of("reduction", reduction, REDUCTIONS)
    kl_weight = checks.number("kl_weight", kl_weight, low=0.0)
    e = at_least_float32(checks.evidence(evidence))
    W = checks.prior_weight(prior_weight, e.shape[-1])
    target = checks.target(target, e.shape[:-1], e.shape[-1], e.device)
    return reduce(dirichlet_loss(log_ratio_from_evidence(e, W), target, W, form, kl_weight), reduction)


def decoupling_loss(text: Tensor, kind: str = "cosine", *, backend: str | None = None) -> Tensor:
    """Push the templates of a class apart: mean similarity of its text features across pairs of prompts.

    Mean over classes k and prompt pairs m != n of ``cos(t_mk, t_nk)``, or of its square.

    Args:
        text: ``t`` [M, K, D]. A length below 1e-12 counts as 1e-12, so that zero features have cosine 0.
        kind: ``"cosine"`` (least at opposite features) or ``"cosine_squared"`` (least at orthogonal ones).
        backend: ``"reference"`` (plain PyTorch), ``"triton"`` (one read of the features, for as many as one program
            holds), or None: triton on a GPU that can run it, else reference.

    Returns:
        Scalar in [-1, 1]; 0 when M = 1, where there are no pairs.

    Raises:
        ValueError: text of another shape, empty, not floating, not finite or of overflowing length; unknown kind.
        NotImplementedError: as :func:`fused_opinion`.

    Source: **our reading** of CDC's decoupling loss (Zhang et al., NeurIPS 2024); not the paper's formula.

    >>> decoupling_loss(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[3.0, 0.0]]]))
    tensor(0.3333)
    """
    checks.one_of("kind", kind, KINDS)
    text = checks.text_features("text", text)
    checks.finite_lengths("text", text)
    M, K, _ = text.shape
    pairs = max(1, K * M * (M - 1) // 2)
    triton = kernels(backend, text)
    if triton is not None and (backend == "triton" or triton.takes_text(text)):
        return triton.decoupling_sum(text, kind == "cosine_squared") / pairs
    with full_precision(text.device):
        t = F.normalize(at_least_float32(text), dim=-1).transpose(0, 1)
        cosine = t @ t.transpose(1, 2)  # [K, M, M]
        if kind == "cosine_squared":
            cosine = cosine * cosine
        return torch.tril(cosine, diagonal=-1).sum() / pairs


def consistency_loss(text: Tensor, anchor: Tensor, temperature: float = 0.01) -> Tensor:
    """Keep every learned template recognisable: cross-entropy of its class among hand-crafted features.

    Mean over m and k of the cross-entropy of ``cos(t_mk, anchor_k') / temperature`` with class k.

    Args:
        text: ``t`` [M, K, D], learned. A length below 1e-12 counts as 1e-12, so that zero features have cosine 0.
        anchor: [K, D], usually from a hand-crafted template and frozen.
        temperature: above 0; CLIP's own is 0.01.

    Returns:
        Scalar, not negative; 0 when K = 1.

    Raises:
        ValueError: shapes that do not fit, features not floating, not finite or of overflowing length, mixed
            devices, temperature not above 0.

    Source: **our reading** of CDC's consistency loss (Zhang et al., NeurIPS 2024); not the paper's formula.

    >>> consistency_loss(torch.eye(2).expand(3, 2, 2), torch.eye(2), temperature=1.0)
    tensor(0.3133)
    """
    text = at_least_float32(checks.text_features("text", text))
    M, K, D = text.shape
    anchor = at_least_float32(checks.floating("anchor", anchor, f"[{K}, {D}]"))
    if list(anchor.shape) != [K, D]:
        raise ValueError(
            f"anchor must have shape [{K}, {D}] to match text {list(text.shape)}; got {checks.came(anchor)}"
        )
    checks.same_device("text", text, anchor=anchor)
    checks.finite_lengths("text", text)
    checks.finite_lengths("anchor", anchor)
    temperature = checks.number("temperature", temperature, low=0.0, open_low=True)
    with full_precision(text.device):
        dtype = torch.promote_types(text.dtype, anchor.dtype)
        cosine = F.normalize(text.to(dtype), dim=-1) @ F.normalize(anchor.to(dtype), dim=-1).T
        target = torch.arange(K, device=text.device).repeat(M)
        return F.cross_entropy(cosine.reshape(M * K, K) / temperature, target)
