"""Two processes (gloo, CPU) against one: the same steps, the same figures, nothing lost or doubled at the tail."""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from dataclasses import asdict
from datetime import timedelta
from itertools import chain

import pytest
import torch
from conftest import make_small_backbone
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cdc_models import CDC, METHODS, CoOp, evaluate, fit, processes
from cdc_models.cli import COMMANDS, main
from cdc_models.data import BadImageError, ImageLoader
from cdc_models.engine import CheckpointError, FitResult, extract_features

CLASSES = ["red", "green", "blue"]
OPTIONS = {"coop": {}, "maple": {"depth": 2}, "cdc": {"depth": 2, "views": None, "trusted": False}}
BAD = (3, 10, 11, 12, 13, 14, 21)  # with batches of 5 in order: one in the first, all of the third


class Noisy(Dataset):
    """23 coloured images, some of which cannot be read; their augmentation draws from torch's generator."""

    def __init__(self, noise=0.3, bad=BAD, light=0.0):
        self.noise, self.bad, self.light = noise, bad, light

    def __len__(self):
        return 23

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImageError(f"{index}.png", "damaged", "on purpose")
        colour = torch.eye(3)[index % 3] + 0.02 * index + self.light
        return colour[:, None, None] + self.noise * torch.randn(3, 32, 32), index % 3


def learned(model):
    return torch.cat([p.detach().flatten() for p in model.learned_parameters().values()])


def loader(part, seed=5, batch=5, **options):
    return ImageLoader(Noisy(**options), batch, seed=seed, part=part)


def training(part, method):
    model = METHODS[method](make_small_backbone(), CLASSES, **OPTIONS[method], seed=1)
    if part[0]:  # the first one's start is everybody's
        torch.nn.init.zeros_(next(iter(model.learned_parameters().values())))
    images = loader(part)
    result = fit(model, images, epochs=2, lr=0.05, warmup_epochs=0, momentum=0.5, seed=3, progress=False)
    return learned(model), result.losses, result.steps, {image.path for image in images.report.skipped}


def evaluation(part):
    model = CDC(make_small_backbone(), CLASSES, depth=2, seed=1)
    unknown = ImageLoader(Noisy(noise=0, light=0.5), 4, part=part)
    loaders = [ImageLoader(Noisy(noise=0), batch, part=part) for batch in (5, 100, 1)]
    found = [evaluate(model, each, unknown=unknown, progress=False) for each in loaders]
    skipped = [len(each.report.skipped) for each in loaders]
    return [(f.numbers() | {"seconds": 0}, f.prob, f.targets) for f in found], skipped


def stopping(folder, unbroken):
    """CDC with random views, so that each process has random states of its own; a signal at step 4 to one of them."""
    part, images = processes.part(), loader(processes.part(), bad=())
    model, loss, calls = CDC(make_small_backbone(), CLASSES, depth=2, seed=1), CDC.loss, []

    def stop_at_the_fourth(self, *given):
        calls.append(1)
        if len(calls) == 4 and not unbroken and part[0] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, *given)

    CDC.loss = stop_at_the_fourth
    path = folder / ("whole.safetensors" if unbroken else "broken.safetensors")
    try:
        first = fit(model, images, epochs=2, lr=0.05, warmup_epochs=0, seed=3, checkpoint=path, progress=False)
        if unbroken:
            return learned(model), asdict(first)
        again = CDC(make_small_backbone(), CLASSES, depth=2, seed=1)
        torch.manual_seed(17 + part[0])
        images = loader(part, bad=())
        second = fit(again, images, epochs=2, lr=0.05, warmup_epochs=0, seed=3, checkpoint=path, progress=False)
        return learned(again), asdict(first), asdict(second)
    finally:
        CDC.loss = loss


