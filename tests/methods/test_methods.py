"""ZeroShot, CoOp, MaPLe and CDC as users build them."""

import pytest
import torch
import torch.nn.functional as F

from cdc_models import CDC, METHODS, CoOp, MaPLe, ZeroShot
from cdc_models.clip import ClipBackbone
from cdc_models.clip.sources import build_network
from cdc_models.clip.tokenizer import cut_tokenizer
from cdc_models.methods.cdc import DEFAULT_VIEWS

CLASSES = ["cat", "dog", "tea pot"]
OPTIONS = {"zero_shot": {}, "coop": {"n_ctx": 3}, "maple": {"depth": 3}, "cdc": {"depth": 3}}
CDC_PARTS_OFF = {
    "views": {"views": None},
    "decoupling": {"weight_de": 0.0},
    "consistency": {"weight_con": 0.0},
    "trusted": {"trusted": False},
    "evidence head": {"evidence_head": False},
    "image prompts": {"image_prompts": False},
    "early image prompts": {"image_start": 1, "depth": None},
    "templates": {"n_templates": 1, "views": ["flip"]},
}


def build(name, backbone, classes=CLASSES, **changes):
    return METHODS[name](backbone, classes, **{**OPTIONS[name], **changes})


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", METHODS)
def test_prediction_is_a_distribution_with_an_uncertainty(name, backbone, images):
    model = build(name, backbone)
    said = model.predict(images)
    assert said.prob.shape == (5, 3) and torch.allclose(said.prob.sum(-1), torch.ones(5), atol=1e-5)
    assert torch.equal(said.classes, said.prob.argmax(-1))
    assert ((said.uncertainty >= 0) & (said.uncertainty <= 1)).all()
    assert said.labels() == [CLASSES[i] for i in said.classes]
    assert said.prob.requires_grad is False


def test_cdc_prediction_holds_opinions(backbone, images):
    said = build("cdc", backbone).predict(images)
    assert torch.allclose(said.belief.sum(-1) + said.uncertainty, torch.ones(5), atol=1e-5)
    assert said.prompt_uncertainty.shape == (5, 4)
    assert ((said.conflict >= 0) & (said.conflict <= 1)).all()


@pytest.mark.parametrize("name", ["coop", "maple", "cdc"])
def test_only_the_adapter_learns(name, backbone, coloured):
    images, targets = coloured
    before = backbone.fingerprint
    model = build(name, backbone)
    model.loss(images, targets).backward()
    learned = model.learned_parameters()
    assert learned and all(p.dtype == torch.float32 for p in learned.values())
    for n, p in model.named_parameters():
        assert (p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0) == (n in learned), n
    assert backbone.fingerprint == before


@pytest.mark.parametrize("part", CDC_PARTS_OFF)
def test_each_part_of_cdc_switches_off_alone(part, backbone, coloured):
    images, targets = coloured
    model = build("cdc", backbone, **CDC_PARTS_OFF[part])
    loss = model.loss(images, targets)
    loss.backward()
    assert loss.isfinite() and all(
        p.grad.isfinite().all() for p in model.learned_parameters().values() if p.grad is not None
    )
    assert torch.allclose(model.predict(images).prob.sum(-1), torch.ones(len(images)), atol=1e-5)


def test_switching_a_loss_off_changes_exactly_that_loss(backbone, coloured):
    from cdc_ops import consistency_loss, decoupling_loss

    images, targets = coloured
    whole = build("cdc", backbone, views=None, weight_de=0.5, weight_con=2.0)
    text = whole.text_features()
    plain = build("cdc", backbone, views=None, weight_de=0.0, weight_con=0.0).loss(images, targets)
    expected = plain + 0.5 * decoupling_loss(text) + 2.0 * consistency_loss(text, whole.anchor, 0.02)
    assert torch.allclose(whole.loss(images, targets), expected, atol=1e-5)


