"""Prompt contexts, coupled prompts and templates."""

import pytest
import torch
from tower_reference import small_backbone

from cdc_models.clip import load_clip
from cdc_models.prompts import ENSEMBLE, HAND_CRAFTED, CoupledPrompts, PromptContext, fill_templates


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_maple_learns_the_published_number_of_parameters():
    prompts = CoupledPrompts(load_clip("ViT-B-16-quickgelu"), n=2, depth=9, m=1)
    assert sum(parameter.numel() for parameter in prompts.parameters() if parameter.requires_grad) == 3_555_072


@pytest.mark.parametrize("module", [PromptContext, CoupledPrompts])
def test_words_start_the_context_with_their_embeddings(module):
    backbone = small_backbone(dtype=torch.bfloat16)
    options = {"depth": 2} if module is CoupledPrompts else {}
    prompts = module(backbone, n=3, m=2, words=["a photo of a", "my own drawing"], **options)
    context = prompts() if module is PromptContext else prompts.text()[0]
    assert context.dtype == torch.float32  # whatever the backbone's dtype
    embedding = backbone.clip.token_embedding.weight
    for own, words in zip(context, ["a photo of", "my own drawing"], strict=True):
        assert torch.equal(own, embedding[backbone.encode_words(words)].float())


def test_contexts_can_start_at_random():
    backbone = small_backbone()
    vectors = PromptContext(backbone, n=16, m=50, std=0.02, generator=seeded())()
    assert vectors.shape == (50, 16, 48)
    assert vectors.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(vectors, PromptContext(backbone, n=16, m=50, generator=seeded())())
    assert not torch.equal(vectors, PromptContext(backbone, n=16, m=50, generator=seeded(1))())


def test_noise_tells_templates_apart_that_start_from_one_text():
    backbone = small_backbone()
    same = PromptContext(backbone, n=2, m=2, words="a photo")()
    apart = PromptContext(backbone, n=2, m=2, words="a photo", noise=0.01, generator=seeded())()
    assert torch.equal(same[0], same[1])
    assert not torch.equal(apart[0], apart[1])
    assert torch.allclose(apart, same, atol=0.06)


def test_class_specific_contexts():
    backbone = small_backbone()
    vectors = PromptContext(backbone, n=2, m=3, n_classes=5, generator=seeded())()
    assert vectors.shape == (3, 5, 2, 48)
    assert not torch.equal(vectors[0, 0], vectors[0, 1])
    alike = PromptContext(backbone, n=2, m=3, n_classes=5, words="a photo")()
    assert torch.equal(alike, alike[:1, :1].expand_as(alike))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n: expected a whole number >= 1, got 0"),
        ({"m": 0}, "m: expected a whole number >= 1"),
        ({"n": 5, "words": "a photo of a"}, "at least n = 5 tokens.* has 4"),
        ({"m": 2, "words": ["a photo of a cat"]}, r"one per template \(2\), got 1"),
        ({"m": 2.0}, "m: .* got 2.0"),
        ({"n_classes": 0}, "n_classes: expected a whole number >= 1"),
        ({"words": 5}, "words: .* got 5"),
        ({"words": ["a photo", 5], "m": 2}, "words: .* got 5"),
        ({"std": -1}, "std must be a finite number >= 0"),
        ({"noise": float("nan")}, "noise must be a finite number >= 0"),
        ({"generator": 5}, "generator: .* got 5"),
    ],
)
def test_bad_contexts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PromptContext(small_backbone(), **({"n": 2} | options))


@pytest.mark.parametrize("depth", [0, 4, 1.5, "2", True])
def test_coupled_prompts_are_no_deeper_than_the_towers(depth):
    with pytest.raises(ValueError, match=r"depth: expected 1\.\.3"):
        CoupledPrompts(small_backbone(), depth=depth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_start": 3}, r"image_start: expected a block, 0\.\.2, got 3"),
        ({"image_start": -1}, "image_start"),
        ({"image_start": 1, "depth": 3}, r"depth: expected 1\.\.2"),
    ],
)
def test_image_prompts_start_within_the_tower(options, message):
    with pytest.raises(ValueError, match=message):
        CoupledPrompts(small_backbone(), **({"depth": 1} | options))


