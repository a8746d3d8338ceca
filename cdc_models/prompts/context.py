"""Learned context vectors for the text tower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cdc_models.clip.anatomy import text_parts
from cdc_models.clip.backbone import ClipBackbone, check_backbone
from cdc_models.clip.checks import check_count
from cdc_ops import checks


def word_vectors(backbone: ClipBackbone, words: str, n: int) -> Tensor:
    """The token embeddings of the first n tokens of `words`, [n, W] in float32.

    Raises ValueError if `words` has fewer than n tokens.
    """
    if not isinstance(words, str):
        raise ValueError(f"words: expected a text, got {words!r:.80}")
    ids = backbone.encode_words(words)
    if len(ids) < n:
        raise ValueError(f"words: expected at least n = {n} tokens to start from, {words!r} has {len(ids)}")
    parts = text_parts(backbone.clip)
    if parts is None:
        backbone.require_promptable_text()
        raise AssertionError("unreachable: a tower without parts is never promptable")
    embedding = parts.token_embedding.weight.detach()
    return embedding[torch.tensor(ids[:n], dtype=torch.long, device=embedding.device)].float()


def start_vectors(
    backbone: ClipBackbone,
    n: int,
    m: int,
    words: str | Sequence[str] | None,
    noise: float,
    std: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Starting values [m, n, W] of m contexts: word embeddings (plus noise), or N(0, std)."""
    check_count("n", n)
    check_count("m", m)
    noise, std = checks.number("noise", noise, low=0.0), checks.number("std", std, low=0.0)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: expected a torch.Generator or None, got {generator!r:.80}")
    device = generator.device if generator is not None else torch.device("cpu")
    normal = torch.randn(m, n, backbone.text_width, generator=generator, device=device).to(backbone.device)
    if words is None:
        return normal * std
    texts = [words] * m if isinstance(words, str) else words
    if not isinstance(texts, Sequence) or len(texts) != m:
        got = len(texts) if isinstance(texts, Sequence) else repr(texts)
        raise ValueError(f"words: expected one text, or one per template ({m}), got {got}")
    return torch.stack([word_vectors(backbone, text, n) for text in texts]) + normal * noise


class PromptContext(nn.Module):
    """M learned contexts of n vectors: [M, n, W], or one per class, [M, K, n, W]. Always float32.

    Args:
        backbone: gives the width, and the embeddings of `words`.
        n: context vectors per template.
        m: templates.
        words: start from the first n token embeddings of this text (or of one text per template); None: N(0, std).
        n_classes: K; given, every class has a context of its own (CoOp's class-specific context).
        noise: standard deviation of what is added to `words`, to tell templates apart that start from one text.
        std: standard deviation of the random start (CoOp and MaPLe: 0.02).
        generator: source of randomness; None: torch's global one.

    Raises:
        ValueError: n, m or n_classes below 1, words of fewer than n tokens or not one text per template, a negative
            deviation.
        UnsupportedBackboneError: a text tower that cannot be prompted.

    Source: CoOp, "Learning to Prompt for Vision-Language Models" (Zhou et al., IJCV 2022). As there, classes draw
    their random starts apart; several templates and `noise` are ours.

    Example:
        >>> import torch
        >>> from cdc_models.clip import load_clip
        >>> from cdc_models.prompts import PromptContext
        >>> backbone = load_clip("bundled")
        >>> context = PromptContext(backbone, n=4, words="a photo of a")
        >>> context().shape == (1, 4, backbone.text_width)
        True
    """

    def __init__(
        self,
        backbone: ClipBackbone,
        n: int = 16,
        m: int = 1,
        *,
        words: str | Sequence[str] | None = None,
        n_classes: int | None = None,
        noise: float = 0.0,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        if n_classes is not None:
            check_count("n_classes", n_classes)
        if n_classes is None:
            vectors = start_vectors(backbone, n, m, words, noise, std, generator)
        else:
            per_class = [start_vectors(backbone, n, m, words, noise, std, generator) for _ in range(n_classes)]
            vectors = torch.stack(per_class, dim=1)
        self.vectors = nn.Parameter(vectors)

    def forward(self) -> Tensor:
        """The contexts, [M, n, W] or [M, K, n, W]."""
        return self.vectors
