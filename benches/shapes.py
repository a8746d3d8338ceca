"""What is measured: the shapes S1 to S6 (S1 also at CLIP's scale), the operations on them, their inputs and work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Scale of the logits: random features have cosines of about 1/sqrt(D), so evidence here spans e^-4 to e^4.
SCALE = 20.0
#: CLIP's own, where its training clamps it (Radford et al., 2021), and a cosine about which its features' lie.
CLIP_SCALE, CLIP_COSINE = 100.0, 0.2


@dataclass(frozen=True)
class Shape:
    """B images, M prompts, K classes, D features."""

    name: str
    B: int
    M: int
    K: int
    D: int
    per_prompt: bool = False  # every prompt has its own image features
    softmax: bool = False  # race fused linear cross-entropies on their own ground
    like_clip: bool = False  # its scale, and cosines of its size
    cut: str = ""  # how it was made smaller

    @property
    def title(self) -> str:
        own = ", images for each prompt" if self.per_prompt else ""
        like = f", scale {self.scale:g}, cosines like CLIP's" if self.like_clip else ""
        return f"{self.name}: B={self.B} M={self.M} K={self.K} D={self.D}{own}{like}{self.cut}"

    @property
    def scale(self) -> float:
        """Of the logits."""
        return CLIP_SCALE if self.like_clip else SCALE

    @property
    def operations(self) -> tuple[str, ...]:
        return ("softmax", "softmax gradients") if self.softmax else ("opinion", "loss gradients")

    def work(self, operation: str, itemsize: int) -> tuple[float, float]:
        """Floating-point operations of the products, and bytes that must be read or written whatever the algorithm."""
        products = 2.0 * self.B * self.M * self.K * self.D
        features = itemsize * self.D * (self.B * (self.M if self.per_prompt else 1) + self.M * self.K)
        if "gradients" in operation:
            return 3 * products, 2.0 * features
        return products, features + (4.0 * self.B * self.K if operation == "opinion" else 0.0)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S1", 256, 4, 1000, 512),
        Shape("S1-clip", 256, 4, 1000, 512, like_clip=True),
        Shape("S2", 1024, 4, 21841, 512),
        Shape("S3", 512, 8, 100_000, 768),
        Shape("S4", 4, 4, 50, 512),
        Shape("S5", 1024, 4, 21841, 512, per_prompt=True),
        Shape("S6", 8192, 1, 100_000, 768, softmax=True),
    )
}
#: What B and K of a shape are divided by on a CPU, where the whole would take minutes for one call and tens of GB.
CPU_DIVISORS = {"S2": (8, 1), "S3": (4, 10), "S5": (8, 1), "S6": (16, 10)}


def shape_for(name: str, device: str, tiny: bool) -> Shape:
    """The shape as it is measured on ``"cuda"`` or ``"cpu"``; tiny: small enough for Triton's interpreter."""
    shape = SHAPES[name]
    if tiny:
        small = replace(shape, B=min(4, shape.B), M=min(2, shape.M), K=min(40, shape.K), D=32)
        return replace(small, cut=" (tiny: proves the way, not its speed)")
    if device == "cpu" and name in CPU_DIVISORS:
        b, k = CPU_DIVISORS[name]
        return replace(shape, B=shape.B // b, K=shape.K // k, cut=f" (on a CPU B / {b}, K / {k})")
    return shape


class Inputs(NamedTuple):
    """image [B, D] or [B, M, D], text [M, K, D], target [B]."""

    image: Tensor
    text: Tensor
    target: Tensor


def make_inputs(shape: Shape, operation: str, device: str, dtype: torch.dtype) -> Inputs:
    """The same random features every time; those of a softmax are ready to be multiplied: logits within the scale."""
    generator = torch.Generator(device).manual_seed(0)

    def features(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    image = features(shape.B, *((shape.M,) if shape.per_prompt else ()), shape.D)
    text = features(shape.M, shape.K, shape.D)
    if shape.like_clip:
        # one direction that all share, so long that cosines lie about that: of random features they lie about 0
        shared = math.sqrt(CLIP_COSINE / (1 - CLIP_COSINE)) * F.normalize(features(shape.D), dim=0)
        image, text = (F.normalize(x, dim=-1) + shared for x in (image, text))
    if shape.softmax:
        image, text = SCALE * F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    target = torch.randint(shape.K, (shape.B,), generator=generator, device=device)
    gradients = "gradients" in operation
    return Inputs(image.to(dtype).requires_grad_(gradients), text.to(dtype).requires_grad_(gradients), target)
