"""`cdc protocol` end to end on small trees in the published layouts: rows, tables, going on, errors."""

import json
import re
import shutil
from statistics import stdev

import pytest
import torch
import yaml
from conftest import SMALL_PROTOCOL as SMALL

from cdc_models.data import harmonic_mean
from cdc_models.methods import CoOp
from cdc_models.provenance import peak_memory, restart_peak_memory

pytestmark = pytest.mark.filterwarnings("ignore:.*figures will not compare with published ones")


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_base_to_new_rows(protocol_run):
    rows = results(protocol_run)
    assert len(rows) == 2 * 2 * 2 * 2  # datasets, methods, seeds, halves
    for row in rows:
        assert row["dataset"] in ("EuroSAT", "DescribableTextures") and row["split"] in ("base", "new")
        assert row["protocol"] == "base-to-new" and row["shots"] == 2 and row["images"] == 2
        assert (
            0 <= row["ece"] <= 1 and 0 <= row["uncertainty_wrong" if row["accuracy"] < 1 else "uncertainty_right"] <= 1
        )
        assert (row["unknown_auroc"] is None) == (row["split"] == "new")
        assert row["calibrated_accuracy"] == row["accuracy"] and row["peak_memory_bytes"] > 10**7
        assert row["versions"]["torch"] and row["learned"] == (512 if row["method"] == "coop" else 0)
        assert (row["seconds_train"] > 0) == (row["method"] == "coop") and row["train_images"] == 4
        other = next(r for r in rows if r["split"] != row["split"] and same(r, row))
        assert row["H"] == harmonic_mean(row["accuracy"], other["accuracy"])
    commits = {row["commit"] for row in rows}
    assert len(commits) == 1 and all(c is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", c) for c in commits)


def same(one, other):
    return all(one[name] == other[name] for name in ("dataset", "method", "seed", "shots"))


def test_base_to_new_tables(protocol_run):
    summary = json.loads((protocol_run / "summary.json").read_text())["cells"]
    rows = results(protocol_run)
    cell = next(c for c in summary if (c["dataset"], c["method"], c["figure"]) == ("EuroSAT", "coop", "base"))
    values = [
        100 * r["accuracy"] for r in rows if (r["dataset"], r["method"], r["split"]) == ("EuroSAT", "coop", "base")
    ]
    assert cell["mean"] == sum(values) / 2 and cell["std"] == stdev(values) and cell["seeds"] == [1, 2]
    for name in ("table.md", "table.tex"):
        text = (protocol_run / name).read_text()
        assert "DescribableTextures" in text and "average" in text and "calibrated ECE" in text
    settings = yaml.safe_load((protocol_run / "config.yaml").read_text())
    assert settings["momentum"] == 0.9 and settings["seeds"] == [1, 2] and settings["backbone"] == "bundled"


def test_it_goes_on_where_it_stopped(protocol_run, published_root, cdc, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(protocol_run, out)
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:-1]) + lines[-1][:50])  # killed within the last line
    loss, calls = CoOp.objective, []
    monkeypatch.setattr(CoOp, "objective", lambda self, *a: calls.append(1) or loss(self, *a))
    data = [f"--root={published_root}", "--datasets=[eurosat,DTD]"]
    assert cdc("protocol", "base-to-new", *SMALL, *data, f"--out={out}")[0] == 0
    again = {
        row["key"]: row for row in map(json.loads, filter(whole, (out / "results.jsonl").read_text().splitlines()))
    }
    for row in map(json.loads, lines):
        assert again[row["key"]]["accuracy"] == row["accuracy"] and again[row["key"]]["brier"] == row["brier"]
    assert not calls  # its adapter was there

    # one more seed: only that is trained; one and the same table
    assert cdc("protocol", "base-to-new", *SMALL, *data, f"--out={out}", "--seeds=[1,2,3]")[0] == 0
    assert len(calls) == 2  # one step for each of two datasets
    assert "seeds 1, 2, 3" in (out / "table.md").read_text()


def whole(line):
    return line.endswith("}")


