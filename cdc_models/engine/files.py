"""Files that are whole or not there at all, and safetensors among them that know when they were changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = ["from_json", "read_tensors", "replacing", "write_tensors"]

ABANDONED = 3600
"""Seconds after which a file that nobody has written on is what a killed writer has left; writing takes seconds."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata so that the file is either the old one or the new one, never half of one.

    Written beside its place, flushed to the disk and renamed. What is stored carries a hash of itself.

    Raises:
        OSError: if the folder is missing or cannot be written, or the disk is full; an earlier file is untouched.
    """
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    data = save(kept, {**metadata, "sha256": _digest(kept, metadata)})
    with replacing(path) as beside:
        beside.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; after the block it is flushed to the disk and takes the place of `path`.

    If the block or the disk fails (OSError, which names `path`), what was at `path` is untouched and nothing is left
    beside it. Each writer has a place of its own, so several may write the same file, and the last one's is there
    whole. What a killed writer has left is removed by one that comes an hour later.
    """
    # not tempfile: its files are for their owner alone, and results are read by whom the umask allows
    beside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:  # a full disk does not say of which file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        beside.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the renaming itself must reach the disk
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    left = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.part")
    with suppress(OSError), os.scandir(path.parent) as entries:  # whoever else removes them is welcome
        for entry in entries:
            if (
                entry.name.endswith(".part")
                and left.fullmatch(entry.name)
                and time.time() - entry.stat().st_mtime > ABANDONED
            ):
                os.unlink(entry.path)


def read_tensors(path: Path, *, need_hash: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What :func:`write_tensors` wrote, and its metadata.

    Args:
        path: the file.
        need_hash: refuse a file that carries no hash of itself; a hash that is there must always fit.

    Raises:
        ValueError: for a file that is not safetensors, was cut off or changed, or lacks its hash.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = dict(stored.metadata() or {})
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    digest = metadata.pop("sha256", None)
    if digest is None and need_hash:
        raise ValueError(f"{path} is damaged: it does not carry the hash of its content")
    if digest is not None and digest != _digest(tensors, metadata):
        raise ValueError(f"{path} is damaged: its content does not match the hash stored in it")
    return tensors, metadata


def from_json(text: str) -> Any:
    """What JSON of unknown origin holds.

    Raises:
        ValueError: for what is no JSON, has numbers of thousands of digits, or is nested without end.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
