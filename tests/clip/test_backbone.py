"""Loading a CLIP, what a backbone promises, and what it refuses."""

import json
import re

import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from PIL import Image
from safetensors.torch import save_file
from tower_reference import CONTEXT_LENGTH, TEXT, VISION, Framed, small_backbone, small_clip

from cdc_models import CDC, CoOp, MaPLe, ZeroShot
from cdc_models.clip import (
    ClipBackbone,
    UnsupportedBackboneError,
    encode_prompted_image,
    encode_prompted_text,
    load_clip,
    sources,
    tokenize_classes,
)
from cdc_models.data import test_transform as plain_transform
from cdc_models.data import train_transform
from cdc_models.prompts import CoupledPrompts, PromptContext

MODEL_CFG = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}


def write_folder(folder, config=None, weights="model.safetensors", clip=None, config_name="open_clip_config.json"):
    state = {name: t.contiguous() for name, t in (clip or small_clip(seed=7)).state_dict().items()}
    if weights.endswith(".safetensors"):
        save_file(state, folder / weights)
    else:
        torch.save(state, folder / weights)
    (folder / config_name).write_text(json.dumps(config or {"model_cfg": MODEL_CFG}))
    return folder


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"])
def test_a_folder_says_what_the_network_is(tmp_path, weights):
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0]}}
    backbone = load_clip("mine", str(write_folder(tmp_path, config, weights)))
    assert (backbone.name, backbone.pretrained) == ("mine", str(tmp_path))
    assert backbone.fingerprint == small_backbone(seed=7).fingerprint
    assert (backbone.image_mean, backbone.image_std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
    assert backbone.tokenize(["a cat"]).shape == (1, CONTEXT_LENGTH)


def test_a_folder_with_a_cut_tokenizer_and_half_precision_weights(tmp_path):
    text = TEXT | {"vocab_size": 512 + 100 + 2}
    config = {"model_cfg": MODEL_CFG | {"text_cfg": text}, "tokenizer": {"merges": 100}}
    clip = small_clip(({}, {}, text)).half()
    backbone = load_clip("mine", str(write_folder(tmp_path, config, clip=clip, config_name="config.json")))
    assert backbone.text_frame == ((612,), (613, *[0] * (CONTEXT_LENGTH - 3)))
    assert {t.dtype for t in backbone.parameters()} == {torch.float32}
    assert torch.equal(backbone.clip.visual.proj, clip.visual.proj.float())
    assert backbone.encode_text(backbone.tokenize(["a photo of a cat."])).shape == (1, 32)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_from_a_file(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: MODEL_CFG if name == "ViT-tiny" else None)
    write_folder(tmp_path, weights=f"weights{suffix}")
    backbone = load_clip("ViT-tiny", str(tmp_path / f"weights{suffix}"))
    assert backbone.fingerprint == small_backbone(seed=7).fingerprint


@pytest.mark.parametrize("custom", [False, True])
def test_random_weights_and_both_network_classes(custom, monkeypatch):
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: MODEL_CFG | {"custom_text": custom})
    backbone = load_clip("ViT-B/32", device="cpu")
    assert isinstance(backbone.clip, open_clip.CustomTextCLIP if custom else open_clip.CLIP)
    assert backbone.pretrained is None
    sizes = (backbone.embed_dim, backbone.text_width, backbone.image_width, backbone.text_depth, backbone.image_depth)
    assert sizes == (32, 48, 64, 3, 3)
    assert (backbone.image_size, backbone.context_length) == (32, 24)


def test_unknown_names_list_close_ones():
    with pytest.raises(ValueError, match=r"'vit-b-16-quickgel' is not an open_clip model; .*ViT-B-16-quickgelu"):
        load_clip("vit-b-16-quickgel")
    with pytest.raises(ValueError, match="see open_clip"):
        load_clip("%%%%")


