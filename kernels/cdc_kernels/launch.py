"""Launchers of the fused opinion: from checked tensors to kernels, along one of two paths. No autograd here.

"tiles": the kernels of :mod:`cdc_kernels.fused_opinion` multiply features themselves. "chunks": a library multiplies
them over chunks of classes, the same epilogue reads the products (:mod:`cdc_kernels.chunks`). The rule between them
is :func:`cdc_kernels.configs.path`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from cdc_kernels import configs
from cdc_kernels.chunks import project_kernel, slope_kernel
from cdc_kernels.configs import INTERPRETER, Choice, Config
from cdc_kernels.fused_opinion import finish_kernel, forward_kernel, image_kernel, text_kernel
from cdc_kernels.special import NOTHING

T = TypeVar("T")

INTERPRETED = configs.interpreted(forward_kernel)
#: Which kernel reads or makes the logits, by direction and path.
KINDS = {
    "forward": {"tiles": "forward", "chunks": "epilogue"},
    "backward": {"tiles": "gradient", "chunks": "slope"},
}
#: Tiles' backward pass of the loss makes the fused log ratio again, for so many numbers (16 MB) of it at a time.
RATIO_NUMBERS = 2**22
#: So many partial row sums (16 MB) are kept at a time.
PARTIAL_NUMBERS = 2**22
#: The running top-k looks at so many classes at a time, and at no more than a quarter of them; or at half of them, if
#: these are no more than so many log ratios (4 MB).
TOPK_COLUMNS, TOPK_NUMBERS = 4096, 2**20
FINISH_ROWS, FINISH_TILES = 32, 32
PROJECT_ROWS, PROJECT_FEATURES = 16, 128


@dataclass(frozen=True)
class Inputs:
    """What every kernel of the family reads.

    image [B, D] or [B, M, D] and text [M, K, D] of one dtype; float32: scale and bias [M], lengths [B]
    or [B, M] and [M, K] or None (features taken as they are), weight [B, M] of the weighted rule; target [B], -1 for
    none of the K. classes: of the whole opinion, where text holds a shard of it; 0 stands for K.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    image_length: Tensor | None
    text_length: Tensor | None
    weight: Tensor | None
    target: Tensor | None
    activation: str
    rule: str
    prior_weight: float
    classes: int = 0
    square: bool = False
    kl: bool = False

    def __post_init__(self) -> None:
        """Kernels follow pointers: what does not fit together is refused here, where operators are called directly."""
        M, _, D = self.text.shape
        B = self.image.shape[0]
        shapes = {
            "image": [[B, D], [B, M, D]],
            "scale": [[M]],
            "bias": [[M]],
            "image_length": [list(self.image.shape[:-1])],
            "text_length": [[M, self.text.shape[1]]],
            "weight": [[B, M]],
            "target": [[B]],
        }
        for name, allowed in shapes.items():
            x = getattr(self, name)
            if x is None:
                continue
            if list(x.shape) not in allowed or x.device != self.text.device:
                raise ValueError(
                    f"{name} must have shape {' or '.join(map(str, allowed))} on {self.text.device}, to match text "
                    f"{list(self.text.shape)}; got {list(x.shape)} on {x.device}"
                )
        if self.image.dtype != self.text.dtype:
            raise ValueError(f"image must have the dtype of text, {self.text.dtype}; got {self.image.dtype}")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, M, K, D."""
        M, K, D = self.text.shape
        return self.image.shape[0], M, K, D

    @property
    def tf32(self) -> bool:
        """Whether PyTorch may multiply float32 features as tf32."""
        # not allow_tf32, which raises once a program has used the newer setting
        cuda = self.image.device.type == "cuda"
        return cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" and configs.has_tf32(self.image.device)


def log_of(x: float) -> float:
    """``ln x`` as the kernels write it, 0 included."""
    return math.log(x) if x > 0 else float(NOTHING.value)


def unit_last(x: Tensor) -> Tensor:
    """x with features next to each other in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@dataclass
