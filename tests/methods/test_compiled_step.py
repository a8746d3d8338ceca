"""The training step through torch.compile: one graph, the same loss, the same gradients."""

import pytest
import torch
from conftest import CLASSES

from cdc_models import CDC, CoOp, MaPLe, fit
from cdc_models.methods import Method

NAMES = ["cat", "dog", "fire engine", "teapot", "umbrella with rain drops"]


@pytest.fixture
def graphs():
    """A backend that runs what it is given as it is, and keeps it."""
    torch.compiler.reset()
    kept = []

    def backend(graph, inputs):
        kept.append(graph)
        return graph.forward

    backend.kept = kept
    return backend


def step(model, images, targets):
    model.zero_grad()
    loss = model.loss(images, targets)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.learned_parameters().values()]


def assert_same_step(own, want):
    torch.testing.assert_close(own[0], want[0], rtol=1e-5, atol=0)
    for a, b in zip(own[1], want[1], strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize(
    ("method", "options"),
    [(CoOp, {}), (MaPLe, {}), (CDC, {})],
    ids=["coop", "maple", "cdc"],
)
def test_a_step_is_one_graph(bundled, graphs, method, options):
    model = method(bundled, NAMES, **options)
    images = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    if model.views is not None:
        images = torch.stack([images, images.flip(-1), -images, images.roll(5, -1)], dim=1)
    want = step(model, images, torch.arange(5))
    model.compile(fullgraph=True, backend=graphs)
    assert_same_step(step(model, images, torch.arange(5)), want)
    assert len(graphs.kept) == 1


def test_chunks_of_classes_are_in_the_graph(backbone, graphs):
    model = CDC(backbone, CLASSES, views=None)
    model.class_chunk = 2
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want = step(model, images, torch.arange(3))
    model.compile(fullgraph=True, backend=graphs)
    assert_same_step(step(model, images, torch.arange(3)), want)
    assert len(graphs.kept) == 1


def test_fit_trains_a_compiled_model_through_batches_of_two_sizes(backbone, coloured, graphs):
    images, targets = coloured
    loader = [(images[:10], targets[:10]), (images[10:20], targets[10:20]), (images[20:], targets[20:])]
    eager, compiled = CoOp(backbone, CLASSES), CoOp(backbone, CLASSES)
    compiled.compile(fullgraph=True, backend=graphs)
    for model in (eager, compiled):
        fit(model, loader, epochs=3, progress=False)
    assert len(graphs.kept) == 2
    torch.testing.assert_close(compiled.context.vectors, eager.context.vectors)
    copy = compiled.with_classes(["yellow square"])
    assert copy.loss(images[:2], torch.zeros(2, dtype=torch.long)).isfinite()
    assert len(graphs.kept) == 2  # copies are not compiled


def test_targets_are_still_checked(backbone, coloured, graphs):
    model = CoOp(backbone, CLASSES)
    model.compile(backend=graphs)
    with pytest.raises(ValueError, match=r"class indices in \[0, 3\)"):
        model.loss(coloured[0][:1], torch.tensor([3]))


def test_a_run_goes_on_with_and_without_compiling(cdc_json, photos, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Method, "compile", lambda model, **options: asked.append(options))
    small = [f"--data={photos}", "--backbone=bundled", "--method=coop", "--shots=2", "--epochs=2", "--batch=3"]
    cdc_json("train", *small, f"--out={tmp_path / 'run'}")
    assert asked == []
    cdc_json("train", *small, "--compile", f"--out={tmp_path / 'run'}")
    assert asked == [{"fullgraph": True}]
    cdc_json("train", *small, f"--out={tmp_path / 'run'}")
    assert asked == [{"fullgraph": True}]


def test_a_protocol_compiles_if_asked_and_counts_the_results_as_the_same(cdc_json, photos, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Method, "compile", lambda model, **options: asked.append(options))
    small = [f"--datasets=[{photos}]", "--backbone=bundled", "--methods=[coop]", "--seeds=[1]", "--shots=1"]
    arguments = ("protocol", "few-shot", *small, "--epochs=2", "--settings={}", f"--out={tmp_path / 'run'}")
    cdc_json(*arguments, "--compile")
    assert asked == [{"fullgraph": True}]
    cdc_json(*arguments)
    assert asked == [{"fullgraph": True}] and len((tmp_path / "run/results.jsonl").read_text().splitlines()) == 1