def refusals(folder):
    rank, _ = processes.part()
    model, told = CoOp(make_small_backbone(), CLASSES), []
    attempts = [
        lambda: fit(model, loader((rank, 2)), lr=0.1 + rank, progress=False),
        lambda: fit(model, loader((rank, 2)), checkpoint=folder / "none/run.safetensors", progress=False),
        lambda: fit(model, loader((rank, 2)), epochs=3, checkpoint=folder / "alone.safetensors", progress=False),
        lambda: fit(model, loader((rank, 2), bad=range(23)), progress=False),
        lambda: extract_features(model, loader((rank, 3)), progress=False),
        lambda: evaluate(model, loader((rank, 2), bad=range(23)), progress=False),
        lambda: fit(model, loader((0, 1)), progress=False),
        lambda: fit(model, sampled(1 - rank), progress=False),
        lambda: evaluate(model, sampled(rank), progress=False),
    ]
    for attempt in attempts:
        try:
            attempt()
            told.append(None)
        except (ValueError, OSError, RuntimeError) as error:
            told.append((type(error).__name__, str(error)))
    return told


def sampled(rank):
    """A loader of plain PyTorch, whose sampler makes shares of equal length by repeating images."""
    data = Noisy(bad=())
    return DataLoader(data, 4, sampler=DistributedSampler(data, 2, rank))


def uneven():
    """Loaders that know nothing of parts: three batches here, one there."""
    rank, model = processes.part()[0], CoOp(make_small_backbone(), CLASSES, seed=1)
    data = Noisy(noise=0, bad=())
    images, targets = torch.stack([x for x, _ in data_of(data)]), torch.tensor([y for _, y in data_of(data)])
    rows = [[range(0, 6), range(6, 8), range(8, 10)], [range(10, 13)]][rank]
    batches = [(images[list(r)], targets[list(r)]) for r in rows]
    result = fit(model, batches, epochs=1, lr=0.05, warmup_epochs=0, progress=False)
    whole = evaluate(model, [(images, targets)], progress=False)
    return learned(model), result.steps, whole.count


def gradients():
    """One and three images; then two and none; a parameter that nobody has a gradient of."""
    rank, found = processes.part()[0], []
    for images in ((1, 3), (2, 0)):
        parameters = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(1))]
        if images[rank]:
            parameters[0].grad = torch.full((2, 2), 1.0 + rank)
        told = processes.sum_gradients(parameters, images[rank], float(rank), stop=rank == 1)
        found.append((told, [None if p.grad is None else p.grad.unique().tolist() for p in parameters]))
    return found


def data_of(data):
    return [data[i] for i in range(len(data))]


