"""The rule between the two paths, and how to override it."""

import pytest
import torch

pytest.importorskip("triton")

from cdc_kernels import configs

S1, S2, S3, S4 = (256, 4, 1000, 512), (1024, 4, 21841, 512), (512, 8, 100000, 768), (4, 4, 50, 512)
bf16 = torch.bfloat16


@pytest.mark.parametrize(
    ("direction", "sizes", "dtype", "expected"),
    [
        ("forward", S2, bf16, "tiles"),  # the workspace costs more than the products it makes faster
        ("forward", S3, bf16, "tiles"),
        ("forward", S4, bf16, "tiles"),  # launches
        ("backward", S4, bf16, "tiles"),
        ("backward", S2, bf16, "chunks"),  # every slice of features makes the logits again
        ("backward", S3, bf16, "chunks"),
        ("backward", (1024, 4, 21841, 128), bf16, "tiles"),  # one slice
        ("forward", (1024, 4, 21841, 2048), torch.float32, "chunks"),  # no tensor cores: products are what counts
        ("backward", S2, torch.float32, "chunks"),
        ("backward", (32, 4, 21841, 512), torch.float16, "tiles"),  # chunks of few images are mostly text
    ],
)
def test_the_rule(direction, sizes, dtype, expected):
    assert configs.path(direction, *sizes, dtype) == expected


def test_nothing_takes_some_time_too():
    for direction, sides in (("forward", 2), ("backward", 2), ("backward", 0)):
        for each in configs.PATHS:
            assert 0 < configs.seconds(each, direction, 0, 1, 5, 8, bf16, sides, again=False) < 1e-3


def test_the_rule_asks_no_device_and_is_monotonic_in_d():
    chosen = [configs.path("backward", 1024, 4, 21841, D, bf16) for D in range(64, 2048, 64)]
    assert chosen == sorted(chosen, reverse=True) and set(chosen) == set(configs.PATHS)


def test_a_loss_without_fused_opinion_makes_fewer_products_along_tiles():
    with_it, without = (
        {each: configs.seconds(each, "backward", 8192, 1, 100000, 768, bf16, again=again) for each in configs.PATHS}
        for again in (True, False)
    )
    # of 2 * 6 slices, 2 sides and the fused opinion itself
    assert 13 / 15 < without["tiles"] / with_it["tiles"] < 1
    assert without["chunks"] == with_it["chunks"]


def test_rocm_keeps_to_tiles_for_16_bits(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert configs.path("backward", *S3, bf16) == "tiles"


def test_forced():
    assert configs.path("forward", *S1, bf16) == "tiles"
    with configs.force_path("chunks"):
        assert configs.path("forward", *S1, bf16) == "chunks"
        with configs.force_path(None):
            assert configs.path("forward", *S1, bf16) == "tiles"
        assert configs.path("forward", *S1, bf16) == "chunks"
    assert configs.path("forward", *S1, bf16) == "tiles"
    with pytest.raises(ValueError, match="path must be 'tiles', 'chunks' or None; got 'blas'"):
        configs.force_path("blas")
