"""The README's code runs as it stands, on photographs of one's own and the bundled CLIP."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_researchers_lines(capsys):
    exec(BLOCKS[0], {})
    assert capsys.readouterr().out == "torch.Size([8, 100]) torch.Size([8]) torch.Size([8])\n"


def test_the_engineers_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("dog", "teapot"):
        (tmp_path / "my_photos" / name).mkdir(parents=True)
        for i in range(3):
            noise = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "my_photos" / name / f"{i}.jpg")
    lines = BLOCKS[1].replace('load_clip("ViT-B-16-quickgelu", "openai")', 'load_clip("bundled")')
    assert lines != BLOCKS[1]
    names: dict = {}
    exec(lines, names)
    assert (tmp_path / "my_photos.safetensors").stat().st_size < 3e6
    said = names["said"]
    assert set(said.labels()) <= {"dog", "teapot"} and said.prob.shape == (6, 2) and said.uncertainty.shape == (6,)
