"""Files whose content is not what it should be although they can be read: refused, and nothing is half loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cdc_models import CDC, CoOp, fit, load_adapter, save_adapter
from cdc_models.engine import CheckpointError, adapter_info
from cdc_models.engine.adapters import AdapterError
from cdc_models.engine.checkpoint import Checkpoint, Randomness
from cdc_models.engine.files import read_tensors, write_tensors

CLASSES = ["red", "green", "blue"]
VECTORS = "context.vectors"


class Run:
    """A checkpoint of two steps of CoOp, and a fresh model and optimiser to load it into."""

    def __init__(self, backbone, coloured, path):
        self.path = path
        fit(CoOp(backbone, CLASSES), [coloured] * 2, epochs=1, warmup_epochs=0, progress=False, checkpoint=path)
        _, metadata = read_tensors(path)
        self.model = CoOp(backbone, CLASSES)
        self.optimizer = torch.optim.SGD(self.model.learned_parameters().values(), lr=0.1)
        self.checkpoint = Checkpoint(path, self.model, self.optimizer, Randomness(None, backbone.device), {})
        self.checkpoint.run = json.loads(metadata["run"])

    def rewrite(self, tensors=None, **metadata):
        """Changed, with a hash that fits."""
        stored, told = read_tensors(self.path)
        changed = {n: t for n, t in {**stored, **(tensors or {})}.items() if t is not None}
        write_tensors(self.path, changed, {**told, **metadata})


@pytest.fixture
def run(backbone, coloured, tmp_path):
    return Run(backbone, coloured, tmp_path / "run.safetensors")


def refused(run):
    before, random_state = run.model.context.vectors.detach().clone(), torch.get_rng_state()
    with pytest.raises(CheckpointError, match="cannot be used.*delete it to start over"):
        run.checkpoint.load()
    untouched = torch.equal(run.model.context.vectors, before) and torch.equal(torch.get_rng_state(), random_state)
    return untouched and not run.optimizer.state


def test_the_checkpoint_as_written_is_loaded(run):
    position, _, _ = run.checkpoint.load()
    assert position.steps == 2 and run.optimizer.state


@pytest.mark.parametrize(
    "tensors",
    [
        {f"model.{VECTORS}": None},
        {f"model.{VECTORS}": torch.zeros(1, 4, 32, dtype=torch.float64)},
        {f"model.{VECTORS}": torch.zeros(4, 32)},
        {f"optimizer.momentum_buffer.{VECTORS}": None},
        {f"optimizer.momentum_buffer.{VECTORS}": torch.zeros(32)},
        {"optimizer.momentum_buffer.elsewhere": torch.zeros(32)},
        {"now.torch": None},
        {"epoch_start.numpy": None},
        {"now.torch": torch.zeros_like(torch.get_rng_state())},
        {"now.python": torch.full((626,), -1)},
        {"now.python_gauss": torch.zeros(2, dtype=torch.float64)},
        {"now.loader": torch.get_rng_state()},
    ],
    ids=lambda changed: "-".join(f"{n}={'none' if t is None else list(t.shape)}" for n, t in changed.items()),
)
def test_a_checkpoint_with_a_wrong_tensor_leaves_model_and_optimiser_untouched(tensors, run):
    run.rewrite(tensors)
    assert refused(run)


@pytest.mark.parametrize(
    "metadata",
    [
        {"run": "[]"},
        {"position": '{"epoch": "x"}'},
        {"position": '{"epoch": 1}'},
        {"position": '{"batch": -1}'},
        {"position": '{"losses": 1}'},
        {"position": '{"total": null}'},
        {"position": "[]"},
        {"optimizer": "1"},
    ],
    ids=str,
)
def test_a_checkpoint_with_wrong_metadata_leaves_model_and_optimiser_untouched(metadata, run):
    run.rewrite(**metadata)
    assert refused(run)


def test_a_checkpoint_without_its_hash_is_refused(run):
    tensors, metadata = read_tensors(run.path)
    save_file(tensors, run.path, metadata)
    assert refused(run)


@pytest.fixture
def adapter(backbone, tmp_path):
    return save_adapter(CDC(backbone, CLASSES, depth=2), tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float64])
def test_an_adapter_of_another_dtype_is_refused(dtype, adapter, backbone):
    tensors, metadata = read_tensors(adapter)
    write_tensors(adapter, {n: t.to(dtype) for n, t in tensors.items()}, metadata)
    with pytest.raises(AdapterError, match="holds tensors"):
        load_adapter(adapter, backbone)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": "x"},
        {"views": [1, 2, 3, 4]},
        {"words": [1, 2, 3, 4]},
        {"n_ctx": 10**12},
        {"n_ctx": [2]},
        {"n_templates": 10**12, "views": None},
        {"n_templates": 2**63, "views": None},
    ],
    ids=str,
)
def test_an_adapter_with_impossible_options_is_refused(options, adapter, backbone, monkeypatch):
    monkeypatch.setattr(torch, "randn", bounded(torch.randn))
    tensors, metadata = read_tensors(adapter)
    changed = json.dumps({**json.loads(metadata["options"]), **options})
    write_tensors(adapter, tensors, {**metadata, "options": changed})
    with pytest.raises(AdapterError, match="refuses"):
        load_adapter(adapter, backbone)


def bounded(make):
    """The same maker of tensors; the test fails if it is asked for a large one."""

    def made(*sizes, **options):
        if any(size > 10**6 for size in sizes):
            pytest.fail(f"asked for a tensor of {sizes}")
        return make(*sizes, **options)

    return made


def test_an_adapter_without_a_hash_is_accepted(adapter, backbone):
    """As early versions wrote it."""
    tensors, metadata = read_tensors(adapter)
    save_file(tensors, adapter, metadata)
    again = load_adapter(adapter, backbone)
    assert torch.equal(again.prompts.weight, load_file(adapter)["prompts.weight"])


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000], ids=["brackets", "digits"])
@pytest.mark.parametrize("name", ["options", "classes", "backbone", "summary"])
def test_metadata_without_end(name, text, adapter, backbone):
    tensors, metadata = read_tensors(adapter)
    write_tensors(adapter, tensors, {**metadata, name: text})
    with pytest.raises(AdapterError, match="has damaged metadata"):
        adapter_info(adapter)
    if name != "summary":
        with pytest.raises(AdapterError, match="has damaged metadata"):
            load_adapter(adapter, backbone)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000], ids=["brackets", "digits"])
@pytest.mark.parametrize("name", ["run", "position", "optimizer"])
def test_a_position_without_end(name, text, run):
    run.rewrite(**{name: text})
    with pytest.raises(CheckpointError, match="cannot be used"):
        run.checkpoint.load()
