"""docs/commands.md: its commands run in the order of the page, and its tables are so."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from trees import SPLIT_FILES, split_file_tree

from cdc_models.cli import COMMANDS
from cdc_models.commands.protocol import PROTOCOL_COMMANDS
from cdc_models.shards import COLUMNS

PAGE = (Path(__file__).parents[2] / "docs/commands.md").read_text()


@pytest.mark.filterwarnings("ignore:.*figures will not compare with published ones")
def test_the_pages_commands_run(tmp_path, monkeypatch, photos, cdc, cdc_command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_photos").symlink_to(photos)
    (tmp_path / "new_photos").symlink_to(photos / "blue square")
    for dataset in SPLIT_FILES:
        if dataset.name in ("EuroSAT", "DescribableTextures"):
            split_file_tree(tmp_path / "data", dataset, classes=2, images=4)
    commands = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    assert len(commands) == 8
    for line in commands:
        program, *arguments = shlex.split(line)
        small = {
            "train": ["--epochs=1", "--warmup_epochs=0", "--shots=1"],
            "protocol": ["--epochs=1", "--warmup_epochs=0", "--shots=1", "--seeds=[1]"],
        }
        if arguments[0] == "protocol":
            arguments.append("--backbone=bundled")  # no download in a test
        if arguments[0] == "report":
            shutil.copytree("runs/b2n", "runs/b2n-seed-4")
        call = cdc_command if arguments[0] == "report" else cdc
        status, _, err = call(*arguments, *small.get(arguments[0], []))
        assert program == "cdc" and status == 0, (line, err)
    assert (tmp_path / "runs/answers/part-00000.parquet").is_file() and (tmp_path / "runs/b2n/table.tex").is_file()


def test_the_pages_tables():
    assert re.findall(r"^\| `cdc protocol ([a-z-]+)`", PAGE, re.M) == list(PROTOCOL_COMMANDS)
    written = PAGE.split("## What `cdc predict` writes")[1].split("## Protocols")[0]
    assert re.findall(r"^\| ([a-z_]+) \|", written, re.M) == ["column", *COLUMNS]
    assert all(f"cdc {command}" in PAGE for command in COMMANDS)
