"""Argument errors: every public function refuses bad input here, in a sentence that names the argument.

Shapes, dtypes, devices and names are always checked; they cost nothing. *Values* (finite features, targets in
range) need one reduction over the tensor, and on an accelerator a synchronisation, which the fused operations make
once for all their arguments (:class:`Readings`): they are checked by default, never while ``torch.compile`` traces or a
CUDA graph is captured, and can be switched off with :class:`value_checks`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn

import torch
from torch import Tensor

_values_checked = True

#: The largest scale, bias or weight: sums of such logits over prompts, classes and images stay finite in float32.
LARGEST = 2.0**100


class NonFiniteError(ValueError):
    """Values that are nan or infinite, or so large that what is made of them might be; a ValueError.

    What a training loop meets when it has diverged.

    >>> import torch, cdc_ops
    >>> try:
    ...     cdc_ops.evidence_from_logits(torch.tensor([1.0, float("nan")]))
    ... except cdc_ops.NonFiniteError as error:
    ...     print(error)
    logits must be finite; got 1 nan or inf among a float32 tensor of shape [2] on cpu
    """


class value_checks:
    """Switch the checks that read tensor values on or off, for good or inside a ``with`` block.

    Args:
        enabled: whether values are checked from now on; at the end of a ``with`` block, what held before holds again.

    Switched off, non-finite features give non-finite results and a target out of range is undefined
    behaviour. Shapes, dtypes, devices and names stay checked.

    >>> import torch, cdc_ops
    >>> with cdc_ops.value_checks(False):
    ...     cdc_ops.evidence_from_logits(torch.tensor([float("nan")]))
    tensor([nan])
    """

    def __init__(self, enabled: bool) -> None:
        global _values_checked
        self._before = _values_checked
        _values_checked = bool(enabled)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _values_checked
        _values_checked = self._before


def _may_read(x: Tensor) -> bool:
    if not _values_checked or torch.compiler.is_compiling() or x.device.type == "meta":
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_waited_for(device: torch.device) -> bool:
    """Whether reading a number of the device costs more than a few operations."""
    return device.type != "cpu"


class Readings:
    """Numbers on a device that checks are waiting for, read together: an accelerator is waited for once."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[float], object]]] = []

    def later(self, value: Tensor, check: Callable[[float], object]) -> None:
        """Have ``check`` called with the value of a scalar tensor; all of them on one device."""
        self._waiting.append((value, check))

    def read(self) -> None:
        """Wait, and check in the order in which checks came."""
        if not self._waiting:
            return
        found = [value for value, _ in self._waiting]
        together = _is_waited_for(found[0].device)  # then in the widest dtype among them
        values = torch.stack(found).tolist() if together else [value.item() for value in found]
        for (_, check), value in zip(self._waiting, values, strict=True):
            check(value)
        self._waiting.clear()


