"""Where a CLIP comes from: an open_clip name with random weights, a file, a folder, the box, or an open_clip tag."""

from __future__ import annotations

import copy
import difflib
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import load_state_dict
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from cdc_models.clip.anatomy import OpenClip
from cdc_models.clip.tokenizer import cut_tokenizer

BUNDLED = Path(__file__).resolve().parent.parent / "bundled" / "clip"
CONFIG_NAMES = ("open_clip_config.json", "config.json")
POSITION_EMBEDDINGS = {"positional_embedding", "text.positional_embedding", "visual.positional_embedding"}
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "model.pth",
    "model.pt",
)


@dataclass(frozen=True)
class Source:
    """An open_clip network and how to make its tokenizer (lazily: some need a download that ZeroShot tokens do not)."""

    clip: OpenClip
    make_tokenizer: Callable[[], Any]


def build_network(model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any] | None = None) -> OpenClip:
    """The open_clip network that a `model_cfg` dictionary describes, with random weights.

    Towers from timm or Hugging Face are built without their own pretrained weights, so nothing is downloaded for
    weights that a checkpoint replaces anyway.
    """
    cfg = copy.deepcopy(model_cfg)
    custom_text = cfg.pop("custom_text", False) or bool(cfg["text_cfg"].get("hf_model_name"))
    if cfg["vision_cfg"].get("timm_model_name"):
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    if cfg["text_cfg"].get("hf_model_name"):
        cfg["text_cfg"]["hf_model_pretrained"] = False
    if not custom_text:
        clip = open_clip.CLIP(**cfg)
    elif "multimodal_cfg" in cfg:
        clip = open_clip.CoCa(**cfg)
    else:
        clip = open_clip.CustomTextCLIP(**cfg)
    preprocess = merge_preprocess_dict(asdict(PreprocessCfg()), preprocess_cfg or {})
    open_clip.set_model_preprocess_cfg(clip, preprocess | {"size": clip.visual.image_size})
    return clip


def load_weights(clip: OpenClip, file: Path) -> None:
    """Fill `clip` from a safetensors file or a torch checkpoint (weights only); every key and shape must fit.

    open_clip would stretch position embeddings of another length to fit; here that is an error as any other.
    """
    if _is_torchscript(file):
        raise ValueError(
            f"pretrained: {file} is a TorchScript archive, a program that runs as it is read; give a tag instead "
            "(OpenAI's weights: 'openai'), or convert a file that you trust: safetensors.torch.save_file(open_clip."
            f"factory.load_state_dict({str(file)!r}, weights_only=False), {str(file.with_suffix('.safetensors'))!r})"
        )
    try:
        given, own = load_state_dict(str(file)), clip.state_dict()
        for name in POSITION_EMBEDDINGS & given.keys() & own.keys():
            if given[name].shape != own[name].shape:
                raise ValueError(f"{name} is {list(given[name].shape)}, expected {list(own[name].shape)}")
        open_clip.load_checkpoint(clip, str(file), strict=True, weights_only=True)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        summary = " ".join(line.strip() for line in lines[:4]) + (" ..." if len(lines) > 4 else "")
        raise ValueError(f"pretrained: the weights in {file} do not fit the network: {summary}") from error


def _is_torchscript(file: Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI publishes its weights: told apart as torch does."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def from_folder(folder: Path) -> Source:
    """A network from a folder that holds its configuration and its weights."""
    config_file = next((folder / name for name in CONFIG_NAMES if (folder / name).is_file()), None)
    weights = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if config_file is None or weights is None:
        missing = "configuration" if config_file is None else "weights"
        wanted = CONFIG_NAMES if config_file is None else WEIGHT_NAMES
        raise ValueError(f"pretrained: the folder {folder} holds no {missing} (one of {', '.join(wanted)})")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"pretrained: {config_file} is not JSON: {error}") from error
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise ValueError(f"pretrained: {config_file} has no 'model_cfg'")
    model_cfg = config["model_cfg"]
    try:
        clip = build_network(model_cfg, config.get("preprocess_cfg"))
    except Exception as error:  # whatever a configuration that says anything at all may lead to
        raise ValueError(f"pretrained: {config_file} does not describe a network: {error!r}") from error
    load_weights(clip, weights)
    context_length = open_clip.CLIPTextCfg(**model_cfg["text_cfg"]).context_length
    merges = config.get("tokenizer", {}).get("merges")
    # partial, as all that is to be pickled
    make_tokenizer: Callable[[], Any] = partial(open_clip.SimpleTokenizer, context_length=context_length)
    if merges is not None:
        make_tokenizer = partial(cut_tokenizer, merges, context_length)
    elif config_file.name == CONFIG_NAMES[0]:
        make_tokenizer = partial(open_clip.get_tokenizer, f"local-dir:{folder}")
    return Source(clip, make_tokenizer)


def from_name(name: str, pretrained: str | None) -> Source:
    """A network that open_clip knows by name, with the weights of a tag or a file, or random ones."""
    if ":" in name:  # open_clip's "hf-hub:" and "local-dir:"
        raise ValueError(
            f"name: expected an open_clip model name, got {name!r}; to use a repository or a folder, give its local "
            "folder (open_clip_config.json and weights) as `pretrained`"
        )
    name = name.replace("/", "-")
    model_cfg = open_clip.get_model_config(name)
    if model_cfg is None:
        known = [*open_clip.list_models(), "bundled"]
        lower = {k.lower(): k for k in known}
        close = [lower[k] for k in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.4)]
        hint = f"; did you mean {', '.join(close)}?" if close else "; see open_clip.list_models()"
        raise ValueError(f"name: {name!r} is not an open_clip model{hint}")
    make_tokenizer = partial(open_clip.get_tokenizer, name)
    if pretrained is None:
        return Source(_build_named(name, model_cfg), make_tokenizer)
    if open_clip.is_pretrained_cfg(name, pretrained):
        return Source(_download(name, pretrained, model_cfg), make_tokenizer)
    file = Path(pretrained).expanduser()
    if not file.is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"pretrained: {pretrained!r} is neither a file or folder here nor an open_clip tag of {name}"
            f" (tags: {', '.join(tags) or 'none'})"
        )
    clip = _build_named(name, model_cfg)
    load_weights(clip, file)
    return Source(clip, make_tokenizer)


def _build_named(name: str, model_cfg: dict[str, Any]) -> OpenClip:
    try:
        return build_network(model_cfg)
    except (RuntimeError, OSError, ImportError) as error:
        raise RuntimeError(f"could not build {name}: {error}") from error


def _download(name: str, tag: str, model_cfg: dict[str, Any]) -> OpenClip:
    """Weights by open_clip tag. A tag trained with another activation than the name's is refused, not warned about."""
    wants_quick = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    has_quick = bool(model_cfg.get("quick_gelu", False))
    if wants_quick != has_quick:
        right = f"{name}-quickgelu" if wants_quick else name.removesuffix("-quickgelu")
        hint = f": use {right!r}" if open_clip.get_model_config(right) is not None else ""
        kind = "QuickGELU" if wants_quick else "GELU"
        raise ValueError(f"name: the weights {tag!r} were trained with {kind}, {name!r} has the other one{hint}")
    try:
        return open_clip.create_model(name, pretrained=tag)
    except Exception as error:  # whatever the network, the cache or the hub throws
        raise RuntimeError(
            f"could not get the weights {tag!r} of {name} ({type(error).__name__}: {error}); without a network, "
            "give `pretrained` a local file or folder, or load 'bundled'"
        ) from error
