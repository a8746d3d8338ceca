"""CDC: several learned templates, kept apart, each with an opinion; their fusion knows when it does not know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdc_models.clip import ClipBackbone, encode_prompted_image, encode_prompted_text
from cdc_models.clip.checks import check_count
from cdc_models.clip.classes import check_template
from cdc_models.data.transforms import Views
from cdc_models.methods.base import Method, Prediction, bounded_temperature
from cdc_models.methods.options import check_flags, check_room
from cdc_models.prompts import CoupledPrompts, PromptContext, default_depth
from cdc_models.prompts.templates import fill_templates
from cdc_models.seeds import check_seed
from cdc_ops import (
    EvidenceHead,
    FusedOpinion,
    Opinion,
    checks,
    consistency_loss,
    decoupling_loss,
    evidential_cross_entropy,
)
from cdc_ops.dirichlet import FORMS
from cdc_ops.evidence import log_ratio_from_logits

__all__ = ["CDC", "DEFAULT_VIEWS"]

DEFAULT_VIEWS = ("none", "colour", "rotation", "blur")


class CDC(Method):
    """Causality-guided semantic decoupling and classification.

    Three parts, each of which can be switched off alone:

    - **VSD**, dual semantic decoupling: template m is trained on its own augmentation of the image (`views`),
      and `weight_de` pushes its text features away from the other templates' of the same class.
    - **DSTC**, trusted classification (`trusted`): every template gives an opinion, Dempster's rule fuses them,
      the trusted cross-entropy trains them. Off: softmax cross-entropy of each template, probabilities averaged.
    - Consistency (`weight_con`): every template must stay recognisable among hand-crafted features.

    The objective is ``L_t-ce + weight_de * L_de + weight_con * L_con``. **Our reading** of the paper, whose
    equations were not at hand: the forms of L_de and L_con, the set of augmentations, the evidence head (a scale
    and a bias per template, learned; CLIP's own scale makes every opinion certain) and all weights.

    Args:
        backbone: a CLIP that takes prompts in the text tower, and in the image tower with `image_prompts`.
        class_names: the K classes.
        n_templates: M.
        n_ctx: prompt vectors per layer and template.
        depth: layers with prompts of their own (with `image_prompts`; text-only prompts are shallow); None: the
            published 9, or all layers of shallower towers.
        words: what the templates start from, one text or one per template.
        hand_crafted: template t^0, fixed, the anchor of the consistency loss.
        views: augmentation of each template, see `Views`; by default the first M of `DEFAULT_VIEWS`; None trains every
            template on the same image.
        weight_de, weight_con: weights of the decoupling and the consistency loss; 0 switches them off.
        temperature: of the consistency loss.
        trusted: DSTC on or off.
        evidence_head: whether scale and bias of the evidence are trained; if not, they stay CLIP's scale and 0 until
            `calibrate` divides both by its temperature.
        image_prompts: False learns text prompts only; the image side is zero-shot CLIP's.
        image_start: the first block of the image tower that sees prompts (ours; MaPLe's is 0). The blocks before it run
            once for an image that the templates share, as in prediction.
        activation, rule, form, kl_weight: see `evidential_cross_entropy`.
        noise: deviation added to each template's start, so that templates that start from one text differ.
        seed: of the random start.

    Raises:
        ValueError: for a backbone that takes no prompts, a depth it does not have, unknown views, other options that
            are not among those named or out of range, names that n_ctx leaves no room for.

    Source: CDC (Zhang, Li, Liu, Qiang, NeurIPS 2024, arXiv 2410.12816); coupled prompts: MaPLe; opinions and
    their fusion: Trusted Multi-View Classification (Han et al., ICLR 2021).

    Example:
        >>> from cdc_models import CDC, load_clip
        >>> model = CDC(load_clip("bundled"), ["dog", "teapot"])
        >>> model.text_features().shape
        torch.Size([4, 2, 128])
    """

    name = "cdc"

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        n_templates: int = 4,
        n_ctx: int = 2,
        depth: int | None = None,
        words: str | Sequence[str] | None = "a photo of a",
        hand_crafted: str = "a photo of a {}.",
        views: Sequence[str] | None = DEFAULT_VIEWS,
        weight_de: float = 0.1,
        weight_con: float = 1.0,
        temperature: float = 0.02,
        trusted: bool = True,
        evidence_head: bool = True,
        image_prompts: bool = True,
        image_start: int = 0,
        activation: str = "exp",
        rule: str = "dempster",
        form: str = "digamma",
        kl_weight: float = 0.0,
        noise: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, class_names)
        check_count("n_templates", n_templates)
        check_room(backbone, self.classes, n_ctx)
        check_flags(trusted=trusted, evidence_head=evidence_head, image_prompts=image_prompts)
        check_seed(seed)
        if views is DEFAULT_VIEWS:
            views = DEFAULT_VIEWS[:n_templates]
        apiece = isinstance(views, Sequence) and not isinstance(views, str) and len(views) == n_templates
        if views is not None and not apiece:
            raise ValueError(
                f"views: expected one augmentation per template ({n_templates}), or views=None, got {views!r}"
            )
        check_template("hand_crafted", hand_crafted)
        checks.one_of("form", form, FORMS)
        weight_de = checks.number("weight_de", weight_de, low=0.0)
        weight_con = checks.number("weight_con", weight_con, low=0.0)
        kl_weight = checks.number("kl_weight", kl_weight, low=0.0)
        noise = checks.number("noise", noise, low=0.0)
        temperature = checks.number("temperature", temperature, low=0.0, open_low=True)
        if image_prompts and depth is None:
            depth = default_depth(backbone, image_start)
        self.options = {
            "n_templates": n_templates,
            "n_ctx": n_ctx,
            "depth": depth,
            "words": list(words) if isinstance(words, tuple) else words,
            "hand_crafted": hand_crafted,
            "views": None if views is None else list(views),
            "weight_de": weight_de,
            "weight_con": weight_con,
            "temperature": temperature,
            "trusted": trusted,
            "evidence_head": evidence_head,
            "image_prompts": image_prompts,
            "image_start": image_start,
            "activation": activation,
            "rule": rule,
            "form": form,
            "kl_weight": kl_weight,
            "noise": noise,
            "seed": seed,
        }
        self.hand_crafted, self.weight_de, self.weight_con = hand_crafted, weight_de, weight_con
        self.consistency_temperature, self.trusted = temperature, trusted
        self.form, self.kl_weight = form, kl_weight
        generator = torch.Generator().manual_seed(seed)
        self.prompts: CoupledPrompts | PromptContext
        if image_prompts:
            assert depth is not None
            self.prompts = CoupledPrompts(
                backbone,
                n_ctx,
                depth,
                n_templates,
                words=words,
                noise=noise,
                image_start=image_start,
                generator=generator,
            )
        else:
            backbone.require_promptable_text()
            self.prompts = PromptContext(backbone, n_ctx, n_templates, words=words, noise=noise, generator=generator)
        self.views = None if views is None else Views(views, backbone.image_mean, backbone.image_std)
        # A cosine of a quarter, about what CLIP gives to a caption that does not fit, starts at evidence 1.
        scale = float(backbone.scale)
        self.head = EvidenceHead(
            n_templates,
            scale=scale,
            bias=-scale / 4 if evidence_head else 0.0,
            activation=activation,
            rule=rule,
            learn_scale=evidence_head,
            learn_bias=evidence_head,
        )
        self._anchor: Tensor | None = None

    def _changed_classes(self) -> None:
        super()._changed_classes()
        self._anchor = None

    @property
    def anchor(self) -> Tensor:
        """Features of t^0, the hand-crafted template, [K, D]; fixed."""
        if self._anchor is None or self._anchor.device != self.backbone.device:
            (texts,) = fill_templates([self.hand_crafted], self.class_names)
            with torch.no_grad():
                self._anchor = self.backbone.encode_text(self.backbone.tokenize(texts)).float()
        return self._anchor

    def text_features(self) -> Tensor:
        if isinstance(self.prompts, PromptContext):
            return encode_prompted_text(self.backbone, self.classes, self.prompts(), chunk=self.class_chunk)
        context, deep = self.prompts.text()
        return encode_prompted_text(self.backbone, self.classes, context, deep=deep, chunk=self.class_chunk)

    def image_features(self, images: Tensor) -> Tensor:
        """[B, M, D] of images [B, 3, H, W] or views [B, M, 3, H, W]; [B, D] of images without image prompts."""
        if isinstance(self.prompts, CoupledPrompts):
            context, deep = self.prompts.image()
            return encode_prompted_image(self.backbone, images, context, deep=deep, start=self.prompts.image_start)
        with torch.no_grad():
            if isinstance(images, Tensor) and images.ndim == 5:
                return self.backbone.encode_image(images.flatten(0, 1)).unflatten(0, images.shape[:2])
            return self.backbone.encode_image(images)

    @property
    def frozen_image(self) -> bool:
        return isinstance(self.prompts, PromptContext)

    def objective(self, image: Tensor, text: Tensor, targets: Tensor) -> Tensor:
        if self.trusted:
            loss = evidential_cross_entropy(
                image,
                text,
                targets,
                scale=self.head.scale,
                bias=self.head.bias,
                activation=self.head.activation,
                rule=self.head.rule,
                form=self.form,
                kl_weight=self.kl_weight,
            )
        else:
            loss = F.cross_entropy(self._logits(image, text).flatten(0, 1), targets.repeat_interleave(len(text)))
        if self.weight_de and len(text) > 1:
            loss = loss + self.weight_de * decoupling_loss(text)
        if self.weight_con:
            loss = loss + self.weight_con * consistency_loss(text, self.anchor, self.consistency_temperature)
        return loss

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        # Decay would pull the evidence head towards scale 1, which means nothing.
        learned = self.learned_parameters()
        head = [p for n, p in learned.items() if n.startswith("head.")]
        prompts = [p for n, p in learned.items() if not n.startswith("head.")]
        return [{"params": prompts, "weight_decay": weight_decay}, {"params": head, "weight_decay": 0.0}]

    def calibration(self, image: Tensor, text: Tensor, targets: Tensor) -> tuple[list[Tensor], Callable[[], Tensor]]:
        # One temperature for all evidence logits. Fitting every scale and bias anew gains a point of calibration
        # error, but likelihood then drives vacuity to 0 and silences templates: it does not ask for either.
        self.check_text(text)
        scale, bias = self.head.scale.detach().clone(), self.head.bias.detach().clone()
        log_temperature = torch.zeros((), device=scale.device, requires_grad=True)

        def negative_log_likelihood() -> Tensor:
            temperature = bounded_temperature(log_temperature)
            with torch.no_grad():
                self.head.log_scale.copy_((scale / temperature).log())
                self.head.bias.copy_(bias / temperature)
            if not self.trusted:
                prob = self._logits(image, text, scale / temperature, bias / temperature).softmax(-1).mean(1)
                return F.nll_loss(prob.clamp_min(torch.finfo(prob.dtype).tiny).log(), targets)
            return evidential_cross_entropy(
                image,
                text,
                targets,
                scale=scale / temperature,
                bias=bias / temperature,
                activation=self.head.activation,
                rule=self.head.rule,
                form="log",  # ln S - ln alpha_y is the negative log of the expected probability of y
                prompt_weight=0.0,
            )

        return [log_temperature], negative_log_likelihood

    def _logits(self, image: Tensor, text: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Logits of every template, [B, M, K] in float32, by the head's scale and bias unless given."""
        image, text = checks.features(image, text)
        scale, bias = self.head.scale if scale is None else scale, self.head.bias if bias is None else bias
        with torch.autocast(image.device.type, enabled=False):
            x, t = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
            x = x.unsqueeze(1) if x.ndim == 2 else x
            cosine = torch.einsum("bmd,mkd->bmk", x.expand(-1, len(t), -1), t)
            return scale[:, None] * cosine + bias[:, None]

    def opinion(self, image: Tensor, text: Tensor | None = None) -> FusedOpinion:
        """The fused opinion of image features [B, D] or [B, M, D]."""
        return self.head(image, self.cached_text_features() if text is None else text)

    def predict_features(self, image: Tensor, text: Tensor) -> Prediction:
        self.check_features(image)
        self.check_text(text)
        if not self.trusted:
            prob = self.template_prob(image, text).mean(1)
            top, classes = prob.max(-1)
            return Prediction(classes, prob, (1 - top).clamp(0, 1), self.class_names)
        fused = self.opinion(image, text)
        return Prediction(
            classes=fused.prob.argmax(-1),
            prob=fused.prob,
            uncertainty=fused.uncertainty,
            names=self.class_names,
            belief=fused.belief,
            prompt_uncertainty=fused.prompt_uncertainty,
            conflict=fused.conflict if self.head.rule == "dempster" else None,
        )

    def template_prob(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        """What each template thinks by itself: class probabilities [B, M, K] of image features."""
        logits = self._logits(image, self.cached_text_features() if text is None else text)
        if not self.trusted:
            return logits.softmax(-1)
        return Opinion.from_log_ratio(log_ratio_from_logits(logits, self.head.activation, logits.shape[-1])).prob
