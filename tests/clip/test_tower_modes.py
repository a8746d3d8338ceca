"""Precision, autograd and compilation of the towers; the full-size and the bundled networks."""

import copy

import open_clip
import pytest
import torch
from tower_reference import assert_close, full_image, full_text, small_backbone, small_clip

from cdc_models import CDC, CoOp
from cdc_models.clip import (
    ClipBackbone,
    encode_prompted_image,
    encode_prompted_text,
    load_clip,
    tokenize_classes,
)
from cdc_models.prompts import CoupledPrompts

NAMES = ["cat", "fire engine", "jack-o'-lantern"]


def both_towers(backbone, prompts, images, classes):
    (context, deep), (image_context, image_deep) = prompts.text(), prompts.image()
    text = encode_prompted_text(backbone, classes, context, deep=deep)
    return text, encode_prompted_image(backbone, images, image_context, deep=image_deep)


@pytest.fixture
def setup():
    backbone = small_backbone()
    prompts = CoupledPrompts(backbone, n=2, depth=3, m=2, generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return backbone, prompts, images, tokenize_classes(backbone, NAMES)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def test_bfloat16_autocast_keeps_trainables_in_float32(setup):
    backbone, prompts, images, classes = setup
    exact = both_towers(backbone, prompts, images, classes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = both_towers(backbone, prompts, images, classes)
    for own, want in zip(features, exact, strict=True):
        assert own.dtype == torch.bfloat16
        assert cosine(own, want) > 0.999
    sum(f.float().square().sum() for f in features).backward()
    rough = [parameter.grad.clone() for parameter in prompts.parameters()]
    prompts.zero_grad()
    sum(f.square().sum() for f in exact).backward()
    for parameter, grad in zip(prompts.parameters(), rough, strict=True):
        assert parameter.dtype == grad.dtype == torch.float32
        assert cosine(grad, parameter.grad) > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_backbone_runs_in_its_own_precision(setup, dtype):
    backbone, prompts, images, classes = setup
    exact = both_towers(backbone, prompts, images, classes)
    features = both_towers(backbone.to(dtype), prompts, images, classes)
    for own, want in zip(features, exact, strict=True):
        assert own.dtype == dtype
        assert cosine(own, want) > 0.999
    assert backbone.encode_image(images).dtype == dtype
    sum(f.float().square().sum() for f in features).backward()
    assert {parameter.grad.dtype for parameter in prompts.parameters()} == {torch.float32}


def test_open_clips_own_mixed_precision(setup):
    """Linear layers in bfloat16, norms (LayerNormFp32) and embeddings in float32: open_clip's precision="bf16"."""
    _, prompts, images, classes = setup
    clip = small_clip(({"cast_dtype": torch.bfloat16}, {}, {}))
    clip.load_state_dict(small_clip().state_dict())
    open_clip.convert_weights_to_lp(clip, dtype=torch.bfloat16)
    mixed = ClipBackbone(clip, make_tokenizer=lambda: open_clip.SimpleTokenizer(context_length=24))
    exact = both_towers(small_backbone(), prompts, images, classes)
    for own, want in zip(both_towers(mixed, prompts, images, classes), exact, strict=True):
        assert own.dtype == torch.bfloat16
        assert cosine(own, want) > 0.999
    assert mixed.encode_image(images).dtype == torch.bfloat16
    assert mixed.encode_text(mixed.tokenize(NAMES)).dtype == torch.bfloat16


def test_no_graph_where_no_gradient_is_needed(setup):
    backbone, prompts, images, classes = setup
    text, image = both_towers(backbone, prompts.requires_grad_(False), images, classes)
    assert not text.requires_grad and not image.requires_grad
    assert not backbone.encode_image(images).requires_grad
    assert not backbone.encode_text(backbone.tokenize(NAMES)).requires_grad


def test_frozen_weights_get_no_gradient(setup):
    backbone, prompts, images, classes = setup
    sum(f.sum() for f in both_towers(backbone, prompts, images, classes)).backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in prompts.parameters())


def test_what_inference_mode_leaves_behind_can_be_trained_with(setup):
    backbone, prompts, images, classes = setup
    with torch.inference_mode():
        first = both_towers(backbone, prompts, images, classes)
    second = both_towers(backbone, prompts, images, classes)
    sum(f.sum() for f in second).backward()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_classes_move_and_are_copied_with_a_model(setup):
    backbone, prompts, images, classes = setup
    want = both_towers(backbone, prompts, images, classes)[0]
    for again in (classes.to("cpu"), copy.deepcopy(classes)):
        assert torch.equal(both_towers(backbone, prompts, images, again)[0], want)


@pytest.mark.parametrize(("position", "warm"), [("end", False), ("middle", True)])
def test_the_towers_compile_without_a_graph_break(setup, position, warm):
    backbone, prompts, images, classes = setup

    def forward(images):
        (context, deep), (image_context, image_deep) = prompts.text(), prompts.image()
        deep = deep if position == "end" else None
        text = encode_prompted_text(backbone, classes, context, deep=deep, position=position)
        return text, encode_prompted_image(backbone, images, image_context, deep=image_deep)

    if warm:
        forward(images)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(images)
    sum(f.square().sum() for f in compiled).backward()
    grads = [parameter.grad.clone() for parameter in prompts.parameters()]
    prompts.zero_grad()
    eager = forward(images)
    sum(f.square().sum() for f in eager).backward()
    for own, want in zip(compiled, eager, strict=True):
        assert_close(own, want)
    for own, parameter in zip(grads, prompts.parameters(), strict=True):
        assert_close(own, parameter.grad)


def check_against_open_clip(backbone, m=2):
    """Features of word prompts and of plain images, then deep prompts the long way round."""
    generator = torch.Generator().manual_seed(0)
    classes = tokenize_classes(backbone, NAMES)
    prompts = CoupledPrompts(backbone, n=2, depth=3, m=m, words="a photo", generator=generator)
    context, deep = prompts.text()
    want = backbone.clip.encode_text(backbone.tokenize([f"a photo {name}." for name in NAMES]))
    assert_close(encode_prompted_text(backbone, classes, context), want.expand(m, -1, -1))
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size, generator=generator)
    plain = encode_prompted_image(backbone, images, torch.zeros(1, 0, backbone.image_width))
    assert_close(plain[:, 0], backbone.clip.encode_image(images))
    with torch.no_grad():
        text, image = both_towers(backbone, prompts, images, classes)
        assert_close(text, full_text(backbone, NAMES, context, deep))
        assert_close(image, full_image(backbone, images, *prompts.image()))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-quickgelu"])
