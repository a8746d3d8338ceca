"""Launch configurations: one fixed default for each kind of kernel, architecture and width of the features.

Nothing is asked of a device at import. Set ``CDC_KERNELS_AUTOTUNE=1`` to time the candidates once for each
shape instead of taking the default.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from triton.runtime.interpreter import InterpretedFunction

AUTOTUNE = "CDC_KERNELS_AUTOTUNE"


@dataclass(frozen=True)
class Config:
    """Tile of images, classes and features; ``out`` is the width of a gradient's tile; warps and stages."""

    images: int
    classes: int
    features: int
    out: int
    num_warps: int
    num_stages: int


#: kind -> architecture -> (16-bit features, 32-bit features). KL needs registers for its gamma functions. Chosen
#: so that no kernel spills much (benches/results/aot); speed on a device is still to be measured.
DEFAULTS: dict[str, dict[str, tuple[Config, Config]]] = {
    "forward": {
        "cuda90": (Config(128, 64, 64, 0, 8, 3), Config(64, 64, 32, 0, 8, 3)),
        "cuda80": (Config(128, 64, 64, 0, 8, 3), Config(64, 64, 32, 0, 8, 3)),
        "hip": (Config(64, 64, 64, 0, 4, 2), Config(64, 64, 32, 0, 4, 2)),
    },
    "forward_kl": {
        "cuda90": (Config(64, 64, 64, 0, 8, 3), Config(64, 32, 32, 0, 8, 3)),
        "cuda80": (Config(64, 64, 64, 0, 8, 3), Config(64, 32, 32, 0, 8, 3)),
        "hip": (Config(64, 32, 64, 0, 4, 2), Config(64, 32, 32, 0, 4, 2)),
    },
    "gradient": {
        "cuda90": (Config(64, 64, 64, 128, 8, 2), Config(32, 32, 32, 64, 4, 2)),
        "cuda80": (Config(64, 64, 64, 128, 8, 2), Config(32, 32, 32, 64, 4, 2)),
        "hip": (Config(64, 64, 64, 64, 4, 2), Config(32, 32, 32, 64, 4, 2)),
    },
    "gradient_kl": {
        "cuda90": (Config(64, 32, 64, 64, 8, 2), Config(32, 32, 32, 32, 4, 2)),
        "cuda80": (Config(64, 32, 64, 64, 8, 2), Config(32, 32, 32, 32, 4, 2)),
        "hip": (Config(32, 32, 64, 64, 4, 2), Config(32, 32, 32, 32, 4, 2)),
    },
}
#: Small tiles for the CPU interpreter: a program costs time by the operation, not by the number.
INTERPRETER = Config(16, 16, 16, 32, 1, 1)
#: Tried in turn when autotuning, beside the default.
CANDIDATES: dict[str, tuple[Config, ...]] = {
    "forward": (Config(64, 64, 64, 0, 4, 3), Config(64, 128, 64, 0, 4, 3), Config(128, 128, 64, 0, 8, 4)),
}
_tuned: dict[tuple[object, ...], Config] = {}


def interpreted(kernel: object) -> bool:
    """Whether the kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return isinstance(kernel, InterpretedFunction)


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of :data:`DEFAULTS` for a device."""
    if torch.version.hip:
        return "hip"
    return "cuda90" if torch.cuda.get_device_capability(device) >= (9, 0) else "cuda80"


def default(kind: str, arch: str, itemsize: int) -> Config:
    """The default for features of 2 or 4 bytes."""
    return DEFAULTS[kind][arch][0 if itemsize == 2 else 1]


def pick(kind: str, x: torch.Tensor, key: tuple[int, ...], launch: Callable[[Config], object]) -> Config:
    """The configuration to launch with; ``launch`` runs the kernel with one, for autotuning."""
    base = default(kind, architecture(x.device), x.element_size())
    if os.environ.get(AUTOTUNE) != "1" or kind not in CANDIDATES:
        return base
    found = (kind, x.device, x.dtype, *key)
    if found not in _tuned:
        _tuned[found] = min((base, *CANDIDATES[kind]), key=lambda config: _time(launch, config))
    return _tuned[found]


def _time(launch: Callable[[Config], object], config: Config) -> float:
    """Milliseconds; infinite for a configuration that does not fit the device."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: launch(config), warmup=5, rep=20))
    except OutOfResources:
        return float("inf")