class Call:
    """The arguments the kernels share, by name; image and text with features next to each other in memory."""

    image: Tensor
    text: Tensor
    tensors: dict[str, Any]
    sizes: dict[str, int]
    numbers: dict[str, float]
    flags: dict[str, Any]
    log_others: float  # of the prior's share of a row sum: 1 over all classes, 1 - 1 / classes without the target

    @classmethod
    def of(cls, i: Inputs) -> Call:
        """From inputs; what is absent becomes a flag and a pointer nobody follows."""
        B, M, K, D = i.sizes
        classes = i.classes or K
        x, t, dummy = unit_last(i.image), unit_last(i.text), i.scale
        xi = dummy if i.image_length is None else i.image_length
        return cls(
            image=x,
            text=t,
            tensors={
                "x_ptr": x,
                "t_ptr": t,
                "scale_ptr": i.scale.contiguous(),
                "bias_ptr": dummy if i.bias is None else i.bias.contiguous(),
                "xi_ptr": xi,
                "ti_ptr": dummy if i.text_length is None else i.text_length.contiguous(),
                "weight_ptr": dummy if i.weight is None else i.weight.t().contiguous(),
                "target_ptr": dummy if i.target is None else i.target.contiguous(),
            },
            sizes={
                "B": B,
                "M": M,
                "K": K,
                "D": D,
                "x_b": x.stride(0),
                "x_m": x.stride(1) if x.dim() == 3 else 0,
                "t_m": t.stride(0),
                "t_k": t.stride(1),
                "xi_b": xi.stride(0),
                "xi_m": xi.stride(1) if xi.dim() == 2 else 0,
            },
            numbers={
                "log_w": math.log(i.prior_weight),
                "log_share": -math.log(M) if i.rule == "averaging" else 0.0,
                "log_share_of_class": -math.log(classes),
            },
            flags={
                "ACTIVATION": i.activation,
                "RULE": i.rule,
                "TARGET": i.target is not None,
                "SQUARE": i.square,
                "KL": i.kl,
                "HAS_BIAS": i.bias is not None,
                "NORMALIZE": i.image_length is not None,
                "UPCAST": INTERPRETED,
                "PRECISION": "tf32" if i.tf32 else "ieee",
            },
            log_others=0.0 if i.target is None else log_of((classes - 1) / classes),
        )

    @property
    def dummy(self) -> Tensor:
        """A tensor to point at where nothing is read or written."""
        return self.tensors["scale_ptr"]  # type: ignore[no-any-return]

    def images(self, dtype: torch.dtype) -> Tensor:
        """Image features as [M, B, D]."""
        x, M = self.image.to(dtype), self.sizes["M"]
        return x.transpose(0, 1) if x.dim() == 3 else x.expand(M, -1, -1)

    @property
    def together(self) -> int:
        """How many prompts can lie side by side in one product: their images must be the same."""
        return math.gcd(self.sizes["M"], 4) if self.image.dim() == 2 else 1

    def config(self, kind: str) -> Config:
        """The default configuration of a kind of kernel."""
        if INTERPRETED:
            return dataclasses.replace(INTERPRETER, prompts=self.together if kind == "forward" else 1)
        if self.flags["KL"]:
            kind += "_kl"
        elif kind == "forward":
            kind = configs.forward_kind(self.together, self.image.element_size())
        return configs.default(kind, configs.architecture(self.image.device), self.image.element_size())

    def tile(self, config: Config) -> dict[str, Any]:
        """The configuration as launch arguments."""
        return {
            "EVEN_D": self.sizes["D"] % config.features == 0,
            "BLOCK_B": config.images,
            "BLOCK_K": config.classes,
            "BLOCK_D": config.features,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    @property
    def half(self) -> bool:
        """Gradients are multiplied as bf16, whose range is float32's. float16 would lose small ones."""
        return self.image.dtype == torch.bfloat16 and not INTERPRETED

    def gradient_flags(self) -> dict[str, Any]:
        """How tiles multiply gradients: bf16 as it is, float16 through tf32 where there is one, float32 like logits."""
        half = self.image.dtype == torch.float16 and not INTERPRETED
        through_tf32 = half and configs.has_tf32(self.image.device)
        return {
            "HALF": "bf16" if self.half else "",
            "GRAD_PRECISION": "tf32" if through_tf32 else self.flags["PRECISION"],
        }

    def products(self, work: Tensor, first: int, last: int) -> Call:
        """This call for classes first .. last, whose products with every image go into the workspace first."""
        M, B = self.sizes["M"], self.sizes["B"]
        here = work[: M * B * (last - first)].view(M, B, last - first)
        multiply(self.images(self.image.dtype), self.text[:, first:last].transpose(1, 2), here)
        sizes = self.sizes | {"x_m": here.stride(0), "x_b": here.stride(1)}
        return dataclasses.replace(self, tensors=self.tensors | {"x_ptr": here}, sizes=sizes)


def run_fastest(
    call: Call,
    direction: str,
    what: tuple[object, ...],
    launch: Callable[[Choice], T],
    sides: int = 2,
    again: bool = True,
) -> T:
    """Launch along the rule's path with its default; when autotuning along the fastest here, for inputs of this kind.

    what: what else than the call tells one launch from another; sides and again as for :func:`configs.paths`.
    """
    x, B, M, K, D = call.image, *(call.sizes[name] for name in "BMKD")
    paths = configs.paths(direction, B, M, K, D, x.dtype, sides, call.flags["PRECISION"] == "tf32", again)

    def default(path: str) -> Choice:
        return path, call.config(KINDS[direction][path])

    if not configs.autotuning():
        return launch(default(paths[0]))
    choices = [default(path) for path in paths]
    if not call.flags["KL"] and not INTERPRETED:  # KL's gamma functions need smaller tiles
        for path in paths:
            candidates = configs.CANDIDATES.get(KINDS[direction][path], ())
            choices += [(path, each) for each in candidates if call.together % each.prompts == 0]
    key = direction, tuple(paths), x.device, x.dtype, x.dim(), B, M, K, D, *call.flags.values(), *what
    return launch(configs.fastest(key, choices, launch, x.device))


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` [M, .., ..] by the library; out is float32, a and b are of one dtype."""
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    elif a.device.type == "cuda" and not torch.version.hip:
        torch.bmm(a, b, torch.float32, out=out)
    else:
        torch.bmm(a.float(), b.float(), out=out)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch where the tensors are, whatever the current device."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(x.device).device(x.device)  # type: ignore[no-any-return]


def run_forward(
    call: Call, config: Config, *, first: int, last: int, fused: bool, loaded: bool = False,
    ratio: Tensor | None = None, partial: Tensor | None = None, sums: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the forward kernel on classes first .. last."""
    tiles = triton.cdiv(last - first, config.classes)
    forward_kernel[(triton.cdiv(call.sizes["B"], config.images) * tiles,)](
        **call.tensors,
        ratio_ptr=call.dummy if ratio is None else ratio,
        partial_ptr=call.dummy if partial is None else partial,
        sums_ptr=call.dummy if sums is None else sums,
        **call.sizes,
        first=first,
        last=last,
        tiles=tiles,
        ratio_b=0 if ratio is None else ratio.stride(0),
        **call.numbers,
        log_others=call.log_others,
        FUSED=fused,
        SUMS=sums is not None,
        RATIO=ratio is not None,
        WHOLE=sums is not None and partial is sums,
        PROMPTS=config.prompts,
        LOADED=loaded,
        **call.flags,
        **call.tile(config),
    )


def run_finish(call: Call, partial: Tensor, sums: Tensor, tiles: int, opinions: int, add: bool) -> None:
    """Launch the reduction of partial row sums."""
    B = call.sizes["B"]
    finish_kernel[(triton.cdiv(B, FINISH_ROWS), opinions)](
        partial,
        sums,
        B,
        sums.shape[1],
        tiles,
        call.log_others,
        ADD=add,
        TARGET=call.flags["TARGET"],
        SQUARE=call.flags["SQUARE"],
        KL=call.flags["KL"],
        BLOCK_B=FINISH_ROWS,
        BLOCK_T=FINISH_TILES,
        num_warps=4,
    )


def forward(
    call: Call, config: Config, path: str, sums: Tensor, fused: bool, ratio: Tensor | None = None, columns: int = 0
) -> Iterator[tuple[int, Tensor | None]]:
    """Fill row sums [4, M + 1, B] chunk by chunk of classes, and yield the first class and log ratio of each.

    ratio, if wanted: [B, K]; or [B, columns], which is written over by the next chunk. One launch when all classes fit
    one tile.
    """
    _, R, B = sums.shape
    M, K = call.sizes["M"], call.sizes["K"]
    planes = 4 if call.flags["SQUARE"] or call.flags["KL"] else 1
    D, tile = call.sizes["D"], config.classes
    limit = configs.chunk_of(K, 1, PARTIAL_NUMBERS // (planes * R * B) * tile, tile)
    if path == "chunks":
        limit = min(limit, configs.chunk_of(K, configs.bytes_a_class(B, M, D), configs.WORKSPACE, tile))
    columns = min(columns, limit) if columns else limit
    whole = config.classes >= K
    partial = sums if whole else sums.new_empty((planes, R, triton.cdiv(columns, config.classes), B))
    work = sums.new_empty(M * B * columns if path == "chunks" else 0)
    for first in range(0, K, columns):
        last = min(first + columns, K)
        here = call.products(work, first, last) if path == "chunks" else call
        out = ratio
        if ratio is not None:
            out = ratio[:, first:last] if ratio.shape[1] == K else ratio[:, : last - first]
        run_forward(
            here, config, first=first, last=last, fused=fused, loaded=path == "chunks",
            ratio=out, partial=partial, sums=sums,
        )  # fmt: skip
        if not whole:
            tiles = triton.cdiv(last - first, config.classes)
            run_finish(call, partial, sums, tiles, R if fused else M, first > 0)
        yield first, out


def row_sums(i: Inputs, want_ratio: bool, fused: bool = True) -> tuple[Tensor, Tensor]:
    """log_ratio [B, K] (or empty) and row sums [4, M + 1, B]: see :mod:`cdc_kernels.fused_opinion`.

    Without ``fused`` only the prompts' opinions are summed up; the last row is zero.
    """
    B, M, K, _ = i.sizes
    ratio = i.scale.new_empty((B, K) if want_ratio else (0,))
    sums = i.scale.new_empty((4, M + 1, B)) if fused else i.scale.new_zeros((4, M + 1, B))
    if B == 0:
        return ratio, sums
    call = Call.of(i)

    def launch(choice: Choice) -> None:
        path, config = choice
        for _ in forward(call, config, path, sums, fused, ratio if want_ratio else None):
            pass

    with on_device(i.image):
        run_fastest(call, "forward", (want_ratio, fused), launch)
    return ratio, sums


def topk(i: Inputs, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Classes [B, k], their log_ratio [B, k], and row sums [4, M + 1, B]; [B, K] never exists."""
    B, M, K, _ = i.sizes
    sums = i.scale.new_empty((4, M + 1, B))
    values = i.scale.new_empty((B, 0))
    classes = torch.empty((B, 0), dtype=torch.int64, device=i.image.device)
    if B == 0:
        return classes.new_empty((0, k)), values.new_empty((0, k)), sums
    call = Call.of(i)

    def launch(choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
        path, config = choice
        most = max(min(TOPK_COLUMNS, triton.cdiv(K, 4)), min(TOPK_NUMBERS // B, triton.cdiv(K, 2)))
        columns = triton.cdiv(max(k, most), config.classes) * config.classes
        ratio, best, at = i.scale.new_empty((B, min(columns, K))), values, classes
        for first, here in forward(call, config, path, sums, True, ratio, columns):
            assert here is not None
            more, where = here.topk(min(k, here.shape[1]), dim=1)
            best, at = torch.cat([best, more], 1), torch.cat([at, where + first], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            at = at.gather(1, order)
        return at, best, sums

    with on_device(i.image):
        return run_fastest(call, "forward", ("topk", k), launch)


@dataclass
class Wanted:
    """Where gradients go, or None: image (float32), text, and rows [3, M, B] of scale, bias and weight."""

    image: Tensor | None
    text: Tensor | None
    rows: Tensor | None


def gradients(
    i: Inputs, planes: Tensor, ratio: Tensor | None, g_ratio: Tensor | None,
    need_image: bool, need_text: bool, need_rows: bool, fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of image (float32), text, and rows [3, M, B] (of scale, bias and weight, before the sum over images).

    planes [7, M + 1, B]: total, log_target, log_square, then the gradients by these and by kl_sum. Without a
    ratio the fused log ratio is made again. What is not needed comes back empty.
    """
    B, M, _, _ = i.sizes
    g_image = i.scale.new_empty(i.image.shape if need_image else (0,))
    g_text = i.text.new_empty(i.text.shape if need_text else (0,))
    g_rows = i.scale.new_empty((3, M, B) if need_rows else (0,))
    if B == 0:
        return g_image, g_text.zero_(), g_rows
    out = Wanted(g_image if need_image else None, g_text if need_text else None, g_rows if need_rows else None)
    call, planes = Call.of(i), planes.contiguous()

    def launch(choice: Choice) -> None:
        path, config = choice
        if path == "chunks":
            chunk_gradients(call, config, planes, g_ratio, fused, out)
        else:
            tile_gradients(call, config, planes, ratio, g_ratio, fused, out)

    what = need_image, need_text, need_rows, fused, ratio is None, g_ratio is None
    with on_device(i.image):
        run_fastest(call, "backward", what, launch, need_image + need_text, again=fused and ratio is None)
    return g_image, g_text, g_rows


def tile_gradients(
    call: Call, config: Config, planes: Tensor, ratio: Tensor | None, g_ratio: Tensor | None, fused: bool, out: Wanted
) -> None:
    """Tiles multiply for themselves; the fused log ratio, if not at hand, is made again for a chunk of classes."""
    B, M, K, D = (call.sizes[name] for name in "BMKD")
    # the fused log ratio alone: whatever the loss, by the widest product
    plain = dataclasses.replace(call, flags=call.flags | {"TARGET": False, "SQUARE": False, "KL": False})
    widest = plain.config("forward")
    again = fused and ratio is None
    columns = configs.chunk_of(K, B, RATIO_NUMBERS, config.classes) if again else K
    if again or ratio is None:
        ratio = planes.new_empty((B, columns) if again else (1, 1))
    shared = call.image.dim() == 2
    slices = triton.cdiv(D, config.out)
    # the image kernel: prompts of a program, programs along its three axes, and partial gradients [splits, ..]
    features = out.image is not None
    groups = 1 if shared and features else M
    rows_grid, image_slices = triton.cdiv(B, config.images), slices if features else 1
    splits = triton.cdiv(configs.PROGRAMS, rows_grid * groups * image_slices)
    splits = min(splits, triton.cdiv(columns, config.classes))
    g_image, g_rows = (None if x is None else parts_of(x, splits) for x in (out.image, out.rows))
    for first in range(0, K, columns):
        last = min(first + columns, K)
        if again:
            run_forward(plain, widest, first=first, last=last, fused=True, ratio=ratio)
        common = {
            **call.tensors,
            "planes_ptr": planes,
            "ratio_ptr": ratio,
            "g_ratio_ptr": call.dummy if g_ratio is None else g_ratio,
            **call.sizes,
            "first": first,
            "last": last,
            "ratio_b": ratio.stride(0),
            "g_ratio_b": 0 if g_ratio is None else g_ratio.stride(0),
            **call.numbers,
            "FUSED": fused,
            "G_RATIO": g_ratio is not None,
            **call.flags,
            **call.gradient_flags(),
            **call.tile(config),
            "OUT_D": config.out,
        }
        if g_image is not None or g_rows is not None:
            image_kernel[(rows_grid, splits * groups, image_slices)](
                g_image_ptr=call.dummy if g_image is None else g_image,
                g_rows_ptr=call.dummy if g_rows is None else g_rows,
                group=M // groups,
                span=triton.cdiv(triton.cdiv(last - first, config.classes), splits) * config.classes,
                gi_s=0 if g_image is None else g_image.stride(0),
                gi_b=0 if g_image is None else g_image.stride(1),
                gi_m=0 if shared or g_image is None else g_image.stride(2),
                FEATURES=features,
                ROWS=g_rows is not None,
                ADD=first > 0,
                **common,
            )
        if out.text is not None:
            text_kernel[(triton.cdiv(last - first, config.classes), M, slices)](g_text_ptr=out.text, **common)
    for whole, parts in ((out.image, g_image), (out.rows, g_rows)):
        if whole is not None and parts is not None and splits > 1:
            torch.sum(parts, 0, out=whole)


def parts_of(whole: Tensor, splits: int) -> Tensor:
    """Where so many parts [splits, ..] of a result are made: a single one is the result."""
    return whole.unsqueeze(0) if splits == 1 else whole.new_empty((splits, *whole.shape))


def chunk_gradients(
    call: Call, config: Config, planes: Tensor, g_ratio: Tensor | None, fused: bool, out: Wanted
) -> None:
    """A library multiplies, over chunks of classes; one kernel between turns products into their gradients.

    Beyond inputs and gradients it takes ``configs.WORKSPACE`` bytes (or one tile of classes, if that is more), for
    image gradients M float32 copies of these, and for float16 features a float32 copy of the images.
    """
    B, M, K, D = (call.sizes[name] for name in "BMKD")
    gradient_dtype = torch.bfloat16 if call.half else torch.float32
    text_buffer = out.text is not None and out.text.dtype != torch.float32
    text_copy = out.image is not None and call.text.dtype != gradient_dtype
    size = configs.bytes_a_class(B, M, D, call.half, text_buffer + text_copy)
    columns = configs.chunk_of(K, size, configs.WORKSPACE, config.classes)
    work = planes.new_empty(M * B * columns)
    halves = planes.new_empty(M * B * columns if call.half else 0, dtype=torch.bfloat16)
    buffer = planes.new_empty(M * columns * D if text_buffer else 0)
    partial = planes.new_empty(3 * M * triton.cdiv(columns, config.classes) * B if out.rows is not None else 0)
    per_prompt = planes.new_empty((M, B, D) if out.image is not None else 0)
    images = call.images(gradient_dtype)
    for total in (out.image, out.rows):
        if total is not None:
            total.zero_()
    for first in range(0, K, columns):
        last = min(first + columns, K)
        here = call.products(work, first, last)
        products = here.tensors["x_ptr"]
        slope = halves[: products.numel()].view_as(products) if call.half else products
        tiles = triton.cdiv(last - first, config.classes)
        slope_kernel[(triton.cdiv(B, config.images) * tiles,)](
            **here.tensors,
            planes_ptr=planes,
            g_ratio_ptr=call.dummy if g_ratio is None else g_ratio,
            slope_ptr=slope,
            g_rows_ptr=partial,
            **here.sizes,
            first=first,
            last=last,
            tiles=tiles,
            g_ratio_b=0 if g_ratio is None else g_ratio.stride(0),
            **call.numbers,
            ROWS=out.rows is not None,
            FUSED=fused,
            G_RATIO=g_ratio is not None,
            LOADED=True,
            **call.flags,
            **call.tile(config),
        )
        text = call.text[:, first:last]
        if out.rows is not None:
            out.rows += partial[: 3 * M * tiles * B].view(3, M, tiles, B).sum(2)
        if out.image is not None:
            multiply(slope, text.to(gradient_dtype), per_prompt)
            out.image += per_prompt.sum(0) if out.image.dim() == 2 else per_prompt.transpose(0, 1)
        if out.text is not None:
            mine = out.text[:, first:last]
            g_text = buffer[: M * (last - first) * D].view(mine.shape) if text_buffer else mine
            multiply(slope.transpose(1, 2), images, g_text)
            if call.flags["NORMALIZE"]:
                project(g_text, text, call.tensors["ti_ptr"][:, first:last], mine)
            elif text_buffer:
                mine.copy_(g_text)
    if out.image is not None and call.flags["NORMALIZE"]:
        lengths = call.tensors["xi_ptr"]
        if call.image.dim() == 2:
            project(out.image[None], call.image[None], lengths[None], out.image[None])
        else:
            mine = out.image.transpose(0, 1)  # prompts outside: a grid may have any size along x alone
            project(mine, call.image.transpose(0, 1), lengths.t(), mine)


def project(g: Tensor, x: Tensor, lengths: Tensor, out: Tensor) -> None:
    """Launch ``out = g - <g, x> x / |x|^2`` over [outer, N, D], with lengths [outer, N] of x; g may be out."""
    outer, N, D = g.shape
    project_kernel[(triton.cdiv(N, PROJECT_ROWS), outer)](
        g, x, lengths, out, N, D,
        g.stride(0), g.stride(1), x.stride(0), x.stride(1), lengths.stride(0), lengths.stride(1),
        out.stride(0), out.stride(1),
        BLOCK_N=PROJECT_ROWS, BLOCK_D=PROJECT_FEATURES, num_warps=4,
    )  # fmt: skip
