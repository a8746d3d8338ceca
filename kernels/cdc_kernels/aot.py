"""Compile the kernels without a GPU and read the machine code: tensor cores, shared memory, registers, spills.

``python -m cdc_kernels.aot`` compiles every kernel with every default configuration for NVIDIA 8.0 and 9.0 and for
AMD gfx942 and prints a table. Triton carries compilers and ``cuobjdump``; no driver is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cdc_kernels import chunks, decoupling, fused_opinion, fusion, row_loss
from cdc_kernels.configs import DEFAULTS, Config
from cdc_kernels.epilogue import ACTIVATIONS, RULES
from cdc_kernels.launch import FINISH_TILES, PROJECT_FEATURES, PROJECT_ROWS
from cdc_kernels.launch_small import FUSE_BLOCK, LOSS_BLOCK

#: name -> target, key of DEFAULTS, shared memory a block may use (bytes), the matrix instruction to look for
TARGETS = {
    "cuda80": (GPUTarget("cuda", 80, 32), "cuda80", 163 * 1024, "HMMA"),
    "cuda90": (GPUTarget("cuda", 90, 32), "cuda90", 227 * 1024, "HGMMA"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "hip", 64 * 1024, "mfma"),
}
DTYPES = ("bf16", "fp16", "fp32")
#: Kernels that multiply (tiles) and that read products (chunks): function, kind of configuration, dtypes. Those of
#: the second path read float32 products, and write gradients in bf16 or float32.
FUSED = {
    "forward": (fused_opinion.forward_kernel, "forward", DTYPES),
    "forward_2": (fused_opinion.forward_kernel, "forward_2", ("bf16",)),
    "forward_4": (fused_opinion.forward_kernel, "forward_4", ("bf16",)),
    "image": (fused_opinion.image_kernel, "gradient", DTYPES),
    "text": (fused_opinion.text_kernel, "gradient", DTYPES),
    "epilogue": (fused_opinion.forward_kernel, "epilogue", ("fp32",)),
    "slope": (chunks.slope_kernel, "slope", ("bf16", "fp32")),
}
PACKED = ("forward_2", "forward_4")
WITH_PRODUCTS = ("forward", *PACKED, "image", "text")
SMALL = {
    "finish": fused_opinion.finish_kernel,
    "project": chunks.project_kernel,
    "fuse_forward": fusion.fuse_forward_kernel,
    "fuse_backward": fusion.fuse_backward_kernel,
    "decoupling_forward": decoupling.decoupling_forward_kernel,
    "decoupling_backward": decoupling.decoupling_backward_kernel,
    "row_loss": row_loss.row_loss_kernel,
}
BASE: dict[str, Any] = {
    "ACTIVATION": "exp", "RULE": "dempster", "FUSED": True, "SUMS": True, "RATIO": False, "G_RATIO": False,
    "WHOLE": False, "TARGET": False, "SQUARE": False, "KL": False, "FEATURES": True, "ROWS": True, "ADD": True,
    "HAS_BIAS": True, "NORMALIZE": True, "EVEN_D": True, "PRECISION": "ieee", "UPCAST": False,
}  # fmt: skip
OPINION, LOSS = {"RATIO": True, "G_RATIO": True}, {"TARGET": True}
#: What the fused kernels do: name -> flags. The top-k is the opinion's kernel. All of these in float32 and bf16.
MODES: dict[str, dict[str, Any]] = {
    "opinion": OPINION,
    "loss digamma, log": LOSS,
    "loss mse": LOSS | {"SQUARE": True},
    "loss digamma, log + kl": LOSS | {"KL": True},
    "loss mse + kl": LOSS | {"SQUARE": True, "KL": True},
}
#: float16 differs from bf16 in little: these modes of it will do.
FLOAT16_MODES = ("opinion", "loss digamma, log", "loss mse + kl")
#: And these in one dtype, the first: other activations, other rules, what small problems and odd sizes need.
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"opinion, {each}": OPINION | {"ACTIVATION": each} for each in ACTIVATIONS[1:]},
    **{f"opinion, {each}": OPINION | {"RULE": each} for each in RULES[1:]},
    "prompts alone": {"FUSED": False},
    "loss of prompts alone": LOSS | {"FUSED": False},
    "loss mse + kl of prompts alone": LOSS | {"FUSED": False, "SQUARE": True, "KL": True},
    "loss, one tile": LOSS | {"WHOLE": True},
    "loss, sizes of one": LOSS | {"ONES": True},
    "opinion, odd D": OPINION | {"EVEN_D": False, "NORMALIZE": False, "HAS_BIAS": False},
}
SMALL_CASES: dict[str, dict[str, dict[str, Any]]] = {
    "finish": {**MODES, "sizes of one": MODES["loss mse + kl"] | {"ADD": False}},
    "project": {"": {}, "sizes of one": {}},
    "fuse_forward": {rule: {"RULE": rule} for rule in RULES[:3]},
    "fuse_backward": {rule: {"RULE": rule} for rule in RULES[:3]},
    "decoupling_forward": {"cosine": {"SQUARED": False}, "cosine_squared": {"SQUARED": True}},
    "decoupling_backward": {"cosine": {"SQUARED": False}, "cosine_squared": {"SQUARED": True}},
    "row_loss": {
        form + kl: {"FORM": form, "KL": bool(kl)} for form in ("digamma", "log", "mse") for kl in ("", " + kl")
    },
}
#: The launcher makes a size of 1 a constant; a kernel must not take it for a tensor then.
ONES = {"B", "M", "K", "D", "last", "tiles", "N", "group"}
INTEGERS = {"total", "N", "B", "M", "K", "D", "R", "first", "last", "tiles", "group", "span"}
FLOATS = {"top", "kl_weight", "log_w", "log_share", "log_share_of_class", "log_others"}


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel says. Spilled registers count in bytes of stack.

    spills_in_loop: loads and stores of these in the innermost loop of matrix instructions; None where there is none, or
    for AMD, whose code is not read so closely.
    """

    kernel: str
    case: str
    dtype: str
    target: str
    shared: int
    registers: int
    stack: int
    matrix_instructions: int
    instructions: int
    spills_in_loop: int | None
    warp: int


