"""A frozen CLIP, and where to get one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from cdc_models.clip.anatomy import OpenClip, image_obstacle, text_obstacle, text_parts
from cdc_models.clip.checks import check_images, shape_of, usable_device
from cdc_models.clip.sources import BUNDLED, from_folder, from_name


class UnsupportedBackboneError(ValueError):
    """The tower works for zero-shot classification but cannot take prompts."""


class ClipBackbone(nn.Module):
    """An open_clip network, frozen and in evaluation mode, with its tokenizer and its image transform.

    Usually made by `load_clip`; wrap a network of your own with `ClipBackbone(clip, make_tokenizer=...)`. The
    network's parameters stop asking for gradients, and `.train()` leaves the network in evaluation mode.

    Args:
        clip: an open_clip CLIP, CustomTextCLIP or CoCa.
        name, pretrained: labels of the architecture and the weights.
        make_tokenizer: called once, when a text is first tokenised.

    Raises:
        ValueError: what is no open_clip network.

    Example:
        >>> from cdc_models.clip import load_clip
        >>> backbone = load_clip("bundled")
        >>> tokens = backbone.tokenize(["a photo of a cat", "a photo of a dog"])
        >>> backbone.encode_text(tokens).shape == (2, backbone.embed_dim)
        True
    """

    clip: OpenClip

    def __init__(
        self,
        clip: OpenClip,
        *,
        name: str = "custom",
        pretrained: str | None = None,
        make_tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        parts = ("visual", "encode_image", "encode_text", "logit_scale", "context_length")
        if not isinstance(clip, nn.Module) or not all(hasattr(clip, part) for part in parts):
            raise ValueError(f"clip: expected an open_clip CLIP, CustomTextCLIP or CoCa, got {type(clip).__name__}")
        self.clip = clip.requires_grad_(False).eval()
        self.training = False
        self.name, self.pretrained = name, pretrained
        self._make_tokenizer = make_tokenizer
        self._fingerprint: tuple[object, str] | None = None
        self._text_obstacle, self._image_obstacle = text_obstacle(clip), image_obstacle(clip)

    def train(self, mode: bool = True) -> ClipBackbone:
        """A backbone is always in evaluation mode; returns itself unchanged."""
        return self

    # -- texts ---------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """The open_clip tokenizer. Raises RuntimeError if it cannot be had (some need a package or a download)."""
        if self._make_tokenizer is None:
            raise RuntimeError(f"{self.name} was made without a tokenizer")
        try:
            return self._make_tokenizer()
        except Exception as error:
            raise RuntimeError(f"could not get the tokenizer of {self.name}: {error}") from error

    @property
    def context_length(self) -> int:
        """Tokens in a text, start, end and padding among them."""
        return int(self.clip.context_length)

    @cached_property
    def text_frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts around the words of a text: ids before them, and behind them the end, then padding.

        Seen in what it makes of a short text. There may be nothing before the words (SigLIP).
        """
        try:
            words = self.encode_words("a")
            row = self.tokenizer(["a"], context_length=self.context_length)[0].tolist()
        except (AttributeError, TypeError) as error:
            raise UnsupportedBackboneError(
                f"the tokenizer of {self.name} is not like open_clip's ({error}): {self.name} takes no prompts"
            ) from error
        found = [at for at in range(len(row)) if row[at : at + len(words)] == words]
        start, tail = (tuple(row[: found[0]]), tuple(row[found[0] + len(words) :])) if found and words else ((), ())
        if not tail or len(set(tail[1:])) > 1:
            raise UnsupportedBackboneError(
                f"the tokenizer of {self.name} does not put an end and padding behind the words of a text: "
                f"{self.name} takes no prompts"
            )
        return start, tail

    @property
    def eot_id(self) -> int:
        """Id of the token that ends a text."""
        return self.text_frame[1][0]

    @property
    def text_room(self) -> int:
        """Tokens that a prompt has between start and end."""
        return self.context_length - len(self.text_frame[0]) - 1

    def encode_words(self, text: str) -> list[int]:
        """Token ids of a text, without start, end and padding."""
        if not isinstance(text, str):
            raise ValueError(f"text: expected a text, got {text!r:.80}")
        if hasattr(self.tokenizer, "encode"):
            return list(self.tokenizer.encode(text))
        cleaned = self.tokenizer.clean_fn(text)
        return list(self.tokenizer.tokenizer(cleaned, add_special_tokens=False).input_ids)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts as [N, context_length] long token ids; a text that does not fit is an error, never cut."""
        if isinstance(texts, str) or len(texts) == 0 or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts: expected a non-empty sequence of strings, got {texts!r:.80}")
        room = self.context_length - 2
        if long := [text for text in texts if len(self.encode_words(text)) > room]:
            raise ValueError(
                f"texts: too long for a context of {self.context_length} tokens, start and end among them: {long}"
            )
        return self.tokenizer(list(texts), context_length=self.context_length)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [N, context_length] -> features [N, D], unnormalised, as open_clip's own encode_text."""
        good = isinstance(tokens, Tensor) and tokens.dtype in (torch.int64, torch.int32) and tokens.ndim == 2
        if not good or tokens.size(1) != self.context_length or len(tokens) == 0:
            raise ValueError(f"tokens: expected token ids [N, {self.context_length}], got {shape_of(tokens)}")
        parts = text_parts(self.clip)
        if parts is not None and not torch.compiler.is_compiling():
            known, low, high = parts.token_embedding.num_embeddings, int(tokens.min()), int(tokens.max())
            if low < 0 or high >= known:
                raise ValueError(f"tokens: expected ids in [0, {known}), got {low} to {high}")
        return _feature(self.clip.encode_text(tokens.to(self.device), normalize=False))

    def require_promptable_text(self) -> None:
        """Raise UnsupportedBackboneError, saying why, unless `encode_prompted_text` works with this backbone."""
        self._require("text", self._text_obstacle)
        parts = text_parts(self.clip)
        if parts is not None and parts.eos_id is not None and parts.eos_id != self.eot_id:
            self._require("text", f"it pools at token {parts.eos_id}, its tokenizer ends with {self.eot_id}")

    # -- images --------------------------------------------------------------------------------------------------

    @property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """The test transform: a PIL image -> [3, H, W], resized, centre-cropped, normalised."""
        return image_transform_v2(PreprocessCfg(**self._preprocess_cfg), is_train=False)

    @property
    def _preprocess_cfg(self) -> dict[str, Any]:
        visual = self.clip.visual
        return getattr(visual, "preprocess_cfg", None) or {"size": visual.image_size}

    @property
    def image_mean(self) -> tuple[float, ...]:
        """Per-channel mean that `preprocess` subtracts."""
        return tuple(PreprocessCfg(**self._preprocess_cfg).mean)

    @property
    def image_std(self) -> tuple[float, ...]:
        """Per-channel standard deviation that `preprocess` divides by."""
        return tuple(PreprocessCfg(**self._preprocess_cfg).std)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        size = self.clip.visual.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def image_size(self) -> int:
        """Side of the (square) images in pixels."""
        h, w = self.image_shape
        if h != w:
            raise UnsupportedBackboneError(f"{self.name} takes images of {h} x {w} pixels: read image_shape instead")
        return h

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> features [B, D], unnormalised, as open_clip's own encode_image."""
        check_images(images, self.image_shape, self.device)
        return _feature(self.clip.encode_image(images.to(self.dtype), normalize=False))

    def require_promptable_image(self) -> None:
        """Raise UnsupportedBackboneError, saying why, unless `encode_prompted_image` works with this backbone."""
        self._require("image", self._image_obstacle)

    # -- sizes and weights ---------------------------------------------------------------------------------------

    @property
    def embed_dim(self) -> int:
        """Size D of the shared space."""
        parts = text_parts(self.clip)
        if parts is None:
            return int(self.clip.text.output_dim)
        return parts.embed_dim

    @property
    def text_width(self) -> int:
        """Width W of the text tower's tokens."""
        return self._text_parts().width

    @property
    def text_depth(self) -> int:
        """Blocks in the text tower."""
        return len(self._text_parts().blocks)

    @property
    def image_width(self) -> int:
        """Width Wv of the image tower's tokens."""
        self.require_promptable_image()
        return int(self.clip.visual.transformer.width)

    @property
    def image_depth(self) -> int:
        """Blocks in the image tower."""
        self.require_promptable_image()
        return len(self.clip.visual.transformer.resblocks)

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the image tower's first convolution, which is what images are cast to."""
        return next(parameter.dtype for parameter in self.clip.visual.parameters() if parameter.ndim == 4)

    @property
    def scale(self) -> Tensor:
        """CLIP's learned logit scale, exp(logit_scale), a detached scalar."""
        return self.clip.logit_scale.detach().exp().reshape(())

    @property
    def bias(self) -> Tensor | None:
        """CLIP's learned logit bias (SigLIP), a detached scalar, or None."""
        bias = self.clip.logit_bias
        return None if bias is None else bias.detach().reshape(())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all weights: says whether two backbones are the same.

        Cached until a weight is written to or replaced. A cast changes it, a move to another device does not.
        """
        state = self.clip.state_dict()
        # Writing through an inference tensor leaves no trace, so weights made in inference mode are hashed anew.
        stamp = [(name, t.data_ptr(), None if t.is_inference() else t._version) for name, t in state.items()]
        known = self._fingerprint
        if known is not None and known[0] == stamp and not any(t.is_inference() for t in state.values()):
            return known[1]
        digest = hashlib.sha256()
        for name, t in state.items():
            digest.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
            digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self._fingerprint = (stamp, digest.hexdigest())
        return self._fingerprint[1]

    def _text_parts(self) -> Any:
        self._require("text", self._text_obstacle)
        return text_parts(self.clip)

    def _require(self, tower: str, obstacle: str | None) -> None:
        if obstacle is not None:
            raise UnsupportedBackboneError(
                f"the {tower} tower of {self.name} cannot be prompted: {obstacle}; ZeroShot works with it"
            )


def check_backbone(backbone: object) -> None:
    """Raise ValueError unless `backbone` is a ClipBackbone."""
    if not isinstance(backbone, ClipBackbone):
        raise ValueError(f"backbone: expected a ClipBackbone, as load_clip gives, got {type(backbone).__name__}")


def _feature(output: Any) -> Tensor:
    """The pooled feature of towers that may also return their tokens."""
    return output[0] if isinstance(output, tuple) else output


def load_clip(
    name: str, pretrained: str | os.PathLike[str] | None = None, *, device: torch.device | str | None = None
) -> ClipBackbone:
    """Load a CLIP, frozen and in evaluation mode, in float32.

    Args:
        name: an open_clip model name ("ViT-B-16-quickgelu"), or "bundled", the small CLIP that comes with this
            package. With a folder as `pretrained`, only a label: the folder says what the network is.
        pretrained: an open_clip tag (downloaded by open_clip), a local file (safetensors or a torch checkpoint,
            read weights-only), a local folder (open_clip_config.json and weights), or None for random weights.
        device: where to put it; None: torch's default device.

    Raises:
        ValueError: an unknown name (close ones are listed); a `pretrained` that is neither tag, file nor folder;
            weights that do not fit; a TorchScript archive (reading one runs it; the message says how to convert it);
            a tag trained with another activation than the name's (OpenAI's weights need the "-quickgelu" names: with
            the plain ones accuracy silently drops); a device that is not there.
        RuntimeError: weights that cannot be downloaded.

    Example:
        >>> from cdc_models.clip import load_clip
        >>> backbone = load_clip("bundled")
        >>> backbone.name, backbone.training
        ('bundled', False)
    """
    if not isinstance(name, str):
        raise ValueError(f"name: expected an open_clip model name or 'bundled', got {name!r:.80}")
    if pretrained is not None:
        if not isinstance(pretrained, str | os.PathLike) or pretrained == "":
            raise ValueError(f"pretrained: expected a tag, a file, a folder or None, got {pretrained!r:.80}")
        pretrained = os.fspath(pretrained)
    device = torch.get_default_device() if device is None else usable_device(device)
    if name == "bundled" or pretrained == "bundled":
        if name != "bundled" or pretrained not in (None, "bundled"):
            raise ValueError(
                f"the bundled CLIP is load_clip('bundled') alone, got name={name!r}, pretrained={pretrained!r}"
            )
        if not (BUNDLED / "model.safetensors").is_file():
            raise RuntimeError(f"this installation has no bundled CLIP: {BUNDLED.name}/model.safetensors is missing")
        source, pretrained = from_folder(BUNDLED), "bundled"
    elif pretrained is not None and Path(pretrained).expanduser().is_dir():
        source = from_folder(Path(pretrained).expanduser())
    else:
        source = from_name(name, pretrained)
    backbone = ClipBackbone(source.clip, name=name, pretrained=pretrained, make_tokenizer=source.make_tokenizer)
    return backbone.to(device)