def at_least_single(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds numbers of all of these, float32 or float64."""
    wide = torch.float32
    for dtype in dtypes:
        if dtype is not wide:
            wide = torch.promote_types(wide, dtype)
    return wide


def came(x: object) -> str:
    """How an argument is described in an error message."""
    if isinstance(x, Tensor):
        return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {list(x.shape)} on {x.device}"
    return f"{x!r:.60}"


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """``value`` is one of the ``allowed`` strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def floating(name: str, x: object, shape: str) -> Tensor:
    """``x`` is a real floating-point tensor; ``shape`` is how the expected shape is written."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a floating-point tensor of shape {shape}; got {type(x).__name__} {x!r:.60}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be a floating-point tensor of shape {shape}; got {came(x)}")
    if x.layout != torch.strided or x.dtype.itemsize < 2:
        raise ValueError(f"{name} must be dense, of at least 16 bits a number; got {x.layout} in {came(x)}")
    return x


def dims(name: str, x: Tensor, allowed: Sequence[int], shape: str) -> None:
    """``x`` has one of the ``allowed`` numbers of dimensions."""
    if x.dim() not in allowed:
        raise ValueError(f"{name} must have shape {shape}; got {came(x)}")


def same_device(first_name: str, first: Tensor, **others: object) -> None:
    """Every tensor among ``others`` lies on the device of ``first``."""
    for name, x in others.items():
        if isinstance(x, Tensor) and x.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}; got {came(x)}")


def finite(name: str, x: Tensor) -> None:
    """``x`` holds no nan or inf. One reduction over ``x`` unless something is wrong."""
    if not _may_read(x) or x.numel() == 0:
        return
    with torch.no_grad():
        # A sum is one fast pass and is nan or inf when any element is; a finite tensor whose sum overflows
        # is told apart by the exact (slower) test.
        total = x.detach().sum(dtype=torch.float32 if x.dtype.itemsize < 4 else None)
        if not math.isfinite(total.item()) and not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise NonFiniteError(f"{name} must be finite; got {bad} nan or inf among {came(x)}")


def nonnegative(name: str, x: Tensor) -> None:
    """``x`` holds no negative number (and no nan or inf)."""
    finite(name, x)
    if _may_read(x) and x.numel() and (low := float(x.detach().amin())) < 0:
        raise ValueError(f"{name} must not be negative; got a minimum of {low:g} in {came(x)}")


def positive_sum(name: str, x: Tensor) -> None:
    """``x`` holds weights: no negative number, and not all zero."""
    nonnegative(name, x)
    if _may_read(x) and not float(x.detach().sum()) > 0:
        raise ValueError(f"{name} must have a positive sum; got all zeros in {came(x)}")


def within(name: str, x: Tensor, low: float, high: float) -> None:
    """Every value of ``x`` lies in [low, high]."""
    finite(name, x)
    if x.numel() and _may_read(x):
        least, most = (float(v) for v in torch.aminmax(x.detach()))
        if least < low or most > high:
            raise ValueError(f"{name} must lie in [{low:g}, {high:g}]; got values from {least:g} to {most:g}")


def number(name: str, value: object, *, low: float = -math.inf, open_low: bool = False) -> float:
    """``value`` is a finite number, at least (or above) ``low``, that float32 holds with room for sums."""
    want = "a finite number" + (f" {'>' if open_low else '>='} {low:g}" if low > -math.inf else "")
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be {want}; got {came(value)}")
    size = _as_float(value)
    # isfinite in other words, which torch.compile understands of a number that it keeps symbolic too
    if not -math.inf < size < math.inf:
        raise NonFiniteError(f"{name} must be {want}; got {came(value)}")
    if size < low or (open_low and size == low):
        raise ValueError(f"{name} must be {want}; got {came(value)}")
    if abs(size) > LARGEST or (open_low and size - low < 1 / LARGEST):
        room = "between 2^-100 and 2^100" if open_low else "within 2^100"
        raise ValueError(f"{name} must be {want}, {room}; got {size!r}")
    return size


def how_many(name: str, value: object, classes: int) -> None:
    """``value`` is a number of the classes, at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= classes:
        raise ValueError(f"{name} must be an integer from 1 to the number of classes, {classes}; got {value!r}")


def prior_weight(value: object, classes: int) -> float:
    """The non-informative prior weight W: a number above 0, or None for the number of classes."""
    return float(classes) if value is None else number("prior_weight", value, low=0.0, open_low=True)


def evidence(x: object, shape: str = "[..., K]", name: str = "evidence") -> Tensor:
    """Evidence, or its log ratio: floating, at least one class, finite and not negative."""
    x = floating(name, x, shape)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have shape {shape} with at least one class; got {came(x)}")
    nonnegative(name, x)
    return x


def source_dim(x: Tensor, dim: object, name: str = "evidence") -> int:
    """The dimension to fuse over, as a non-negative index: any but the last, which holds the classes."""
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be a dimension of {name}; got {dim!r} for {came(x)}")
    dim %= x.dim()
    if dim == x.dim() - 1:
        raise ValueError(
            f"dim must not be the last dimension of {name}, which holds the classes; got {dim} for {came(x)}"
        )
    if x.shape[dim] == 0:
        raise ValueError(f"{name} must hold at least one opinion along dim {dim}; got {came(x)}")
    return dim


def class_indices(x: object, shape: Sequence[int], device: torch.device) -> Tensor:
    """Integers of the given shape, ready to be class indices; values are not read yet."""
    if not isinstance(x, Tensor) or x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise ValueError(f"target must be an integer tensor of shape {list(shape)}; got {came(x)}")
    if list(x.shape) != list(shape):
        raise ValueError(f"target must have shape {list(shape)}; got {came(x)}")
    if x.device != device:
        raise ValueError(f"target must be on the device of the other tensors, {device}; got {came(x)}")
    return x.long()


def target(
    x: object, shape: Sequence[int], classes: int, device: torch.device, readings: Readings | None = None
) -> Tensor:
    """Class indices of the given shape within [0, classes); read with the others, or without any at once."""
    indices, mine = class_indices(x, shape, device), readings or Readings()
    if indices.numel() and _may_read(indices):

        def check(wrong: float) -> None:
            if wrong:
                low, high = (int(v) for v in torch.aminmax(indices))
                raise ValueError(f"target must hold class indices in [0, {classes}); got values from {low} to {high}")

        mine.later((indices.clamp(0, classes - 1) != indices).any(), check)
    if readings is None:
        mine.read()
    return indices


def fingerprint(x: Tensor) -> int:
    """A number of less than 32 bits that other integers [N] hardly have; 0 where values are not read."""
    if not _may_read(x):
        return 0
    place = torch.arange(1, len(x) + 1, device=x.device)
    return int(((x + 1) * place).sum() % 2**31)


def text_features(name: str, x: object) -> Tensor:
    """Text features [M, K, D], none of them empty, finite."""
    x = floating(name, x, "[M, K, D]")
    if x.dim() != 3 or 0 in x.shape:
        hint = f" (a single prompt: {name}.unsqueeze(0))" if x.dim() == 2 else ""
        raise ValueError(
            f"{name} must have shape [M, K, D] with at least one prompt, class and feature{hint}; got {came(x)}"
        )
    return x


def finite_lengths(name: str, x: Tensor, readings: Readings | None = None) -> Tensor | None:
    """``x`` and the lengths of its rows are finite; hands the lengths back (None when nothing is read)."""
    if not _may_read(x):
        return None
    mine = readings or Readings()
    dtype = at_least_single(x.dtype)
    lengths = torch.linalg.vector_norm(x.detach() if x.requires_grad else x, dim=-1, dtype=dtype)

    def check(total: float) -> None:
        if not math.isfinite(total):
            finite(name, x)
            if long := int(lengths.isinf().sum()):
                kind = str(dtype).removeprefix("torch.")
                raise NonFiniteError(
                    f"{name} must have lengths within {kind}; got {long} whose length overflows in {came(x)}"
                )

    mine.later(lengths.sum(), check)
    if readings is None:
        mine.read()
    return lengths


def products(image: Tensor | None, text: Tensor | None, scale: Tensor, readings: Readings) -> None:
    """Logits of features taken as they are stay within 2^100, told by their lengths (None when nothing is read)."""
    if image is None or text is None or image.numel() == 0:
        return
    sizes = [x.detach().abs().amax() for x in (image, text, scale)]

    def check(size: float) -> None:
        if not size <= LARGEST:  # or the product of the first two overflows where that of all three does not
            found = [float(x) for x in sizes]
            if not math.prod(found) <= LARGEST:
                raise NonFiniteError(
                    "image and text must have lengths whose product, times scale, is within 2^100 for normalize=False; "
                    "got {:g} and {:g} at the most, and a scale of {:g}".format(*found)
                )

    readings.later(sizes[0] * sizes[1] * sizes[2], check)


def features(image: object, text: object) -> tuple[Tensor, Tensor]:
    """Image and text features that fit together, [B, D] or [B, M, D] against [M, K, D]; values are not read yet."""
    text = text_features("text", text)
    prompts, _, size = text.shape
    want = f"[B, {size}] or [B, {prompts}, {size}] to match text {list(text.shape)}"
    image = floating("image", image, want)
    fits = image.dim() in (2, 3) and image.shape[-1] == size and (image.dim() == 2 or image.shape[1] == prompts)
    if not fits:
        raise ValueError(f"image must have shape {want}; got {came(image)}")
    same_device("image", image, text=text)
    return image, text


def per_prompt(
    name: str,
    value: object,
    prompts: int,
    dtype: torch.dtype,
    device: torch.device,
    readings: Readings | None = None,
) -> Tensor:
    """A number, a scalar tensor or one value per prompt, as a tensor [M]; gradients flow through."""

    def refuse(what: str, error: type[ValueError] = ValueError) -> NoReturn:
        want = f"a number, a scalar tensor or a tensor of shape [{prompts}], finite and within 2^100"
        raise error(f"{name} must be {want}; got {what}")

    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            refuse(came(value))
        if not abs(_as_float(value)) <= LARGEST:
            refuse(came(value), NonFiniteError)
        return torch.full((prompts,), float(value), dtype=dtype, device=device)
    if not value.dtype.is_floating_point or list(value.shape) not in ([], [1], [prompts]):
        refuse(came(value))
    if (value.dim() or value.is_meta) and value.device != device:
        raise ValueError(f"{name} must be on the device of image, {device}; got {came(value)}")
    if _may_read(value):

        def check(size: float) -> None:
            if not size <= LARGEST:  # also for nan
                refuse(f"a size of {size:g} in {came(value)}", NonFiniteError)

        size = value.detach().abs().amax()
        if readings is None or value.device != device:
            check(float(size))
        else:
            readings.later(size, check)
    return value.to(device=device, dtype=dtype).expand(prompts)


def _as_float(value: numbers.Real) -> float:
    """``float(value)``, and inf for an integer beyond every float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