def test_without_trust_the_prediction_averages_the_templates(backbone, images):
    model = build("cdc", backbone, trusted=False)
    x, t = model.image_features(images), model.text_features()
    by_hand = torch.stack(
        [
            (
                model.head.scale[m] * F.normalize(x[:, m], dim=-1) @ F.normalize(t[m], dim=-1).T + model.head.bias[m]
            ).softmax(-1)
            for m in range(4)
        ]
    ).mean(0)
    assert torch.allclose(model.predict(images).prob, by_hand, atol=1e-5)
    assert torch.allclose(model.template_prob(x).mean(1), by_hand, atol=1e-5)


def test_template_opinions_fuse_to_the_prediction(backbone, images):
    model = build("cdc", backbone, n_templates=1, views=["none"])
    x = model.image_features(images)
    assert torch.allclose(model.template_prob(x)[:, 0], model.predict(images).prob, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_with_classes_is_the_same_as_building_for_them(name, backbone, images):
    model = build(name, backbone)
    other = ["dog", "red house", "cat", "spoon"]
    moved = model.with_classes(other)
    fresh = build(name, backbone, other)
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(moved.predict(images).prob, fresh.predict(images).prob, atol=1e-6)
    assert model.class_names == tuple(CLASSES) and moved.class_names == tuple(other)
    assert model.predict(images).prob.shape == (5, 3)  # the original is as it was
    for n, p in model.learned_parameters().items():
        assert moved.learned_parameters()[n] is p


def test_text_features_are_reused_until_a_parameter_changes(backbone, monkeypatch):
    model = build("coop", backbone)
    calls = []
    original = CoOp.text_features
    monkeypatch.setattr(CoOp, "text_features", lambda self: calls.append(1) or original(self))
    first = model.cached_text_features()
    assert model.cached_text_features() is first and len(calls) == 1
    with torch.no_grad():
        model.context.vectors.add_(0.1)
    assert not torch.equal(model.cached_text_features(), first) and len(calls) == 2


@pytest.mark.parametrize(
    ("options", "passes"),
    [({"image_prompts": False}, [5, 5, 5]), ({"image_start": 2, "depth": 1}, [5, 5, 20]), ({}, [20, 20, 20])],
    ids=["none", "late", "everywhere"],
)
def test_evaluation_passes_images_once_where_no_template_has_touched_them(options, passes, backbone, images):
    """Images in each of the three blocks, by the norm that both open_clip's blocks and ours go through."""
    model, seen = build("cdc", backbone, **options), []
    blocks = backbone.clip.visual.transformer.resblocks
    hooks = [block.ln_1.register_forward_hook(lambda module, given, x: seen.append(len(x))) for block in blocks]
    model.predict(images)
    for hook in hooks:
        hook.remove()
    assert seen == passes


def test_zero_shot_is_open_clips_own(backbone, images):
    clip, tokens = backbone.clip, backbone.tokenize([f"a photo of a {c}." for c in CLASSES])
    logits = (
        clip.logit_scale.exp() * clip.encode_image(images, normalize=True) @ clip.encode_text(tokens, normalize=True).T
    )
    assert torch.allclose(ZeroShot(backbone, CLASSES).predict(images).prob, logits.softmax(-1), atol=1e-6)


def test_zero_shot_ensemble_averages_normalised_features(backbone, images):
    templates = ["a photo of a {}.", "{}."]
    model = ZeroShot(backbone, CLASSES, templates)
    each = [
        F.normalize(backbone.encode_text(backbone.tokenize([t.format(c) for c in CLASSES])), dim=-1) for t in templates
    ]
    prototype = F.normalize(torch.stack(each).mean(0), dim=-1)
    logits = backbone.scale * F.normalize(backbone.encode_image(images), dim=-1) @ prototype.T
    assert torch.allclose(model.predict(images).prob, logits.softmax(-1), atol=1e-6)


def test_coop_starts_as_zero_shot(backbone, images):
    """With the template's own words as the context, nothing learned yet, CoOp is zero-shot CLIP."""
    coop = CoOp(backbone, CLASSES, n_ctx=len(backbone.encode_words("a photo of a")), words="a photo of a")
    assert torch.allclose(coop.predict(images).prob, ZeroShot(backbone, CLASSES).predict(images).prob, atol=1e-5)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_coop_variants(position, class_specific, backbone, coloured):
    images, targets = coloured
    model = CoOp(backbone, CLASSES, n_ctx=4, words=None, class_specific=class_specific, position=position)
    model.loss(images, targets).backward()
    assert model.context.vectors.shape == ((1, 3, 4, 32) if class_specific else (1, 4, 32))
    assert model.context.vectors.grad.abs().sum() > 0
    if class_specific:
        with pytest.raises(ValueError, match="class-specific"):
            model.with_classes(["x"])


def test_same_seed_same_start(backbone):
    for name in ("coop", "maple", "cdc"):
        extra = {"words": None}
        starts = [
            torch.cat([p.flatten() for p in build(name, backbone, seed=s, **extra).learned_parameters().values()])
            for s in (1, 1, 2)
        ]
        assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_bf16_autocast_keeps_the_adapter_in_float32(backbone, coloured):
    images, targets = coloured
    for name in ("coop", "maple", "cdc"):
        model = build(name, backbone, **({"views": None} if name == "cdc" else {}))
        exact = model.loss(images, targets)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(images, targets)
        loss.backward()
        assert abs(loss.item() - exact.item()) < 0.05 * abs(exact.item()) + 0.05
        assert all(p.grad.dtype == torch.float32 for p in model.learned_parameters().values())


@pytest.mark.parametrize("name", [*METHODS, "untrusted"])
def test_what_autocast_leaves_in_float32(name, backbone, images):
    """Towers run in bfloat16; logits, probabilities and losses never: eight bits do not hold a logit of 100."""
    model = build("cdc", backbone, trusted=False) if name == "untrusted" else build(name, backbone)
    text = model.cached_text_features()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model.image_features(images)
        said, exact = model.predict_features(features, text), model.predict_features(features.float(), text)
        loss = model.objective(features, text, torch.arange(5) % 3)
    assert features.dtype == torch.bfloat16
    with torch.no_grad():
        plain = model.objective(features.float(), text, torch.arange(5) % 3)
    for given, want in ((said.prob, exact.prob), (said.uncertainty, exact.uncertainty), (loss, plain)):
        assert given.dtype == torch.float32 and torch.allclose(given, want, rtol=1e-6, atol=1e-6)
    assert torch.allclose(said.prob.sum(-1), torch.ones(5), rtol=0, atol=1e-6)
    if name in ("cdc", "untrusted"):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(model.template_prob(features).sum(-1), torch.ones(5, 4), rtol=0, atol=1e-6)


def test_views_may_come_from_the_loader(backbone, coloured):
    images, targets = coloured
    model = build("cdc", backbone, views=None)
    same = images.unsqueeze(1).expand(-1, 4, -1, -1, -1)
    assert torch.allclose(model.loss(same, targets), model.loss(images, targets), rtol=1e-5)


@pytest.mark.parametrize("name", ["coop", "maple", "cdc"])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0]), r"targets.*\[0, 3\).*0 to 3"),
        (torch.tensor([0, 1, 2, -1, 0]), "targets.*-1"),
        (torch.tensor([0, 1]), r"targets.*\[5\]"),
        (torch.zeros(5), "targets.*integer"),
    ],
)
def test_bad_targets(name, targets, message, backbone, images):
    with pytest.raises(ValueError, match=message):
        build(name, backbone).loss(images, targets)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "names: .*empty list"),
        (["cat", "cat"], "names: 'cat' and 'cat' are the same class"),
        (["Cat", "cat"], "names: 'cat' and 'Cat' are the same class"),
        (["a_cat", "a cat"], "names: 'a cat' and 'a_cat' are the same class"),
        (["cat", " "], "names: .*blank"),
        (["a b " * 30], "too long"),
        ("cat", "names: expected a sequence"),
        (["cat", 5], "names: expected a sequence"),
        (None, "names: expected a sequence"),
        ({"cat": 0}, "names: expected a sequence"),
    ],
)
def test_bad_class_names(name, names, message, backbone):
    """When a method is built, and when it moves to other classes."""
    with pytest.raises(ValueError, match=message):
        build(name, backbone, names)
    with pytest.raises(ValueError, match=message):
        build(name, backbone).with_classes(names)


