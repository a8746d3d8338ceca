"""Launch configurations, one fixed default for each kind of kernel, architecture and width of the features; and
which of two paths computes: tiles that multiply for themselves, or a library's products over chunks of classes.

Nothing is asked of a device at import. Set ``CDC_KERNELS_AUTOTUNE=1`` to time both paths and the candidates once for
each shape, direction and dtype, and take the fastest instead of the default along the rule's path: like cuDNN's
benchmark mode, at the price that two processes may choose differently and then differ by rounding. :class:`force_path`
overrides the rule between the paths.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from triton.runtime.interpreter import InterpretedFunction

AUTOTUNE = "CDC_KERNELS_AUTOTUNE"


@dataclass(frozen=True)
class Config:
    """Tile of images, classes and features; ``out`` is the width of a gradient's tile; warps and stages.

    prompts: how many lie side by side in one product: 1, 2 or 4, and it divides M. One that sees the images' tile
    once reads less for its flops; images must be the same for all of them then.
    """

    images: int
    classes: int
    features: int
    out: int
    num_warps: int
    num_stages: int
    prompts: int = 1


Choice = tuple[str, Config]  # a path, and the configuration of its kernel that makes or reads the logits

#: kind -> architecture -> (16-bit features, 32-bit features). KL needs registers for its gamma functions. Chosen
#: so that products read little for their flops and spill nothing in their loop (benches/results/aot); speed on a device
#: is still to be measured.
DEFAULTS: dict[str, dict[str, tuple[Config, Config]]] = {
    "forward": {
        "cuda90": (Config(128, 128, 64, 0, 8, 3), Config(64, 64, 32, 0, 8, 3)),
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
#: The same for kernels that read products from the workspace, whatever the features were. Few numbers a thread, so
#: that two blocks share a multiprocessor; 64-wide warps need half as many.
for _kind in ("epilogue", "epilogue_kl", "slope", "slope_kl"):
    _loaded = {arch: Config(16, 64, 64, 0, 4 if arch == "hip" else 8, 1) for arch in ("cuda90", "cuda80", "hip")}
    DEFAULTS[_kind] = {arch: (config, config) for arch, config in _loaded.items()}
#: Two and four prompts in one product, of 16-bit features.
_two = {
    "cuda90": Config(128, 64, 64, 0, 8, 3, 2),
    "cuda80": Config(128, 64, 64, 0, 8, 3, 2),
    "hip": Config(64, 64, 64, 0, 4, 2, 2),
}
_four = {
    "cuda90": Config(128, 64, 64, 0, 8, 3, 4),
    "cuda80": Config(128, 32, 64, 0, 8, 3, 4),
    "hip": Config(64, 32, 64, 0, 4, 2, 4),
}
for _kind, _packed in (("forward_2", _two), ("forward_4", _four)):
    DEFAULTS[_kind] = {arch: (config, DEFAULTS["forward"][arch][1]) for arch, config in _packed.items()}
#: So many programs keep a device busy (an H100 has 132 multiprocessors): work is split until there are about as many.
PROGRAMS = 128
#: Small tiles for the CPU interpreter: a program costs time by the operation, not by the number.
INTERPRETER = Config(16, 16, 16, 32, 1, 1)
#: Tried in turn when autotuning, beside the default.
CANDIDATES: dict[str, tuple[Config, ...]] = {
    "forward": (
        Config(64, 64, 64, 0, 4, 3),
        Config(128, 64, 64, 0, 8, 3),
        Config(64, 64, 64, 0, 4, 3, 2),
        Config(64, 32, 64, 0, 4, 3, 4),
        Config(128, 32, 64, 0, 8, 3, 4),
    ),
}
_tuned: dict[tuple[object, ...], Choice] = {}


# ---- which path -------------------------------------------------------------------------------------------------
# Estimated for an H100, not measured: waits for a GPU. The arithmetic is in benches/NOTES.md.

PATHS = ("tiles", "chunks")
#: Bytes of the workspace of the second path. A chunk of classes takes nine calls, so it should be worth them.
WORKSPACE = 64 * 2**20
#: Share of the peak rate that matrix products reach: a library's, and tiles' that the L2 cache feeds fast enough.
LIBRARY_SHARE, TILE_SHARE = 0.7, 0.6
MATRIX_RATE = {"16 bits": 989e12, "tf32": 495e12, "float32": 67e12}  # flop/s
BANDWIDTH = 3.35e12  # bytes/s
L2_BANDWIDTH = 5.5e12  # bytes/s, to all multiprocessors together
INSTRUCTION_RATE = 3.0e13  # float32 instructions a second
SLOPE_INSTRUCTIONS = 50  # for the gradient of one logit
CALL = 15e-6  # seconds of the host for a launch or a library's product

_forced: str | None = None


class force_path:
    """Take one path whatever the rule says, for good or inside a ``with`` block; None goes back to the rule.

    Process-wide, because autograd computes gradients in threads of its own; a backward pass follows what is in force
    when it runs.

    >>> with force_path("chunks"):
    ...     path("forward", 4, 4, 50, 512, torch.float32)
    'chunks'
    """

    def __init__(self, path: str | None) -> None:
        if path is not None and path not in PATHS:
            raise ValueError(f"path must be 'tiles', 'chunks' or None; got {path!r}")
        global _forced
        self._before = _forced
        _forced = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._before


def paths(
    direction: str, B: int, M: int, K: int, D: int, dtype: torch.dtype,
    sides: int = 2, tf32: bool = False, again: bool = True,
) -> list[str]:  # fmt: skip
    """The paths that can be taken, that of least estimated time first; one alone if it is forced.

    direction: "forward" or "backward", the latter to ``sides`` of the features. again: whether a backward pass along
    "tiles" makes the fused opinion again.
    """
    if _forced is not None:
        return [_forced]
    if torch.version.hip and dtype.itemsize == 2:
        return ["tiles"]  # no library product of 16-bit features gives float32 there in every version of torch
    return sorted(PATHS, key=lambda each: seconds(each, direction, B, M, K, D, dtype, sides, tf32, again))


def path(direction: str, B: int, M: int, K: int, D: int, dtype: torch.dtype) -> str:
    """The path that the rule takes, of a backward pass to image and text."""
    return paths(direction, B, M, K, D, dtype)[0]


def seconds(
    path: str, direction: str, B: int, M: int, K: int, D: int, dtype: torch.dtype,
    sides: int = 2, tf32: bool = False, again: bool = True,
) -> float:  # fmt: skip
    """Estimated time of one path: the device's, for products, workspace and slopes of logits, or the host's if longer.

    Images are taken to be the same for all prompts.
    """
    logits = B * M * K
    single = "tf32" if tf32 else "float32"
    rate = MATRIX_RATE[single if dtype == torch.float32 else "16 bits"]
    # float16 would lose small gradients: tiles multiply those through tf32, the library in float32
    half = dtype == torch.bfloat16
    if path == "chunks":
        product = 2 * D * logits / LIBRARY_SHARE
        if direction == "forward":
            chunks = math.ceil(K / chunk_of(K, bytes_a_class(B, M, D), WORKSPACE))
            return max(product / rate + 8 * logits / BANDWIDTH, 3 * chunks * CALL)
        # gradients of 16-bit text features are made in float32, and float16's are made by float32 copies of these
        copies = (dtype.itemsize == 2 and sides > 0) + (dtype == torch.float16 and sides > 1)
        chunks = math.ceil(K / chunk_of(K, bytes_a_class(B, M, D, half, copies), WORKSPACE))
        products = product / rate + sides * product / (rate if half else MATRIX_RATE[single])
        traffic = (12 + (2 if half else 4) * (1 + sides)) * logits + 12 * copies * M * K * D
        slopes = logits * SLOPE_INSTRUCTIONS / INSTRUCTION_RATE
        return max(products + traffic / BANDWIDTH + slopes, (3 + 3 * sides) * chunks * CALL)
    kind = "gradient" if direction == "backward" else forward_kind(M, dtype.itemsize)
    config = default(kind, "cuda90", dtype.itemsize)
    rows, columns = math.ceil(B / config.images), math.ceil(K / config.classes)
    product = 2 * D * M * rows * config.images * columns * config.classes
    if direction == "forward":
        busy = min(1, max(1, rows * columns) / PROGRAMS)
        return max(product / (tile_rate(config, dtype.itemsize, rate) * busy), 2 * CALL)
    # each side makes the logits again for every slice of features (what is not of features, once); and once more for
    # a fused opinion
    slices = math.ceil(D / config.out) if sides else 1
    times = max(1, sides) * slices
    busy = min(1, max(1, slices * columns * min(rows, M)) / PROGRAMS)
    gradient = MATRIX_RATE["tf32"] if dtype == torch.float16 else rate
    products = (times + again) * product / tile_rate(config, dtype.itemsize, rate)
    products += sides * product / tile_rate(config, dtype.itemsize, gradient)
    slopes = times * logits * SLOPE_INSTRUCTIONS / INSTRUCTION_RATE
    return max((products + slopes) / busy, (again + max(1, sides)) * CALL)


def bytes_a_class(B: int, M: int, D: int, half: bool = False, copies: int = 0) -> int:
    """Of the workspace: products; their gradients in bf16, if half; copies in float32 of text features."""
    return M * ((6 if half else 4) * B + 4 * D * copies)


def chunk_of(K: int, size: int, limit: int, tile: int = 64) -> int:
    """Classes of so many bytes (or numbers) each that fit a limit: whole tiles, at least one."""
    return min(K, max(1, limit // max(1, size * tile)) * tile)


def tile_rate(config: Config, itemsize: int, rate: float) -> float:
    """Flop/s of a tile's product: what matrix units of that rate reach, or what the L2 cache can feed."""
    images, columns = config.images, config.prompts * config.classes
    return min(TILE_SHARE * rate, L2_BANDWIDTH * 2 * images * columns / (itemsize * (images + columns)))