def test_full_size_networks_with_random_weights(name):
    backbone = load_clip(name)
    check_against_open_clip(backbone, m=1)
    assert backbone.image_size == 224 and backbone.context_length == 77


def test_a_full_size_custom_text_network():
    clip = open_clip.create_model("ViT-B-32", force_custom_text=True)
    assert isinstance(clip, open_clip.CustomTextCLIP)
    check_against_open_clip(ClipBackbone(clip, make_tokenizer=open_clip.SimpleTokenizer), m=1)


def test_the_bundled_network():
    backbone = load_clip("bundled")
    assert (backbone.name, backbone.pretrained) == ("bundled", "bundled")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert backbone.eot_id == backbone.clip.vocab_size - 1
    check_against_open_clip(backbone)


def test_both_towers_attend_through_torchs_own_attention(setup, monkeypatch):
    backbone, prompts, images, classes = setup
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []

    def counting(*arguments, **options):
        calls.append(1)
        return attend(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    (context, deep), (image_context, image_deep) = prompts.text(), prompts.image()
    encode_prompted_text(backbone, classes, context, deep=deep)
    assert len(calls) >= backbone.text_depth
    calls.clear()
    encode_prompted_image(backbone, images, image_context, deep=image_deep)
    assert len(calls) >= backbone.image_depth


@pytest.mark.parametrize(
    "method", [CoOp, lambda *given: CDC(*given, image_prompts=False)], ids=["CoOp", "CDC on texts"]
)
def test_a_frozen_image_side_builds_no_graph(setup, method):
    backbone, _, images, _ = setup
    model = method(backbone, NAMES).train()
    assert model.image_features(images).grad_fn is None
    assert model.text_features().grad_fn is not None