@pytest.mark.parametrize("name", METHODS)
def test_text_features_of_other_classes(name, backbone):
    model = build(name, backbone)
    text = model.with_classes(["spoon", "fork"]).cached_text_features()
    with pytest.raises(ValueError, match="text: expected features of 3 classes"):
        model.predict_features(torch.ones(2, 16), text)


@pytest.mark.parametrize("name", METHODS)
def test_new_classes_encode_only_new_names(name, backbone, monkeypatch):
    model, encoded = build(name, backbone), []
    text_features = type(model).text_features

    def counting(self):
        encoded.extend(self.class_names)
        return text_features(self)

    monkeypatch.setattr(type(model), "text_features", counting)
    model.cached_text_features()
    other = model.with_classes([CLASSES[1], "spoon", CLASSES[0]])
    reused = other.cached_text_features()
    assert encoded == [*CLASSES, "spoon"]
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.allclose(reused, other.text_features(), atol=1e-5)
    assert torch.equal(model.cached_text_features()[:, :2], reused[:, [2, 0]])


def test_features_cached_in_inference_mode_or_autocast_serve_training_too(backbone, images):
    model = build("cdc", backbone)
    with torch.no_grad():
        exact = model.text_features()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model.predict(images)
    assert not model.cached_text_features().is_inference()
    assert torch.equal(model.cached_text_features(), exact)
    model.opinion(model.image_features(images)).log_ratio.sum().backward()
    with torch.inference_mode():
        built = build("coop", backbone)
        assert built.predict(images).prob.shape == (len(images), len(CLASSES))


