"""Options are checked when a method is built, not steps later."""

import pytest
import torch

from cdc_models import CDC, METHODS, CoOp, MaPLe, ZeroShot

CLASSES = ["cat", "dog"]
LONG = " ".join("abcdefghijklmnopq")  # 17 tokens and the full stop: fits a context of 20 by itself
NAN = float("nan")


@pytest.mark.parametrize(
    ("method", "options", "argument"),
    [
        (ZeroShot, {"templates": []}, "templates"),
        (ZeroShot, {"templates": ["a photo"]}, "templates"),
        (ZeroShot, {"templates": "{} and {}"}, "templates"),
        (CoOp, {"position": "up"}, "position"),
        (CDC, {"form": "x"}, "form"),
        (CDC, {"rule": "x"}, "rule"),
        (CDC, {"activation": "x"}, "activation"),
        (CDC, {"kl_weight": -1}, "kl_weight"),
        (CDC, {"weight_con": NAN}, "weight_con"),
        (CDC, {"temperature": 0}, "temperature"),
        (CDC, {"temperature": NAN}, "temperature"),
        (CDC, {"noise": NAN}, "noise"),
        (CDC, {"noise": -0.1}, "noise"),
        (CDC, {"n_templates": 0, "views": None}, "n_templates"),
        (CDC, {"n_templates": 1.5, "views": None}, "n_templates"),
        (CDC, {"views": 5}, "views"),
        (CDC, {"views": "none"}, "views"),
        (CDC, {"n_templates": 5}, "views: expected one augmentation per template \\(5\\), or views=None"),
        (CDC, {"n_templates": 2, "views": ["none", "colour", "rotation"]}, "views"),
        (CDC, {"views": [1, 2, 3, 4]}, "names"),
        (CDC, {"hand_crafted": 5}, "hand_crafted"),
        (CDC, {"trusted": "false"}, "trusted"),
        (CDC, {"evidence_head": None}, "evidence_head"),
        (CDC, {"image_prompts": 1}, "image_prompts"),
        (CDC, {"words": 5}, "words"),
        (CDC, {"words": ["a photo of a"]}, "words"),
        (CoOp, {"class_specific": "no"}, "class_specific"),
        (CoOp, {"words": ["a photo of a", "a"]}, "words"),
        (CoOp, {"words": "a", "n_ctx": 2}, "words"),
        (ZeroShot, {"templates": 5}, "templates"),
        (ZeroShot, {"templates": ["a {}.", None]}, "templates"),
        *[(method, {"depth": depth}, "depth") for method in (MaPLe, CDC) for depth in (0, 4, 1.5, "2", True)],
        *[(method, {"seed": seed}, "seed") for method in (CoOp, MaPLe, CDC) for seed in (None, "x", 1.5, 2**64)],
        (CDC, {"image_start": 3}, "image_start"),
        (CDC, {"image_start": 1.5, "depth": 1}, "image_start"),
        (CDC, {"image_start": 1, "depth": 3}, "depth"),
        *[
            (method, {"n_ctx": n, "words": None}, "n_ctx")
            for method in (CoOp, MaPLe, CDC)
            for n in (0, 18, 10**12, 2.0, True)
        ],
    ],
)
def test_an_option_out_of_range_is_named(method, options, argument, backbone):
    with pytest.raises(ValueError, match=f"^{argument}"):
        method(backbone, CLASSES, **options)


def test_default_views_are_as_many_as_the_templates(backbone):
    for count in (1, 2, 4):
        model = CDC(backbone, CLASSES, depth=2, n_templates=count)
        assert model.options["views"] == ["none", "colour", "rotation", "blur"][:count]
        assert model.text_features().shape[0] == count


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wrong", [None, "bundled", torch.nn.Linear(2, 2)], ids=["none", "name", "layer"])
def test_what_is_no_backbone(name, wrong):
    with pytest.raises(ValueError, match="^backbone: expected a ClipBackbone.*got (NoneType|str|Linear)"):
        METHODS[name](wrong, CLASSES)


@pytest.mark.parametrize("name", ["coop", "maple", "cdc"])
def test_names_that_leave_no_room_for_the_context(name, backbone):
    assert len(backbone.encode_words(f"{LONG}.")) == 18
    with pytest.raises(ValueError, match="names: .* do not fit"):
        METHODS[name](backbone, [LONG, "cat"], n_ctx=1)
    model = METHODS[name](backbone, CLASSES, n_ctx=1)
    with pytest.raises(ValueError, match="names: .* do not fit"):
        model.with_classes([LONG])


def test_the_hand_crafted_template_may_hold_other_braces(backbone):
    model = CDC(backbone, CLASSES, hand_crafted="a {} of {k}", depth=2)
    expected = backbone.encode_text(backbone.tokenize([f"a {name} of {{k}}" for name in CLASSES]))
    assert torch.allclose(model.anchor, expected, atol=1e-6)