def source(kernel: str, case: str, dtype: str, arch: str) -> tuple[ASTSource, dict[str, int]]:
    """A kernel with its default configuration as Triton's compiler takes it, and the compiler's options."""
    if kernel in SMALL:
        function, config = SMALL[kernel], Config(32, 0, 512, 0, 4, 1)
        flags = BASE | SMALL_CASES[kernel][case]
    else:
        function, kind, _ = FUSED[kernel]
        flags = BASE | (MODES | VARIANTS)[case]
        config = DEFAULTS[kind + ("_kl" if flags["KL"] else "")][arch][1 if dtype == "fp32" else 0]
    constants: dict[str, Any] = {
        "PROMPTS": config.prompts,
        "LOADED": kernel not in WITH_PRODUCTS,
        "HALF": "bf16" if dtype == "bf16" else "",
        "GRAD_PRECISION": "tf32" if dtype == "fp16" else "ieee",
        "BLOCK_B": config.images,
        "BLOCK_K": config.classes,
        "BLOCK_D": PROJECT_FEATURES if kernel == "project" else config.features,
        "OUT_D": config.out,
        "BLOCK_T": FINISH_TILES,
        "BLOCK_N": PROJECT_ROWS,
        "BLOCK_M": 4,
        "BLOCK": LOSS_BLOCK if kernel == "row_loss" else FUSE_BLOCK,
        **flags,
    }
    features = {"t_ptr", "g_text_ptr", "g_t_ptr", "slope_ptr"} | ({"x_ptr"} if kernel in WITH_PRODUCTS else set())
    ones = {"tiles"} if flags["WHOLE"] else set()
    if flags.get("ONES") or case == "sizes of one":
        ones = ONES - {"M"} if kernel in PACKED else ONES
    signature, constexprs, attrs = {}, {}, {}
    for at, name in enumerate(function.arg_names):
        stride = name.islower() and name[-2:-1] == "_" and name not in FLOATS
        if name.endswith("_ptr"):
            signature[name] = "*i64" if name == "target_ptr" else f"*{dtype if name in features else 'fp32'}"
        elif name in ones:
            signature[name] = "constexpr"
            constexprs[(at,)] = 1
        elif name in INTEGERS or stride:
            signature[name] = "i32"
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "constexpr"
            constexprs[(at,)] = constants[name]
        even = stride or name == "D"
        if name.endswith("_ptr") or (even and flags["EVEN_D"]):
            attrs[(at,)] = [["tt.divisibility", 16]]
    attrs = {at: each for at, each in attrs.items() if at not in constexprs}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return ASTSource(function, signature, constexprs, attrs), options


def report(kernel: str, case: str, dtype: str, target_name: str) -> Report:
    """Compile one kernel and read what came out."""
    target, arch, _, instruction = TARGETS[target_name]
    src, options = source(kernel, case, dtype, arch)
    compiled = triton.compile(src, target=target, options=options)
    shared = int(compiled.metadata.shared)
    if target.backend == "cuda":
        read = _read_cubin(compiled.asm["cubin"], instruction)
    else:
        read = _read_amdgcn(compiled.asm["amdgcn"], instruction)
    return Report(kernel, case, dtype, target_name, shared, *read, target.warp_size)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [_tool("cuobjdump"), option, file.name], capture_output=True, text=True, check=True
        ).stdout


def disassemble(cubin: bytes) -> str:
    """NVIDIA's machine code as text."""
    return _dump(cubin, "-sass")


