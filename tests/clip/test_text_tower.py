"""The text tower against open_clip's own encode_text and against the full-length computation."""

from functools import cache

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tower_reference import CONTEXT_LENGTH, FRAMES, TEXT, VARIANTS, assert_close, full_text, small_backbone, small_clip

from cdc_models import CDC, CoOp, MaPLe
from cdc_models.clip import UnsupportedBackboneError, encode_prompted_text, text_tower, tokenize_classes
from cdc_models.clip.anatomy import text_parts
from cdc_models.clip.blocks import run_block
from cdc_models.clip.text_layout import _rectangles, text_layout

NAMES = ["cat", "fire engine", "x ray of an unusually large aeroplane", "dog"]
POSITIONS = ["end", "middle", "front"]

word = st.sampled_from(["cat", "of", "zebra", "hippopotamus", "u.s.", "3d", "jack-o'-lantern", "a"])
name_lists = st.lists(st.lists(word, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=5, unique=True)


def word_context(backbone, words, m=1):
    """[m, n, W]: the token embeddings of the words."""
    parts = getattr(backbone.clip, "text", backbone.clip)
    ids = torch.tensor(backbone.encode_words(words))
    return parts.token_embedding.weight[ids].expand(m, -1, -1).clone()


def prompts(backbone, m, n, j, seed=0, k=None):
    """Random context and deep prompts that ask for gradients, in the backbone's dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = (m, n, backbone.text_width) if k is None else (m, k, n, backbone.text_width)
    context = torch.randn(shape, generator=generator).to(backbone.dtype).requires_grad_()
    deep = torch.randn(m, j - 1, n, backbone.text_width, generator=generator).to(backbone.dtype).requires_grad_()
    return context, deep


@pytest.mark.parametrize("variant", VARIANTS)
def test_word_embeddings_as_prompts_give_open_clips_features(variant):
    backbone = small_backbone(variant)
    words = "a photo of a"
    want = backbone.encode_text(backbone.tokenize([f"{words} {name}." for name in NAMES]))
    ours = encode_prompted_text(backbone, tokenize_classes(backbone, NAMES), word_context(backbone, words, m=2))
    assert_close(ours, want.expand(2, -1, -1))


def gradients(features, inputs):
    """Of a weighted sum of the features, by the inputs that have entries."""
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features.dtype)
    return torch.autograd.grad((features * weights).sum(), [x for x in inputs if x is not None and x.numel()])


def assert_matches_the_full_length_tower(backbone, names, context, deep=None, position="end", chunk=None):
    """Outputs and gradients of context and deep prompts, to rounding."""
    classes = tokenize_classes(backbone, names)
    ours = encode_prompted_text(backbone, classes, context, deep=deep, position=position, chunk=chunk)
    theirs = full_text(backbone, names, context, deep, position)
    assert_close(ours, theirs)
    for own, other in zip(gradients(ours, (context, deep)), gradients(theirs, (context, deep)), strict=True):
        assert_close(own, other)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deep_prompts_and_their_gradients_match_the_full_length_tower(variant, dtype):
    backbone = small_backbone(variant, dtype=dtype)
    assert_matches_the_full_length_tower(backbone, NAMES, *prompts(backbone, m=2, n=3, j=backbone.text_depth))


# Those variants that differ in the text tower, at CLIP's own length.
TEXT_VARIANTS = [name for name, (whole, _, text) in VARIANTS.items() if whole or text]


@cache
def full_size_context(variant, dtype):
    whole, vision, text = VARIANTS[variant]
    return small_backbone((whole, vision, text | {"context_length": 77}), dtype=dtype, frame=FRAMES.get(variant))


@settings(max_examples=100, deadline=None)
@given(
    variant=st.sampled_from(["flat", *TEXT_VARIANTS]),
    names=name_lists,
    n=st.integers(1, 5),
    j=st.integers(1, 3),
    m=st.integers(1, 3),
    position=st.sampled_from(POSITIONS),
    class_specific=st.booleans(),
    chunk=st.none() | st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_any_prompt_matches_the_77_token_tower(variant, names, n, j, m, position, class_specific, chunk, dtype, seed):
    backbone = full_size_context(variant, dtype)
    assert backbone.context_length == 77
    j = min(j, backbone.text_depth)
    context, deep = prompts(backbone, m, n, j, seed, k=len(names) if class_specific else None)
    if class_specific or position != "end":
        deep = None
    assert_matches_the_full_length_tower(backbone, names, context, deep, position, chunk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["flat", "own attention", "bidirectional"])
def test_half_precision_is_as_exact_as_open_clips_own(variant, dtype):
    backbone = small_backbone(variant, dtype=dtype)
    given = prompts(backbone, m=2, n=3, j=3)
    ours = encode_prompted_text(backbone, tokenize_classes(backbone, NAMES), given[0], deep=given[1])
    theirs = full_text(backbone, NAMES, *given)
    assert ours.dtype == theirs.dtype == dtype
    exact_given = [x.detach().double().requires_grad_() for x in given]
    exact = full_text(small_backbone(variant, dtype=dtype).double(), NAMES, *exact_given)
    truth = [exact, *gradients(exact, exact_given)]
    errors = [
        [
            float((x.detach() - y.detach()).norm() / y.detach().norm())
            for x, y in zip((f, *gradients(f, given)), truth, strict=True)
        ]
        for f in (ours, theirs)
    ]
    for own, other in zip(*errors, strict=True):
        assert own <= 1.5 * other


def listed_text_towers():
    """One model for each kind of text tower that open_clip lists, sizes and tokenizers aside: name -> (whole, text).

    Towers from Hugging Face are left out: building one takes a package and a download.
    """
    kinds = {}
    for name in open_clip.list_models():
        cfg = open_clip.get_model_config(name)
        text = {k: v for k, v in cfg["text_cfg"].items() if k not in {*TEXT, "mlp_ratio"} and "token" not in k}
        if "hf_model_name" not in text:
            whole = {k: cfg[k] for k in ("custom_text", "quick_gelu") if k in cfg}
            kinds.setdefault(repr((whole, text)), (name, whole, text | ({"eos_id": 49407} if "eos_id" in text else {})))
    return {name: (whole, text) for name, whole, text in kinds.values()}


@pytest.mark.parametrize(("name", "kind"), listed_text_towers().items(), ids=lambda x: x if isinstance(x, str) else "")
def test_every_kind_of_text_tower_in_open_clip_is_right(name, kind):
    whole, text = kind
    family = next((family for family in FRAMES if family in name), None)
    backbone = small_backbone((whole, {}, text), frame=FRAMES.get(family))
    assert_matches_the_full_length_tower(backbone, NAMES, *prompts(backbone, m=2, n=2, j=3))


@pytest.mark.parametrize("variant", ["flat", "SigLIP", "CLIPA"])
def test_a_prompt_fills_the_context_to_the_last_token(variant):
    backbone = small_backbone(variant)
    n = backbone.text_room - max(tokenize_classes(backbone, NAMES).token_lengths)
    assert_matches_the_full_length_tower(backbone, NAMES, *prompts(backbone, m=1, n=n, j=2))
    with pytest.raises(ValueError, match=rf"classes: .*aeroplane.* do not fit: {n + 1} context vectors leave"):
        encode_prompted_text(backbone, tokenize_classes(backbone, NAMES), torch.zeros(1, n + 1, 48))


@pytest.mark.parametrize("frame", [((), 49407, 0), ((49406, 5), 49407, 0)])
def test_a_causal_tower_without_a_start_or_with_two_is_packed(frame):
    backbone = small_backbone("flat", dtype=torch.float64, frame=frame)
    assert len(backbone.text_frame[0]) == len(frame[0])
    for position in POSITIONS:
        context, deep = prompts(backbone, m=2, n=3, j=3)
        assert_matches_the_full_length_tower(backbone, NAMES, context, deep if position == "end" else None, position)


@pytest.mark.parametrize("method", [CoOp, CDC])
@pytest.mark.parametrize("variant", ["SigLIP", "CLIPA", "CoCa"])
def test_methods_learn_on_towers_at_full_length(variant, method):
    backbone = small_backbone(variant)
    model = method(backbone, NAMES)
    images, targets = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    model.loss(images, targets).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.learned_parameters().values())
    other = model.with_classes([*NAMES[:2], "zebra"])
    assert other.predict(images).prob.shape == (3, 3)


@pytest.mark.parametrize("position", POSITIONS)
def test_padded_rectangles_give_the_same_features(position, monkeypatch):
    backbone = small_backbone(dtype=torch.float64)
    context, _ = prompts(backbone, m=2, n=3, j=1)
    features, groups = [], []
    for slack in (0, 10_000):
        monkeypatch.setattr("cdc_models.clip.text_layout.SLACK_CPU", slack)
        classes = tokenize_classes(backbone, NAMES)
        features.append(encode_prompted_text(backbone, classes, context, position=position))
        (layout,) = classes.layouts.values()
        groups.append(len(layout.groups))
    assert groups == [len(set(classes.token_lengths)), 1]
    assert_close(*features)


def test_only_real_tokens_are_encoded_and_the_prefix_once(monkeypatch):
    monkeypatch.setattr("cdc_models.clip.text_layout.SLACK_CPU", 0)
    backbone = small_backbone()
    classes = tokenize_classes(backbone, NAMES)
    reading = text_parts(backbone.clip).reading
    common = (classes, 4, False, "end", backbone.text_frame, reading, backbone.context_length, backbone.device)
    layout = text_layout(*common)
    assert layout.tokens.numel() == 1 + 4 + sum(length + 1 for length in classes.token_lengths)
    assert text_layout(*common) is layout  # worked out once


@pytest.mark.parametrize(("variant", "shares"), [("flat", True), ("bidirectional", False)])
def test_all_templates_and_classes_go_through_a_block_at_once(variant, shares, monkeypatch):
    monkeypatch.setattr("cdc_models.clip.text_layout.SLACK_CPU", 0)
    backbone, seen = small_backbone(variant), []

    def counted(block, x, *rest, **more):
        seen.append(tuple(x.shape[:2]))
        return run_block(block, x, *rest, **more)

    monkeypatch.setattr(text_tower, "run_block", counted)
    classes = tokenize_classes(backbone, NAMES)
    context, deep = prompts(backbone, m=4, n=2, j=3)
    encode_prompted_text(backbone, classes, context, deep=deep)
    packed = 1 + 2 + sum(length + 1 for length in classes.token_lengths)
    tokens = packed if shares else len(NAMES) * CONTEXT_LENGTH  # the full path
    assert seen == [(4, tokens)] * backbone.text_depth


def test_rectangles_join_only_while_padding_is_cheap():
    assert _rectangles([2, 2, 3, 9], slack=0) == [(2, 2), (1, 3), (1, 9)]
    assert _rectangles([2, 2, 3, 9], slack=2) == [(3, 3), (1, 9)]
    assert _rectangles([2, 2, 3, 9], slack=100) == [(4, 9)]


def saved_bytes(backbone, classes, context, chunk):
    """Bytes that autograd keeps between the forward and the backward pass, weights and inputs aside."""
    known = {p.untyped_storage().data_ptr() for p in (*backbone.parameters(), *backbone.buffers(), context)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encode_prompted_text(backbone, classes, context, chunk=chunk)
    return sum(kept.values())


def test_chunks_keep_next_to_nothing_for_the_backward_pass():
    backbone = small_backbone()
    classes = tokenize_classes(backbone, [f"{a} {b}" for a in ("red", "big", "old") for b in ("cat", "dog", "zebra")])
    context, _ = prompts(backbone, m=2, n=2, j=1)
    assert saved_bytes(backbone, classes, context, 2) < 0.05 * saved_bytes(backbone, classes, context, None)
    assert classes.chunks(2) is classes.chunks(2)  # worked out once


def test_methods_train_in_chunks_to_the_same_gradients(bundled):
    names = ["cat", "dog", "fire engine", "teapot", "umbrella with rain drops"]
    images, targets = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    for method in (CoOp, MaPLe, CDC):
        options = {"views": None} if method is CDC else {}
        model = method(bundled, names, **options)
        gradients = []
        for chunk in (None, 2):
            model.zero_grad()
            model.class_chunk = chunk
            model.loss(images, targets).backward()
            gradients.append([p.grad.clone() for p in model.learned_parameters().values()])
        for whole, pieces in zip(*gradients, strict=True):
            assert_close(pieces, whole)


@pytest.mark.parametrize("chunk", [0, -1])
def test_bad_chunks_are_refused(chunk):
    backbone = small_backbone()
    with pytest.raises(ValueError, match=f"chunk: expected a whole number >= 1, got {chunk}"):
        encode_prompted_text(backbone, tokenize_classes(backbone, NAMES), torch.zeros(1, 2, W), chunk=chunk)


def test_no_context_is_the_plain_name():
    backbone = small_backbone()
    want = backbone.encode_text(backbone.tokenize([f"{name}." for name in NAMES]))
    context = torch.zeros(1, 0, backbone.text_width)
    assert_close(encode_prompted_text(backbone, tokenize_classes(backbone, NAMES), context)[0], want)


def test_a_template_of_words_around_the_name():
    backbone = small_backbone()
    classes = tokenize_classes(backbone, NAMES, template="the {}, a type of pet.")
    want = backbone.encode_text(backbone.tokenize([f"a photo of the {name}, a type of pet." for name in NAMES[:2]]))
    ours = encode_prompted_text(backbone, classes, word_context(backbone, "a photo of"))
    assert_close(ours[0, :2], want)


def test_the_longest_name_that_fits_and_one_token_more():
    backbone = small_backbone()
    n = 4
    fits = " ".join(["cat"] * (CONTEXT_LENGTH - 2 - n - 1))  # start, end, context and the full stop
    context = word_context(backbone, "a photo of a")
    ours = encode_prompted_text(backbone, tokenize_classes(backbone, [fits]), context)
    assert_close(ours[0], backbone.encode_text(backbone.tokenize([f"a photo of a {fits}."])))
    classes = tokenize_classes(backbone, ["dog", f"{fits} dog"])
    with pytest.raises(ValueError, match=r"dog'.*leave 18 of the 22") as error:
        encode_prompted_text(backbone, classes, context)
    assert "'dog'" not in str(error.value)  # only the name that is too long is named


def test_underscores_are_spaces_and_names_stay_as_given():
    backbone = small_backbone()
    classes = tokenize_classes(backbone, ["fire_engine"])
    assert classes.names == ("fire_engine",)
    assert classes.rows == tokenize_classes(backbone, ["fire engine"]).rows
    assert classes.lengths.tolist() == list(classes.token_lengths)
    assert classes.ids[0, : classes.token_lengths[0]].tolist() == list(classes.rows[0])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one class name"),
        (["cat", " "], r"blank names at positions \[1\]"),
        (["cat", "dog", "cat"], "'cat' and 'cat' are the same class"),
        (["Fire Engine", "fire_engine"], "'fire_engine' and 'Fire Engine' are the same class"),
        ("cat", "expected a sequence of strings"),
        (["cat", 3], "expected a sequence of strings"),
        (["cat", "dog " * 30], r"too long for a context of 24 tokens.*dog .*\(31\)"),
    ],
)
def test_bad_class_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        tokenize_classes(small_backbone(), names)


@pytest.mark.parametrize("template", ["a photo.", "{} or {}"])
def test_a_template_needs_exactly_one_place_for_the_name(template):
    with pytest.raises(ValueError, match="exactly one"):
        tokenize_classes(small_backbone(), ["cat"], template)


def test_an_early_end_of_text_is_refused():
    with pytest.raises(ValueError, match=r"\['cat'\].*for the end of the text"):
        tokenize_classes(small_backbone(), ["cat"], "a <end_of_text> {}")


W = 48


@pytest.mark.parametrize(
    ("context", "deep", "position", "message"),
    [
        (torch.zeros(2, W), None, "end", r"context: expected .* \[M, n, 48\] or \[M, 4, n, 48\].*got \[2, 48\]"),
        (torch.zeros(1, 2, W + 1), None, "end", "context: expected"),
        (torch.zeros(0, 2, W), None, "end", "M >= 1"),
        (torch.zeros(1, 3, 2, W), None, "end", "context: expected"),  # 3 classes, 4 names
        (torch.zeros(1, 2, W, dtype=torch.long), None, "end", "int64"),
        ("a photo", None, "end", "got str"),
        (torch.zeros(1, 2, W, device="meta"), None, "end", "context is on meta"),
        (torch.zeros(1, 2, W), None, "begin", "position: expected one of"),
        (torch.zeros(1, 2, W), torch.zeros(2, 2, 2, W), "end", r"deep: expected .*\[1, at most 2, 2, 48\]"),
        (torch.zeros(1, 2, W), torch.zeros(1, 2, 3, W), "end", "deep: expected"),
        (torch.zeros(1, 2, W), torch.zeros(1, 3, 2, W), "end", "deep: expected"),  # 3 blocks: at most 2 deep
        (torch.zeros(1, 2, W), torch.zeros(1, 2, 2, W, dtype=torch.long), "end", "deep: expected"),
        (torch.zeros(1, 2, W), torch.zeros(1, 2, 2, W, device="meta"), "end", "deep is on meta"),
        (torch.zeros(1, 4, 2, W), torch.zeros(1, 2, 2, W), "end", "class-specific"),
        (torch.zeros(1, 2, W), torch.zeros(1, 2, 2, W), "front", "deep prompts need position='end'"),
        (torch.zeros(1, 2, W), torch.zeros(1, 2, 2, W), "middle", "deep prompts need position='end'"),
    ],
)
def test_bad_prompts_are_refused(context, deep, position, message):
    backbone = small_backbone()
    classes = tokenize_classes(backbone, NAMES)
    with pytest.raises(ValueError, match=message):
        encode_prompted_text(backbone, classes, context, deep=deep, position=position)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"pool_type": "first"}, "reads the first token, which sees nothing of the name"),
        ({"pool_type": "none"}, "returns tokens instead of one feature"),
        ({"scaled_cosine_attn": True}, "scaled cosine"),
        ({"pool_type": "eos", "eos_id": 2}, "pools at token 2, its tokenizer ends with 49407"),
    ],
)
def test_towers_that_cannot_be_prompted_say_why_and_still_encode(text, message):
    backbone = small_backbone(({"custom_text": True}, {}, text))
    with pytest.raises(UnsupportedBackboneError, match=message) as error:
        tokenize_classes(backbone, ["cat"])
    assert str(error.value).startswith("the text tower of small cannot be prompted: it")
    # open_clip 3.3 cannot run its own scaled cosine attention
    if "scaled_cosine_attn" not in text and text.get("pool_type") != "none":
        tokens = backbone.tokenize(["a cat", "a dog"])
        assert backbone.encode_text(tokens).shape == (2, 32)


def test_open_clips_scaled_cosine_attention_is_still_broken():
    """The reason why it is refused; should this test fail, it can be supported."""
    clip = small_clip(({}, {}, {"scaled_cosine_attn": True}))
    with pytest.raises(RuntimeError):
        clip.encode_text(torch.zeros(1, CONTEXT_LENGTH, dtype=torch.long))
