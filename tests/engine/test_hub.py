"""Adapters in a model hub repository, which here is a folder: what is sent, what comes back, what goes wrong."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import yaml
from conftest import make_small_backbone
from huggingface_hub.errors import BadRequestError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from cdc_models import CDC, ZeroShot, load_adapter, push_adapter
from cdc_models.engine import adapter_info
from cdc_models.engine.adapters import AdapterError

CLASSES = ["red", "green", "blue | `x`"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of folders owner/name; what it was asked, in order."""
    asked = []

    class Api:
        def __init__(self, token=None):
            asked.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            full = repo_id if "/" in repo_id else f"me/{repo_id}"
            (tmp_path / full).mkdir(parents=True, exist_ok=exist_ok)
            asked.append(("create", full, private))
            return SimpleNamespace(repo_id=full)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            asked.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, *, revision):
        asked.append(("download", repo_id, filename, revision))
        if repo_id.count("/") != 1:
            raise HFValidationError("Repo id must be in the form 'namespace/repo_name'")
        if not (tmp_path / repo_id / filename).exists():
            raise LocalEntryNotFoundError("not there\nand a second line")
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(folder=tmp_path, asked=asked)


def test_there_and_back(hub, backbone, coloured):
    model = CDC(backbone, CLASSES, depth=2, seed=1)
    address = push_adapter(model, "mine", {"epochs": 3}, private=True, token="secret")
    assert address == "hf-hub:me/mine"
    assert hub.asked == [
        ("token", "secret"),
        ("create", "me/mine", True),
        ("token", "secret"),
        ("upload", "me/mine", ["README.md", "adapter.safetensors"]),
    ]
    again = load_adapter(address, backbone)
    assert torch.equal(again.predict(coloured[0]).prob, model.predict(coloured[0]).prob)
    assert hub.asked[-1] == ("download", "me/mine", "adapter.safetensors", None)
    elsewhere = load_adapter(f"{address}@v1", backbone, ["spoon", "fork"])
    assert elsewhere.class_names == ("spoon", "fork") and hub.asked[-1][3] == "v1"
    info = adapter_info(address)
    assert info["method"] == "cdc" and info["summary"] == {"epochs": 3}
    assert push_adapter(model, "me/mine") == address  # once more, into the same place


def test_the_card(hub, backbone):
    push_adapter(CDC(backbone, CLASSES, depth=2), "me/mine", {"accuracy": 0.5})
    card = (hub.folder / "me/mine/README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "cdc-ops" and "cdc" in front["tags"]
    for text in ("hf-hub:me/mine", backbone.fingerprint[:16], '"blue | `x`"', '"n_templates": 4', '"accuracy": 0.5'):
        assert text in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    compile(code, "card", "exec")
    assert 'load_clip("small")' in code
    push_adapter(ZeroShot(backbone, [f"thing {i}" for i in range(101)]), "me/many")
    card = (hub.folder / "me/many/README.md").read_text()
    assert "The first 100 of 101:" in card and "thing 99" in card and "thing 100" not in card


def test_paths_of_this_machine_are_not_sent_and_odd_names_break_no_page(hub):
    backbone = make_small_backbone()
    backbone.name, backbone.pretrained = "my | `CLIP`", "/home/someone/secret/we|ights``.pt"
    names = ["a\n# heading", "</pre><b>", "| `x`"]
    address = push_adapter(CDC(backbone, names, depth=2, hand_crafted="a `{}` | *photo*\n---"), "me/mine")
    card = (hub.folder / "me/mine/README.md").read_text()
    assert "someone" not in card and b"someone" not in (hub.folder / "me/mine/adapter.safetensors").read_bytes()
    assert adapter_info(address)["backbone"]["pretrained"] == "we|ights``.pt"
    (row,) = (line for line in card.splitlines() if line.startswith("| backbone"))
    assert row == r"| backbone | `` my \| `CLIP` ``, weights ``` we\|ights``.pt ``` |"
    for text in (json.dumps(names), r"a `{}` | *photo*\n---"):  # in blocks of code, each on one line
        (line,) = (line for line in card.splitlines() if text in line)
        assert line.startswith("    ")


def test_what_goes_wrong(hub, backbone, other_backbone):
    with pytest.raises(
        OSError, match=r"^hf-hub:me/none: adapter.safetensors cannot be downloaded: not there and a second line$"
    ):
        load_adapter("hf-hub:me/none", backbone)
    with pytest.raises(ValueError, match="hf-hub:a/b/c: adapter.safetensors cannot be downloaded: Repo id must be"):
        adapter_info("hf-hub:a/b/c")
    address = push_adapter(CDC(backbone, CLASSES, depth=2), "me/mine")
    with pytest.raises(AdapterError, match="was trained on small"):
        load_adapter(address, other_backbone)
    (hub.folder / "me/mine/adapter.safetensors").write_bytes(b"changed on the way")
    with pytest.raises(AdapterError, match="not a readable safetensors"):
        load_adapter(address, backbone)


class NoAnswer(Exception):
    """As the errors of an HTTP client, of no kind that others share."""


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (NoAnswer("connection refused\n\nby peer"), OSError, "connection refused by peer"),
        (NoAnswer(), OSError, "NoAnswer"),
        (RepositoryNotFoundError("401 Client Error", response=Mock()), OSError, "401 Client Error"),
        (BadRequestError("400 Bad Request", response=Mock()), OSError, "400 Bad Request"),
        (HFValidationError("no such name"), ValueError, "no such name"),
    ],
)
def test_what_the_hub_says_is_passed_on_in_a_sentence(error, kind, told, backbone, monkeypatch, cdc_command):
    def fail(*_, **__):
        raise error

    model = ZeroShot(backbone, CLASSES)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(kind, match=f"^hf-hub:me/a@v1: adapter.safetensors cannot be downloaded: {told}"):
        load_adapter("hf-hub:me/a@v1", backbone)
    with pytest.raises(kind, match=f"^hf-hub:me/a: the repository cannot be made: {told}"):
        push_adapter(model, "me/a")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/a"))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fail)
    with pytest.raises(kind, match=f"^hf-hub:me/a: the adapter cannot be uploaded: {told}"):
        push_adapter(model, "me/a")
    status, out, err = cdc_command("predict", "--images=x", "--adapter=hf-hub:me/a")
    assert (status, out) == (1 if kind is OSError else 2, "") and err.startswith("cdc: hf-hub:me/a: adapter")
    assert err.count("\n") == 1


def test_without_the_package(backbone, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'cdc-ops\[hub\]'"):
        load_adapter("hf-hub:me/mine", backbone)


def test_the_command_takes_an_address(hub, bundled, photos, cdc_json, tmp_path):
    address = push_adapter(CDC(bundled, ["red square", "blue square"], depth=2), "me/photos")
    said = cdc_json(
        "predict", f"--images={photos / 'blue square'}", f"--adapter={address}", f"--out={tmp_path / 'out'}"
    )
    assert said["images"] == 10 and said["method"] == "cdc"


def test_examples_in_docstrings():
    import doctest
    import importlib

    for name in ("cdc_models.engine.hub", "cdc_models.processes"):
        result = doctest.testmod(importlib.import_module(name))
        assert result.attempted > 0 and result.failed == 0
