"""What every method shares: classes, cached text features, a loss and a prediction."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_models.clip import ClipBackbone
from cdc_models.clip.backbone import check_backbone
from cdc_models.clip.checks import check_images
from cdc_models.clip.classes import ClassTokens, check_names, tokenize_classes
from cdc_models.data.transforms import Views
from cdc_models.methods.options import check_room
from cdc_ops import checks

__all__ = ["Method", "Prediction", "SoftmaxMethod", "bounded_temperature", "out_of_inference"]

_MAX_LOG_TEMPERATURE = math.log(100.0)


@dataclass(frozen=True)
class Prediction:
    """What a method says about B images.

    Attributes:
        classes: most probable class, int64 [B].
        prob: class probabilities, [B, K]; rows sum to one.
        uncertainty: how far to distrust the answer, [B], in [0, 1]. Vacuity (Dirichlet uncertainty) for methods
            that give opinions, one minus the largest probability for methods that end in a softmax.
        belief: evidence-backed belief of every class, [B, K], or None for softmax methods.
        prompt_uncertainty: vacuity of each template's own opinion, [B, M], or None.
        conflict: how far the templates contradict each other, [B], or None.
        names: the K class names.

    Example:
        >>> import torch
        >>> from cdc_models import ZeroShot, load_clip
        >>> model = ZeroShot(load_clip("bundled"), ["dog", "teapot"])
        >>> said = model.predict(torch.zeros(3, 3, 48, 48))
        >>> said.prob.shape, said.uncertainty.shape, said.belief, len(said.labels())
        (torch.Size([3, 2]), torch.Size([3]), None, 3)
    """

    classes: Tensor
    prob: Tensor
    uncertainty: Tensor
    names: tuple[str, ...]
    belief: Tensor | None = None
    prompt_uncertainty: Tensor | None = None
    conflict: Tensor | None = None

    def labels(self) -> list[str]:
        """The predicted class names."""
        return [self.names[i] for i in self.classes.tolist()]


def bounded_temperature(log_temperature: Tensor) -> Tensor:
    """exp, kept within 1/100 to 100: for answers worse than chance the best temperature is infinite and ties them."""
    return log_temperature.clamp(-_MAX_LOG_TEMPERATURE, _MAX_LOG_TEMPERATURE).exp()


@dataclass
class _TextCache:
    """Text features [M, D] by class name, for one state of the parameters."""

    state: Any = None
    of_name: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """A CLIP adapter: text features for templates, a loss for training, a prediction.

    Subclasses implement `text_features`, `image_features`, `objective` and `predict_features`, and list the options
    that a saved adapter must remember in `options`. `text_features` is differentiable; evaluation reuses its
    last result until a parameter changes.

    Args:
        backbone: the frozen CLIP.
        class_names: the K classes.

    Attributes:
        class_names: the K class names.
        classes: the same as tokens, for methods that prompt the text tower.
        class_chunk: set it to train on many classes in bounded memory, see `chunk` of `encode_prompted_text`.
        prompted (of the class): whether the text tower is prompted; False for methods that write whole texts.
        name_wise (of the class): whether the text features of a class follow from its own name alone, so that those of
            names which stay may be reused when classes change. A subclass whose features depend on the other classes
            sets it to False.

    Raises:
        ValueError: no backbone, or class names that are empty, duplicate or too long.
        UnsupportedBackboneError: a method that prompts the text tower on one that takes no prompts.

    Example:
        >>> import torch
        >>> from cdc_models import fit, load_clip
        >>> from cdc_models.methods.base import SoftmaxMethod
        >>> class Nudge(SoftmaxMethod):
        ...     name, prompted, frozen_image = "nudge", False, True
        ...     def __init__(self, backbone, class_names):
        ...         super().__init__(backbone, class_names)
        ...         self.step = torch.nn.Parameter(torch.zeros(backbone.embed_dim))
        ...     def text_features(self):  # [M, K, D], here with one template
        ...         tokens = self.backbone.tokenize([f"a photo of a {name}." for name in self.class_names])
        ...         return (self.backbone.encode_text(tokens) + self.step).unsqueeze(0)
        ...     def image_features(self, images):
        ...         return self.backbone.encode_image(images)
        >>> model = Nudge(load_clip("bundled"), ["cat", "dog"])
        >>> batch = torch.zeros(2, 3, 48, 48), torch.tensor([0, 0])
        >>> losses = fit(model, [batch], epochs=3, lr=0.1, progress=False).losses
        >>> list(model.learned_parameters()), losses[-1] < losses[0]
        (['step'], True)
        >>> model.with_classes(["cow", "horse", "sheep"]).predict(batch[0]).prob.shape
        torch.Size([2, 3])
    """

    prompted: ClassVar[bool] = True
    name_wise: ClassVar[bool] = True
    class_chunk: int | None = None
    name: ClassVar[str]
    options: dict[str, Any]
    backbone: ClipBackbone
    class_names: tuple[str, ...]
    classes: ClassTokens

    def __init__(self, backbone: ClipBackbone, class_names: Sequence[str]) -> None:
        super().__init__()
        check_backbone(backbone)
        self.backbone = backbone
        self._set_classes(class_names)
        self.options = {}
        self.views: Views | None = None  # the augmentation of each template, in training
        self._text_cache = _TextCache()  # shared with what `with_classes` returns
        self._text_features: tuple[Any, Tensor] | None = None

    # -- what a subclass says ---------------------------------------------------------------------------------

    def text_features(self) -> Tensor:
        """Text features of every template and class, [M, K, D], unnormalised, differentiable."""
        raise NotImplementedError

    def image_features(self, images: Tensor) -> Tensor:
        """Image features [B, D], or [B, M, D] where templates have their own, unnormalised."""
        raise NotImplementedError

    def objective(self, image: Tensor, text: Tensor, targets: Tensor) -> Tensor:
        """Training loss, a scalar, of image features [B, D] or [B, M, D], text features [M, K, D] and targets [B]."""
        raise NotImplementedError

    def predict_features(self, image: Tensor, text: Tensor) -> Prediction:
        """Prediction from image features [B, D] or [B, M, D] and text features [M, K, D]."""
        raise NotImplementedError

    @property
    def frozen_image(self) -> bool:
        """Whether nothing is learned on the image side, so that image features may be kept (`cache_features`)."""
        return False

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Training loss, a scalar.

        Args:
            images: [B, 3, H, W]; or [B, M, 3, H, W], an image for each template, where there are templates; or,
                with a frozen image side, ready features [B, D] or [B, M, D].
            targets: class indices [B], integers.

        Raises:
            ValueError: for images, features or targets of other shapes, dtypes or devices, values that are not finite,
                targets out of range, or features where the image side learns.
        """
        targets = self.check_targets(images, targets)
        images, targets = out_of_inference(images), out_of_inference(targets)
        if images.ndim > 3:
            if self.views is not None and images.ndim == 4:
                check_images(images, self.backbone.image_shape, self.backbone.device)
                images = self.views(images)
        elif self.frozen_image:
            self.check_features(images, "images")
        else:
            raise ValueError(
                f"images: {type(self).__name__} learns on its image side and needs images [B, 3, H, W]; got "
                f"{tuple(images.shape)}"
            )
        return self(images, targets)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The part of `loss` that `compile` compiles: both towers and the objective, of targets already checked."""
        image = images if images.ndim <= 3 else self.image_features(images)
        return self.objective(image, self.text_features(), targets)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the training step: from now on `loss` runs its towers and its objective through `torch.compile`.

        One graph, with nothing of ours that breaks it (``fullgraph=True`` works). The first step of a shape takes the
        time to compile it: seconds to minutes. Checks of targets and views stay outside; whether images are finite is
        not checked. Copies made by `with_classes` are not compiled. Call it when the model is on its device.

        Args:
            args, kwargs: of `torch.compile`.

        Example:
            >>> from cdc_models import CoOp, load_clip
            >>> model = CoOp(load_clip("bundled"), ["dog", "teapot"])
            >>> model.compile(fullgraph=True)
        """
        images = torch.zeros(1, 3, *self.backbone.image_shape, device=self.backbone.device)
        with torch.no_grad():  # what is worked out once is worked out now, not traced
            self.forward(images, torch.zeros(1, dtype=torch.long, device=self.backbone.device))
        super().compile(*args, **kwargs)

    def _changed_classes(self) -> None:
        """Called on the copy that `with_classes` returns, for what depends on the classes."""
        if self.prompted and "n_ctx" in self.options:
            check_room(self.backbone, self.classes, self.options["n_ctx"])

    # -- what every method has --------------------------------------------------------------------------------

    def _set_classes(self, names: Sequence[str]) -> None:
        if self.prompted:
            self.classes = tokenize_classes(self.backbone, names)
            self.class_names = self.classes.names
        else:
            self.class_names = check_names(names)

    def learned_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes, by name; the frozen backbone has no part in it."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad and not n.startswith("backbone.")}

    def with_classes(self, names: Sequence[str]) -> Self:
        """The same learned prompts over other classes, without retraining.

        The copy shares its parameters with the original.

        Raises:
            ValueError: empty, duplicate or too long names.
        """
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other._parameters = dict(self._parameters)
        other._buffers = dict(self._buffers)
        other._set_classes(names)
        other._text_features = None
        other._changed_classes()
        return other

    def cached_text_features(self) -> Tensor:
        """`text_features` without gradient, float32; after `with_classes`, only names that are new are encoded.

        Computed again after a parameter has changed in place or been replaced. Changes through ``.data`` go unseen,
        as they do by autograd: use ``with torch.no_grad()``. The result is shared; clone it before changing it.
        """
        state = tuple((p.data_ptr(), None if p.is_inference() else p._version, p.device) for p in self.parameters())
        if self._text_cache.state != state:
            self._text_cache.state, self._text_cache.of_name = state, {}
        if self._text_features is None or self._text_features[0] != state:
            of_name = self._text_cache.of_name if self.name_wise else {}
            new = [name for name in self.class_names if name not in of_name]
            if new:
                encoded = self if len(new) == len(self.class_names) else self.with_classes(new)
                # Whoever asks first, the features must serve everybody: full precision, and fit for autograd.
                device = self.backbone.device.type
                with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                    of_name.update(zip(new, encoded.text_features().float().unbind(1), strict=True))
            with torch.inference_mode(False):
                self._text_features = state, torch.stack([of_name[name] for name in self.class_names], 1)
        return self._text_features[1]

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """Classify images [B, 3, H, W], preprocessed as `backbone.preprocess` does.

        Raises:
            ValueError: for images of another shape, integer or non-finite images.
        """
        return self.predict_features(self.image_features(images).float(), self.cached_text_features())

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """What an optimiser should update, in torch's parameter groups; `lr_scale` multiplies the learning rate."""
        return [{"params": list(self.learned_parameters().values()), "weight_decay": weight_decay}]

    def calibration(self, image: Tensor, text: Tensor, targets: Tensor) -> tuple[list[Tensor], Callable[[], Tensor]]:
        """The numbers that `calibrate` fits, and the mean negative log-likelihood as a function of them."""
        raise NotImplementedError

    def check_features(self, image: Tensor, argument: str = "image") -> None:
        """Raise ValueError unless `image` holds finite features [B, D] or [B, M, D] on the backbone's device."""
        size = self.backbone.embed_dim
        want = f"[B, {size}] or [B, M, {size}]"
        image = checks.floating(argument, image, want)
        if image.ndim not in (2, 3) or image.shape[-1] != size or image.numel() == 0:
            raise ValueError(f"{argument}: expected features {want}, got {checks.came(image)}")
        if image.device != self.backbone.device:
            raise ValueError(f"{argument}: features are on {image.device}, the backbone is on {self.backbone.device}")
        checks.finite(argument, image)

    def check_text(self, text: Tensor) -> None:
        """Raise ValueError unless `text` holds finite features [M, K, D] of as many classes as there are names."""
        text = checks.text_features("text", text)
        if text.shape[1] != len(self.class_names):
            raise ValueError(f"text: expected features of {len(self.class_names)} classes, got {checks.came(text)}")
        checks.finite("text", text)

    def check_targets(self, images: Tensor, targets: Tensor) -> Tensor:
        """Targets as int64, or one clear sentence for targets that do not fit the images or the classes."""
        count = len(self.class_names)
        targets = as_targets(images, targets)
        if targets.numel() == 0:
            raise ValueError("targets: expected at least one image to train on, got an empty batch")
        if int(targets.min()) < 0 or int(targets.max()) >= count:
            raise ValueError(
                f"targets: expected class indices in [0, {count}), got {int(targets.min())} to {int(targets.max())}"
            )
        return targets