def _read_cubin(cubin: bytes, instruction: str) -> tuple[int, int, int, int, int | None]:
    """Registers, stack bytes, and the numbers of matrix instructions, of all, and of spills in a loop, of a cubin."""
    usage, code = _dump(cubin, "-res-usage"), disassemble(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    count = len(re.findall(rf"\b{instruction}\.", code))
    every = len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+[^/\s]", code)) - code.count(" NOP")
    return int(found[1]), int(found[2]), count, every, _spills_in_loop(code, instruction)


def _spills_in_loop(code: str, instruction: str) -> int | None:
    """Loads and stores of local memory in the shortest loop that holds a matrix instruction, or None."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/\s].*)", code)]
    products = [at for at, text in lines if f"{instruction}." in text]
    jumps = [(int(to[1], 16), at) for at, text in lines if (to := re.search(r"\bBRA\b[^;]*0x([0-9a-f]+)", text))]
    loops = [(at - to, to, at) for to, at in jumps if any(to <= product <= at for product in products)]
    if not loops:
        return None
    _, first, last = min(loops)
    return sum(first <= at <= last and ("LDL" in text or "STL" in text) for at, text in lines)


def _read_amdgcn(text: str, instruction: str) -> tuple[int, int, int, int, None]:
    """Vector registers, scratch bytes, and the numbers of matrix instructions and of all, of AMD assembly."""

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    count = len(re.findall(rf"\bv_{instruction}_", text))
    every = len(re.findall(r"^\s+[a-z]+_\w+", text, re.MULTILINE))
    return metadata("vgpr_count"), metadata("private_segment_fixed_size"), count, every, None


def exists(kernel: str, case: str) -> bool:
    """Whether a fused kernel is used so: with KL prompts are taken one by one."""
    return kernel not in PACKED or not (MODES | VARIANTS)[case].get("KL")


def everything() -> Iterator[tuple[str, str, str, str]]:
    """Every kernel, case, dtype and target."""
    for target in TARGETS:
        for kernel, (_, _, dtypes) in FUSED.items():
            for case in MODES:
                for dtype in dtypes:
                    if exists(kernel, case) and (dtype != "fp16" or case in FLOAT16_MODES):
                        yield kernel, case, dtype, target
            for case in VARIANTS:
                if exists(kernel, case):
                    yield kernel, case, dtypes[0], target
        for kernel, cases in SMALL_CASES.items():
            for case in cases:
                yield kernel, case, "bf16" if kernel in ("project", "decoupling_backward") else "fp32", target


def defaults() -> dict[str, Any]:
    """The launch configurations in force, to tell when the committed table is not about them."""
    return {
        kind: {arch: [asdict(c) for c in both] for arch, both in by_arch.items()} for kind, by_arch in DEFAULTS.items()
    }


def groups(reports: Sequence[Report]) -> dict[tuple[str, str], dict[str, list[Report]]]:
    """The reports by kernel and kind of case (dtype where there are several), then by target."""
    grouped: dict[tuple[str, str], dict[str, list[Report]]] = {}
    for each in reports:
        case = "every case" if each.kernel in SMALL else f"{each.case}, {each.dtype}"
        if each.case in VARIANTS:
            case = f"other activations, rules and shapes, {each.dtype}"
        grouped.setdefault((each.kernel, case), {}).setdefault(each.target, []).append(each)
    return grouped


def markdown(reports: Sequence[Report]) -> str:
    """The reports as a table: a row for each kernel and kind of case, its worst figures for each target."""
    lines = ["| kernel | case | " + " | ".join(TARGETS) + " |", "| --- | --- |" + " --- |" * len(TARGETS)]
    for (kernel, case), by_target in groups(reports).items():
        cells = []
        for target in TARGETS:
            them = by_target.get(target, [])
            if not them:  # a part of the table
                cells.append("")
                continue
            figures = (
                f"{max(r.registers for r in them)} / {max(r.stack for r in them)} / {max(r.shared for r in them)}"
                f" / {min(r.matrix_instructions for r in them)}"
            )
            cells.append(figures + (f" ({len(them)} kernels)" if len(them) > 1 else ""))
        lines.append(f"| {kernel} | {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(reports: Sequence[Report], folder: Path) -> None:
    """The table, as aot.json and aot.md."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(asdict(r)) for r in reports)
    (folder / "aot.json").write_text(
        f'{{\n "versions": {json.dumps({"triton": triton.__version__})},\n "defaults": {json.dumps(defaults())},\n'
        f' "reports": [\n{rows}\n ]\n}}\n'
    )
    head = (
        "# Compiled ahead of time\n\nWritten by `python -m cdc_kernels.aot --out benches/results/aot` "
        f"with Triton {triton.__version__}; every kernel compiled, one by one, is in aot.json. Each cell: "
        "registers / bytes of stack (spills) a thread / bytes of shared memory a block / matrix instructions, "
        "the worst of the row's kernels. Matrix instructions are HGMMA on cuda90, HMMA on cuda80, MFMA on gfx942; "
        "float32 is multiplied exactly, without them, on NVIDIA. The kernels forward, image and text multiply; "
        "epilogue and slope read a library's products; the top-k runs the opinion's kernel.\n\n"
    )
    (folder / "aot.md").write_text(head + markdown(reports))


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for aot.json and aot.md")
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of kernel/case/dtype/target, as in a shell")
    arguments = parser.parse_args()
    reports: list[Report] = []
    for line in everything():
        if any(fnmatch("/".join(line), pattern) for pattern in arguments.only):
            reports.append(report(*line))
            print(reports[-1], flush=True)
    if arguments.out:
        write(reports, arguments.out)


if __name__ == "__main__":
    main()
