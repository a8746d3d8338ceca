"""Adapters and checkpoints of random damage and random metadata: our own errors, or what was stored; nothing else."""

import contextlib
import json

import pytest
import torch
from conftest import make_small_backbone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdc_models import CoOp, fit, load_adapter, save_adapter
from cdc_models.engine import AdapterError, CheckpointError, adapter_info
from cdc_models.engine.checkpoint import Checkpoint, Randomness
from cdc_models.engine.files import read_tensors, write_tensors

CLASSES = ["red", "green", "blue"]
FEW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

numbers = st.integers() | st.floats()
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
texts = json_values.map(json.dumps) | st.text(max_size=20)
changes = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "end"]), st.floats(0, 1, exclude_max=True), st.binary(max_size=6)
    ),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, steps: list[tuple[str, float, bytes]]) -> bytes:
    """Bytes overwritten, cut out or put in, more often early in the file, where its header is."""
    for what, where, new in steps:
        at = int(len(data) * where**3)
        if what == "end":
            data = data[:at]
        elif what == "cut":
            data = data[:at] + data[at + len(new) :]
        else:
            data = data[:at] + new + data[at + (len(new) if what == "set" else 0) :]
    return data


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A backbone, a folder with an adapter and the checkpoint of its training, and its learned parameters."""
    backbone, folder = make_small_backbone(), tmp_path_factory.mktemp("fuzzed")
    model = CoOp(backbone, CLASSES)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fit(model, [(images, torch.tensor([0, 1, 2, 0]))], epochs=2, progress=False, checkpoint=folder / "run.safetensors")
    save_adapter(model, folder / "adapter.safetensors", {"epochs": 1})
    return backbone, folder, {name: p.detach().clone() for name, p in model.learned_parameters().items()}


def same(model, learned):
    return all(torch.equal(p, learned[name]) for name, p in model.learned_parameters().items())


def resume(trained, file):
    """Load a checkpoint into a fresh model."""
    backbone, folder, _ = trained
    model = CoOp(backbone, CLASSES)
    optimizer = torch.optim.SGD(model.learned_parameters().values(), lr=0.1)
    checkpoint = Checkpoint(file, model, optimizer, Randomness(None, backbone.device), {})
    checkpoint.run = json.loads(read_tensors(folder / "run.safetensors")[1]["run"])
    checkpoint.load()
    return model


@FEW
@given(steps=changes)
def test_bytes_of_an_adapter(trained, steps):
    backbone, folder, learned = trained
    file = folder / "damaged-adapter.safetensors"
    file.write_bytes(damaged((folder / "adapter.safetensors").read_bytes(), steps))
    try:
        assert same(load_adapter(file, backbone), learned)
        adapter_info(file)
    except AdapterError:
        pass


@FEW
@given(steps=changes)
def test_bytes_of_a_checkpoint(trained, steps):
    _, folder, learned = trained
    file = folder / "damaged-run.safetensors"
    file.write_bytes(damaged((folder / "run.safetensors").read_bytes(), steps))
    state = torch.get_rng_state()
    try:
        assert same(resume(trained, file), learned)
    except CheckpointError:
        assert torch.equal(torch.get_rng_state(), state)  # refused before anything was put back


@FEW
@given(
    name=st.sampled_from(["format", "method", "options", "fingerprint", "classes", "backbone", "summary"]), text=texts
)
def test_metadata_of_an_adapter(trained, name, text):
    backbone, folder, _ = trained
    tensors, metadata = read_tensors(folder / "adapter.safetensors")
    file = folder / "other-adapter.safetensors"
    write_tensors(file, tensors, {**metadata, name: text})
    for use in (lambda: load_adapter(file, backbone), lambda: adapter_info(file)):
        with contextlib.suppress(AdapterError):
            use()


@FEW
@given(text=texts, data=st.data())
def test_metadata_of_a_checkpoint(trained, text, data):
    _, folder, learned = trained
    tensors, metadata = read_tensors(folder / "run.safetensors")
    file = folder / "other-run.safetensors"
    write_tensors(file, tensors, {**metadata, data.draw(st.sampled_from(sorted(metadata))): text})
    with contextlib.suppress(CheckpointError):
        assert same(resume(trained, file), learned)
