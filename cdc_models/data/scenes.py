"""Scenes: artwork placed on a background, drawn at random from a generator.

One batched, seeded composer serves two purposes: pre-training of the bundled CLIP and the images of the
bundled benchmark. Everything random comes from the generator given, so a seed names the same images on every
machine of the same torch version.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["compose_scenes"]

# RGB <-> YIQ (NTSC); a rotation in the IQ plane is a hue shift that keeps luminance.
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_TO_RGB = torch.linalg.inv(_TO_YIQ)


def compose_scenes(
    sprites: Tensor,
    *,
    size: int,
    hardness: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one random scene for every sprite.

    Args:
        sprites: straight-alpha RGBA artwork, uint8, [B, 4, S, S].
        size: side of the square scenes in pixels.
        hardness: 0 (centred artwork on a plain background) to 1 (rotation, scale, shear, flips, patterned
            backgrounds, distractors, occlusion, colour jitter, grey, noise).
        generator: source of all randomness.

    Returns:
        float32 scenes in [0, 1], [B, 3, size, size].

    Raises:
        ValueError: if ``sprites`` is not uint8 [B, 4, S, S] or ``hardness`` lies outside [0, 1].

    Example:
        >>> sprites = torch.zeros(2, 4, 64, 64, dtype=torch.uint8)
        >>> compose_scenes(sprites, size=48, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 48, 48])
    """
    if sprites.dtype != torch.uint8 or sprites.ndim != 4 or sprites.shape[1] != 4:
        raise ValueError(f"sprites: expected uint8 [B, 4, S, S], got {sprites.dtype} {tuple(sprites.shape)}")
    if not 0.0 <= hardness <= 1.0:
        raise ValueError(f"hardness: expected a number in [0, 1], got {hardness}")
    draw = _Draw(len(sprites), generator)
    art = sprites.float() / 255
    art[:, :3] *= art[:, 3:]  # premultiplied: interpolation must not bleed the colour of empty pixels

    scene = _background(art, size, hardness, draw)
    for _ in range(2):
        present = draw.happens(0.35 * hardness).flatten().nonzero().flatten()
        other = art.roll(int(draw.integer(1, max(len(art), 2))), 0)[present]
        if len(present):
            placed = _place(other, size, draw.of(len(present)), (0.2, 0.4), 1.0, border=True)
            scene[present] = _over(placed, scene[present])
    extent = (0.95 - 0.45 * hardness, 0.95 + 0.1 * hardness)
    scene = _over(_place(art, size, draw, extent, hardness), scene)
    scene = _occlude(scene, hardness, draw)
    scene = _jitter(scene, hardness, draw)
    return (scene + draw.normal(3, size, size) * draw.uniform(0, 0.06 * hardness)).clamp_(0, 1)


class _Draw:
    """Random numbers for B scenes, all shaped [B, 1, 1, 1] unless told otherwise."""

    def __init__(self, batch: int, generator: torch.Generator | None) -> None:
        self.batch, self.generator = batch, generator

    def of(self, batch: int) -> _Draw:
        """The same stream for another number of scenes."""
        return _Draw(batch, self.generator)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        shape = shape or (1, 1, 1)
        return torch.rand(self.batch, *shape, generator=self.generator) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)

    def happens(self, probability: float) -> Tensor:
        return (self.uniform(0, 1) < probability).float()

    def integer(self, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (), generator=self.generator)


def _over(art: Tensor, scene: Tensor) -> Tensor:
    """Porter-Duff 'over' with premultiplied art."""
    return art[:, :3] + scene * (1 - art[:, 3:])


