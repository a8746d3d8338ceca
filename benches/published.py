"""CoOp's and MaPLe's training losses the way their public code computes them, over open_clip's own modules; and CDC's.

CDC's own code was not at hand. Its rows are our reading: MaPLe's towers once for each template, the pairwise fusion of
Trusted Multi-View Classification's public code, and our losses.

The learned prompts come from our modules, so that loss and gradients can be compared; everything that costs time is
as published: every prompt padded to the full context (77 tokens), every class encoded with a prefix of its own, one
pass of both towers for each template, pairwise K x K fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import torch
import torch.nn.functional as F
from pairwise import pairwise_dempster
from torch import Tensor

from cdc_models.clip import ClipBackbone
from cdc_models.methods import CDC, CoOp, MaPLe, Method


@lru_cache(maxsize=4)
def embedded_names(backbone: ClipBackbone, names: tuple[str, ...], n: int) -> tuple[Tensor, Tensor]:
    """Tokens [K, 77], with room for n context vectors, and their embeddings [K, 77, W]: made once, as published."""
    tower = getattr(backbone.clip, "text", backbone.clip)
    tokens = backbone.tokenize([" ".join(["x"] * n + [f"{name}."]) for name in names]).to(backbone.device)
    with torch.no_grad():
        return tokens, tower.token_embedding(tokens)


def prepare(model: Method) -> None:
    """What is made once, before training."""
    embedded_names(model.backbone, model.class_names, model.options["n_ctx"])


def text_tower(
    backbone: ClipBackbone,
    names: Sequence[str],
    context: Tensor,
    deep: Tensor | None = None,
    length: int | None = None,
    some: slice = slice(None),
) -> Tensor:
    """Text features [K, D] of context [n, W] and deep prompts [J - 1, n, W], every prompt at full length.

    `length`: every prompt cut to so many tokens; the end of each must be among them. `some`: of these names only.
    """
    tower = getattr(backbone.clip, "text", backbone.clip)
    n = len(context)
    tokens, embedded = (whole[some, :length] for whole in embedded_names(backbone, tuple(names), n))
    k, mask = len(tokens), tower.attn_mask[:length, :length]
    x = torch.cat([embedded[:, :1], context.expand(k, -1, -1), embedded[:, 1 + n :]], dim=1)
    x = x + tower.positional_embedding[:length]
    for i, block in enumerate(tower.transformer.resblocks):
        if deep is not None and 1 <= i <= len(deep):
            x = torch.cat([x[:, :1], deep[i - 1].expand(k, -1, -1), x[:, 1 + n :]], dim=1)
        x = block(x, attn_mask=mask)
    x = tower.ln_final(x)[torch.arange(k, device=x.device), tokens.argmax(dim=1)]
    return x @ tower.text_projection


def image_tower(backbone: ClipBackbone, images: Tensor, context: Tensor, deep: Tensor) -> Tensor:
    """Image features [B, D] of images [B, 3, H, W] with context [n, W] appended and deep prompts [J - 1, n, W]."""
    visual = backbone.clip.visual
    b, n = len(images), len(context)
    x = visual.conv1(images).flatten(2).permute(0, 2, 1)
    x = torch.cat([visual.class_embedding.expand(b, 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, context.expand(b, -1, -1)], dim=1))
    for i, block in enumerate(visual.transformer.resblocks):
        if 1 <= i <= len(deep):
            x = torch.cat([x[:, :-n], deep[i - 1].expand(b, -1, -1)], dim=1)
        x = block(x)
    return visual.ln_post(x[:, 0]) @ visual.proj


def text_prompts(model: Method) -> list[tuple[Tensor, Tensor | None]]:
    """Context and deep prompts of each template."""
    if isinstance(model, CoOp):
        return [(model.context()[0], None)]
    assert isinstance(model, MaPLe | CDC)
    return list(zip(*model.prompts.text(), strict=True))


def text_features(model: Method) -> Tensor:
    """Text features [M, K, D], template by template."""
    return torch.stack([text_tower(model.backbone, model.class_names, *prompt) for prompt in text_prompts(model)])


def text_in_pieces(model: Method, classes: int) -> Tensor:
    """The same without a graph, the backward pass already made: so many classes at a time, each piece forward and, with
    a stand-in for the loss's gradient, backward. The work of both passes in the memory of one piece."""
    features = []
    for prompt in text_prompts(model):
        pieces = []
        for start in range(0, len(model.class_names), classes):
            some = slice(start, start + classes)
            piece = text_tower(model.backbone, model.class_names, *prompt, some=some)
            piece.backward(torch.ones_like(piece))
            pieces.append(piece.detach())
        features.append(torch.cat(pieces))
    return torch.stack(features)


def image_features(model: Method, images: Tensor) -> Tensor:
    """Image features [B, M, D] of images [B, 3, H, W] or views [B, M, 3, H, W], template by template."""
    if isinstance(model, CoOp):
        with torch.no_grad():
            return model.backbone.clip.encode_image(images).unsqueeze(1)
    assert isinstance(model, MaPLe | CDC)
    views = images.unsqueeze(1) if images.ndim == 4 else images
    prompts = zip(views.unbind(1), *model.prompts.image(), strict=True)
    return torch.stack([image_tower(model.backbone, view, *prompt) for view, *prompt in prompts], 1)


def objective(model: Method, image: Tensor, text: Tensor, targets: Tensor) -> Tensor:
    """The training loss of these features, [B, M, D] and [M, K, D]."""
    if not isinstance(model, CDC):
        cosine = F.normalize(image[:, 0], dim=-1) @ F.normalize(text[0], dim=-1).T
        return F.cross_entropy(model.backbone.scale * cosine, targets)
    alphas = []
    for m in range(len(text)):
        cosine = F.normalize(image[:, m], dim=-1) @ F.normalize(text[m], dim=-1).T
        alphas.append((model.head.scale[m] * cosine + model.head.bias[m]).exp() + 1)
    fused = alphas[0]
    for alpha in alphas[1:]:
        fused = pairwise_dempster(fused, alpha)
    loss = torch.zeros((), device=image.device)
    for alpha in (*alphas, fused):
        at_target = alpha.gather(1, targets[:, None]).squeeze(1)
        loss = loss + (torch.digamma(alpha.sum(-1)) - torch.digamma(at_target)).mean()
    pairs = [F.cosine_similarity(text[m], text[n], dim=-1).mean() for m, n in combinations(range(len(text)), 2)]
    if pairs:
        loss = loss + model.weight_de * torch.stack(pairs).mean()
    anchor, consistency = F.normalize(model.anchor, dim=-1), []
    for each in text:
        cosine = F.normalize(each, dim=-1) @ anchor.T
        own = torch.arange(len(anchor), device=anchor.device)
        consistency.append(F.cross_entropy(cosine / model.consistency_temperature, own))
    return loss + model.weight_con * torch.stack(consistency).mean()
