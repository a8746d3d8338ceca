"""The README's code runs as it stands, on pictures of the bundled benchmark and the bundled CLIP."""

import csv
import re
import shlex
from pathlib import Path

from pyarrow import parquet

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_researchers_lines(capsys):
    exec(BLOCKS[0], {})
    assert capsys.readouterr().out == "torch.Size([8, 100]) torch.Size([8]) torch.Size([8])\n"


def test_the_engineers_commands_and_lines(tmp_path, monkeypatch, cdc_command):
    monkeypatch.chdir(tmp_path)
    [commands] = re.findall(r"```console\n(.*?)```", README, re.S)
    small = {"sample": ["--classes=3", "--images=6"], "train": ["--epochs=1", "--warmup_epochs=0", "--shots=1"]}
    for line in commands.splitlines():
        program, command, *arguments = shlex.split(line, comments=True)
        own = [] if command == "sample" else ["--workers=0"]
        status, out, err = cdc_command(command, *arguments, *small.get(command, []), *own)
        assert program == "cdc" and status == 0 and out, (line, err)
    rows = parquet.read_table("runs/answers/part-00000.parquet").to_pylist()
    assert len(rows) == 12 and all(0 <= row["uncertainty"] <= 1 for row in rows)
    truth = list(csv.DictReader(Path("photos/truth.csv").read_text().splitlines()))
    assert [row["path"] for row in truth] == [Path(row["path"]).name for row in rows]
    known = {row["label"] for row in truth if row["known"] == "True"}
    assert known == {path.name for path in Path("photos/labelled").iterdir()}
    assert len({row["label"] for row in truth} - known) == 3

    lines = BLOCKS[1].replace('load_clip("ViT-B-16-quickgelu", "openai")', 'load_clip("bundled")')
    assert lines != BLOCKS[1] and len(lines.split("\n\n")[1].splitlines()) == 5
    names: dict = {}
    exec(lines, names)
    said = names["said"]
    assert set(said.labels()) <= known and said.prob.shape == (8, 3) and said.uncertainty.shape == (8,)