def as_launched(rank, folder):
    """What a launcher tells each of two processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = (folder / "port").read_text()
    torch.set_num_threads(1)


def start_two(target, folder):
    """Run a function of (rank, folder) in two processes, and give their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cdc_models", "conftest"])
    started = [context.Process(target=target, args=(rank, folder)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def work(rank, folder):
    """All that the tests look at, in one of two processes."""
    as_launched(rank, folder)
    try:
        with processes.joined():
            found = {name: training(processes.part(), name) for name in ("coop", "maple", "cdc")}
            found["evaluation"] = evaluation(processes.part())
            found["whole"], found["broken"] = stopping(folder, True), stopping(folder, False)
            found["refusals"], found["uneven"], found["gradients"] = refusals(folder), uneven(), gradients()
            found["messages"] = processes.gather_json({"from": rank}), processes.gather_tensors({"x": torch.ones(rank)})
    except Exception:
        found = {"error": traceback.format_exc()}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    alone = CoOp(make_small_backbone(), CLASSES)
    fit(alone, loader((0, 1)), epochs=3, checkpoint=folder / "alone.safetensors", progress=False)
    start_two(work, folder)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert not any("error" in f for f in found), found
    return found


@pytest.mark.parametrize("method", ["coop", "maple", "cdc"])
def test_training_takes_the_steps_of_one_process(two, method):
    end, losses, steps, skipped = training((0, 1), method)
    (one, *_), (other, *_) = two[0][method], two[1][method]
    assert torch.equal(one, other) and torch.allclose(one, end, atol=1e-5, rtol=1e-5)
    start = learned(METHODS[method](make_small_backbone(), CLASSES, **OPTIONS[method], seed=1))
    assert (end - start).abs().max() > 1e-3  # and steps they were
    for _, their_losses, their_steps, _ in (two[0][method], two[1][method]):
        assert their_losses == pytest.approx(losses, rel=1e-5) and their_steps == steps
    assert two[0][method][3] | two[1][method][3] == skipped == {f"{i}.png" for i in BAD}


def test_evaluation_gives_the_figures_of_one_process(two):
    expected, skipped = evaluation((0, 1))
    for rank in range(2):
        found, _ = two[rank]["evaluation"]
        for (numbers, prob, targets), (own, own_prob, own_targets) in zip(found, expected, strict=True):
            assert torch.equal(targets, own_targets) and torch.allclose(prob, own_prob, atol=1e-6)
            assert numbers == pytest.approx(own, abs=1e-6, nan_ok=True) and numbers["count"] == 23 - len(BAD)
    shares = [two[rank]["evaluation"][1] for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == skipped == [len(BAD)] * 3
    assert two[0]["evaluation"][0][2][0] == two[1]["evaluation"][0][2][0]


def test_a_signal_to_one_stops_both_and_both_go_on_to_the_same_bits(two):
    for rank in range(2):
        (whole, result), (end, *results) = two[rank]["whole"], two[rank]["broken"]
        result, first, second = (FitResult(**values) for values in (result, *results))
        assert torch.equal(whole, end) and torch.equal(whole, two[0]["whole"][0])
        assert first.interrupted and first.steps == 4 and not second.interrupted and second.steps == result.steps == 10
        assert second.losses == result.losses


def test_what_is_refused_is_refused_in_both(two):
    for rank in range(2):
        settings, folder, alone, nothing, part, empty, whole, other, repeated = two[rank]["refusals"]
        assert settings[0] == "ValueError" and "same run in all processes; 1 and 0 differ in lr" in settings[1]
        assert folder[0] == ("FileNotFoundError", "FirstFailed")[rank] and "No such file" in folder[1]
        assert alone[0] == CheckpointError.__name__ and "processes: 1 there, 2 here" in alone[1]
        assert nothing[0] == "ValueError" and "gave no batch in epoch 0" in nothing[1]
        assert part[0] == "ValueError" and f"part ({rank}, 2)" in part[1]
        assert empty[0] == "ValueError" and "got none" in empty[1]
        assert whole == (
            "ValueError",
            f"loader: expected part {(rank, 2)} of every batch, as of processes.part(), got part (0, 1)",
        )
        assert other[0] == "ValueError" and f"got part {(1 - rank, 2)}" in other[1]
        assert repeated[0] == "ValueError" and "DistributedSampler" in repeated[1] and "repeats images" in repeated[1]


def test_loaders_of_unequal_length_wait_for_nobody(two):
    model, data = CoOp(make_small_backbone(), CLASSES, seed=1), data_of(Noisy(noise=0, bad=()))
    rows = [[*range(6), 10, 11, 12], [6, 7], [8, 9]]
    batches = [(torch.stack([data[i][0] for i in r]), torch.tensor([data[i][1] for i in r])) for r in rows]
    fit(model, batches, epochs=1, lr=0.05, warmup_epochs=0, progress=False)
    for rank in range(2):
        end, steps, count = two[rank]["uneven"]
        assert torch.allclose(end, learned(model), atol=1e-6) and steps == 3
        assert count == 23  # a loader without part is everything, in each process


def test_gradients_are_averaged_over_images(two):
    for rank in range(2):
        uneven, empty = two[rank]["gradients"]
        assert uneven == ((4, 0.75, True), [[1.75], None])  # (1 * 1 + 3 * 2) / 4
        assert empty == ((2, 0.0, True), [[1.0], None])


def test_messages(two):
    for rank in range(2):
        told, tensors = two[rank]["messages"]
        assert told == [{"from": 0}, {"from": 1}] and [t["x"].tolist() for t in tensors] == [[], [1.0]]


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("drop_last", [False, True])
def test_shares_are_the_batches_of_one_process(count, drop_last):
    def batches(part):
        each = ImageLoader([(torch.full((1,), i), i) for i in range(23)], 5, seed=1, drop_last=drop_last, part=part)
        return [targets.tolist() for _, targets in each]

    shares = [batches((rank, count)) for rank in range(count)]
    assert [list(chain(*turn)) for turn in zip(*shares, strict=True)] == batches((0, 1))
    with pytest.raises(ValueError, match="part: expected"):
        batches((count, count))


def left_alone(rank, folder):
    """A command in which one process dies and the other waits for it, in one of the ways of waiting."""
    as_launched(rank, folder)
    sys.stderr = (folder / f"{rank}.err").open("w", buffering=1)

    def command(workers: int = 0) -> None:
        meet = processes.meeting()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        parameter = torch.nn.Parameter(torch.ones(1))
        waits = {
            "meet": meet,
            "gather": lambda: processes.gather_json(1),
            "gradients": lambda: processes.sum_gradients([parameter], 1, 0.0, False),
            "batches": lambda: list(processes.in_step([1], 0)),
            "share": lambda: processes.share_tensors([torch.ones(1)]),
        }
        waits[(folder / "wait").read_text()]()

    COMMANDS["train"] = command
    main(["train"])


@pytest.mark.parametrize("wait", ["meet", "gather", "gradients", "batches", "share"])
def test_a_process_that_has_lost_the_others_says_so(wait, tmp_path):
    (tmp_path / "wait").write_text(wait)
    assert start_two(left_alone, tmp_path) == [1, -signal.SIGKILL]
    told = (tmp_path / "0.err").read_text()
    assert told.startswith("cdc: process 0 of 2 has lost the others, which ended or do not answer (")
    assert told.endswith("); start all again to go on from what is saved\n") and told.count("\n") == 1


def test_processes_that_do_not_meet_say_so(cdc_command, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", timedelta(seconds=1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        status, _, err = cdc_command("evaluate", "--data=x")
    assert status == 1 and "process 1 of 2 has lost the others" in err and "Traceback" not in err
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert cdc_command("evaluate", "--data=x")[::2] == (
        2, "cdc: WORLD_SIZE: expected a whole number from the launcher, got 'two'\n",
    )  # fmt: skip


@pytest.fixture
def gpus(monkeypatch):
    """As the third of four processes on a machine of so many GPUs; gives those that were taken."""
    taken = []

    def pretend(count):
        monkeypatch.setattr(processes, "part", lambda: (2, 4))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setenv("LOCAL_RANK", "2")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        return taken

    return pretend


def test_each_process_takes_a_gpu_of_its_own(gpus):
    taken = gpus(4)
    assert processes.own_device("cuda") == "cuda:2" and taken == [2]
    assert processes.own_device("cpu") == "cpu" and taken == [2]


@pytest.mark.parametrize(
    ("device", "count", "told"),
    [
        ("auto", 3, "device: 4 processes on this machine need a GPU each, it has 3; start fewer, or take cpu"),
        ("cuda:1", 4, "device: each of 4 processes takes a GPU of its own; expected 'cuda', got 'cuda:1'"),
    ],
)
def test_gpus_that_do_not_suffice_are_one_sentence(device, count, told, gpus, cdc_command, photos):
    gpus(count)
    assert cdc_command("evaluate", f"--data={photos}", "--backbone=bundled", f"--device={device}") == (
        2, "", f"cdc: {told}\n",
    )  # fmt: skip


def test_alone_a_device_is_what_it_is():
    assert processes.own_device("cuda:1") == "cuda:1" and processes.own_device("cuda") == "cuda"


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes.joined():
        assert processes.part() == (0, 1) and processes.is_first()
    assert processes.gather_json({1, 2}) == [{1, 2}]
