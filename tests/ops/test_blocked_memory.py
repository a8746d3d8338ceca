"""The blocked backend allocates nothing of size [B, M, K], forward or backward, nor [B, K] where it need not."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdc_ops import evidential_cross_entropy, fused_opinion, fused_topk

B, M, K, D = 16, 5, 24, 2


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
def small_blocks(monkeypatch):
    monkeypatch.setattr("cdc_ops.backends.blocks.BLOCK_ROWS", 4)
    monkeypatch.setattr("cdc_ops.backends.blocks.BLOCK_COLUMNS", 6)
    monkeypatch.setattr("cdc_ops.backends.blocked.TOPK_COLUMNS", 6)
    monkeypatch.setattr("cdc_ops.backends.blocks._idle", {})


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
INPUT = M * K * D  # text and its gradient: the largest input, smaller than [B, K]
assert INPUT < B * K < B * M * K


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opinion_never_holds_every_prompts_logits(rule, activation):
    most = most_elements(lambda *a: opinion(*a, rule=rule, activation=activation), "blocked")
    assert most == B * K  # its output
    most = most_elements(lambda *a: opinion(*a, rule=rule, activation=activation), "reference")
    assert most >= B * M * K


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form, kl_weight", [("digamma", 0.0), ("log", 1.0), ("mse", 0.0)])
def test_loss_never_holds_even_the_fused_logits(rule, form, kl_weight):
    kwargs = {"rule": rule, "form": form, "kl_weight": kl_weight}
    assert most_elements(lambda *a: loss(*a, **kwargs), "blocked") <= INPUT
    assert most_elements(lambda *a: loss(*a, **kwargs), "reference") >= B * M * K


@pytest.mark.parametrize("rule", RULES)
def test_topk_never_holds_the_fused_logits(rule):
    assert most_elements(lambda *a: topk(*a, rule=rule), "blocked") <= INPUT
    assert most_elements(lambda *a: topk(*a, rule=rule), "reference") >= B * M * K


def test_a_confident_problem_allocates_no_more():
    """Logits too large for linear space take the logarithmic path."""
    x, t, s, b = (v.detach() for v in inputs())
    for function in (opinion, loss):
        with LargestTensor() as largest:
            function(x, t, 20 * s, b, "blocked")
        assert largest.most <= B * K
