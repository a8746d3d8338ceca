"""Small random CLIPs, and prompted towers computed the long way round: full length, one prompt after the other.

The references call open_clip's own modules and share no code with the library.
"""

import open_clip
import torch
from open_clip.transformer import text_global_pool

from cdc_models.clip import ClipBackbone
from cdc_models.clip.sources import build_network

CONTEXT_LENGTH = 24
VISION = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 3}
OWN_BLOCKS = dict.fromkeys(("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), True)

# What open_clip can configure and a tower can get wrong: name -> (whole, vision, text) changes.
VARIANTS = {
    "flat": ({}, {}, {}),
    "custom text": ({"custom_text": True}, {}, {}),
    "quick gelu": ({"quick_gelu": True}, {}, {}),
    "projection with bias": ({"custom_text": True}, {}, {"proj_bias": True}),
    "no text projection": ({"embed_dim": 48}, {}, {"proj_type": "none"}),
    "layer scale": ({}, {"ls_init_value": 0.5}, {"ls_init_value": 0.5}),
    "own attention": ({"custom_text": True}, OWN_BLOCKS, OWN_BLOCKS),
    "own attention, plain": ({}, {"block_type": "custom"}, {"block_type": "custom"}),
    "norms": ({}, {"norm_kwargs": {"eps": 1e-3}, "no_ln_pre": True}, {"norm_kwargs": {"eps": 1e-3}}),
    "pool at eos": ({"custom_text": True}, {"pool_type": "avg"}, {"pool_type": "eos", "eos_id": 49407}),
    "bidirectional": ({}, {"final_ln_after_pool": True}, {"no_causal_mask": True}),
    "average, late norm": ({}, {"final_ln_after_pool": True, "pool_type": "avg"}, {}),
    "attentional pool": ({}, {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2}, {}),
    "patch dropout": ({}, {"patch_dropout": 0.5}, {}),
    "one block": ({}, {"layers": 1}, {"layers": 1}),
    "SigLIP": ({"custom_text": True}, {}, {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}),
    "CLIPA": ({}, {}, {"no_causal_mask": True, "pool_type": "last"}),
    "CoCa": ({"custom_text": True}, {}, {"embed_cls": True}),
    "CoCa, mask put right": ({"custom_text": True}, {}, {"embed_cls": True, "set": {"correct_cls_mask": True}}),
    "CoCa, bidirectional": ({"custom_text": True}, {}, {"embed_cls": True, "no_causal_mask": True}),
    "padding hidden": ({"custom_text": True}, {}, {"no_causal_mask": True, "set": {"use_pad_mask": True}}),
    "reads the first": ({"custom_text": True}, {}, {"no_causal_mask": True, "pool_type": "first"}),
    "reads the last": ({"custom_text": True}, {}, {"pool_type": "last"}),
}


class Framed:
    """The face of open_clip's HFTokenizer around CLIP's words: `start` before them, `end` and padding behind."""

    def __init__(self, context_length, start, end, pad):
        self.context_length, self.start, self.end, self.pad = context_length, start, end, pad
        self.clip = open_clip.SimpleTokenizer(context_length=context_length)
        self.tokenizer = lambda text, add_special_tokens: type("Encoding", (), {"input_ids": self.clip.encode(text)})

    def clean_fn(self, text):
        return text.strip()

    def __call__(self, texts, context_length):
        rows = [[*self.start, *self.clip.encode(text), self.end] for text in texts]
        return torch.tensor([row + [self.pad] * (context_length - len(row)) for row in rows])


# Variants whose published tokenizers are of another kind: T5's has no start; BERT's end is erased for CLIPA.
FRAMES = {"SigLIP": ((), 1, 1), "CLIPA": ((101,), 0, 0)}


def small_clip(variant="flat", seed=0):
    whole, vision, text = VARIANTS[variant] if isinstance(variant, str) else variant
    text = TEXT | text
    attributes = text.pop("set", {})  # what the class of the text tower knows and open_clip's configurations do not
    torch.manual_seed(seed)
    clip = build_network({"embed_dim": 32, "vision_cfg": VISION | vision, "text_cfg": text} | whole)
    for name, value in attributes.items():
        assert hasattr(clip.text, name)
        setattr(clip.text, name, value)
    with torch.no_grad():  # norms, scales and biases start as the identity: move them, so that none can be forgotten
        for name, parameter in clip.named_parameters():
            if not name.startswith("logit"):
                parameter += 0.05 * torch.randn_like(parameter)
    return clip


def small_backbone(variant="flat", seed=0, dtype=torch.float32, frame=None):
    """A backbone of a few ten thousand parameters with open_clip's tokenizer, or one that is framed otherwise."""
    clip = small_clip(variant, seed).to(dtype)
    length = int(clip.context_length)
    return ClipBackbone(
        clip, name="small", make_tokenizer=lambda: _tokenizer(frame or FRAMES.get(str(variant)), length)
    )


def _tokenizer(frame, length):
    return Framed(length, *frame) if frame else open_clip.SimpleTokenizer(context_length=length)


def full_text(backbone, names, context, deep=None, position="end"):
    """[M, K, D]: every prompt at full length, as CoOp assembles it and MaPLe deepens it.

    Masks and pooling are open_clip's own; so are the tokens, with words in the places of the context.
    """
    tower = getattr(backbone.clip, "text", backbone.clip)
    n, tokenizer = context.size(-2), backbone.tokenizer
    tokens = tokenizer([" ".join(["x"] * n + [f"{name}."]) for name in names], context_length=tower.context_length)
    s = len(getattr(tokenizer, "start", [0]))
    encode = backbone.encode_words
    appended = getattr(tower, "cls_emb", None)
    masked = appended is not None or getattr(tower, "use_pad_mask", False)
    mask = tower._embeds(tokens)[1] if masked else tower.attn_mask
    features = []
    for m in range(context.size(0)):
        embedded = tower.token_embedding(tokens)
        rows = []
        for k, name in enumerate(names):
            own = context[m] if context.ndim == 3 else context[m, k]
            start, rest = embedded[k, :s], embedded[k, s + n :]
            size = len(encode(name))
            if position == "end":
                row = [start, own, rest]
            elif position == "middle":
                row = [start, own[: n // 2], rest[:size], own[n // 2 :], rest[size:]]
            else:
                row = [start, rest[:size], own, rest[size:]]
            rows.append(torch.cat(row if appended is None else [*row, appended[None]]))
        x = torch.stack(rows) + tower.positional_embedding
        for i, block in enumerate(tower.transformer.resblocks):
            if deep is not None and 1 <= i <= deep.size(1):
                x = torch.cat([x[:, :s], deep[m, i - 1].expand(len(names), -1, -1), x[:, s + n :]], dim=1)
            x = block(x, attn_mask=mask)
        flat = tower is backbone.clip
        pool, eos = (tower.text_pool_type, tower.text_eos_id) if flat else (tower.pool_type, tower.eos_id)
        x = text_global_pool(tower.ln_final(x), tokens, "last" if appended is not None else pool, eos)
        if isinstance(tower.text_projection, torch.nn.Linear):
            x = tower.text_projection(x)
        elif tower.text_projection is not None:
            x = x @ tower.text_projection
        features.append(x)
    return torch.stack(features)


def full_image(backbone, images, context, deep=None, start=0):
    """[B, M, D]: prompts appended to the image's tokens (before block `start`), one prompt after the other."""
    visual = backbone.clip.visual
    n, features = context.size(1), []
    for m in range(context.size(0)):
        pictures = images if images.ndim == 4 else images[:, m]
        b = len(pictures)
        x = visual.conv1(pictures).reshape(b, visual.conv1.out_channels, -1).permute(0, 2, 1)
        x = torch.cat([visual.class_embedding.expand(b, 1, -1), x], dim=1) + visual.positional_embedding
        length = x.size(1)
        prompts = context[m].expand(b, -1, -1)
        x = visual.ln_pre(x if start else torch.cat([x, prompts], dim=1))
        for i, block in enumerate(visual.transformer.resblocks):
            if i == start > 0:
                x = torch.cat([x, prompts], dim=1)
            if deep is not None and start + 1 <= i <= start + deep.size(1):
                x = torch.cat([x[:, : x.size(1) - n], deep[m, i - start - 1].expand(b, -1, -1)], dim=1)
            x = block(x)
        pooled, _ = visual._pool(x[:, :length])  # open_clip's own pooling, without the prompts
        features.append(pooled @ visual.proj)
    return torch.stack(features, dim=1)


def assert_close(ours, theirs, dtype=None):
    """Equal to rounding, relative to the largest entry."""
    bound = {torch.float64: 1e-11, torch.float32: 5e-5}[dtype or theirs.dtype]
    assert ours.shape == theirs.shape
    error, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= bound * size, f"off by {error:.2e} where the largest entry is {size:.2e}"
