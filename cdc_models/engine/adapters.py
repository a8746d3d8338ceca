"""Adapter files: what was learned, and the facts that must fit when it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cdc_models.clip import ClipBackbone
from cdc_models.clip.backbone import check_backbone
from cdc_models.engine import hub
from cdc_models.engine.checks import check_method
from cdc_models.engine.files import from_json, read_tensors, write_tensors
from cdc_models.engine.model_card import model_card, name_of_weights
from cdc_models.methods import METHODS
from cdc_models.methods.base import Method
from cdc_models.provenance import library_version
from cdc_ops.checks import LARGEST

__all__ = ["AdapterError", "adapter_info", "load_adapter", "push_adapter", "save_adapter"]

FORMAT = 1
IN_REPOSITORY = "adapter.safetensors"
"""Name of an adapter in a model hub repository."""


class AdapterError(ValueError):
    """An adapter file that cannot be read, or does not fit the backbone or the classes."""


def _learned_state(model: Method) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if not n.startswith("backbone.")}


def _kinds(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {n: f"{list(t.shape)} {t.dtype}" for n, t in sorted(tensors.items())}


def _unusable_values(tensors: dict[str, torch.Tensor]) -> str | None:
    """What no training leaves behind: values that are not finite, a temperature or a scale of evidence out of range."""
    if bad := [n for n, t in tensors.items() if not bool(torch.isfinite(t).all())]:
        return f"values that are not finite in {', '.join(bad)}"
    positive = {name: tensors[name] for name in ("temperature",) if name in tensors}
    positive |= {name: tensors[name].exp() for name in ("head.log_scale",) if name in tensors}
    for name, t in positive.items():
        if not bool(((t >= 1 / LARGEST) & (t <= LARGEST)).all()):
            return f"{name} must stand for numbers between 2^-100 and 2^100, got {t.tolist()}"
    return None


def _check_sizes(options: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for a size that no stored tensor has, before memory is taken for it."""
    stored = {size for t in tensors.values() if t.numel() for size in t.shape}
    for name in ("n_ctx", "n_templates"):
        if name in options and options[name] not in stored:
            raise ValueError(f"{name}: no stored tensor has the size {options[name]!r}")


def save_adapter(model: Method, path: str | os.PathLike[str], summary: dict[str, Any] | None = None) -> Path:
    """Write what a method has learned, and nothing of the backbone, as one safetensors file.

    Its metadata names the method and its options, the backbone with the hash of its weights, and the classes.
    The file is written beside its place, flushed and renamed: an existing adapter survives a failure.

    Args:
        model: a trained method.
        path: file to write; its folder must exist.
        summary: names and anything JSON can hold, such as epochs and accuracy.

    Returns:
        The path written.

    Raises:
        ValueError: values that are not finite, or a summary that is no dict or that JSON does not hold.
        OSError: if the folder cannot be written.

    Example:
        >>> import tempfile
        >>> from cdc_models import CoOp, load_clip, save_adapter
        >>> model = CoOp(load_clip("bundled"), ["cat", "dog"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, f"{folder}/pets.safetensors", {"epochs": 0}).name
        'pets.safetensors'
    """
    check_method(model)
    return _save(model, Path(path), summary, model.backbone.pretrained)


def _save(model: Method, path: Path, summary: dict[str, Any] | None, pretrained: str | None) -> Path:
    """`save_adapter`, with what is said of where the backbone's weights are from."""
    state = _learned_state(model)
    if wrong := _unusable_values(state):
        raise ValueError(f"model: {wrong}; nothing was written")
    if not isinstance(summary, dict | None):
        raise ValueError(f"summary: expected a dict, such as {{'epochs': 5}}, or None, got {summary!r:.80}")
    try:
        told = json.dumps(summary or {}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"summary: expected what JSON holds, got {summary!r:.80}: {error}") from error
    metadata = {
        "format": str(FORMAT),
        "library": f"cdc-ops {library_version()}",
        "method": model.name,
        "options": json.dumps(model.options),
        "backbone": json.dumps({"name": model.backbone.name, "pretrained": pretrained}),
        "fingerprint": model.backbone.fingerprint,
        "classes": json.dumps(list(model.class_names)),
        "summary": told,
    }
    write_tensors(path, state, metadata)
    return path