@pytest.mark.parametrize("tag", ["openai", "dfn2b", "metaclip_400m"])
def test_weights_trained_with_another_activation_are_refused(tag):
    with pytest.raises(ValueError, match=f"{tag}.*trained with QuickGELU.*use 'ViT-B-16-quickgelu'"):
        load_clip("ViT-B-16", tag)


def test_gelu_weights_under_a_quickgelu_name_are_refused(monkeypatch):
    monkeypatch.setattr(open_clip, "is_pretrained_cfg", lambda name, tag: True)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"url": "somewhere"})
    with pytest.raises(ValueError, match=r"trained with GELU.*use 'ViT-B-16'"):
        load_clip("ViT-B-16-quickgelu", "some_tag")


def test_weights_that_cannot_be_downloaded_say_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"'openai' of ViT-B-16-quickgelu .*no network.*local file or folder"):
        load_clip("ViT-B-16-quickgelu", "openai")


def test_a_network_that_cannot_be_built_is_named(monkeypatch):
    def broken(*args, **kwargs):
        raise ImportError("transformers is missing")

    monkeypatch.setattr(sources, "build_network", broken)
    with pytest.raises(RuntimeError, match="could not build roberta-ViT-B-32: transformers is missing"):
        load_clip("roberta-ViT-B-32")


def test_a_missing_file_lists_the_tags(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.pt' is neither a file or folder.*tags: .*laion2b_s34b_b79k"):
        load_clip("ViT-B-32", str(tmp_path / "nowhere.pt"))


def test_weights_of_another_shape_are_refused(tmp_path):
    config = {"model_cfg": MODEL_CFG | {"embed_dim": 16}}
    with pytest.raises(ValueError, match=r"do not fit the network.*(proj|projection)"):
        load_clip("mine", str(write_folder(tmp_path, config)))


@pytest.mark.parametrize(
    ("change", "embedding"),
    [({"text_cfg": TEXT | {"context_length": 12}}, ""), ({"vision_cfg": VISION | {"image_size": 48}}, "visual.")],
)
def test_position_embeddings_are_not_stretched(tmp_path, change, embedding):
    with pytest.raises(
        ValueError, match=rf"fit the network: {embedding}positional_embedding is \[\d+, \d+\], expected"
    ):
        load_clip("mine", str(write_folder(tmp_path, {"model_cfg": MODEL_CFG | change})))


def test_files_that_are_no_weights_are_refused(tmp_path):
    write_folder(tmp_path, weights="pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="do not fit the network"):
        load_clip("mine", str(tmp_path))


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    write_folder(tmp_path, weights="pytorch_model.bin")
    torch.save({"state_dict": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="do not fit the network"):
        load_clip("mine", str(tmp_path))
    assert not (tmp_path / "harm").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*received a zip file:UserWarning")
@pytest.mark.parametrize("folder", [False, True])
def test_a_torchscript_archive_is_refused_and_the_advice_works(tmp_path, folder, monkeypatch):
    """OpenAI publishes its weights as such archives, with three numbers among them that no network asks for."""
    clip = small_clip(seed=7)
    holder = torch.nn.Module()
    for name, tensor in {**clip.state_dict(), "vocab_size": torch.tensor(49408)}.items():
        *path, last = name.split(".")
        owner = holder
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.register_buffer(last, tensor.half() if tensor.is_floating_point() else tensor)
    archive = tmp_path / "pytorch_model.bin"
    torch.jit.save(torch.jit.script(holder), archive)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL_CFG}))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: MODEL_CFG)
    with pytest.raises(
        ValueError, match="TorchScript archive.*tag.*'openai'.*convert a file that you trust"
    ) as refusal:
        load_clip("ViT-tiny", tmp_path if folder else archive)
    (advice,) = re.findall(r"safetensors\.torch\.save_file.*", str(refusal.value))
    exec(f"import open_clip, safetensors.torch; {advice}", {})
    backbone = load_clip("ViT-tiny", tmp_path / "pytorch_model.safetensors")
    assert torch.equal(backbone.clip.visual.proj, clip.visual.proj.half().float())


