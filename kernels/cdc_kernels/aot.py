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
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cdc_kernels import decoupling, fused_opinion, fusion, row_loss
from cdc_kernels.configs import DEFAULTS, Config

#: name -> target, key of DEFAULTS, shared memory a block may use (bytes), the matrix instruction to look for
TARGETS = {
    "cuda80": (GPUTarget("cuda", 80, 32), "cuda80", 163 * 1024, "HMMA"),
    "cuda90": (GPUTarget("cuda", 90, 32), "cuda90", 227 * 1024, "HGMMA"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "hip", 64 * 1024, "mfma"),
}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
KERNELS = {"forward": "forward", "image": "gradient", "text": "gradient"}
ELEMENTWISE = ("finish", "fuse_forward", "fuse_backward", "decoupling_forward", "decoupling_backward", "row_loss")
MODULES = {"fuse": fusion, "decoupling": decoupling, "row": row_loss}
#: What a kernel may do: sums with a target and KL are the heaviest ordinary case, opinion the lightest.
CASES: dict[str, dict[str, Any]] = {
    "opinion": {"TARGET": False, "SQUARE": False, "KL": False, "RATIO": True, "G_RATIO": True},
    "loss": {"TARGET": True, "SQUARE": False, "KL": False, "RATIO": False, "G_RATIO": False},
    "loss+kl": {"TARGET": True, "SQUARE": False, "KL": True, "RATIO": False, "G_RATIO": False},
}
INT32 = {"total", "e_n", "e_m", "e_k", "B", "M", "K", "D", "R", "first", "last", "tile0", "tiles", "group"}
STRIDES = {"x_b", "x_m", "t_m", "t_k", "xi_b", "xi_m", "ratio_b", "g_ratio_b", "gi_b", "gi_m"}
FLOATS = {"top", "kl_weight", "log_w", "log_share", "log_share_of_class", "log_others"}


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel says. Spilled registers count in bytes of stack."""

    kernel: str
    case: str
    dtype: str
    target: str
    shared: int
    registers: int
    stack: int
    matrix_instructions: int
    warp: int


def source(kernel: str, case: str, dtype: str, arch: str) -> tuple[ASTSource, dict[str, int]]:
    """A kernel with its default configuration as Triton's compiler takes it, and the compiler's options."""
    function = getattr(MODULES.get(kernel.split("_")[0], fused_opinion), f"{kernel}_kernel")
    flags = CASES[case]
    if kernel in ELEMENTWISE:
        config = Config(32, 0, 512, 0, 4, 1)
    else:
        kind = KERNELS[kernel] + ("_kl" if flags["KL"] else "")
        config = DEFAULTS[kind][arch][0 if DTYPES[dtype] == 2 else 1]
    constants: dict[str, Any] = {
        **flags,
        "ACTIVATION": "exp",
        "RULE": "dempster",
        "FUSED": True,
        "SUMS": True,
        "FEATURES": True,
        "ROWS": True,
        "ADD": False,
        "HAS_BIAS": True,
        "NORMALIZE": True,
        "EVEN_D": True,
        "UPCAST": False,
        "PRECISION": "ieee",
        "HALF": "bf16" if dtype == "bf16" else "",
        "GRAD_PRECISION": "tf32" if dtype == "fp16" else "ieee",
        "BLOCK_B": config.images,
        "BLOCK_K": config.classes,
        "BLOCK_D": config.features,
        "OUT_D": config.out,
        "BLOCK_T": 32,
        "BLOCK": 128 if kernel == "row_loss" else 1024,
        "FORM": "digamma",
        "SQUARED": True,
        "BLOCK_M": 4,
    }
    features = {"x_ptr", "t_ptr", "g_text_ptr", "g_t_ptr"}
    signature, constexprs, attrs = {}, {}, {}
    for at, name in enumerate(function.arg_names):
        aligned = False
        if name.endswith("_ptr"):
            signature[name] = "*i64" if name == "target_ptr" else f"*{dtype if name in features else 'fp32'}"
            aligned = True
        elif name in INT32 | STRIDES:
            signature[name] = "i32"
            aligned = name in STRIDES | {"D"}
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "constexpr"
            constexprs[(at,)] = constants[name]
        if aligned:
            attrs[(at,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return ASTSource(function, signature, constexprs, attrs), options


def report(kernel: str, case: str, dtype: str, target_name: str) -> Report:
    """Compile one kernel and read what came out."""
    target, arch, _, instruction = TARGETS[target_name]
    src, options = source(kernel, case, dtype, arch)
    compiled = triton.compile(src, target=target, options=options)
    shared = int(compiled.metadata.shared)
    if target.backend == "cuda":
        registers, stack, count = _read_cubin(compiled.asm["cubin"], instruction)
    else:
        registers, stack, count = _read_amdgcn(compiled.asm["amdgcn"], instruction)
    return Report(kernel, case, dtype, target_name, shared, registers, stack, count, target.warp_size)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _read_cubin(cubin: bytes, instruction: str) -> tuple[int, int, int]:
    """Registers, stack bytes and the number of matrix instructions of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(*arguments: str) -> str:
            command = [_tool("cuobjdump"), *arguments, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    count = len(re.findall(rf"\b{instruction}\.", code))
    return int(found[1]), int(found[2]), count


def _read_amdgcn(text: str, instruction: str) -> tuple[int, int, int]:
    """Vector registers, scratch bytes and the number of matrix instructions of AMD assembly."""

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    count = len(re.findall(rf"\bv_{instruction}_", text))
    return metadata("vgpr_count"), metadata("private_segment_fixed_size"), count


def everything() -> Iterator[tuple[str, str, str, str]]:
    """Every kernel, case, dtype and target."""
    for target in TARGETS:
        for dtype in DTYPES:
            for kernel in (*KERNELS, *ELEMENTWISE):
                for case in CASES:
                    if kernel not in ELEMENTWISE or (dtype, case) == ("fp32", "loss+kl"):
                        yield kernel, case, dtype, target


def markdown(reports: Sequence[Report]) -> str:
    """The reports as a table."""
    names = ["kernel", "case", "dtype", "target", "shared", "registers", "stack", "matrix_instructions", "warp"]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for each in reports:
        values = asdict(each)
        lines.append("| " + " | ".join(str(values[name]) for name in names) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for aot.json and aot.md")
    parser.add_argument("--only", default="", help="compile only lines of the table that hold these words")
    arguments = parser.parse_args()
    words = arguments.only.split()
    reports: list[Report] = []
    for line in everything():
        if all(word in line for word in words):
            reports.append(report(*line))
            print(reports[-1], flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        versions = {"triton": triton.__version__}
        text = json.dumps({"versions": versions, "reports": [asdict(r) for r in reports]}, indent=1)
        (arguments.out / "aot.json").write_text(text + "\n")
        head = (
            "# Compiled ahead of time\n\nWritten by `python -m cdc_kernels.aot --out benches/results/aot` "
            f"with Triton {triton.__version__}. Bytes of shared memory and of stack (spills) for each block and "
            "thread; matrix instructions: HMMA on cuda80, HGMMA on cuda90, MFMA on gfx942 "
            "(float32 is multiplied exactly, without them, on NVIDIA).\n\n"
        )
        (arguments.out / "aot.md").write_text(head + markdown(reports))


if __name__ == "__main__":
    main()
