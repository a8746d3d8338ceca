"""Files of a repository on a model hub, through huggingface_hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["PREFIX", "create", "local_file", "upload"]

PREFIX = "hf-hub:"
"""What the address of a repository begins with, as open_clip has it: "hf-hub:owner/name", "hf-hub:owner/name@v1"."""

TOLD = 300
"""Characters of what the hub says that are passed on."""


def local_file(address: str | os.PathLike[str], name: str) -> Path:
    """The file `name` of a repository, downloaded unless it is there already; any other address is a path as it is.

    Raises:
        ValueError: for an address of no repository. OSError: if it is not there or cannot be reached.
        ImportError: without huggingface_hub.

    Example:
        >>> local_file("runs/a.safetensors", "adapter.safetensors").name
        'a.safetensors'
    """
    if not (isinstance(address, str) and address.startswith(PREFIX)):
        return Path(address)
    repository, _, revision = address.removeprefix(PREFIX).partition("@")
    hub = _hub()
    with _trying(address, f"{name} cannot be downloaded"):
        return Path(hub.hf_hub_download(repository, name, revision=revision or None))


def create(repository: str, private: bool, token: str | None) -> str:
    """Make a repository if it is not there; its full name, with the owner.

    Raises:
        ValueError, OSError, ImportError: as `local_file`.
    """
    hub = _hub()
    with _trying(PREFIX + repository, "the repository cannot be made"):
        return str(hub.HfApi(token=token).create_repo(repository, private=private, exist_ok=True).repo_id)


def upload(repository: str, folder: Path, message: str, token: str | None) -> None:
    """Put the files of a folder into a repository as one commit.

    Raises:
        ValueError, OSError, ImportError: as `local_file`.
    """
    hub = _hub()
    with _trying(PREFIX + repository, "the adapter cannot be uploaded"):
        hub.HfApi(token=token).upload_folder(repo_id=repository, folder_path=folder, commit_message=message)


@contextmanager
def _trying(address: str, failed: str) -> Iterator[None]:
    """Around a call of huggingface_hub: whatever it or its HTTP client raises becomes one sentence."""
    try:
        yield
    except Exception as error:  # their errors have nothing in common
        told = " ".join(str(error).split())[:TOLD] or type(error).__name__
        # of what was given, and not of what a server said
        kind = ValueError if isinstance(error, ValueError) and not isinstance(error, OSError) else OSError
        raise kind(f"{address}: {failed}: {told}") from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("hf-hub: needs huggingface_hub; pip install 'cdc-ops[hub]'") from error
    return huggingface_hub
