"""Every public operation inside somebody's autocast, inference mode or torch.compile: the same numbers."""

import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

import cdc_ops

generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.rand(*shape, generator=generator) + 0.1


x, t, y = draw(4, 16), draw(2, 5, 16), torch.tensor([0, 1, 2, 4])
e, p_s, p_y = draw(4, 2, 5), draw(4, 2).softmax(-1), draw(4, 2, 5).softmax(-1)
opinion_measures = ("evidence", "alpha", "prob", "entropy", "expected_entropy", "mutual_information", "dissonance")


def values(opinion):
    """All that an opinion tells."""
    parts = [getattr(opinion, name) for name in opinion_measures]
    return [part() if callable(part) else part for part in parts]


def bank(p_s, p_y):
    aggregate = cdc_ops.FrontDoorAggregator("bank", bank_size=4, semantics=2, classes=5)
    aggregate.update(p_y)
    return aggregate(p_s)


def fused(backend):
    opinion = cdc_ops.fused_opinion(x, t, scale=3.0, backend=backend)
    return [opinion.belief, opinion.prob, opinion.evidence, opinion.conflict, *values(opinion.opinion())]


BACKENDS = ("reference", "blocked")
CALLS = {
    "ConsistencyLoss": lambda: cdc_ops.ConsistencyLoss()(t, t[0]),
    "DecouplingLoss": lambda: cdc_ops.DecouplingLoss()(t),
    "EvidenceFusion": lambda: cdc_ops.EvidenceFusion("weighted")(e),
    "EvidenceHead": lambda: cdc_ops.EvidenceHead(2, scale=3.0)(x, t).prob,
    "EvidentialLoss": lambda: cdc_ops.EvidentialLoss(kl_weight=0.1)(x, t, y, scale=3.0),
    "FrontDoorAggregator": lambda: [
        cdc_ops.FrontDoorAggregator("self")(p_s, p_y),
        cdc_ops.FrontDoorAggregator("batch")(p_s, p_y),
        bank(p_s, p_y),
    ],
    "FusedOpinion": lambda: fused("blocked"),
    "Opinion": lambda: values(cdc_ops.Opinion.from_evidence(e)),
    "TopK": lambda: cdc_ops.fused_topk(x, t, 2, scale=3.0).belief,
    "conflict": lambda: cdc_ops.conflict(e, 1),
    "consistency_loss": lambda: cdc_ops.consistency_loss(t, t[0]),
    "decoupling_loss": lambda: [cdc_ops.decoupling_loss(t, kind) for kind in ("cosine", "cosine_squared")],
    "dirichlet_cross_entropy": lambda: cdc_ops.dirichlet_cross_entropy(e[:, 0], y, kl_weight=0.1),
    "discount": lambda: cdc_ops.discount(e, 0.7),
    "evidence_from_logits": lambda: [cdc_ops.evidence_from_logits(e, a) for a in ("exp", "softplus", "relu")],
    "evidential_cross_entropy": lambda: [
        cdc_ops.evidential_cross_entropy(x, t, y, scale=3.0, backend=backend) for backend in BACKENDS
    ],
    "frontdoor_adjust": lambda: [cdc_ops.frontdoor_adjust(p_s, p_y), cdc_ops.frontdoor_adjust(p_s, p_y, e[:, 0, 0])],
    "fuse_evidence": lambda: [
        cdc_ops.fuse_evidence(e, 1, rule) for rule in ("dempster", "cumulative", "averaging", "weighted")
    ],
    "fuse_log_ratio": lambda: cdc_ops.fuse_log_ratio(e, 1, "weighted"),
    "fused_opinion": lambda: [fused(backend) for backend in BACKENDS],
    "fused_topk": lambda: [cdc_ops.fused_topk(x, t, 2, scale=3.0, backend=backend).prob for backend in BACKENDS],
}