@pytest.mark.parametrize(
    ("remove", "message"), [("model.safetensors", "no weights"), ("open_clip_config.json", "no configuration")]
)
def test_an_incomplete_folder_is_refused(tmp_path, remove, message):
    write_folder(tmp_path)
    (tmp_path / remove).unlink()
    with pytest.raises(ValueError, match=message):
        load_clip("mine", str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"preprocess_cfg": {}}', "has no 'model_cfg'"),
        ("[]", "has no 'model_cfg'"),
        ("{", "is not JSON"),
        ('{"model_cfg": {}}', "does not describe a network"),
        ('{"model_cfg": {"embed_dim": "x", "vision_cfg": {}, "text_cfg": {}}}', "does not describe a network"),
    ],
)
def test_a_configuration_without_a_network_is_refused(tmp_path, config, message):
    write_folder(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(ValueError, match=f"pretrained: .*open_clip_config.json {message}"):
        load_clip("mine", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5,), "name: expected an open_clip model name or 'bundled', got 5"),
        ((None,), "name: .* got None"),
        (("hf-hub:nobody/nothing",), "name: .*'hf-hub:nobody/nothing'; .*local folder.*`pretrained`"),
        (("local-dir:/nowhere", "openai"), "name: .*'local-dir:/nowhere'"),
        (("ViT-B-32", 5), "pretrained: expected a tag, a file, a folder or None, got 5"),
        (("ViT-B-32", b"openai"), "pretrained: .* got b'openai'"),
        (("ViT-B-32", ""), "pretrained: .* got ''"),
    ],
)
def test_arguments_that_are_no_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_clip(*arguments)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", 1.5])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"device: '?{device}'? cannot be used"):
        load_clip("bundled", device=device)


@pytest.mark.parametrize("arguments", [("ViT-B-32", "bundled"), ("bundled", "openai")])
def test_the_bundled_clip_goes_by_its_own_name(arguments):
    with pytest.raises(ValueError, match=r"load_clip\('bundled'\) alone"):
        load_clip(*arguments)


# -- a backbone ------------------------------------------------------------------------------------------------------


def test_a_backbone_is_frozen_and_stays_in_evaluation_mode():
    backbone = small_backbone("patch dropout")
    owner = torch.nn.Sequential(backbone).train()
    assert owner.training
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_scale_and_bias():
    backbone = small_backbone()
    assert backbone.scale.item() == pytest.approx(1 / 0.07)
    assert backbone.bias is None
    siglip = small_backbone(({"init_logit_bias": -10, "nonscalar_logit_scale": True}, {}, {}))
    assert siglip.bias.item() == -10
    assert siglip.scale.shape == siglip.bias.shape == ()


def test_coca_returns_unnormalised_single_features():
    """CoCa's own encode_* normalise by default, and its towers also return tokens."""
    decoder = {"width": 48, "heads": 4, "layers": 1, "context_length": CONTEXT_LENGTH, "vocab_size": 49408}
    tokens = {"output_tokens": True}
    backbone = small_backbone(
        (
            {"custom_text": True, "multimodal_cfg": decoder},
            {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 3} | tokens,
            {"embed_cls": True} | tokens,
        )
    )
    text = backbone.encode_text(backbone.tokenize(["a cat"]))
    image = backbone.encode_image(torch.randn(1, 3, 32, 32))
    assert text.shape == image.shape == (1, 32)
    assert abs(text.norm() - 1) > 1e-3
    assert abs(image.norm() - 1) > 1e-3