def test_features_that_depend_on_the_other_classes_are_not_reused(backbone):
    class Centred(CoOp):
        name_wise = False

        def text_features(self):
            features = super().text_features()
            return features - features.mean(1, keepdim=True)

    model = Centred(backbone, CLASSES)
    model.cached_text_features()
    other = model.with_classes([CLASSES[0], "spoon"])
    with torch.no_grad():
        assert torch.allclose(other.cached_text_features(), other.text_features(), atol=1e-6)


@pytest.mark.parametrize("variant", ["RN50-like", "SigLIP-like", "first token"])
def test_zero_shot_works_with_every_kind_of_tower(variant, images):
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 20, "vocab_size": 1514, "width": 32, "heads": 2, "layers": 2}
    changes = {
        "RN50-like": ({"layers": [1, 1, 1, 1], "width": 16, "patch_size": None}, {}),
        "SigLIP-like": ({}, {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}),
        "first token": ({}, {"pool_type": "first"}),
    }[variant]
    cfg = {"embed_dim": 16, "custom_text": True, "vision_cfg": vision | changes[0], "text_cfg": text | changes[1]}
    torch.manual_seed(0)
    backbone = ClipBackbone(build_network(cfg), name="odd", make_tokenizer=lambda: cut_tokenizer(1000, 20))
    model = ZeroShot(backbone, CLASSES)
    size = backbone.image_shape
    pictures = torch.randn(2, 3, *size)
    assert model.predict(pictures).prob.shape == (2, 3)
    assert model.with_classes(["spoon", "fork"]).predict(pictures).prob.shape == (2, 2)
    with pytest.raises(ValueError, match="same class"):
        ZeroShot(backbone, ["a_b", "a b"])
    if variant == "first token":
        with pytest.raises(ValueError, match="cannot be prompted"):
            CoOp(backbone, CLASSES)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_targets_of_any_integer_dtype(dtype, backbone, images):
    for name in ("coop", "maple", "cdc"):
        model = build(name, backbone, **({"views": None} if name == "cdc" else {}))
        targets = torch.arange(len(images)) % 3
        assert torch.equal(model.loss(images, targets.to(dtype)), model.loss(images, targets))
    with pytest.raises(ValueError, match="targets: expected a tensor.*list"):
        model.loss(images, [0, 1, 2, 0, 1])