def adapter_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What an adapter file says of itself, without a backbone.

    Args:
        path: file, or hub repository, as for `load_adapter`.

    Returns:
        "method", "options", "classes", "backbone" ({"name", "pretrained"}, as `load_clip` takes them) and "summary".

    Raises:
        FileNotFoundError: no such file.
        AdapterError: not an adapter, or damaged (a ValueError).

    Example:
        >>> import tempfile
        >>> from cdc_models import CoOp, load_clip, save_adapter
        >>> model = CoOp(load_clip("bundled"), ["cat", "dog"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     info = adapter_info(save_adapter(model, f"{folder}/pets.safetensors", {"epochs": 0}))
        >>> info["method"], info["classes"], info["backbone"]["name"], info["summary"]
        ('coop', ['cat', 'dog'], 'bundled', {'epochs': 0})
    """
    _, metadata = _read(hub.local_file(path, IN_REPOSITORY))
    try:
        parts = {name: from_json(metadata[name]) for name in ("options", "classes", "backbone", "summary")}
        name, pretrained = parts["backbone"]["name"], parts["backbone"]["pretrained"]
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{path} has damaged metadata: {error}") from error
    if not isinstance(parts["summary"], dict):
        raise AdapterError(f"{path} has damaged metadata: summary {parts['summary']!r:.80}")
    if not isinstance(name, str) or not isinstance(pretrained, str | None):
        raise AdapterError(f"{path} has damaged metadata: backbone {parts['backbone']!r:.200}")
    return {"method": metadata["method"], **parts}


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of an adapter of this format, not yet looked into."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        tensors, metadata = read_tensors(path, need_hash=False)  # early versions wrote none
    except ValueError as error:
        raise AdapterError(str(error)) from error
    missing = [k for k in ("format", "method", "options", "fingerprint", "classes", "backbone") if k not in metadata]
    if missing:
        raise AdapterError(f"{path} is not an adapter of this library: its metadata lacks {', '.join(missing)}")
    if metadata["format"] != str(FORMAT):
        raise AdapterError(f"{path} has adapter format {metadata['format']!r:.80}, this library reads format {FORMAT}")
    return tensors, metadata


def load_adapter(
    path: str | os.PathLike[str], backbone: ClipBackbone, class_names: Sequence[str] | None = None
) -> Method:
    """Read an adapter onto the backbone it was trained on.

    Args:
        path: file written by `save_adapter`; or a hub repository that `push_adapter` has written to,
            "hf-hub:owner/name" or "hf-hub:owner/name@revision".
        backbone: the same architecture and weights; checked by hash.
        class_names: other classes to use the learned prompts for; None takes those it was trained on.

    Raises:
        FileNotFoundError: no such file.
        AdapterError: not an adapter, damaged, of an unknown method, for another backbone or other tensors, or with
            values out of range (a ValueError).
        OSError: a repository that is not there or cannot be reached.
        ValueError: no backbone, or class names that are empty, duplicate or too long.

    Example:
        >>> import tempfile
        >>> from cdc_models import CoOp, load_adapter, load_clip, save_adapter
        >>> backbone = load_clip("bundled")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_adapter(CoOp(backbone, ["cat", "dog"]), f"{folder}/pets.safetensors")
        ...     model = load_adapter(path, backbone, ["cow", "horse"])
        >>> type(model).__name__, model.class_names
        ('CoOp', ('cow', 'horse'))
    """
    check_backbone(backbone)
    path = hub.local_file(path, IN_REPOSITORY)
    tensors, metadata = _read(path)
    if metadata["method"] not in METHODS:
        raise AdapterError(f"{path} is for method {metadata['method']!r:.80}; known are {sorted(METHODS)}")
    try:
        options, trained_on, origin = (from_json(metadata[k]) for k in ("options", "classes", "backbone"))
        label = f"{origin['name']} (weights: {origin['pretrained']})"
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{path} has damaged metadata: {error}") from error
    if metadata["fingerprint"] != backbone.fingerprint:
        raise AdapterError(
            f"{path} was trained on {label}, hash {metadata['fingerprint'][:12]}; the backbone given is "
            f"{backbone.name} (weights: {backbone.pretrained}), hash {backbone.fingerprint[:12]}"
        )
    try:
        _check_sizes(options, tensors)
        model = METHODS[metadata["method"]](backbone, trained_on, **options)
    except Exception as error:  # whatever options that are anything at all may lead to
        raise AdapterError(f"{path} has options or classes that this library refuses: {error}") from error
    expected = _learned_state(model)
    wanted, found = _kinds(expected), _kinds(tensors)
    if wanted != found:
        raise AdapterError(f"{path} holds tensors {found}, its options ask for {wanted}")
    if wrong := _unusable_values(tensors):
        raise AdapterError(f"{path}: {wrong}")
    model.load_state_dict(tensors, strict=False)
    model = model.to(backbone.device).eval()
    return model if class_names is None else model.with_classes(class_names)


def push_adapter(
    model: Method,
    repository: str,
    summary: dict[str, Any] | None = None,
    *,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Write an adapter into a model hub repository, with a page (README.md) that says what it is and how to load it.

    Needs huggingface_hub, and its login or a token. Nothing but these two files is sent, in one commit; the page is
    written anew. Of weights from a local file, they have the file's name and the hash of the weights, not its path.

    Args:
        model: a trained method.
        repository: "owner/name"; made if it is not there.
        summary: as for `save_adapter`; it is public where the repository is.
        private: of a repository that is made now.
        token: of the hub; None: that of `hf auth login`.

    Returns:
        The address that `load_adapter` and `cdc predict --adapter` take.

    Raises:
        ValueError: for a name that no repository can have. OSError: if the hub refuses or cannot be reached.
        ImportError: without huggingface_hub.

    Example:
        >>> push_adapter(model, "owner/pets")  # doctest: +SKIP
        'hf-hub:owner/pets'
    """
    with TemporaryDirectory() as folder:
        # refuses bad input before anything is made
        check_method(model)
        _save(model, Path(folder) / IN_REPOSITORY, summary, name_of_weights(model.backbone))
        full = hub.create(repository, private, token)
        address = f"{hub.PREFIX}{full}"
        (Path(folder) / "README.md").write_text(model_card(model, address, summary), encoding="utf-8")
        hub.upload(full, Path(folder), f"Adapter of the method {model.name}", token)
    return address
