"""pytest-benchmark cases of the fused operations: `pytest benches/`. Parity first, then time.

Shapes that take milliseconds; benches/report.py measures all of them, memory too.
"""

from __future__ import annotations

import pytest
import torch
from report import OUR_TOLERANCE, OURS, TOLERANCE
from shapes import make_inputs, shape_for
from timing import synchronize
from ways import relative_error, truth, ways

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = ("S1", "S4", "S2") if DEVICE == "cuda" else ("S1", "S4")
CASES = [
    (name, operation, way)
    for name in SHAPES
    for shape in [shape_for(name, DEVICE, tiny=False)]
    for operation in shape.operations
    for way in ways(shape, operation, DEVICE)[0]
]


@pytest.mark.parametrize("name, operation, way", CASES, ids=[" ".join(case) for case in CASES])
def test_way(name, operation, way, benchmark):
    shape = shape_for(name, DEVICE, tiny=False)
    benchmark.group = f"{shape.title}, {operation}"
    torch.compiler.reset()
    call = ways(shape, operation, DEVICE)[0][way]
    inputs = make_inputs(shape, operation, DEVICE, DTYPE)
    results = call(*inputs)
    if way != "bare product":
        tolerance = OUR_TOLERANCE if way.split(",")[0] in OURS else TOLERANCE
        assert relative_error(results, truth(shape, operation, inputs)) <= tolerance[DTYPE]

    def timed():
        call(*inputs)
        synchronize(DEVICE)

    benchmark.pedantic(timed, rounds=5, iterations=50 if name == "S4" else 1, warmup_rounds=1)
