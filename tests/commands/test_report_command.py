"""`cdc report`: the tables of finished runs again, of several folders together, and what it refuses."""

import json
import shutil

import pytest
from rich.console import Console

from cdc_models.console_table import ConsoleTable
from cdc_models.demo import demo

TABLES = ("summary.json", "table.md", "table.tex")


def lines_of(folder):
    return (folder / "results.jsonl").read_text().splitlines(keepends=True)


def folder_of(path, lines):
    path.mkdir()
    (path / "results.jsonl").write_text("".join(lines))
    return path


def test_a_protocols_tables_again(protocol_run, tmp_path, cdc_command):
    made = {name: (protocol_run / name).read_text() for name in TABLES}
    again = folder_of(tmp_path / "again", lines_of(protocol_run))
    status, out, err = cdc_command("report", f"--runs=[{again}]")
    assert status == 0 and "EuroSAT" in out, err
    assert {name: (again / name).read_text() for name in TABLES} == made


def test_seeds_of_two_folders_are_put_together(protocol_run, tmp_path, cdc_command):
    lines = lines_of(protocol_run)
    parts = [[x for x in lines if json.loads(x)["seed"] == seed] for seed in (1, 2)]
    folders = [folder_of(tmp_path / str(i), part + lines[:1]) for i, part in enumerate(parts)]  # one row in both
    status, out, _ = cdc_command(
        "report", f"--runs=[{folders[0]},{folders[1]}]", f"--out={tmp_path / 'both'}", "--json"
    )
    assert status == 0
    whole = {tuple(c[k] for k in ("dataset", "method", "figure")): c for c in json.loads(out)["cells"]}
    for cell in json.loads((protocol_run / "summary.json").read_text())["cells"]:
        again = whole[tuple(cell[k] for k in ("dataset", "method", "figure"))]
        assert again["seeds"] == [1, 2] and again["mean"] == pytest.approx(cell["mean"])


def test_a_demo_again(tmp_path, cdc_command, capsys):
    out = tmp_path / "demo"
    summary = demo(out, splits=1, shots=1, workers=1, methods=["zero-shot", "CoOp"])
    capsys.readouterr()
    table = (out / "table.md").read_text()
    for name in ("table.md", "accuracy.png", "coverage.png", "reliability.png"):
        (out / name).unlink()
    status, said, err = cdc_command("report", f"--runs=[{out}]", "--json")
    assert status == 0, err
    again = json.loads(said)
    assert again["rows"] == summary["rows"] and again["rows"]["CoOp"]["H_std"] is None  # a single run
    assert again["date"] == summary["date"] and again["title"] == summary["title"]
    assert (out / "table.md").read_text() == table and (out / "coverage.png").stat().st_size > 10_000


@pytest.mark.parametrize("width", [40, 80, 100, 132, 200])
def test_cells_are_whole_at_any_width(width, capsys):
    head = ["method", "base", "H − zero-shot", *(f"AUROC {i}" for i in range(9))]
    body = [
        [label, "74.0 ± 1.4", "+1.2 ± 1.5", *(f"{i}{k}.5" for i in range(9))]
        for k, label in enumerate(["CDC", "no trusted classification"])
    ]
    Console(width=width).print(ConsoleTable("all of it", head, body))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width for line in lines) and "…" not in "".join(lines)
    for label, *cells in body:
        own = [line for line in lines if line.startswith(f"{label}  ")]
        assert " ".join(own).replace(label, "").split() == " ".join(cells).split()
    assert (sum(line.startswith("method") for line in lines) == 1) == (width >= 122)


def test_what_is_refused(protocol_run, tmp_path, cdc_command):
    lines = lines_of(protocol_run)

    row = json.loads(lines[0])

    def edited(name, **changes):
        return folder_of(
            tmp_path / name,
            [*lines, json.dumps({**row, "key": json.dumps([*json.loads(row["key"]), name]), **changes}) + "\n"],
        )

    def alone(name, **row):
        return folder_of(tmp_path / name, [json.dumps({"key": "a", **row}) + "\n"])

    shutil.copytree(protocol_run, tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    other = json.loads(row["key"])
    other[1] = "another hash"
    for arguments, message in (
        ([f"--runs=[{tmp_path / 'nowhere'}]"], "results.jsonl is not there"),
        ([f"--runs=[{tmp_path / 'empty'}]"], "results.jsonl is not there"),
        (["--runs=[]"], "at least one folder"),
        ([f"--runs=[{protocol_run},{tmp_path / 'copy'}]"], "out: expected a folder"),
        ([f"--runs=[{folder_of(tmp_path / 'damaged', ['not JSON'])}]"], "holds no results"),
        ([f"--runs=[{edited('protocol', protocol='few-shot')}]"], "one protocol, got base-to-new, few-shot"),
        ([f"--runs=[{edited('clip', key=json.dumps(other))}]"], "one CLIP"),
        ([f"--runs=[{edited('key', key='no JSON')}]"], "as cdc writes them"),
        ([f"--runs=[{edited('recipe', recipe={'method': 'x'})}]"], "stands for"),
        ([f"--runs=[{alone('bare', protocol='few-shot')}]"], "as cdc protocol writes them"),
        ([f"--runs=[{alone('other', protocol='zero')}]"], "'zero'"),
        ([f"--runs=[{edited('text', accuracy='high')}]"], "got 1 others"),
        ([f"--runs=[{edited('nan', accuracy=float('nan'))}]"], "got 1 others"),
        ([f"--runs=[{edited('seed', seed=[1])}]"], "got 1 others"),
        ([f"--runs=[{edited('images', skipped_images=[5])}]"], "got 1 others"),
        ([f"--runs=[{edited('kind', protocol=[1])}]"], "one protocol"),
        ([f"--runs=[{alone('demo')}]"], "none with all figures"),
    ):
        status, out, err = cdc_command("report", *arguments)
        assert status == 2 and message in " ".join(err.split()) and not out, (arguments, err)