def test_image_prompts_are_linear_maps_of_the_text_prompts_of_their_template():
    prompts = CoupledPrompts(small_backbone(), n=2, depth=3, m=2, generator=seeded())
    (text, deep_text), (image, deep_image) = prompts.text(), prompts.image()
    assert text.shape == (2, 2, 48) and deep_text.shape == (2, 2, 2, 48)
    assert image.shape == (2, 2, 64) and deep_image.shape == (2, 2, 2, 64)
    for m in range(2):
        want = torch.nn.functional.linear(text[m], prompts.weight[m, 0], prompts.bias[m, 0])
        assert torch.allclose(image[m], want, atol=1e-6)
        for layer in range(2):
            want = torch.nn.functional.linear(
                deep_text[m, layer], prompts.weight[m, layer + 1], prompts.bias[m, layer + 1]
            )
            assert torch.allclose(deep_image[m, layer], want, atol=1e-6)


def test_coupled_prompts_start_as_maple_does():
    prompts = CoupledPrompts(small_backbone(), n=2, depth=3, m=2, generator=seeded())
    weight, bound = prompts.weight, 48**-0.5
    assert torch.equal(weight[:, 1], weight[:, 2])  # one draw for the deep layers
    assert not torch.equal(weight[:, 0], weight[:, 1])
    assert not torch.equal(weight[0], weight[1])  # every template its own
    assert 0.95 * bound < weight.abs().max().item() <= bound
    assert prompts.text()[1].std().item() == pytest.approx(0.02, rel=0.2)
    again = CoupledPrompts(small_backbone(), n=2, depth=3, m=2, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(prompts.parameters(), again.parameters(), strict=True))


def test_one_projection_for_all_templates():
    prompts = CoupledPrompts(small_backbone(), n=2, depth=3, m=4, shared_projection=True)
    assert prompts.weight.shape == (1, 3, 64, 48)
    assert prompts.image()[0].shape == (4, 2, 64)


def test_shallow_coupled_prompts():
    prompts = CoupledPrompts(small_backbone(), n=2, depth=1)
    assert prompts.text()[1].shape == (1, 0, 2, 48)
    assert prompts.image()[1].shape == (1, 0, 2, 64)


def test_templates_have_one_place_each():
    assert all(template.count("{}") == 1 for template in [*HAND_CRAFTED.values(), *ENSEMBLE])
    assert HAND_CRAFTED["EuroSAT"] == "a centered satellite photo of {}."
    assert len(set(ENSEMBLE)) == len(ENSEMBLE)


def test_filling_templates():
    texts = fill_templates(["a {}.", "{} texture."], ["cat", "fire_engine"])
    assert texts == [["a cat.", "a fire engine."], ["cat texture.", "fire engine texture."]]


@pytest.mark.parametrize(
    ("templates", "names", "message"),
    [
        (["a photo."], ["cat"], r"templates: .*exactly one '\{\}', got 'a photo.'"),
        (["{} {}"], ["cat"], "exactly one"),
        ([], ["cat"], "templates: expected a non-empty"),
        ("a {}.", ["cat"], "templates: expected a non-empty"),
        (["a {}."], [], "names: expected a non-empty"),
        (["a {}."], "cat", "names: expected a non-empty"),
        (5, ["cat"], "templates: expected a non-empty .* got 5"),
        ([5], ["cat"], "templates: .*exactly one .* got 5"),
    ],
)
def test_bad_templates_are_refused(templates, names, message):
    with pytest.raises(ValueError, match=message):
        fill_templates(templates, names)
