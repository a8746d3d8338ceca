"""Finished runs that several tests of commands look at."""

import warnings

import pytest
from trees import SPLIT_FILES, SYNSETS, imagenet_tree, split_file_tree, variant_tree


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    for dataset in SPLIT_FILES:
        if dataset.name in ("EuroSAT", "DescribableTextures"):
            split_file_tree(root, dataset, classes=4, images=6)
    imagenet_tree(root)
    variant_tree(root, "ImageNetR", sorted(SYNSETS)[:2])
    return root


@pytest.fixture(scope="session")
def finished(root, tmp_path_factory):
    """A folder with a finished base-to-new run."""
    from cdc_models.cli import main

    out = tmp_path_factory.mktemp("protocol") / "run"
    data = [f"--root={root}", "--datasets=[eurosat,DTD]"]
    run = (
        "--backbone=bundled",
        "--methods=[zero_shot,coop]",
        "--settings={}",
        "--seeds=[1,2]",
        "--shots=2",
        "--epochs=1",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*figures will not compare with published ones")
        main(["protocol", "base-to-new", *run, *data, f"--out={out}", "--workers=0", "--quiet"])
    return out