class StandInForAHuggingFaceTower(HFTextEncoder):
    """Is one by type, and has nothing of one inside: the tests do without the transformers package."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.output_dim = 32

    def forward(self, tokens):
        return tokens.float() @ torch.ones(CONTEXT_LENGTH, 32).cumsum(1)


def test_a_stand_in_for_a_hugging_face_text_tower_works_for_zero_shot_and_is_refused_for_prompts():
    clip = small_clip("custom text")
    clip.text = StandInForAHuggingFaceTower()
    backbone = ClipBackbone(
        clip, name="hf", make_tokenizer=lambda: open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    )
    assert backbone.embed_dim == 32
    assert backbone.encode_text(torch.ones(2, CONTEXT_LENGTH, dtype=torch.long)).shape == (2, 32)
    assert ZeroShot(backbone, ["cat", "dog"]).predict(torch.zeros(1, 3, 32, 32)).prob.shape == (1, 2)
    uses = [backbone.require_promptable_text, lambda: backbone.text_width, lambda: backbone.text_depth]
    uses += [lambda method=method: method(backbone, ["cat", "dog"]) for method in (CoOp, MaPLe, CDC)]
    for refused in uses:
        with pytest.raises(UnsupportedBackboneError, match="StandIn.*, not one of open_clip's own text transformers"):
            refused()


def test_a_tokenizer_that_cannot_be_had_is_missed_only_when_needed():
    def offline():
        raise OSError("needs a download")

    backbone = ClipBackbone(small_clip(), name="small", make_tokenizer=offline)
    assert backbone.encode_text(torch.zeros(1, CONTEXT_LENGTH, dtype=torch.long)).shape == (1, 32)
    with pytest.raises(RuntimeError, match="tokenizer of small: needs a download"):
        backbone.tokenize(["a cat"])
    with pytest.raises(RuntimeError, match="without a tokenizer"):
        ClipBackbone(small_clip()).tokenize(["a cat"])


def test_tokenizers_of_the_hugging_face_kind():
    backbone = small_backbone(({}, {}, {"pool_type": "eos"}), frame=((0,), 2, 1))
    assert backbone.text_frame == ((0,), (2, *[1] * (CONTEXT_LENGTH - 3)))
    assert (backbone.eot_id, backbone.text_room) == (2, CONTEXT_LENGTH - 2)
    assert backbone.encode_words(" a cat ") == open_clip.SimpleTokenizer().encode("a cat")
    backbone.require_promptable_text()


class ClassTokenLast(Framed):
    """Puts one more token behind the padding."""

    def __call__(self, texts, context_length):
        return torch.cat([super().__call__(texts, context_length - 1), torch.full((len(texts), 1), 7)], dim=1)


class OtherWords(Framed):
    """Finds other words in a text than it says."""

    def __call__(self, texts, context_length):
        return super().__call__(["b"] * len(texts), context_length)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (object, "odd is not like open_clip's"),
        (lambda: ClassTokenLast(CONTEXT_LENGTH, (0,), 2, 1), "does not put an end and padding behind the words"),
        (lambda: OtherWords(CONTEXT_LENGTH, (0,), 2, 1), "does not put an end and padding behind the words"),
    ],
)
def test_tokenizers_whose_frame_is_not_understood_take_no_prompts(tokenizer, message):
    backbone = ClipBackbone(small_clip(), name="odd", make_tokenizer=tokenizer)
    with pytest.raises(UnsupportedBackboneError, match=f"the tokenizer of .*{message}"):
        tokenize_classes(backbone, ["cat"])


def test_preprocess_is_the_published_test_transform():
    backbone = small_backbone()
    x = backbone.preprocess(Image.new("RGB", (64, 48), (255, 0, 0)))
    assert x.shape == (3, 32, 32)
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor(backbone.image_mean)) / torch.tensor(backbone.image_std)
    assert torch.allclose(x[:, 16, 16], red, atol=1e-5)
    assert backbone.image_mean == open_clip.OPENAI_DATASET_MEAN
    assert backbone.image_std == open_clip.OPENAI_DATASET_STD


def test_images_that_are_not_square():
    backbone = small_backbone(({}, {"image_size": [32, 16]}, {}))
    assert backbone.image_shape == (32, 16)
    assert backbone.encode_image(torch.randn(1, 3, 32, 16)).shape == (1, 32)
    with pytest.raises(UnsupportedBackboneError, match="32 x 16"):
        _ = backbone.image_size


def test_the_fingerprint_is_stable_cached_and_tells_weights_apart():
    backbone, twin, other = small_backbone(), small_backbone(), small_backbone(seed=1)
    first = backbone.fingerprint
    assert first == backbone.fingerprint == twin.fingerprint != other.fingerprint
    assert backbone._fingerprint[1] is backbone.fingerprint  # the second call hashes nothing
    with torch.no_grad():
        backbone.clip.visual.transformer.resblocks[1].mlp.c_fc.bias[3] += 1e-3
    assert backbone.fingerprint != first
    backbone.clip.load_state_dict(twin.clip.state_dict())
    assert backbone.fingerprint == first
    assert twin.bfloat16().fingerprint != first


@pytest.mark.parametrize("texts", [[], "a cat", ["a cat", None]])
def test_bad_texts_are_refused(texts):
    with pytest.raises(ValueError, match="non-empty sequence of strings"):
        small_backbone().tokenize(texts)


def test_texts_that_do_not_fit_are_named_not_cut():
    backbone = small_backbone()
    assert backbone.tokenize([" cat" * (CONTEXT_LENGTH - 2)])[0, -1] == backbone.eot_id
    with pytest.raises(ValueError, match=r"too long for a context of 24 .*dog") as error:
        backbone.tokenize(["a cat", " dog" * (CONTEXT_LENGTH - 1)])
    assert "a cat" not in str(error.value)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(2, CONTEXT_LENGTH),
        torch.zeros(2, CONTEXT_LENGTH, dtype=torch.bool),
        torch.zeros(3, dtype=torch.long),
        torch.zeros(2, CONTEXT_LENGTH - 1, dtype=torch.long),
        torch.zeros(0, CONTEXT_LENGTH, dtype=torch.long),
        ["a cat"],
    ],
)
def test_bad_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match="tokens: expected token ids"):
        small_backbone().encode_text(tokens)


@pytest.mark.parametrize("token", [-1, 49408])
def test_tokens_that_the_vocabulary_has_not(token):
    with pytest.raises(ValueError, match=rf"tokens: expected ids in \[0, 49408\), got {token} to {token}"):
        small_backbone().encode_text(torch.full((1, CONTEXT_LENGTH), token))


def test_words_that_are_no_text():
    with pytest.raises(ValueError, match="text: expected a text, got 5"):
        small_backbone().encode_words(5)


@pytest.mark.parametrize("clip", [5, None, torch.nn.Linear(2, 2)], ids=["number", "none", "layer"])
def test_what_is_no_network(clip):
    with pytest.raises(ValueError, match="clip: expected an open_clip CLIP.*got (int|NoneType|Linear)"):
        ClipBackbone(clip)


@pytest.mark.parametrize(
    "call",
    [
        lambda: encode_prompted_text("b", None, None),
        lambda: encode_prompted_image(None, None, None),
        lambda: tokenize_classes("bundled", ["cat"]),
        lambda: PromptContext("bundled", 2),
        lambda: CoupledPrompts(5),
        lambda: train_transform("bundled"),
        lambda: plain_transform(small_clip()),
    ],
)
def test_what_is_no_backbone(call):
    with pytest.raises(ValueError, match="backbone: expected a ClipBackbone, as load_clip gives, got "):
        call()


def test_names_in_place_of_class_tokens():
    with pytest.raises(ValueError, match="classes: expected what tokenize_classes gives, got list"):
        encode_prompted_text(small_backbone(), ["cat"], torch.zeros(1, 2, 48))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 16, 16),
        torch.zeros(3, 32, 32),
        torch.zeros(1, 2, 3, 32, 32),
        torch.full((1, 3, 32, 32), torch.nan),
    ],
)
def test_bad_images_are_refused(images):
    with pytest.raises(ValueError, match="images: expected"):
        small_backbone().encode_image(images)
