"""Runs that survive: cut off anywhere, a run goes on to bitwise the same end; a bad checkpoint is refused in words."""

import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import torch
from conftest import make_small_backbone
from safetensors.torch import load_file
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from cdc_models import CDC, CoOp, fit
from cdc_models.engine import CheckpointError

CLASSES = ["red", "green", "blue"]
EPOCHS = 3


class Jittered(TensorDataset):
    """Every kind of random number that an augmentation may draw."""

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image + 0.1 * torch.randn(()) + 0.1 * random.gauss(0, 1), target


def run(path, epochs=EPOCHS, backbone=None, seeded_loader=True, **options):
    """One whole run: CDC with random views, shuffled batches of randomly changed images."""
    backbone = backbone or make_small_backbone()
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(7) if seeded_loader else None
    loader = DataLoader(Jittered(images, torch.arange(24) % 3), batch_size=5, shuffle=True, generator=generator)
    model = CDC(backbone, CLASSES, depth=2, seed=3)
    random.seed(11)
    settings = {"lr": 0.05, "seed": 5, "progress": False, "checkpoint": path, "checkpoint_every": 1} | options
    result = fit(model, loader, epochs=epochs, **settings)
    return torch.cat([p.detach().flatten() for p in model.learned_parameters().values()]), result


def endless_attempts(path, out, seed):
    """In a process of its own: train to the end unless killed."""
    torch.set_num_threads(1)
    end, result = run(path)
    if not result.interrupted:
        torch_file = out.with_suffix(".part")
        torch_file.write_bytes(end.numpy().tobytes())
        torch_file.replace(out)


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    """SIGKILL at 20 random moments of a run that writes its checkpoint after every step."""
    whole, _ = run(None)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cdc_models", "conftest"])
    rng = random.Random(0)
    checkpoint, out = tmp_path / "run.safetensors", tmp_path / "end"
    kills, places = 0, set()
    while kills < 20:
        out.unlink(missing_ok=True)
        process = context.Process(target=endless_attempts, args=(checkpoint, out, kills))
        process.start()
        waited = time.monotonic()
        # the clock starts when training does: at the first sign of life in the folder
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        while process.is_alive() and time.monotonic() - waited < 60:
            now = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
            if now != before:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if checkpoint.exists():
            places.add(bytes(load_file(checkpoint)["now.torch"].numpy().tobytes()))
        if out.exists():  # that run was faster than the kill: begin another
            assert out.read_bytes() == whole.numpy().tobytes()
            checkpoint.unlink()
    process = context.Process(target=endless_attempts, args=(checkpoint, out, kills))
    process.start()
    process.join()
    assert out.read_bytes() == whole.numpy().tobytes()
    assert len(places) > 5  # the kills were not all at one place
    assert {path.suffix for path in tmp_path.iterdir() if path not in (checkpoint, out)} <= {".part"}


@pytest.mark.parametrize("seeded_loader", [True, False])
@pytest.mark.parametrize("every", [0, 2])
def test_stopped_by_ctrl_c_it_goes_on_to_the_same_end(tmp_path, backbone, every, seeded_loader, monkeypatch):
    options = {"backbone": backbone, "seeded_loader": seeded_loader, "checkpoint_every": every}
    whole, result = run(None, **options)
    assert result.steps == 15
    path, calls = tmp_path / "run.safetensors", []
    loss = CDC.loss

    def interrupted_at_step(model, *given):
        calls.append(0)
        if len(calls) in (2, 7, 10):
            os.kill(os.getpid(), signal.SIGINT)
        return loss(model, *given)

    monkeypatch.setattr(CDC, "loss", interrupted_at_step)
    attempts = [run(path, **options) for _ in range(4)]
    assert [r.interrupted for _, r in attempts] == [True, True, True, False]
    assert [r.steps for _, r in attempts] == [2, 7, 10, 15] and len(calls) == 15  # no step was lost or done twice
    assert torch.equal(attempts[-1][0], whole)
    assert attempts[-1][1].losses == result.losses
    again = run(path, **options)  # a finished run has nothing left to do
    assert torch.equal(again[0], whole) and len(calls) == 15


