"""How `cdc` ends, whatever a command does."""

import warnings

import pytest

from cdc_models.cli import COMMANDS, EXIT
from cdc_models.commands.settings import Interrupted, RunFailed


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("shots: expected more"), 2, "cdc: shots: expected more\n"),
        (FileNotFoundError("no adapter file at x"), 2, "cdc: no adapter file at x\n"),
        (ImportError("needs pyarrow"), 2, "cdc: needs pyarrow\n"),
        (Interrupted("the same command goes on"), 130, "cdc: interrupted: the same command goes on\n"),
        (KeyboardInterrupt(), 130, "cdc: interrupted\n"),
        (RunFailed("no network"), 1, "cdc: no network\n"),
        (OSError(28, "No space left on device"), 1, "cdc: [Errno 28] No space left on device\n"),
    ],
)
def test_errors(error, status, told, cdc, monkeypatch):
    def command(workers: int = 1) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "demo", command)
    assert cdc("demo") == (status, "", told)
    assert f"{status} " in EXIT


def test_a_mistake_in_the_program_is_not_hidden(cdc, monkeypatch):
    def command(workers: int = 1) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setitem(COMMANDS, "demo", command)
    with pytest.raises(RuntimeError, match="a bug"):
        cdc("demo")


@pytest.mark.filterwarnings("always")
def test_a_warning_is_a_sentence(cdc, monkeypatch):
    def command(workers: int = 1) -> None:
        warnings.warn("EuroSAT: expected 10 classes, found 4", stacklevel=1)

    monkeypatch.setitem(COMMANDS, "demo", command)
    assert cdc("demo") == (0, "", "cdc: warning: EuroSAT: expected 10 classes, found 4\n")


@pytest.mark.parametrize(
    "given", [["tarin"], ["train"], ["train", "--data=x", "--lr=fast"], ["train", "--data=x", "--bogus=1"]]
)
def test_arguments_that_cannot_be_read(given, cdc):
    status, out, err = cdc(*given)
    assert (status, out) == (2, "") and err.startswith("cdc: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["--calibrate"], True), (["--calibrate", "true"], True), (["--calibrate", "false"], False), ([], False)],
)
def test_a_bare_switch_means_yes(given, expected, cdc, monkeypatch):
    found = []

    def command(calibrate: bool = False, workers: int = 1) -> None:
        found.append(calibrate)

    monkeypatch.setitem(COMMANDS, "demo", command)
    assert cdc("demo", *given) == (0, "", "") and found == [expected]


def test_the_work_of_one_process_does_not_wait_for_others(cdc_command, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: pytest.fail("waited for others"))
    assert cdc_command("report", "--runs=[x]") == (
        2, "", "cdc: report is the work of one process; several do train, evaluate, predict\n",
    )  # fmt: skip
