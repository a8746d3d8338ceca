"""Class names as tokens, without start and end: what a prompted text tower puts around its context vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cdc_models.clip.anatomy import text_parts
from cdc_models.clip.backbone import ClipBackbone, check_backbone


@dataclass(frozen=True, eq=False)
class ClassTokens:
    """K class names, filled into a template and tokenised.

    names: the K names as given.
    ids: [K, L] long, the tokens of "{name}." without start and end tokens, padded with 0 on the right.
    lengths: [K] long, the number of real tokens in each row.
    rows: the same tokens as ints, for laying them out without waiting for a device.
    name_lengths: how many tokens of each row belong to the name (and to what the template says before it).
    layouts: what has been worked out about these classes, so that a training step need not.
    """

    names: tuple[str, ...]
    ids: Tensor
    lengths: Tensor
    rows: tuple[tuple[int, ...], ...]
    name_lengths: tuple[int, ...]
    layouts: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def token_lengths(self) -> tuple[int, ...]:
        """`lengths` as ints."""
        return tuple(len(row) for row in self.rows)

    def require_room(self, tokens: int, n: int, argument: str) -> None:
        """Raise ValueError, naming `argument`, unless every class and n context vectors fit into so many tokens."""
        room = tokens - n
        if long := [name for name, length in zip(self.names, self.token_lengths, strict=True) if length > room]:
            raise ValueError(
                f"{argument}: {long} do not fit: {n} context vectors leave {room} of the {tokens} tokens between start "
                "and end"
            )

    def chunks(self, size: int) -> tuple[tuple[tuple[list[int], ClassTokens], ...], list[int]]:
        """At most `size` classes at a time, of like length: (their places, their tokens) each; and the way back."""
        key = ("chunks", size)
        if key not in self.layouts:
            order = sorted(range(len(self)), key=lambda k: len(self.rows[k]))
            pieces = [order[i : i + size] for i in range(0, len(order), size)]
            back = sorted(range(len(order)), key=order.__getitem__)
            self.layouts[key] = tuple((piece, self._take(piece)) for piece in pieces), back
        return self.layouts[key]  # type: ignore[no-any-return]

    def _take(self, places: list[int]) -> ClassTokens:
        return ClassTokens(
            tuple(self.names[k] for k in places),
            self.ids[places],
            self.lengths[places],
            tuple(self.rows[k] for k in places),
            tuple(self.name_lengths[k] for k in places),
        )

    def to(self, device: torch.device | str) -> ClassTokens:
        """The same classes with the tensors on `device`."""
        return replace(self, ids=self.ids.to(device), lengths=self.lengths.to(device))


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names if they are a list of distinct, non-blank strings; else a ValueError that says which are not."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names: expected a sequence of strings, got {names!r:.80}")
    if len(names) == 0:
        raise ValueError("names: expected at least one class name, got an empty list")
    if blank := [i for i, name in enumerate(names) if not words_of(name)]:
        raise ValueError(f"names: expected words, got blank names at positions {blank}")
    first: dict[str, str] = {}
    for name in names:
        if (words := words_of(name)) in first:
            raise ValueError(f"names: {name!r} and {first[words]!r} are the same class")
        first[words] = name
    return tuple(names)


def check_distinct(names: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if two names have the same tokens: no text tower could tell them apart."""
    first: dict[tuple[int, ...], str] = {}
    for name, row in zip(names, rows, strict=True):
        if tuple(row) in first:
            raise ValueError(f"names: {name!r} and {first[tuple(row)]!r} are the same class (they tokenise alike)")
        first[tuple(row)] = name


def check_template(argument: str, template: object) -> None:
    """Raise ValueError unless `template` is a text with one place for a name."""
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(f"{argument}: expected a text with exactly one '{{}}', got {template!r:.80}")


def words_of(name: str) -> str:
    """A class name as words: underscores count as spaces (the rule of CoOp's data sets, whose names are file names)."""
    return name.replace("_", " ").strip()


def tokenize_classes(backbone: ClipBackbone, names: Sequence[str], template: str = "{}.") -> ClassTokens:
    """Tokenise class names for `encode_prompted_text`.

    Underscores count as spaces (the rule of CoOp's data sets, whose names are file names).

    Args:
        backbone: gives the tokenizer and the context length; its text tower must be promptable.
        names: K distinct, non-blank names.
        template: text with exactly one "{}" for the name; the context vectors come before it at position "end".

    Raises:
        ValueError: no names, blank names, names that tokenise alike (the tower could not tell them apart), names
            that do not fit the context length, a template without exactly one "{}".
        UnsupportedBackboneError: a text tower that cannot be prompted.

    Example:
        >>> from cdc_models.clip import load_clip, tokenize_classes
        >>> classes = tokenize_classes(load_clip("bundled"), ["cat", "fire_engine"])
        >>> len(classes), classes.names[1]
        (2, 'fire_engine')
    """
    check_backbone(backbone)
    backbone.require_promptable_text()
    names = check_names(names)
    check_template("template", template)
    texts = [words_of(name) for name in names]
    room = backbone.text_room

    head = template.split("{}")[0]
    rows = [backbone.encode_words(template.replace("{}", text)) for text in texts]
    check_distinct(names, rows)
    if long := [f"{name!r:.80} ({len(row)})" for name, row in zip(names, rows, strict=True) if len(row) > room]:
        raise ValueError(
            f"names: too long for a context of {backbone.context_length} tokens, start and end among them: "
            f"{', '.join(long[:10])}{', ...' if len(long) > 10 else ''}"
        )
    parts = text_parts(backbone.clip)
    assert parts is not None  # promptable
    end = backbone.eot_id  # pooling looks for it, or for the largest id, which it is meant to be
    looks = parts.reading.at == "end"
    if early := [n for n, row in zip(names, rows, strict=True) if looks and (end in row or max(row, default=0) > end)]:
        raise ValueError(f"names: the tower would take a token of {early} (in {template!r}) for the end of the text")

    lengths = tuple(len(row) for row in rows)
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    heads = tuple(
        min(len(backbone.encode_words(head + text)), length) for text, length in zip(texts, lengths, strict=True)
    )
    return ClassTokens(tuple(names), ids, torch.tensor(lengths), tuple(map(tuple, rows)), heads)
