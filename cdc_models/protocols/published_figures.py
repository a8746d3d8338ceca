"""Published accuracies that runs are set beside, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIGURES", "Figure", "published_figure"]

AVERAGE = "average"

_MAPLE = "MaPLe (Khattak et al., CVPR 2023)"
_CDC = "CDC (Zhang et al., NeurIPS 2024), at second hand"


@dataclass(frozen=True)
class Figure:
    """An accuracy in percent: ViT-B/16 with OpenAI's weights, 16 shots, mean over seeds 1 to 3.

    split: "base", "new", "H" or "test". dataset: its name, or "average" over the protocol's.
    """

    protocol: str
    method: str
    dataset: str
    split: str
    percent: float
    source: str


FIGURES = (
    Figure("base-to-new", "maple", AVERAGE, "base", 82.28, _MAPLE),
    Figure("base-to-new", "maple", AVERAGE, "new", 75.14, _MAPLE),
    Figure("base-to-new", "maple", AVERAGE, "H", 78.55, _MAPLE),
    Figure("base-to-new", "cdc", "FGVCAircraft", "base", 37.47, _CDC),
    Figure("base-to-new", "cdc", "DescribableTextures", "base", 82.70, _CDC),
    Figure("base-to-new", "cdc", "UCF101", "base", 85.70, _CDC),
    Figure("base-to-new", "cdc", "SUN397", "H", 81.18, _CDC),
    Figure("cross-dataset", "cdc", "ImageNet", "test", 71.76, _CDC),
    Figure("domain-generalisation", "cdc", "ImageNet", "test", 71.76, _CDC),
)
"""What is known to this project; most cells of the papers' tables are not."""


def published_figure(protocol: str, method: str, dataset: str, split: str) -> Figure | None:
    """The published accuracy of a cell, or None where this project knows none.

    Example:
        >>> published_figure("base-to-new", "maple", "average", "H").percent
        78.55
    """
    wanted = (protocol, method, dataset, split)
    return next((f for f in FIGURES if (f.protocol, f.method, f.dataset, f.split) == wanted), None)