BAD_IMAGES = {
    "uint8": torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    "size": torch.zeros(2, 3, 30, 32),
    "channels": torch.zeros(2, 1, 32, 32),
    "one image": torch.zeros(3, 32, 32),
    "none": torch.zeros(0, 3, 32, 32),
    "templates": torch.zeros(2, 3, 3, 32, 32),
    "nan": torch.full((2, 3, 32, 32), torch.nan),
    "inf": torch.full((2, 3, 32, 32), torch.inf),
    "device": torch.zeros(2, 3, 32, 32, device="meta"),
    "sparse": torch.zeros(2, 3, 32, 32).to_sparse(),
    "8 bits": torch.zeros(2, 3, 32, 32).to(torch.float8_e4m3fn),
    "complex": torch.zeros(2, 3, 32, 32, dtype=torch.complex64),
    "list": [[0.0]],
    "nothing": None,
    "path": "photo.png",
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("what", BAD_IMAGES)
def test_bad_images(name, what, backbone):
    with pytest.raises(ValueError, match="images"):
        build(name, backbone).predict(BAD_IMAGES[what])


@pytest.mark.parametrize("name", ["coop", "maple", "cdc", "cdc without image prompts", "cdc without views"])
@pytest.mark.parametrize("what", BAD_IMAGES)
def test_bad_images_to_train_on(name, what, backbone):
    """Also where views come first, which would make pixels of anything."""
    changes = {"image prompts": {"image_prompts": False}, "views": {"views": None}}.get(name[12:], {})
    images = BAD_IMAGES[what]
    count = len(images) if isinstance(images, torch.Tensor) else 2
    message = "targets: expected at least one image" if what == "none" else r"images?\b"
    with pytest.raises(ValueError, match=message):
        build(name.split()[0], backbone, **changes).loss(images, torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize("name", ["coop", "cdc"])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(2, 15), r"images: expected features \[B, 16\].*\[2, 15\]"),
        (torch.zeros(2, 16).int(), "images must be a floating-point tensor.*int32"),
        (torch.full((2, 16), torch.inf), "images must be finite"),
        (torch.zeros(2, 7, 16), r"image must have shape .*\[2, 7, 16\]"),
        (torch.zeros(2), r"images: expected features .*\[2\]"),
        (torch.zeros(2, 16, device="meta"), "images: features are on meta, the backbone is on cpu"),
    ],
)
def test_bad_features_to_train_on(name, features, message, backbone):
    model = build(name, backbone, **({"image_prompts": False} if name == "cdc" else {}))
    with pytest.raises(ValueError, match=message):
        model.loss(features, torch.zeros(2, dtype=torch.long))


def test_features_for_each_template_need_templates_of_their_own(backbone):
    model = ZeroShot(backbone, CLASSES, ["a {}.", "{}."])
    with pytest.raises(ValueError, match=r"image: expected \[B, D\].*\[4, 2, 16\]"):
        model.logits(torch.ones(4, 2, 16), model.text_features())


def test_bad_options(backbone):
    with pytest.raises(ValueError, match="views.*4"):
        CDC(backbone, CLASSES, depth=3, views=["flip"])
    with pytest.raises(ValueError, match="depth"):
        MaPLe(backbone, CLASSES, depth=9)
    with pytest.raises(ValueError, match="hand_crafted"):
        CDC(backbone, CLASSES, depth=3, hand_crafted="a photo")
    with pytest.raises(ValueError, match="weight_de"):
        CDC(backbone, CLASSES, depth=3, weight_de=float("nan"))
    with pytest.raises(TypeError, match="learns nothing"):
        ZeroShot(backbone, CLASSES).loss(torch.zeros(1, 3, 32, 32), torch.tensor([0]))
    assert len(DEFAULT_VIEWS) == 4
