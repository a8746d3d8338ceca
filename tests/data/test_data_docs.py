"""What docs/datasets.md shows runs, and what it says of the datasets is so."""

import re
from pathlib import Path

import pytest
from trees import picture

from cdc_models.data import BASE_TO_NEW, IMAGENET_VARIANTS
from cdc_models.data.open_image import REASONS

PAGE = (Path(__file__).parents[2] / "docs/datasets.md").read_text()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_the_pages_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, colour in (("red square", (220, 30, 30)), ("green square", (30, 220, 30))):
        for i in range(8):
            picture(tmp_path / "my_photos" / name / f"{i}.png", colour, (50, 50))
    (tmp_path / "my_photos/red square/0.png").write_bytes(b"no image")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(code, {})
    assert re.search(
        r"(0|1)\.\d+ (1 of 14 images skipped: 1 not an image|all 14 images can be read)", capsys.readouterr().out
    )


def test_the_pages_tables():
    for dataset in BASE_TO_NEW + IMAGENET_VARIANTS:
        (row,) = re.findall(rf"^\| {dataset.name}\b.*", PAGE, re.M)
        assert f"`{dataset.folder}`" in row
        for need in ("images", "file", "test", "train"):
            part = getattr(dataset.layout, need, None)
            assert not part or f"`{part}" in row, (dataset.name, part)
        assert all(f"`{name}/`" in row for name in getattr(dataset.layout, "folders", ()))
    listed = re.findall(r"^\| ([a-z ]+) \| .*", PAGE.split("## Images that cannot be read")[1], re.M)
    assert listed == ["reason", *REASONS]