def test_a_sampler_with_its_own_generator_resumes_too(tmp_path, backbone, coloured, monkeypatch):
    def attempt(path, stop_at=None):
        data, calls = TensorDataset(*coloured), []
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(4))
        model, loss = CoOp(backbone, CLASSES, seed=1), CoOp.objective

        def stopping(self, *given):
            calls.append(0)
            if len(calls) == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return loss(self, *given)

        monkeypatch.setattr(CoOp, "objective", stopping)
        fit(model, DataLoader(data, 5, sampler=sampler), epochs=3, lr=0.05, seed=0, checkpoint=path, progress=False)
        monkeypatch.undo()
        return model.context.vectors.detach()

    whole, path = attempt(None), tmp_path / "run.safetensors"
    attempt(path, stop_at=7)
    assert torch.equal(attempt(path), whole)


def test_persistent_workers_cannot_be_resumed_and_are_refused(backbone, coloured, tmp_path):
    loader = DataLoader(TensorDataset(*coloured), 5, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="persistent workers"):
        fit(CoOp(backbone, CLASSES), loader, checkpoint=tmp_path / "a", progress=False)


def test_a_second_ctrl_c_stops_at_once(backbone, monkeypatch, tmp_path):
    loss = CDC.loss

    def impatient(model, *given):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss(model, *given)

    monkeypatch.setattr(CDC, "loss", impatient)
    _, result = run(tmp_path / "a", backbone=backbone)
    assert result.interrupted and result.steps == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_says_how_to_resume(backbone, monkeypatch, tmp_path, capsys):
    loss = CDC.loss
    monkeypatch.setattr(CDC, "loss", lambda *given: (os.kill(os.getpid(), signal.SIGINT), loss(*given))[1])
    run(tmp_path / "a.safetensors", backbone=backbone, progress=True)
    said = "".join(capsys.readouterr().out.split())
    assert "Interruptedatstep1;thesamecallgoesonfrom" in said


@pytest.fixture
def stored(tmp_path, backbone):
    path = tmp_path / "run.safetensors"
    run(path, epochs=2, backbone=backbone)
    return path


@pytest.mark.parametrize("change", [{"epochs": 3}, {"lr": 0.01}, {"seed": 6}, {"autocast": torch.bfloat16}])
def test_a_checkpoint_of_other_settings_is_refused(change, stored, backbone):
    before = stored.read_bytes()
    with pytest.raises(CheckpointError, match=f"belongs to another run.*{next(iter(change))}"):
        run(stored, **{"epochs": 2, "backbone": backbone, **change})
    assert stored.read_bytes() == before


def test_a_checkpoint_of_another_backbone_class_list_or_method_is_refused(stored, backbone, other_backbone, coloured):
    with pytest.raises(CheckpointError, match="backbone"):
        run(stored, epochs=2, backbone=other_backbone)
    with pytest.raises(CheckpointError, match=r'classes: \["red", "green", "blue"\] there, \["a", "b", "c"\] here'):
        fit(CDC(backbone, ["a", "b", "c"], depth=2, seed=3), [coloured], checkpoint=stored, progress=False)
    with pytest.raises(CheckpointError, match='method: "cdc" there, "coop" here'):
        fit(CoOp(backbone, CLASSES), [coloured], checkpoint=stored, progress=False)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign"])
def test_a_damaged_checkpoint_is_refused_and_kept(damage, stored, backbone):
    data = stored.read_bytes()
    changed = {
        "empty": b"",
        "cut": data[:-100],
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "foreign": b"PK\x03\x04 not ours",
    }[damage]
    stored.write_bytes(changed)
    with pytest.raises(CheckpointError, match="cannot be used.*delete it to start over"):
        run(stored, epochs=2, backbone=backbone)
    assert stored.read_bytes() == changed


def test_a_folder_that_cannot_be_written_is_found_out_before_training(tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(CDC, "loss", lambda *_: pytest.fail("trained before the checkpoint was tried"))
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "missing" / "run.safetensors", backbone=backbone)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        run(tmp_path / "file" / "run.safetensors", backbone=backbone)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, backbone):
    path = tmp_path / "run.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(epoch, loss):  # from the second epoch on, no file may grow beyond 1000 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    try:
        with pytest.raises(OSError, match=f"too large: '{path}'"):
            run(path, backbone=backbone, on_epoch=fill, checkpoint_every=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]
    whole, _ = run(None, backbone=backbone, checkpoint_every=0)
    resumed, result = run(path, backbone=backbone, checkpoint_every=0)
    assert torch.equal(resumed, whole) and result.steps == 15


def test_bad_interval(backbone, coloured):
    with pytest.raises(ValueError, match="checkpoint_every"):
        fit(CoOp(backbone, CLASSES), [coloured], checkpoint_every=-1, progress=False)
