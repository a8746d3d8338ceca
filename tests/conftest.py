"""What several rooms of the tests share."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports Triton: the kernels' tests run in its CPU interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cdc_models.clip import ClipBackbone, load_clip
from cdc_models.clip.sources import build_network
from cdc_models.clip.tokenizer import cut_tokenizer

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 1514, "width": 32, "heads": 2, "layers": 3},
}
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
