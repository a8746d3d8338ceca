"""What several rooms of the tests share."""

import json
import os
import warnings

import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports Triton: the kernels' tests run in its CPU interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from trees import SPLIT_FILES, SYNSETS, imagenet_tree, split_file_tree, variant_tree

from cdc_models.clip import ClipBackbone, load_clip
from cdc_models.clip.sources import build_network
from cdc_models.clip.tokenizer import cut_tokenizer

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 1514, "width": 32, "heads": 2, "layers": 3},
}
SMALL_PROTOCOL = (
    "--backbone=bundled",
    "--methods=[zero_shot,coop]",
    "--settings={}",
    "--seeds=[1,2]",
    "--shots=2",
    "--epochs=1",
    "--warmup_epochs=0",
)
CLASSES = ("red square", "green square", "blue square")


def make_small_backbone(seed: int = 0) -> ClipBackbone:
    torch.manual_seed(seed)
    return ClipBackbone(build_network(SMALL), name="small", make_tokenizer=lambda: cut_tokenizer(1000, 20))


@pytest.fixture(scope="session")
def backbone():
    """A random CLIP of a few thousand parameters; frozen, so tests may share it."""
    return make_small_backbone()


@pytest.fixture(scope="session")
def other_backbone():
    """The same architecture with other weights."""
    return make_small_backbone(seed=1)


@pytest.fixture(scope="session")
def bundled():
    return load_clip("bundled")


@pytest.fixture
def coloured():
    """Noisy coloured squares, 3 classes: learnable in a few steps by anything that learns at all."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(24) % 3
    colours = 2 * torch.eye(3)[targets]
    images = colours[:, :, None, None] + 0.3 * torch.randn(24, 3, 32, 32, generator=generator)
    return images, targets


# -- the commands: small data, one trained adapter, and a way to call them

PHOTOS = {"red square": (220, 30, 30), "green square": (30, 220, 30), "blue square": (30, 30, 220)}


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three folders of ten coloured pictures, one of which is none."""
    from trees import picture

    root = tmp_path_factory.mktemp("data") / "photos"
    for name, colour in PHOTOS.items():
        for i in range(10):
            picture(root / name / f"{i}.png", tuple(max(0, part - 5 * i) for part in colour), (50, 50))
    (root / "red square/0.png").write_bytes(b"no picture")
    return root


@pytest.fixture
def cdc_command(capsys):
    """Runs a command: (exit status, stdout, stderr)."""
    from cdc_models.cli import main

    def call(*arguments):
        try:
            main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture
def cdc(cdc_command):
    """The same for a command that reads images, and reads them itself."""
    return lambda *arguments: cdc_command(*arguments, "--workers=0")


@pytest.fixture
def cdc_json(cdc):
    """Runs a command with --json: what it printed, which is one JSON object."""

    def call(*arguments):
        status, out, err = cdc(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    return call


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory):
    """The folder of a short run of `cdc train`."""
    from cdc_models.cli import main

    out = tmp_path_factory.mktemp("run") / "cdc"
    small = ["--shots=4", "--epochs=2", "--options.n_templates=2", "--options.views=[none,grey]"]
    main(["train", f"--data={photos}", "--backbone=bundled", *small, f"--out={out}", "--workers=0", "--quiet"])
    return out


@pytest.fixture(scope="session")
def published_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    for dataset in SPLIT_FILES:
        if dataset.name in ("EuroSAT", "DescribableTextures"):
            split_file_tree(root, dataset, classes=4, images=6)
    imagenet_tree(root)
    variant_tree(root, "ImageNetR", sorted(SYNSETS)[:2])
    return root


@pytest.fixture(scope="session")
def protocol_run(published_root, tmp_path_factory):
    """A folder with a finished base-to-new run."""
    from cdc_models.cli import main

    out = tmp_path_factory.mktemp("protocol") / "run"
    data = [f"--root={published_root}", "--datasets=[eurosat,DTD]"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*figures will not compare with published ones")
        main(["protocol", "base-to-new", *SMALL_PROTOCOL, *data, f"--out={out}", "--workers=0", "--quiet"])
    return out
