"""A block's linear layers, written for speed, are open_clip's own."""

import pytest
import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import nn

from cdc_models.clip.blocks import mlp

ACTIVATIONS = [QuickGELU, nn.GELU]


def layers_and_tokens(activation, dtype=torch.float32):
    torch.manual_seed(0)
    layers = ResidualAttentionBlock(16, 2, act_layer=activation).mlp.to(dtype)
    return layers, 3 * torch.randn(2, 3, 5, 16, dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype, off", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_values_and_every_gradient(activation, dtype, off):
    layers, x = layers_and_tokens(activation, dtype)
    inputs = [x.requires_grad_(), *layers.parameters()]
    results = []
    for way in (layers, lambda tokens: mlp(layers, tokens)):
        y = way(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=off * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_keeps_the_dtype(activation):
    layers, x = layers_and_tokens(activation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = layers(x), mlp(layers, x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_frozen_layers_keep_one_wide_tensor_for_the_backward_pass():
    """And not the three that QuickGELU as it is written keeps."""
    layers, x = layers_and_tokens(QuickGELU)
    layers.requires_grad_(False)
    x.requires_grad_()
    wide = {}
    for name, way in {"theirs": layers, "ours": lambda tokens: mlp(layers, tokens)}.items():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            way(x)
        wide[name] = len({t.data_ptr() for t in kept if t.numel() == 4 * x.numel()})
    assert wide["ours"] == 1 < wide["theirs"]


def test_compiled_it_is_the_same():
    """Inductor (torch 2.14) loses the alpha of an addition behind a product: the layers must do without."""
    layers, x = layers_and_tokens(QuickGELU)
    inputs = [x.requires_grad_(), *layers.parameters()]
    results = []
    for way in (mlp, torch.compile(mlp, fullgraph=True)):
        y = way(layers, x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-6 * float(plain.detach().abs().max()))