def _place(
    art: Tensor, size: int, draw: _Draw, extent: tuple[float, float], hardness: float, border: bool = False
) -> Tensor:
    """Artwork scaled to a fraction of the scene, rotated, sheared, flipped and moved: [B, 4, size, size]."""
    scale = draw.uniform(*extent)
    angle = draw.uniform(-math.pi / 5, math.pi / 5) * hardness
    shear = draw.uniform(-0.2, 0.2) * hardness
    flip = 1 - 2 * draw.happens(0.5 if hardness > 0 else 0.0)
    if border:  # distractors sit on a circle around the middle
        around = draw.uniform(0, 2 * math.pi)
        move_x, move_y = 0.75 * torch.cos(around), 0.75 * torch.sin(around)
    else:
        room = (1.1 - scale).clamp_min(0) * hardness
        move_x, move_y = draw.uniform(-1, 1) * room, draw.uniform(-1, 1) * room
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    # grid_sample asks where an output pixel comes from: the inverse map, input = A (output - move)
    row_x = torch.cat([flip * (cos + shear * sin), flip * (sin - shear * cos)], -1)
    row_y = torch.cat([-sin, cos], -1)
    linear = torch.cat([row_x, row_y], -2)[:, 0]
    move = torch.cat([move_x, move_y], -2)[:, 0]
    theta = torch.cat([linear, -linear @ move], -1)

    placed = art.new_empty(len(art), 4, size, size)
    # Shrinking by more than about 1.5 aliases under bilinear sampling: those start from a half-size copy.
    shrinks = scale.flatten() * size < art.shape[-1] / 1.5
    for mask, source in ((~shrinks, art), (shrinks, F.avg_pool2d(art, 2))):
        if mask.any():
            grid = F.affine_grid(theta[mask], [int(mask.sum()), 4, size, size], align_corners=False)
            placed[mask] = F.grid_sample(source[mask], grid, align_corners=False)
    return placed


def _background(art: Tensor, size: int, hardness: float, draw: _Draw) -> Tensor:
    """Plain, gradient, cloud, grain or stripes, kept apart in lightness from the artwork."""

    def clouds(cells: int) -> Tensor:
        return F.interpolate(
            draw.uniform(0, 1, 3, cells, cells), size=(size, size), mode="bilinear", align_corners=True
        )

    first, second = draw.uniform(0, 1, 3, 1, 1), draw.uniform(0, 1, 3, 1, 1)
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = draw.uniform(0, 2 * math.pi)
    along = x * torch.cos(angle) + y * torch.sin(angle)
    stripes = ((along * draw.uniform(2, 6)).floor() % 2).abs()
    mixes = {
        "plain": torch.zeros_like(along),
        "gradient": (along + 1) / 2,
        "clouds": clouds(4),
        "grain": clouds(16),
        "stripes": 0.5 * stripes,
    }
    kind = (draw.uniform(0, len(mixes)) * float(hardness > 0)).long()
    scene = first.expand(-1, -1, size, size).clone()
    for index, mix in enumerate(mixes.values()):
        scene = torch.where(kind == index, first + (second - first) * mix.clamp(0, 1) * hardness, scene)

    luminance = _TO_YIQ[0].view(1, 3, 1, 1)
    covered = art[:, 3:].sum((2, 3), keepdim=True).clamp_min(1e-6)
    art_light = (art[:, :3] * luminance).sum((1, 2, 3), keepdim=True) / covered
    scene_light = (scene * luminance).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    return torch.where((art_light - scene_light).abs() < 0.2, 1 - scene, scene)


def _occlude(scene: Tensor, hardness: float, draw: _Draw) -> Tensor:
    """Cover a random rectangle, at most a third of the side, with a random colour."""
    size = scene.shape[-1]
    at = torch.arange(size).float()
    width, height = draw.uniform(0.1, 0.35) * size, draw.uniform(0.1, 0.35) * size
    left, top = draw.uniform(0, 1) * (size - width), draw.uniform(0, 1) * (size - height)
    inside = ((at >= left) & (at < left + width)) & ((at[:, None] >= top) & (at[:, None] < top + height))
    return torch.where(inside & (draw.happens(0.35 * hardness) > 0), draw.uniform(0, 1, 3, 1, 1), scene)


def _jitter(scene: Tensor, hardness: float, draw: _Draw) -> Tensor:
    """Brightness, contrast, saturation and hue; sometimes grey."""
    turn = draw.uniform(-0.4, 0.4) * hardness
    saturation = 1 + draw.uniform(-0.5, 0.5) * hardness
    saturation = saturation * (1 - draw.happens(0.1 * hardness))
    cos, sin = (torch.cos(turn) * saturation).flatten(), (torch.sin(turn) * saturation).flatten()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    middle = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], -1).view(-1, 3, 3)
    scene = torch.einsum("bij,bjhw->bihw", _TO_RGB @ middle @ _TO_YIQ, scene)
    mean = scene.mean((1, 2, 3), keepdim=True)
    contrast = 1 + draw.uniform(-0.35, 0.35) * hardness
    return (scene - mean) * contrast + mean + draw.uniform(-0.2, 0.2) * hardness
