"""nn.Module forms, so that an adapter composes the operations in its own ``__init__``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdc_ops import checks
from cdc_ops.backends import BACKENDS, KERNEL_BACKENDS
from cdc_ops.dirichlet import FORMS
from cdc_ops.evidence import ACTIVATIONS
from cdc_ops.frontdoor import frontdoor_adjust, own_mixture
from cdc_ops.fusion import RULES, fuse_evidence
from cdc_ops.losses import KINDS, REDUCTIONS, consistency_loss, decoupling_loss, evidential_cross_entropy
from cdc_ops.similarity import FusedOpinion, fused_opinion

MARGINALS = ("batch", "bank", "self")


def _check_defaults(prior_weight: float | None, backend: str | None, backends: tuple[str, ...]) -> None:
    """Of the two arguments that may be None; whether a backend can run here is seen when it is used."""
    if prior_weight is not None:
        checks.prior_weight(prior_weight, 1)
    if backend is not None:
        checks.one_of("backend", backend, backends)


class EvidenceHead(nn.Module):
    """How sure a prompt may be: a learnable scale and bias per prompt between cosine and evidence.

    With CLIP's own scale of 100, exp evidence is always certain; fitting M scales and M biases on the few-shot
    data is what calibrates it. The scale is learned as its logarithm and stays positive. Parameters are float32.
    Called with image [B, D] or [B, M, D] and text [M, K, D], gives a :class:`FusedOpinion`.

    Args:
        prompts: M.
        scale, bias: initial values, a number or one per prompt (sequence of M).
        activation, rule, prior_weight, normalize, backend: as :func:`fused_opinion`.
        learn_scale, learn_bias: False keeps the value fixed, as a buffer.

    Raises:
        ValueError: prompts not a positive integer, scale or prior_weight not above 0, values of the wrong number or
            not finite, unknown names; when called, as :func:`fused_opinion`.

    Source: **our reading** (docs/mathematics.md, 7): the evidence head is part of this library's CDC, not a formula of
    the paper.

    >>> head = EvidenceHead(2, scale=10.0, bias=-1.0)
    >>> head(torch.eye(3), torch.eye(3).expand(2, 3, 3)).prob.argmax(-1)
    tensor([0, 1, 2])
    >>> sorted(name for name, _ in head.named_parameters())
    ['bias', 'log_scale']
    """

    log_scale: Tensor
    bias: Tensor

    def __init__(
        self,
        prompts: int,
        *,
        scale: float | list[float] | Tensor = 1.0,
        bias: float | list[float] | Tensor = 0.0,
        activation: str = "exp",
        rule: str = "dempster",
        prior_weight: float | None = None,
        normalize: bool = True,
        learn_scale: bool = True,
        learn_bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(prompts, bool) or not isinstance(prompts, int) or prompts < 1:
            raise ValueError(f"prompts must be a positive integer; got {prompts!r}")
        checks.one_of("activation", activation, ACTIVATIONS)
        checks.one_of("rule", rule, RULES)
        _check_defaults(prior_weight, backend, BACKENDS)
        self.activation, self.rule, self.normalize, self.backend = activation, rule, normalize, backend
        self.prior_weight = prior_weight
        initial = _per_prompt("scale", scale, prompts)
        if not bool((initial > 0).all()):
            raise ValueError(f"scale must be > 0; got {scale!r}")
        for name, value, learn in (
            ("log_scale", initial.log(), learn_scale),
            ("bias", _per_prompt("bias", bias, prompts), learn_bias),
        ):
            if learn:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @property
    def scale(self) -> Tensor:
        """``exp(log_scale)`` [M]."""
        return self.log_scale.exp()

    def forward(self, image: Tensor, text: Tensor) -> FusedOpinion:
        """The fused opinion of image [B, D] or [B, M, D] and text [M, K, D]."""
        return fused_opinion(
            image,
            text,
            scale=self.scale,
            bias=self.bias,
            activation=self.activation,
            rule=self.rule,
            prior_weight=self.prior_weight,
            normalize=self.normalize,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"prompts={self.log_scale.numel()}, activation={self.activation!r}, rule={self.rule!r}"


def _per_prompt(name: str, value: float | list[float] | Tensor, prompts: int) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise ValueError(f"{name} must be a number or {prompts} numbers; got {value!r}") from None
    return checks.per_prompt(name, value.detach(), prompts, torch.float32, value.device).clone()


class EvidenceFusion(nn.Module):
    """:func:`fuse_evidence` with its rule (and backend) fixed.

    Args:
        rule, prior_weight, backend: as :func:`fuse_evidence`.
        dim: the dimension of the M opinions in evidence [..., M, ..., K] (not the last).

    Raises:
        ValueError: dim not an integer, prior_weight not above 0, unknown names; when called, as
            :func:`fuse_evidence`.

    >>> EvidenceFusion("averaging", dim=0)(torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
    tensor([2.0000, 0.5000])
    """

    def __init__(
        self,
        rule: str = "dempster",
        dim: int = 1,
        prior_weight: float | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        checks.one_of("rule", rule, RULES)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise ValueError(f"dim must be an integer; got {checks.came(dim)}")
        _check_defaults(prior_weight, backend, KERNEL_BACKENDS)
        self.rule, self.dim, self.prior_weight, self.backend = rule, dim, prior_weight, backend

    def forward(self, evidence: Tensor) -> Tensor:
        """Fused evidence, without the dimension of the opinions."""
        return fuse_evidence(evidence, self.dim, self.rule, self.prior_weight, backend=self.backend)

    def extra_repr(self) -> str:
        return f"rule={self.rule!r}, dim={self.dim}"


class FrontDoorAggregator(nn.Module):
    """:func:`frontdoor_adjust` with a choice of who stands for the population x'.

    Called with ``P(s | x)`` [B, S] and, except for a bank, ``P(y | s, x)`` [B, S, K], gives ``P(y | do(x))`` [B, K].

    Args:
        marginal: ``"batch"``: the batch itself; ``"bank"``: a memory of the last N inputs, a buffer that is saved with
            the module; ``"self"``: x alone, which is the mixture of its own semantics weighted by P(s | x).
        bank_size, semantics, classes: N, S, K; needed for ``"bank"`` only.

    Raises:
        ValueError: unknown marginal; sizes missing for a bank or not positive; a bank asked while it is empty;
            shapes that do not fit.

    Source: Pearl 1995. The choice of marginals is **our reading** of CDC.

    >>> aggregate = FrontDoorAggregator("self")
    >>> aggregate(torch.tensor([[0.5, 0.5]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    tensor([[0.5000, 0.5000]])
    """

    memory: Tensor
    count: Tensor

    def __init__(
        self,
        marginal: str = "batch",
        *,
        bank_size: int | None = None,
        semantics: int | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        checks.one_of("marginal", marginal, MARGINALS)
        self.marginal = marginal
        if marginal == "bank":
            sizes = []
            for name, size in (("bank_size", bank_size), ("semantics", semantics), ("classes", classes)):
                if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                    raise ValueError(f"{name} must be a positive integer for marginal 'bank'; got {size!r}")
                sizes.append(size)
            self.register_buffer("memory", torch.zeros(sizes, dtype=torch.float32))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))  # inputs ever seen

    @torch.no_grad()
    def update(self, class_given_semantic_x: Tensor) -> None:
        """Write ``P(y | s, x)`` [B, S, K] of new inputs into the bank, over the oldest ones.

        Raises:
            ValueError: another marginal than "bank"; another S or K; values negative or not finite.

        >>> bank = FrontDoorAggregator("bank", bank_size=100, semantics=2, classes=2)
        >>> bank.update(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
        >>> bank(torch.tensor([[0.25, 0.75]]))
        tensor([[0.2500, 0.7500]])
        """
        if self.marginal != "bank":
            raise ValueError(f"update needs marginal 'bank'; this aggregator's is {self.marginal!r}")
        new = checks.floating("class_given_semantic_x", class_given_semantic_x, "[B, S, K]")
        size, *rest = self.memory.shape
        if new.dim() != 3 or list(new.shape[1:]) != rest:
            raise ValueError(
                f"class_given_semantic_x must have shape [B, {rest[0]}, {rest[1]}]; got {checks.came(new)}"
            )
        checks.nonnegative("class_given_semantic_x", new)
        skipped = max(0, new.shape[0] - size)  # more than the bank holds: only the last ones stay
        places = (self.count + torch.arange(skipped, new.shape[0], device=self.memory.device)) % size
        self.memory[places] = new[skipped:].to(self.memory)
        self.count += new.shape[0]

    def forward(self, semantic_given_x: Tensor, class_given_semantic_x: Tensor | None = None) -> Tensor:
        """``P(y | do(x))`` [B, K] from ``P(s | x)`` [B, S] and, except for a bank, ``P(y | s, x)`` [B, S, K]."""
        if self.marginal == "bank":
            filled = min(int(self.count), self.memory.shape[0])
            if filled == 0:
                raise ValueError("the memory bank must be filled by update() first; got an empty bank")
            return frontdoor_adjust(semantic_given_x, self.memory[:filled])
        if class_given_semantic_x is None:
            raise ValueError(
                f"class_given_semantic_x must be a tensor [B, S, K] for marginal {self.marginal!r}; got None"
            )
        if self.marginal == "batch":
            return frontdoor_adjust(semantic_given_x, class_given_semantic_x)
        return own_mixture(semantic_given_x, class_given_semantic_x)

    def extra_repr(self) -> str:
        return f"marginal={self.marginal!r}"


class EvidentialLoss(nn.Module):
    """:func:`evidential_cross_entropy` with its choices fixed; ``kl_weight`` may be set between epochs to anneal it.

    Called with image [B, D] or [B, M, D], text [M, K, D], target [B], scale and bias.

    Args:
        form, kl_weight, prompt_weight, fused_weight, activation, rule, prior_weight, normalize, reduction, backend: as
            :func:`evidential_cross_entropy`.

    Raises:
        ValueError: a weight negative or not finite, prior_weight not above 0, unknown names; when called, as
            :func:`evidential_cross_entropy`.

    >>> head, loss = EvidenceHead(2, scale=5.0), EvidentialLoss(form="log")
    >>> image, text = torch.eye(3), torch.eye(3).expand(2, 3, 3)
    >>> loss(image, text, torch.arange(3), scale=head.scale, bias=head.bias).requires_grad
    True
    """

    def __init__(
        self,
        *,
        form: str = "digamma",
        kl_weight: float = 0.0,
        prompt_weight: float = 1.0,
        fused_weight: float = 1.0,
        activation: str = "exp",
        rule: str = "dempster",
        prior_weight: float | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        checks.one_of("form", form, FORMS)
        checks.one_of("activation", activation, ACTIVATIONS)
        checks.one_of("rule", rule, RULES)
        checks.one_of("reduction", reduction, REDUCTIONS)
        _check_defaults(prior_weight, backend, BACKENDS)
        self.form, self.activation, self.rule, self.reduction = form, activation, rule, reduction
        self.kl_weight = checks.number("kl_weight", kl_weight, low=0.0)
        self.prompt_weight = checks.number("prompt_weight", prompt_weight, low=0.0)
        self.fused_weight = checks.number("fused_weight", fused_weight, low=0.0)
        self.prior_weight, self.normalize, self.backend = prior_weight, normalize, backend

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        target: Tensor,
        *,
        scale: float | Tensor,
        bias: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of image [B, D] or [B, M, D], text [M, K, D] and target [B]."""
        return evidential_cross_entropy(
            image,
            text,
            target,
            scale=scale,
            bias=bias,
            activation=self.activation,
            rule=self.rule,
            form=self.form,
            kl_weight=self.kl_weight,
            prompt_weight=self.prompt_weight,
            fused_weight=self.fused_weight,
            prior_weight=self.prior_weight,
            normalize=self.normalize,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"form={self.form!r}, activation={self.activation!r}, rule={self.rule!r}, kl_weight={self.kl_weight}"


class DecouplingLoss(nn.Module):
    """:func:`decoupling_loss` of text [M, K, D] with its kind (and backend) fixed (**our reading** of CDC).

    Args:
        kind, backend: as :func:`decoupling_loss`.

    Raises:
        ValueError: unknown kind or backend; when called, as :func:`decoupling_loss`.

    >>> DecouplingLoss()(torch.ones(2, 3, 4))
    tensor(1.)
    """

    def __init__(self, kind: str = "cosine", *, backend: str | None = None) -> None:
        super().__init__()
        checks.one_of("kind", kind, KINDS)
        _check_defaults(None, backend, KERNEL_BACKENDS)
        self.kind, self.backend = kind, backend

    def forward(self, text: Tensor) -> Tensor:
        """The loss of text [M, K, D]."""
        return decoupling_loss(text, self.kind, backend=self.backend)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


class ConsistencyLoss(nn.Module):
    """:func:`consistency_loss` of text [M, K, D] against anchor [K, D], its temperature fixed (**our reading** of CDC).

    Args:
        temperature: above 0; CLIP's own is 0.01.

    Raises:
        ValueError: temperature not above 0; when called, as :func:`consistency_loss`.

    >>> ConsistencyLoss(1.0)(torch.eye(2).unsqueeze(0), torch.eye(2))
    tensor(0.3133)
    """

    def __init__(self, temperature: float = 0.01) -> None:
        super().__init__()
        self.temperature = checks.number("temperature", temperature, low=0.0, open_low=True)

    def forward(self, text: Tensor, anchor: Tensor) -> Tensor:
        """The loss of text [M, K, D] against anchor [K, D]."""
        return consistency_loss(text, anchor, self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
