"""Names to measure with: ImageNet's, as long as real ones are."""

from __future__ import annotations

from open_clip import IMAGENET_CLASSNAMES


def imagenet_names(count: int) -> list[str]:
    """`count` of ImageNet's 1000 names, evenly spread; a name that comes twice is told apart by a word."""
    names: list[str] = []
    for name in IMAGENET_CLASSNAMES:
        names.append(f"other {name}" if name in names else name)
    return [names[i * len(names) // count] for i in range(count)]
