"""Where a result comes from: versions, the commit of the code, the machine, and the memory it took."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import open_clip
import torch

__all__ = ["git_commit", "library_version", "peak_memory", "restart_peak_memory", "versions"]


def library_version() -> str:
    """This package's version."""
    try:
        return version("cdc-ops")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def versions(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions of what computes, and the name of the device."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "cdc-ops": library_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "device": f"{device.type}: {name}",
    }


def git_commit() -> str | None:
    """The commit of this package's source tree, with "-dirty" if its files have changed; None outside of one.

    An installed package that merely lies inside somebody's repository does not count: git must know this file.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return run.stdout.strip()

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else f"{commit}{'-dirty' if changes else ''}"


def peak_memory(device: torch.device | str = "cpu") -> int | None:
    """Most memory held so far, in bytes: torch's on a GPU since its counter was reset, else this process's.

    None where the system does not say.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (own := _high_water()) is not None:
        return own
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def restart_peak_memory(device: torch.device | str = "cpu") -> bool:
    """Let `peak_memory` count from what is held now; False where the system cannot, and it goes on as before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark falls to what is held
    except OSError:
        return False
    return _high_water() is not None


def _high_water() -> int | None:
    """Linux's high-water mark; getrusage's can be that of the process which started this one, and cannot restart."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
