"""The blocked backend holds less than [B, M, K], forward or backward, and less than [B, K] where it need not.

Twice: no single tensor is so large, over blocks of a few numbers; and all tensors together are not, over blocks as they
are, for K = 1000 and more, or stay below 4 MB. (Below, an image's row sums, some 60 numbers for each opinion, are no
smaller than its K logits; and blocks of fewer than 64 classes are not made, whatever the sum.)
"""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdc_ops import evidential_cross_entropy, fused_opinion, fused_topk
from cdc_ops.backends import blocks

B, M, K, D = 16, 5, 60, 1


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor an operation returns, views and memory behind views included."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dim():
                self.most = max(self.most, x.numel(), x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.fixture(autouse=True)
def nothing_kept_from_before(monkeypatch):
    monkeypatch.setattr("cdc_ops.backends.blocks._idle", {})


@pytest.fixture
def small_blocks(monkeypatch):
    small = {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 6, "LEAST_COLUMNS": 6, "LEAST_ROWS": 1, "VECTOR": 1, "FLOOR": 1}
    for name, value in small.items():
        monkeypatch.setattr(f"cdc_ops.backends.blocks.{name}", value)
    for cut in (blocks.cut, blocks.cut_of_all_classes):
        cut.cache_clear()  # they remember
    yield
    for cut in (blocks.cut, blocks.cut_of_all_classes):
        cut.cache_clear()


def inputs():
    torch.manual_seed(0)
    image, text = torch.randn(B, D, requires_grad=True), torch.randn(M, K, D, requires_grad=True)
    scale, bias = torch.full((M,), 20.0, requires_grad=True), torch.zeros(M, requires_grad=True)
    return image, text, scale, bias


def most_elements(function, backend):
    x, t, s, b = inputs()
    with LargestTensor() as largest:
        result = function(x, t, s, b, backend)
        if result.requires_grad:
            result.sum().backward()
            assert t.grad is not None and s.grad is not None
    return largest.most


def opinion(x, t, s, b, backend, **kwargs):
    result = fused_opinion(x, t, scale=s, bias=b, backend=backend, **kwargs)
    return result.log_ratio.sum() + result.log_partition.sum() + result.prompt_log_partition.sum()


def topk(x, t, s, b, backend, **kwargs):
    return fused_topk(x, t, 3, scale=s, bias=b, backend=backend, **kwargs).prob


def loss(x, t, s, b, backend, **kwargs):
    y = torch.arange(B) % K
    return evidential_cross_entropy(x, t, y, scale=s, bias=b, backend=backend, **kwargs)


RULES = ["dempster", "cumulative", "averaging", "weighted"]
ACTIVATIONS = ["exp", "softplus", "relu"]
INPUT = M * K * D  # text and its gradient: the largest input
ROWS = 8 * B * (M + 1)  # the loss expands each opinion's row sums into a series of 8 terms
assert max(INPUT, ROWS) < B * K < B * M * K


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opinion_never_holds_every_prompts_logits(small_blocks, rule, activation):
    most = most_elements(lambda *a: opinion(*a, rule=rule, activation=activation), "blocked")
    assert most == B * K  # its output
    most = most_elements(lambda *a: opinion(*a, rule=rule, activation=activation), "reference")
    assert most >= B * M * K


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form, kl_weight", [("digamma", 0.0), ("log", 1.0), ("mse", 0.0)])
def test_loss_never_holds_even_the_fused_logits(small_blocks, rule, form, kl_weight):
    """But for that whose gradients are made along with it, of blocks of all classes: it stays below all logits."""
    kwargs = {"rule": rule, "form": form, "kl_weight": kl_weight}
    at_once = (rule, form, kl_weight) == ("dempster", "digamma", 0.0)
    most = most_elements(lambda *a: loss(*a, **kwargs), "blocked")
    assert B * K < most < B * M * K if at_once else most <= max(INPUT, ROWS)
    each = most_elements(lambda *a: loss(*a, reduction="none", **kwargs), "blocked")
    assert each <= max(INPUT, ROWS)
    assert most_elements(lambda *a: loss(*a, **kwargs), "reference") >= B * M * K


@pytest.mark.parametrize("rule", RULES)
def test_topk_never_holds_the_fused_logits(small_blocks, rule):
    assert most_elements(lambda *a: topk(*a, rule=rule), "blocked") <= INPUT
    assert most_elements(lambda *a: topk(*a, rule=rule), "reference") >= B * M * K


def test_a_confident_problem_allocates_no_more(small_blocks):
    """Logits too large for linear space take the logarithmic path."""
    x, t, s, b = (v.detach() for v in inputs())
    for function in (opinion, loss):
        with LargestTensor() as largest:
            function(x, t, 20 * s, b, "blocked")
        assert largest.most <= B * K


@settings(max_examples=1000)
@given(
    B=st.integers(0, 3000),
    M=st.integers(1, 20),
    K=st.integers(1, 30000),
    held=st.integers(0, 30),
    each=st.integers(1, 20),
)
def test_a_problem_is_cut_into_blocks_that_cover_it_and_stay_below_the_whole(B, M, K, held, each):
    rows, columns, groups = blocks.cut(B, M, K, held, each, B * M * K)
    assert [m for group in groups for m in range(group.start, group.stop)] == list(range(M))
    assert 1 <= rows <= max(1, min(B, blocks.BLOCK_ROWS)) and 1 <= columns <= K
    together = max(group.stop - group.start for group in groups)
    numbers = (held + each * together) * rows * columns
    within = numbers + 6 * M * columns <= max(B * M * K, blocks.FLOOR)
    narrow = together == 1 and columns <= blocks.LEAST_COLUMNS + blocks.VECTOR  # as narrow as whole vectors allow
    assert within or narrow


@settings(max_examples=1000)
@given(
    B=st.integers(0, 3000),
    M=st.integers(1, 20),
    K=st.integers(1, 30000),
    held=st.integers(1, 25),
)
def test_blocks_of_all_classes_stay_below_the_whole_and_the_ceiling(B, M, K, held):
    chosen = blocks.cut_of_all_classes(B, M, K, held)
    if chosen is None:
        return
    rows, columns, groups = chosen
    assert [m for group in groups for m in range(group.start, group.stop)] == list(range(M)) and columns == K
    assert min(B, blocks.LEAST_ROWS) / 2 <= rows <= min(B, blocks.BLOCK_ROWS)
    assert held * rows * K <= min(0.9 * max(B * M * K, blocks.FLOOR), blocks.CEILING)


# -- all that is alive at once, blocks as they are


def allocations(call):
    """Result of the call, and the bytes it allocated (or, negative, freed), in order, as the profiler saw them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return result, [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def size_of(tensors):
    return sum(x.nbytes for x in tensors)


def peaks(function, B, M, K, scale):
    """Most numbers alive beyond inputs and outputs, forward; beyond those and the gradients, forward and backward."""
    torch.manual_seed(0)
    image, text = torch.randn(B, 8, requires_grad=True), torch.randn(M, K, 8, requires_grad=True)
    inputs = image, text, torch.full((M,), scale, requires_grad=True), torch.zeros(M, requires_grad=True)
    outputs, forward = allocations(lambda: function(*inputs))
    most = [max(accumulate(forward)) - size_of(outputs)]
    if outputs[0].requires_grad:
        given = [torch.ones_like(x) for x in outputs]
        gradients, backward = allocations(lambda: torch.autograd.grad(outputs, inputs, given))
        most.append(max(accumulate(backward, initial=sum(forward))) - size_of(outputs) - size_of(gradients))
    return [x / 4 for x in most]


SMALL = [(4, 4, 1000), (32, 8, 1000), (16, 1, 2000)]
LARGE = [(260, 4, 1100), (300, 3, 1500), (64, 8, 2500), (32, 4, 9000), (8, 2, 70_000), (8, 1, 140_000), (1100, 1, 1000)]
PROBLEMS = [*SMALL, (256, 4, 1000), *LARGE]
IN_LINEAR_SPACE = {"scale": 20.0}
IN_LOG_SPACE = {"scale": 200.0}
THROUGH_WEIGHTS = {"scale": 20.0, "activation": "softplus", "rule": "weighted"}


@pytest.mark.parametrize("sizes", PROBLEMS)
@pytest.mark.parametrize("choices", [IN_LINEAR_SPACE, IN_LOG_SPACE, THROUGH_WEIGHTS])
def test_an_opinions_tensors_together_stay_below_the_logits(sizes, choices):
    B, M, K = sizes

    def parts(x, t, s, b, backend="blocked", scale=None, **kwargs):
        result = fused_opinion(x, t, scale=s, bias=b, backend=backend, **kwargs)
        return result.log_ratio, result.log_partition, result.prompt_log_partition

    kwargs = choices | {"scale": None}
    assert max(peaks(lambda *i: parts(*i, **kwargs), *sizes, choices["scale"])) < max(B * M * K, blocks.FLOOR)
    assert sizes not in LARGE or B * M * K > blocks.FLOOR
    # and the plain formulas do not, or this could not fail
    assert min(peaks(lambda *i: parts(*i, backend="reference", **kwargs), *sizes, choices["scale"])) >= B * M * K


WITHOUT_KL = [(form, 0.0, sizes) for form in ("digamma", "mse") for sizes in PROBLEMS]
WITH_KL = [("mse", 1.0, sizes) for sizes in (*SMALL, LARGE[0])]  # whose special functions take long


@pytest.mark.parametrize("form, kl_weight, sizes", [*WITHOUT_KL, *WITH_KL])
@pytest.mark.parametrize("choices", [IN_LINEAR_SPACE, IN_LOG_SPACE, THROUGH_WEIGHTS])
def test_a_losss_tensors_together_stay_below_the_logits(choices, form, kl_weight, sizes):
    B, M, K = sizes
    y = torch.arange(B) % K

    def loss(x, t, s, b):
        kwargs = choices | {"scale": s, "form": form, "kl_weight": kl_weight}
        return [evidential_cross_entropy(x, t, y, bias=b, backend="blocked", **kwargs)]

    assert max(peaks(loss, *sizes, choices["scale"])) < max(B * M * K, blocks.FLOOR)


@pytest.mark.parametrize("sizes", [(256, 4, 1000), (300, 3, 1500), (64, 4, 500)])
def test_gradients_made_with_the_loss_want_little_beside_them(sizes):
    """With features as wide as CLIP's: blocks below the logits, and what normalising images takes there and back."""
    (B, M, K), D = sizes, 512
    image, text = torch.randn(B, D, requires_grad=True), torch.randn(M, K, D, requires_grad=True)

    def gradients():
        loss = evidential_cross_entropy(image, text, torch.arange(B) % K, scale=20.0, backend="blocked")
        return torch.autograd.grad(loss, (image, text))

    made, changes = allocations(gradients)
    assert (max(accumulate(changes)) - size_of(made)) / 4 < max(B * M * K, blocks.FLOOR) + 5 * B * D


@pytest.mark.parametrize("sizes", PROBLEMS)
@pytest.mark.parametrize("choices", [IN_LINEAR_SPACE, IN_LOG_SPACE, THROUGH_WEIGHTS])
def test_topks_tensors_together_stay_below_the_fused_logits(sizes, choices):
    """Beside the features' lengths [M, K], which alone are [B, K] when there are no more images than prompts."""
    B, M, K = sizes

    def top(x, t, s, b):
        result = fused_topk(x, t, 5, bias=b, backend="blocked", **(choices | {"scale": s}))
        return [result.classes, result.prob, result.belief, result.uncertainty, result.prompt_uncertainty]

    (most,) = peaks(top, *sizes, choices["scale"])
    assert most - M * K < max(B * K, blocks.FLOOR)