def as_targets(images: Tensor, targets: Tensor) -> Tensor:
    """Targets as int64, one for each image; what else comes is refused."""
    if not isinstance(images, Tensor) or images.ndim == 0:
        raise ValueError(f"images: expected a tensor of images or features, got {checks.came(images)}")
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets: expected a tensor of class indices, got {type(targets).__name__}")
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        raise ValueError(f"targets: expected integer class indices, got {targets.dtype}")
    if targets.ndim != 1 or len(targets) != len(images):
        raise ValueError(f"targets: expected shape [{len(images)}] to match images, got {tuple(targets.shape)}")
    return targets.long()


def out_of_inference(x: Tensor) -> Tensor:
    """The tensor, or a copy of one that inference mode made: autograd keeps none of those."""
    return x.clone() if x.is_inference() else x


class SoftmaxMethod(Method):
    """Methods whose answer is CLIP's own: softmax of scaled cosines, averaged over templates in feature space."""

    temperature: Tensor

    def __init__(self, backbone: ClipBackbone, class_names: Sequence[str]) -> None:
        super().__init__(backbone, class_names)
        # 1 keeps CLIP's scale; `calibrate` may fit it on held-out shots. Not trained with the prompts.
        self.register_buffer("temperature", torch.tensor(1.0))

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Scaled cosines [B, K] of image features [B, D] or [B, 1, D] and text features [M, K, D].

        Always in float32: at CLIP's scale of 100 a bfloat16 logit is off by up to a quarter.
        """
        image, text = checks.features(image, text)
        if image.ndim == 3 and image.shape[1] > 1:
            raise ValueError(f"image: expected [B, D], the templates share it, got {checks.came(image)}")
        with torch.autocast(image.device.type, enabled=False):
            prototype = F.normalize(F.normalize(text.float(), dim=-1).mean(0), dim=-1)
            x = F.normalize(image.float(), dim=-1)
            x = x.squeeze(1) if x.ndim == 3 else x
            logits = self.backbone.scale.float() * x @ prototype.T
            return logits if self.backbone.bias is None else logits + self.backbone.bias.float()

    def objective(self, image: Tensor, text: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(image, text), targets)

    def calibration(self, image: Tensor, text: Tensor, targets: Tensor) -> tuple[list[Tensor], Callable[[], Tensor]]:
        self.check_text(text)
        logits = self.logits(image, text).detach()
        log_temperature = torch.zeros((), device=logits.device, requires_grad=True)

        def negative_log_likelihood() -> Tensor:
            temperature = bounded_temperature(log_temperature)
            with torch.no_grad():
                self.temperature.copy_(temperature)
            return F.cross_entropy(logits / temperature, targets)

        return [log_temperature], negative_log_likelihood

    def predict_features(self, image: Tensor, text: Tensor) -> Prediction:
        self.check_features(image)
        self.check_text(text)
        prob = (self.logits(image, text) / self.temperature).softmax(-1)
        top, classes = prob.max(-1)
        return Prediction(classes=classes, prob=prob, uncertainty=(1 - top).clamp(0, 1), names=self.class_names)