# ---- configurations ---------------------------------------------------------------------------------------------


def interpreted(kernel: object) -> bool:
    """Whether the kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return isinstance(kernel, InterpretedFunction)


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of :data:`DEFAULTS` for a device."""
    if torch.version.hip:
        return "hip"
    return "cuda90" if torch.cuda.get_device_capability(device) >= (9, 0) else "cuda80"


@functools.cache
def has_tf32(device: torch.device) -> bool:
    """Whether Triton multiplies float32 as tf32 there: of AMD's devices on gfx942 alone."""
    return not torch.version.hip or torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")


def default(kind: str, arch: str, itemsize: int) -> Config:
    """The default for features of 2 or 4 bytes."""
    return DEFAULTS[kind][arch][0 if itemsize == 2 else 1]


def forward_kind(M: int, itemsize: int) -> str:
    """The kind of forward kernel for images that are the same for all prompts: 4, 2 or 1 of them in a product."""
    together = math.gcd(M, 4) if itemsize == 2 else 1
    return "forward" if together == 1 else f"forward_{together}"


def autotuning() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get(AUTOTUNE) == "1"


def fastest(
    key: tuple[object, ...], choices: Sequence[Choice], launch: Callable[[Choice], object], device: torch.device
) -> Choice:
    """The choice that ``launch`` runs in least time; remembered for the key while the process lives.

    While a CUDA graph is captured nothing can be timed: the first choice, unless the fastest is known.
    """
    if key not in _tuned:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return choices[0]
        _tuned[key] = min(choices, key=lambda choice: _time(partial(launch, choice), device))
    return _tuned[key]


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds; infinite for a configuration that does not fit the device."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        if device.type != "cpu":
            return float(do_bench(run, warmup=5, rep=20))
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    except OutOfResources:
        return float("inf")