def test_ctrl_c_within_a_training(published_root, cdc, tmp_path, monkeypatch):
    loss, calls = CoOp.objective, []

    def interrupt_the_second(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    monkeypatch.setattr(CoOp, "objective", interrupt_the_second)
    arguments = (
        "protocol",
        "base-to-new",
        *SMALL,
        f"--root={published_root}",
        "--datasets=[eurosat]",
        f"--out={tmp_path}",
    )
    status, out, err = cdc(*arguments)
    assert status == 130 and "the same command goes on from there" in err and "Traceback" not in err
    assert len(results(tmp_path)) == 6 and out == ""  # seed 1 is whole, of seed 2 zero-shot
    monkeypatch.setattr(CoOp, "objective", loss)
    assert cdc(*arguments)[0] == 0 and len(results(tmp_path)) == 8
    assert not list((tmp_path / "adapters").glob("*.checkpoint"))


def test_few_shot(published_root, cdc_json, tmp_path):
    arguments = (
        *SMALL,
        f"--root={published_root}",
        "--datasets=[eurosat]",
        "--shots=[1,2]",
        "--seeds=[1]",
        f"--out={tmp_path}",
    )
    said = cdc_json("protocol", "few-shot", *arguments)
    tests = [c for c in said["cells"] if c["figure"] == "test"]
    assert [(c["method"], c["shots"]) for c in tests] == [("zero_shot", 1), ("coop", 1), ("zero_shot", 2), ("coop", 2)]
    assert all(c["std"] is None and c["seeds"] == [1] for c in tests)
    assert "2 shots test" in (tmp_path / "table.md").read_text()
    assert {(row["split"], row["images"], row["H"]) for row in results(tmp_path)} == {("test", 4, None)}


def test_transfer_from_one_training_to_many_test_sets(published_root, cdc_json, tmp_path, monkeypatch):
    loss, calls = CoOp.objective, []
    monkeypatch.setattr(CoOp, "objective", lambda self, *a: calls.append(1) or loss(self, *a))
    small = (*SMALL, f"--root={published_root}", "--seeds=[1]")
    said = cdc_json("protocol", "cross-dataset", *small, "--datasets=[eurosat,DTD]", f"--out={tmp_path / 'cross'}")
    assert len(calls) == 2  # eight images in batches of four, once
    means = {(c["dataset"], c["method"]): c["mean"] for c in said["cells"] if c["figure"] == "test"}
    assert len(means) == 2 * 4 and next(iter(means)) == ("ImageNet", "zero_shot")
    for method in ("zero_shot", "coop"):  # the source has no part in the average
        both = [means[dataset, method] for dataset in ("EuroSAT", "DescribableTextures")]
        assert means["average", method] == sum(both) / 2
    said = cdc_json("protocol", "domain-generalisation", *small, "--datasets=[ImageNetR]", f"--out={tmp_path / 'dg'}")
    assert [c["dataset"] for c in said["cells"] if c["figure"] == "test"] == ["ImageNet"] * 2 + ["ImageNetR"] * 2


def test_zero_shot_takes_the_template_of_what_it_is_tested_on(published_root, cdc_json, tmp_path):
    arguments = ("--backbone=bundled", "--methods=[zero_shot]", f"--root={published_root}", "--seeds=[1]", "--shots=1")
    cdc_json("protocol", "cross-dataset", *arguments, "--datasets=[eurosat]", f"--out={tmp_path}", "--settings={}")
    (row,) = (row for row in results(tmp_path) if row["dataset"] == "EuroSAT")
    said = cdc_json("evaluate", "--data=EuroSAT", f"--root={published_root}", "--backbone=bundled")
    assert row["brier"] == said["brier"]


def test_ones_own_folder_even_by_the_name_of_a_papers_dataset(photos, cdc_json, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EuroSAT").symlink_to(photos)
    arguments = ("--backbone=bundled", "--methods=[zero_shot]", "--settings={}", "--seeds=[1]", "--shots=1")
    said = cdc_json("protocol", "few-shot", *arguments, "--datasets=[./EuroSAT]", f"--out={tmp_path / 'out'}")
    assert {c["dataset"] for c in said["cells"]} == {"./EuroSAT"} and results(tmp_path / "out")[0]["images"] == 6


def test_a_row_with_options_of_its_own(published_root, cdc_json, tmp_path):
    settings = json.dumps({"long CoOp": {"method": "coop", "options": {"n_ctx": 3}, "lr": 0.01}})
    arguments = ("--backbone=bundled", "--methods=[long CoOp]", f"--settings={settings}", "--seeds=[1]", "--shots=1")
    cdc_json("protocol", "base-to-new", *arguments, f"--root={published_root}", "--datasets=[dtd]", f"--out={tmp_path}")
    rows = results(tmp_path)
    assert {row["method"] for row in rows} == {"long CoOp"} and rows[0]["learned"] == 3 * 128
    assert rows[0]["recipe"]["training"]["lr"] == 0.01 and rows[0]["recipe"]["training"]["epochs"] == 5


def test_the_published_settings_are_the_defaults(cdc):
    for protocol, expected in {
        "base-to-new": ["default: 0.0035)", "(type: int, default: 5)", "default: (1, 2, 3))", "{'coop': {'epochs': 50"],
        "few-shot": ["default: (1, 2, 4, 8, 16))", "'n_ctx': 16"],
        "cross-dataset": ["default: 0.0026)", "(type: int, default: 2)", "'maple': {'options': {'depth': 3}}"],
        "domain-generalisation": ["default: 0.0026)", "'ImageNetV2', 'ImageNetSketch', 'ImageNetA', 'ImageNetR'"],
    }.items():
        status, out, _ = cdc("protocol", protocol, "--help")
        text = " ".join(out.split())
        assert status == 0 and all(part in text for part in expected), protocol


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--datasets=[UCF101]"], "split_zhou_UCF101.json"),
        (["--methods=[lora]"], "'lora' is none of"),
        (["--methods=[coop,coop]"], "distinct"),
        (["--settings={mapl: {}}"], "['mapl'] are not among the methods"),
        (["--settings={coop: {epoch: 1}}"], "'epoch'"),
        (["--seeds=[]"], "seeds"),
        (["--seeds=[1,1]"], "seeds"),
        (["--shots=0"], "shots"),
    ],
)
def test_errors_are_one_sentence(arguments, message, published_root, cdc, tmp_path):
    given = (
        "--backbone=bundled",
        f"--root={published_root}",
        "--datasets=[eurosat]",
        f"--out={tmp_path / 'x'}",
        *arguments,
    )
    status, out, err = cdc("protocol", "base-to-new", *given)
    assert (status, out) == (2, "") and message in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_what_somebody_has_damaged_is_made_again_or_told(published_root, protocol_run, cdc, tmp_path):
    arguments = ("protocol", "base-to-new", *SMALL, f"--root={published_root}", "--datasets=[eurosat,DTD]")
    whole = tmp_path / "run"
    shutil.copytree(protocol_run, whole)
    results = whole / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    rows[0]["accuracy"], rows[1]["skipped_images"] = "high", None
    results.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[" * 100_000 + "\n" + "1" * 5_000 + "\n")
    status, _, err = cdc(*arguments, f"--out={whole}")
    assert status == 0, err
    assert (whole / "table.md").read_text() == (protocol_run / "table.md").read_text()
    results.unlink()
    adapter = next((whole / "adapters").glob("*.safetensors"))
    adapter.write_bytes(adapter.read_bytes()[:-8])
    status, _, err = cdc(*arguments, f"--out={whole}")
    assert status == 2 and str(adapter) in err and "delete it to have it trained again" in err


def test_the_memory_of_a_row_is_its_own(published_root, tmp_path, cdc_json):
    if not restart_peak_memory():
        pytest.skip("this system's high-water mark cannot be restarted")
    held = torch.ones(2**30 // 4)  # far more than a row and pages of a long test run that come back meanwhile
    del held
    before = peak_memory()
    data = ["--root", str(published_root), f"--out={tmp_path / 'run'}", "--datasets=[eurosat]"]
    cdc_json("protocol", "base-to-new", *SMALL, *data)
    assert all(row["peak_memory_bytes"] < before - 2**28 for row in results(tmp_path / "run"))
