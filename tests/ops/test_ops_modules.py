"""The nn.Module forms, and the losses that have no other home."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cdc_ops import (
    ConsistencyLoss,
    DecouplingLoss,
    EvidenceFusion,
    EvidenceHead,
    EvidentialLoss,
    consistency_loss,
    decoupling_loss,
    evidential_cross_entropy,
    fuse_evidence,
    fused_opinion,
)

f64 = torch.float64


def test_head_is_fused_opinion_with_its_own_scale_and_bias():
    choices = {"activation": "softplus", "rule": "averaging", "prior_weight": 2.0}
    head = EvidenceHead(2, scale=[3.0, 5.0], bias=[0.5, -1.0], **choices)
    image, text = torch.randn(4, 6), torch.randn(2, 3, 6)
    torch.testing.assert_close(head.scale, torch.tensor([3.0, 5.0]))
    expected = fused_opinion(
        image,
        text,
        scale=torch.tensor([3.0, 5.0]),
        bias=torch.tensor([0.5, -1.0]),
        **choices,
    )
    torch.testing.assert_close(head(image, text).prob, expected.prob)


def test_head_learns_what_it_is_told_to():
    assert {n for n, _ in EvidenceHead(2).named_parameters()} == {"log_scale", "bias"}
    fixed = EvidenceHead(2, scale=4.0, learn_scale=False)
    assert {n for n, _ in fixed.named_parameters()} == {"bias"}
    assert set(fixed.state_dict()) == {"log_scale", "bias"}
    assert all(p.dtype == torch.float32 for p in EvidenceHead(2, scale=torch.tensor(3.0, dtype=f64)).parameters())


def test_head_fits_its_certainty_to_the_data():
    """Half the labels are wrong: a head that starts out certain learns to be less so, and the loss falls."""
    torch.manual_seed(0)
    image, text = torch.eye(4).repeat(10, 1), torch.eye(4).expand(2, 4, 4)
    y = torch.arange(4).repeat(10)
    y[::2] = torch.randint(4, (20,))
    head, loss = EvidenceHead(2, scale=20.0), EvidentialLoss()
    optimiser = torch.optim.Adam(head.parameters(), lr=0.05)
    history, before = [], head(image, text).uncertainty.mean()
    for _ in range(60):
        value = loss(image, text, y, scale=head.scale, bias=head.bias)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        history.append(value.item())
    assert history[-1] < 0.7 * history[0]
    assert head(image, text).uncertainty.mean() > 100 * before
    assert (head.scale > 0).all()


def test_loss_module_is_the_function_and_can_be_annealed():
    image, text, y = torch.randn(4, 6), torch.randn(2, 3, 6), torch.tensor([0, 1, 2, 0])
    module = EvidentialLoss(form="mse", activation="softplus", rule="cumulative", fused_weight=0.5)
    for kl_weight in (0.0, 0.7):
        module.kl_weight = kl_weight
        expected = evidential_cross_entropy(
            image,
            text,
            y,
            scale=2.0,
            form="mse",
            activation="softplus",
            rule="cumulative",
            fused_weight=0.5,
            kl_weight=kl_weight,
        )
        torch.testing.assert_close(module(image, text, y, scale=2.0), expected)


def test_fusion_module_is_the_function():
    e = torch.rand(4, 3, 5)
    torch.testing.assert_close(EvidenceFusion("weighted", prior_weight=2.0)(e), fuse_evidence(e, 1, "weighted", 2.0))


def test_another_adapter_composes_the_parts_in_its_own_init():
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.text = nn.Parameter(torch.randn(3, 4, 8))
            self.head = EvidenceHead(3, scale=10.0)
            self.classify, self.decouple, self.keep = (
                EvidentialLoss(kl_weight=0.1),
                DecouplingLoss(),
                ConsistencyLoss(0.1),
            )

        def loss(self, image, y, anchor):
            trusted = self.classify(image, self.text, y, scale=self.head.scale, bias=self.head.bias)
            return trusted + self.decouple(self.text) + self.keep(self.text, anchor)

    adapter = Adapter()
    adapter.loss(torch.randn(5, 8), torch.arange(5) % 4, torch.randn(4, 8)).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert "rule='dempster'" in repr(adapter) and "temperature=0.1" in repr(adapter)
    other = Adapter()
    other.load_state_dict(adapter.state_dict())


@pytest.mark.parametrize("kind", ["cosine", "cosine_squared"])
@pytest.mark.parametrize("M", [1, 2, 5])
def test_decoupling_loss_is_its_definition(kind, M):
    text = torch.randn(M, 4, 3, dtype=f64, requires_grad=True)
    pairs = [(m, n) for m in range(M) for n in range(M) if m != n]
    similarity = [F.cosine_similarity(text[m], text[n], dim=-1) for m, n in pairs]
    power = 2 if kind == "cosine_squared" else 1
    expected = torch.stack(similarity).pow(power).mean() if pairs else torch.zeros((), dtype=f64)
    torch.testing.assert_close(decoupling_loss(text, kind), expected)
    torch.testing.assert_close(DecouplingLoss(kind)(text), expected)
    assert torch.autograd.gradcheck(lambda t: decoupling_loss(t, kind), text)


def test_consistency_loss_is_its_definition():
    text = torch.randn(3, 4, 5, dtype=f64, requires_grad=True)
    anchor = torch.randn(4, 5, dtype=f64, requires_grad=True)
    logits = F.cosine_similarity(text[:, :, None], anchor, dim=-1) / 0.2
    expected = -logits.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()
    torch.testing.assert_close(consistency_loss(text, anchor, 0.2), expected)
    assert torch.autograd.gradcheck(lambda t, a: consistency_loss(t, a, 0.2), (text, anchor))


def test_losses_of_features_compute_in_float32_under_autocast():
    text, anchor = torch.randn(2, 3, 4), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = decoupling_loss(text), consistency_loss(text, anchor)
    assert cast == (decoupling_loss(text), consistency_loss(text, anchor))
    assert decoupling_loss(text.bfloat16()).dtype == torch.float32


def test_losses_of_zero_features_are_finite():
    text = torch.zeros(2, 3, 4, requires_grad=True)
    (decoupling_loss(text) + consistency_loss(text, torch.zeros(3, 4))).backward()
    assert text.grad.isfinite().all()
