"""The image tower against open_clip's own encode_image and against prompts appended one after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tower_reference import VARIANTS, VISION, assert_close, full_image, small_backbone

from cdc_models.clip import UnsupportedBackboneError, encode_prompted_image, image_tower
from cdc_models.clip.blocks import run_block

SIZE, WIDTH = VISION["image_size"], VISION["width"]


def draw(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_prompts_give_open_clips_features(variant):
    backbone = small_backbone(variant)
    images = draw((3, 3, SIZE, SIZE))
    ours = encode_prompted_image(backbone, images, torch.zeros(2, 0, WIDTH))
    assert_close(ours, backbone.clip.encode_image(images)[:, None].expand(-1, 2, -1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_prompt", [False, True])
def test_prompts_and_their_gradients_match_the_long_way(variant, dtype, per_prompt):
    backbone = small_backbone(variant, dtype=dtype)
    images = draw((2, 3, 3, SIZE, SIZE) if per_prompt else (2, 3, SIZE, SIZE), dtype)
    context = draw((3, 2, WIDTH), dtype, 1).requires_grad_()
    deep = draw((3, backbone.image_depth - 1, 2, WIDTH), dtype, 2).requires_grad_()
    ours = encode_prompted_image(backbone, images, context, deep=deep)
    theirs = full_image(backbone, images, context, deep)
    assert_close(ours, theirs)
    weights, inputs = draw(theirs.shape, dtype, 3), (context, deep) if deep.numel() else (context,)
    ours, theirs = (torch.autograd.grad((features * weights).sum(), inputs) for features in (ours, theirs))
    for own, other in zip(ours, theirs, strict=True):
        assert_close(own, other)


BACKBONES = {dtype: small_backbone(dtype=dtype) for dtype in (torch.float32, torch.float64)}


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 3),
    m=st.integers(1, 3),
    n=st.integers(0, 4),
    start=st.integers(0, 2),
    j=st.integers(1, 3),
    per_prompt=st.booleans(),
    dtype=st.sampled_from(list(BACKBONES)),
    seed=st.integers(0, 100),
)
def test_any_number_of_prompts_matches_the_long_way(b, m, n, start, j, per_prompt, dtype, seed):
    backbone = BACKBONES[dtype]
    j = min(j, backbone.image_depth - start)
    images = draw((b, m, 3, SIZE, SIZE) if per_prompt else (b, 3, SIZE, SIZE), dtype, seed)
    context = draw((m, n, WIDTH), dtype, seed + 1).requires_grad_()
    deep = draw((m, j - 1, n, WIDTH), dtype, seed + 2).requires_grad_()
    ours = encode_prompted_image(backbone, images, context, deep=deep, start=start)
    theirs = full_image(backbone, images, context, deep, start)
    assert_close(ours, theirs)
    weights, inputs = draw(theirs.shape, dtype, seed + 3), [x for x in (context, deep) if x.numel()]
    if inputs:
        ours, theirs = (torch.autograd.grad((features * weights).sum(), inputs) for features in (ours, theirs))
        for own, other in zip(ours, theirs, strict=True):
            assert_close(own, other)


@pytest.mark.parametrize("start", [0, 2])
def test_what_no_prompt_has_touched_is_computed_once(start, monkeypatch):
    backbone = small_backbone()
    sizes, embedded = [], []

    def counted(block, x, *rest):
        sizes.append(len(x))
        return run_block(block, x, *rest)

    monkeypatch.setattr(image_tower, "run_block", counted)
    backbone.clip.visual.conv1.register_forward_hook(lambda module, given, patches: embedded.append(len(patches)))
    images, context = draw((2, 3, SIZE, SIZE)), draw((4, 2, WIDTH)).requires_grad_()
    encode_prompted_image(backbone, images, context, start=start)
    assert embedded == [2] and sizes == [2] * start + [2 * 4] * (backbone.image_depth - start)


def test_gradients_reach_images_that_ask_for_them():
    backbone = small_backbone()
    images = draw((1, 3, SIZE, SIZE)).requires_grad_()
    encode_prompted_image(backbone, images, draw((2, 2, WIDTH))).sum().backward()
    assert images.grad.abs().sum() > 0


good_images, good_context = torch.zeros(2, 3, SIZE, SIZE), torch.zeros(4, 2, WIDTH)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), "floating-point.*got .*uint8"),
        (torch.zeros(2, 3, SIZE, SIZE + 1), r"expected \[B, 3, 32, 32\] or \[B, 4, 3, 32, 32\].*33"),
        (torch.zeros(2, 1, SIZE, SIZE), "expected"),
        (torch.zeros(3, SIZE, SIZE), "expected"),
        (torch.zeros(0, 3, SIZE, SIZE), "B >= 1"),
        (torch.zeros(2, 3, 3, SIZE, SIZE), "expected"),  # images for 3 prompts, context for 4
        (good_images + torch.inf, "finite"),
        (good_images * torch.nan, "finite"),
        (good_images.to("meta"), "are on meta"),
        ([[0.0]], "got list"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=f"images.*{message}"):
        encode_prompted_image(small_backbone(), images, good_context)


@pytest.mark.parametrize(
    ("context", "deep", "message"),
    [
        (torch.zeros(4, 2, WIDTH - 1), None, r"context: expected .* \[M, n, 64\] with"),
        (torch.zeros(4, 5, 2, WIDTH), None, "context: expected"),
        (torch.zeros(4, 2, WIDTH, dtype=torch.int), None, "context: expected"),
        (torch.zeros(0, 2, WIDTH), None, "M >= 1"),
        (good_context, torch.zeros(4, 3, 2, WIDTH), "deep: expected"),
        (good_context, torch.zeros(3, 2, 2, WIDTH), "deep: expected"),
        (good_context, torch.zeros(4, 2, 1, WIDTH), "deep: expected"),
    ],
)
def test_bad_prompts_are_refused(context, deep, message):
    with pytest.raises(ValueError, match=message):
        encode_prompted_image(small_backbone(), good_images, context, deep=deep)


@pytest.mark.parametrize("start", [-1, 3])
def test_a_start_that_is_no_block_is_refused(start):
    with pytest.raises(ValueError, match=rf"start: expected a block of the tower, 0\.\.2, got {start}"):
        encode_prompted_image(small_backbone(), good_images, good_context, start=start)


def test_prompts_that_start_late_leave_less_room_for_deep_ones():
    with pytest.raises(ValueError, match=r"deep: expected .*at most 1, 2"):
        encode_prompted_image(small_backbone(), good_images, good_context, deep=torch.zeros(4, 2, 2, WIDTH), start=1)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"layers": [1, 1, 1, 1], "width": 16, "head_width": 16}, "ModifiedResNet"),
        ({"timm_model_name": "test_vit", "image_size": 160}, "TimmModel"),
        ({"attentional_pool": "cascade", "attn_pooler_heads": 2, "attn_pooler_queries": 3}, "'cascade' pair"),
        ({"pool_type": "none"}, "returns tokens"),
        ({"scaled_cosine_attn": True}, "scaled cosine"),
    ],
)
def test_towers_that_cannot_be_prompted_say_why(vision, message):
    backbone = small_backbone(({}, vision, {}))
    with pytest.raises(UnsupportedBackboneError, match=f"the image tower of small cannot be prompted: it.*{message}"):
        encode_prompted_image(backbone, good_images, good_context)


@pytest.mark.parametrize(
    "vision",
    [
        {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
        {"timm_model_name": "test_vit", "image_size": 160},
    ],
)
def test_towers_that_cannot_be_prompted_still_encode(vision):
    backbone = small_backbone(({}, vision, {}))
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    assert torch.equal(backbone.encode_image(images), backbone.clip.encode_image(images))
    assert backbone.encode_image(images).shape == (2, backbone.embed_dim)