def test_no_public_name_is_left_out():
    assert set(CALLS) == set(cdc_ops.__all__) - {"BackendUnavailableError", "NonFiniteError", "value_checks"}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name, half):
    plain = tree_leaves(CALLS[name]())
    with torch.autocast("cpu", dtype=half):
        cast = tree_leaves(CALLS[name]())
    for a, b in zip(plain, cast, strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_inference_mode_changes_nothing_then_or_afterwards(name):
    plain = tree_leaves(CALLS[name]())
    with torch.inference_mode():
        inferred = tree_leaves(CALLS[name]())
    for a, b, c in zip(plain, inferred, tree_leaves(CALLS[name]()), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def step(x, t, y, e, p_s, p_y):
    """One call of everything that a training step may hold."""
    index = y % e.shape[-1]
    return [
        cdc_ops.fused_opinion(x, t, scale=3.0, normalize=False).conflict,
        cdc_ops.fused_topk(x, t, 2, scale=3.0).prob,
        cdc_ops.evidential_cross_entropy(x, t, index, scale=3.0, rule="weighted", activation="softplus"),
        cdc_ops.dirichlet_cross_entropy(e[:, 0], index, kl_weight=0.1, form="mse", prior_weight=0.01),
        cdc_ops.decoupling_loss(t),
        cdc_ops.consistency_loss(t, t[0]),
        cdc_ops.discount(e, e[:, :, 0].clamp(max=1.0), 0.01),
        cdc_ops.conflict(e, 1, 0.01),
        cdc_ops.fuse_log_ratio(e, 1, "averaging"),
        *(cdc_ops.fuse_evidence(e, 1, rule, W) for rule in ("dempster", "weighted") for W in (0.01, None)),
        *values(cdc_ops.Opinion.from_evidence(e)),
        *values(cdc_ops.Opinion.from_log_ratio(e)),
        cdc_ops.frontdoor_adjust(p_s, p_y, e[:, 0, 0]),
        cdc_ops.FrontDoorAggregator("self")(p_s, p_y),
    ]


def check_compiled(function, inputs, batches, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B in batches:
        here = [v[:B] for v in inputs]
        for a, b in zip(function(*here), compiled(*here), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_graph_break():
    check_compiled(step, (x, t, y, e, p_s, p_y), [4], None)


def test_compiles_for_sizes_that_stay_symbolic():
    def loss(x, e, y):
        return [
            cdc_ops.evidential_cross_entropy(x, t, y, scale=3.0),
            cdc_ops.fuse_evidence(e, 1),
        ]

    check_compiled(loss, (x, e, y), [4, 3], True)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_a_target_may_have_any_integer_type(kind):
    assert torch.equal(*(cdc_ops.evidential_cross_entropy(x, t, v, scale=3.0) for v in (y, y.to(kind))))


def test_modules_are_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        modules = cdc_ops.EvidenceHead(2), cdc_ops.FrontDoorAggregator("bank", bank_size=4, semantics=2, classes=5)
    finally:
        torch.set_default_dtype(torch.float32)
    held = [v for m in modules for v in m.state_dict().values() if v.dtype.is_floating_point]
    assert len(held) == 3 and all(v.dtype == torch.float32 for v in held)


def test_log1p_has_its_own_speed_once_cdc_ops_is_imported():
    """On a CPU with AVX-512 it is ten times slower before; see cdc_ops.special.map_constants."""
    program = """
import time
import torch
import cdc_ops

torch.set_num_threads(1)  # threads that wait for each other on a busy machine take any time
x, out = torch.linspace(0.1, 5, 100_000), torch.empty(100_000)

def seconds():
    taken = []
    for _ in range(9):
        started = time.perf_counter()
        torch.log1p(x, out=out)
        taken.append(time.perf_counter() - started)
    return min(taken)

here = seconds()
torch.log1p(torch.full((64,), -0.0))
print(here / seconds())
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, timeout=300, capture_output=True, text=True)
    assert float(run.stdout) < 4
