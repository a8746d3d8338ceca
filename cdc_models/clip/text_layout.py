"""Where every token of a batch of prompts lies: nothing encoded twice, no padding (docs/mathematics.md, 6).

A prompt is [SOS][v_1..v_n][class tokens . EOT]. The packed sequence holds, once per template, the prefix that all
classes share, then the rest of every class, classes sorted by length. Classes of one length form a rectangle, so
attention needs no index arithmetic and the linear layers see real tokens only. Towers in which padding matters are
given every prompt at full length, nothing shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cdc_models.clip.anatomy import Reading
from cdc_models.clip.blocks import attention
from cdc_models.clip.classes import ClassTokens

POSITIONS = ("end", "middle", "front")

# A rectangle costs a few kernel launches a block, a padded token a few MFLOP a block. On a CPU a rectangle is worth
# it from a few tokens on (measured); on an accelerator launches weigh more (an estimate from 5 us a launch).
SLACK_CPU, SLACK_ACCELERATOR = 8, 256


@dataclass(frozen=True)
class Group:
    """`count` classes as a rectangle of `width` tokens each."""

    count: int
    width: int
    mask: Tensor | None  # bool, which keys (prefix first) a query may see: [width, prefix + width], or
    # [count, 1, width, prefix + width] where classes differ; None: all keys
    end_mask: Tensor | None  # [count, 1, 1, prefix + width] bool for the queries that are read; None: all keys

    def rows(self, x: Tensor) -> Tensor:
        """[M, count * width, ...] -> [M * count, width, ...]."""
        return x.unflatten(1, (self.count, self.width)).flatten(0, 1)

    def behind(self, prefix: Tensor, x: Tensor) -> Tensor:
        """Keys or values of the classes behind those of the prefix they share: [M * count, prefix + width, ...]."""
        if prefix.size(1) == 0:
            return self.rows(x)
        shared = prefix[:, None].expand(-1, self.count, -1, -1, -1)
        return torch.cat([shared, x.unflatten(1, (self.count, self.width))], dim=2).flatten(0, 1)


@dataclass(frozen=True)
class Layout:
    """The packed sequence of S tokens of all K classes for one template.

    prefix: number of shared leading tokens (SOS and the leading context), 0 where sharing would be wrong.
    tokens, positions: [S] long, token id (0 at context slots) and position in the prompt.
    context_index: [S] long, row of the flattened context [K * n], -1 at ordinary tokens; None where the whole
        context is shared and lies in the prefix.
    ends: [K] long, slot where each class is read (its EOT), in sorted order; restore: [K] long, sorted place of k.
    """

    n: int
    prefix: int
    tokens: Tensor
    positions: Tensor
    context_index: Tensor | None
    groups: tuple[Group, ...]
    ends: Tensor
    restore: Tensor

    def place(self, x: Tensor, context: Tensor) -> Tensor:
        """x [M, S, W] with the context [M, n, W] or [M, K, n, W] written into its slots."""
        if self.n == 0:
            return x
        context = context.to(x.dtype)
        if self.context_index is None:
            return torch.cat([x[:, : self.prefix - self.n], context, x[:, self.prefix :]], dim=1)
        if context.ndim == 3:  # a row per class, so that the gradient is a sum over classes and not a scatter
            context = context[:, None].expand(-1, self.restore.numel(), -1, -1)
        rows = context.flatten(1, 2).index_select(1, self.context_index.clamp(min=0))
        return torch.where((self.context_index >= 0)[:, None], rows, x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every token attends as in its own prompt: [M, S, heads, d] each -> [M, S, heads, d]."""
        (q_prefix, *queries), (k_prefix, *keys), (v_prefix, *values) = (self._split(t) for t in (q, k, v))
        out = [attention(q_prefix, k_prefix, v_prefix, causal=True)] if self.prefix else []
        for group, qs, ks, vs in zip(self.groups, queries, keys, values, strict=True):
            ks, vs = group.behind(k_prefix, ks), group.behind(v_prefix, vs)
            rows = attention(group.rows(qs), ks, vs, mask=_per_prompt(group.mask, q.size(0)))
            out.append(rows.unflatten(0, (-1, group.count)).flatten(1, 2))
        return torch.cat(out, dim=1)

    def attend_ends(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `attend`, for the queries at EOT only: q [M, K, heads, d] in sorted order -> the same shape."""
        queries = q.split([group.count for group in self.groups], dim=1)
        (k_prefix, *keys), (v_prefix, *values) = (self._split(t) for t in (k, v))
        out = []
        for group, qs, ks, vs in zip(self.groups, queries, keys, values, strict=True):
            ks, vs = group.behind(k_prefix, ks), group.behind(v_prefix, vs)
            rows = attention(qs.flatten(0, 1).unsqueeze(1), ks, vs, mask=_per_prompt(group.end_mask, q.size(0)))
            out.append(rows.squeeze(1).unflatten(0, (-1, group.count)))
        return torch.cat(out, dim=1)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Prefix and groups, at one go: slice by slice, the backward pass would fill a full-size tensor for each."""
        return x.split([self.prefix, *(group.count * group.width for group in self.groups)], dim=1)


def _per_prompt(mask: Tensor | None, m: int) -> Tensor | None:
    """A mask of each class, for the rows of m templates."""
    return mask if mask is None or mask.ndim == 2 else mask.repeat(m, 1, 1, 1)


def text_layout(
    classes: ClassTokens,
    n: int,
    class_specific: bool,
    position: str,
    frame: tuple[tuple[int, ...], tuple[int, ...]],
    reading: Reading,
    length: int,
    device: torch.device,
) -> Layout:
    """The layout of K classes with n context vectors, worked out once per set of classes.

    `frame`: the tokens around the words of a text. `length`: tokens of a padded text, an appended class embedding not
    among them.
    """
    key = (n, class_specific, position, frame, reading, length, device)
    layout = classes.layouts.get(key)
    if layout is None:
        # Kept for training even where first asked for in inference mode: no inference tensors in here.
        with torch.inference_mode(False):
            layout = _lay_out(classes, *key)
        if not torch.compiler.is_compiling():
            classes.layouts[key] = layout
    return layout


def _lay_out(
    classes: ClassTokens,
    n: int,
    class_specific: bool,
    position: str,
    frame: tuple[tuple[int, ...], tuple[int, ...]],
    reading: Reading,
    length: int,
    device: torch.device,
) -> Layout:
    start, tail = frame
    full = not reading.only_up_to_the_end
    lead = 0 if class_specific else {"end": n, "middle": n // 2, "front": 0}[position]
    prefix = 0 if full else len(start) + lead

    # One row per class: (token id, context row or -1), the prompt from SOS to EOT, or to the end of its padding.
    rows: list[list[tuple[int, int]]] = []
    for k, (tokens, name) in enumerate(zip(classes.rows, classes.name_lengths, strict=True)):
        words = [(token, -1) for token in tokens]
        context = [(0, k * n + j) for j in range(n)]
        before = {"end": 0, "front": name, "middle": 0}[position]
        half = n // 2 if position == "middle" else n
        body = words[:before] + context[:half] + words[before:name] + context[half:] + words[name:]
        behind = tail[: length - len(start) - len(body)] if full else tail[:1]
        row = [*((token, -1) for token in start), *body, *((token, -1) for token in behind)]
        rows.append([*row, (0, -1)] if reading.appended else row)  # the class embedding takes its place in the tower
    real = [len(start) + len(tokens) + n + 1 for tokens in classes.rows]  # up to and with EOT

    order = sorted(range(len(rows)), key=lambda k: real[k])
    slack = SLACK_CPU if device.type == "cpu" else SLACK_ACCELERATOR
    widths = [len(rows[k]) - prefix for k in order]
    packed = [(token, index, t) for t, (token, index) in enumerate(rows[0][:prefix])]
    groups, ends, first = [], [], 0
    for count, width in _rectangles(widths, slack):
        slot = len(packed)
        own_ends = []
        for k in order[first : first + count]:
            row = rows[k][prefix:] + [(0, -1)] * (width + prefix - len(rows[k]))
            packed += [(token, index, prefix + t) for t, (token, index) in enumerate(row)]
            own_ends.append({"first": 0, "last": width - 1}.get(reading.at or "", real[k] - 1 - prefix))
        ends += [slot + i * width + end for i, end in enumerate(own_ends)]
        if full:
            groups.append(_full_group([rows[k] for k in order[first : first + count]], own_ends, reading, device))
        else:
            groups.append(_group(count, width, prefix, own_ends, device))
        first += count

    slots, indices, positions = (torch.tensor(column, device=device) for column in zip(*packed, strict=True))
    restore = sorted(range(len(order)), key=lambda i: order[i])
    return Layout(
        n=n,
        prefix=prefix,
        tokens=slots,
        positions=positions,
        context_index=None if prefix == len(start) + n else indices,
        groups=tuple(groups),
        ends=torch.tensor(ends, device=device),
        restore=torch.tensor(restore, device=device),
    )


def _full_group(
    rows: Sequence[Sequence[tuple[int, int]]], ends: Sequence[int], reading: Reading, device: torch.device
) -> Group:
    """Classes at full length, each query seeing what the tower lets it see."""
    count, width = len(rows), len(rows[0])
    if not reading.causal and reading.hidden is None:
        return Group(count, width, None, None)
    seen = torch.ones(count, 1, width, width, dtype=torch.bool, device=device)
    if reading.hidden is not None:
        keys = torch.tensor([[index >= 0 or token != reading.hidden for token, index in row] for row in rows])
        if reading.appended:
            own = torch.ones(count, 1, dtype=torch.bool)
            keys = torch.cat([own, keys[:, :-1]] if reading.shifted else [keys[:, :-1], own], dim=1)
        seen &= keys.to(device)[:, None, None]
    if reading.causal:
        seen = seen.tril()
    return Group(count, width, seen, seen[torch.arange(count), :, ends].unsqueeze(2))


def _group(count: int, width: int, prefix: int, ends: Sequence[int], device: torch.device) -> Group:
    keys = torch.arange(prefix + width, device=device)
    mask = keys[None, :] <= keys[prefix:, None]
    end_mask = None
    if any(end != width - 1 for end in ends):
        end_mask = (keys <= prefix + torch.tensor(ends, device=device)[:, None])[:, None, None, :]
    return Group(count, width, mask, end_mask)


def _rectangles(widths: Sequence[int], slack: int) -> list[tuple[int, int]]:
    """Group ascending widths into (count, width) rectangles; neighbours join while that pads at most `slack` tokens."""
    groups: list[tuple[int, int]] = []
    for width in widths:
        if groups and groups[-1][1] == width:
            groups[-1] = (groups[-1][0] + 1, width)
        else:
            groups.append((1, width))
    while len(groups) > 1:
        padded = [(b[1] - a[1]) * a[0] for a, b in pairwise(groups)]
        i = min(range(len(padded)), key=padded.__getitem__)
        if padded[i] > slack:
            break
        groups[i : i + 2] = [(groups[i][0] + groups[i + 1][0], groups[i + 1][1])]
    return groups
