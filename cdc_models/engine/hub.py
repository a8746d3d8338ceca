"""Files of a repository on a model hub, through huggingface_hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["PREFIX", "create", "local_file", "upload"]

PREFIX = "hf-hub:"
"""What the address of a repository begins with, as open_clip has it: "hf-hub:owner/name", "hf-hub:owner/name@v1"."""


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
    try:
        return Path(hub.hf_hub_download(repository, name, revision=revision or None))
    except ValueError as error:
        raise ValueError(f"{address}: {_first_line(error)}") from error
    except OSError as error:
        raise OSError(f"{address}: {name} cannot be downloaded: {_first_line(error)}") from error


def create(repository: str, private: bool, token: str | None) -> str:
    """Make a repository if it is not there; its full name, with the owner."""
    return str(_hub().HfApi(token=token).create_repo(repository, private=private, exist_ok=True).repo_id)


def upload(repository: str, folder: Path, message: str, token: str | None) -> None:
    """Put the files of a folder into a repository as one commit."""
    _hub().HfApi(token=token).upload_folder(repo_id=repository, folder_path=folder, commit_message=message)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("hf-hub: needs huggingface_hub; pip install huggingface_hub") from error
    return huggingface_hub


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
