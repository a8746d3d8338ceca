"""Image transforms: CoOp's train and test transforms, and the views of visual decoupling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from cdc_models.clip import ClipBackbone
from cdc_models.clip.backbone import check_backbone
from cdc_models.data.open_image import to_rgb

__all__ = ["VIEWS", "Views", "test_transform", "train_transform"]


class _ToRgbImage(nn.Module):
    """What comes into a transform as an image of three channels; a module, so that it prints itself the same always."""

    def forward(self, image: object) -> Tensor:
        if isinstance(image, Image.Image):
            return v2.functional.to_image(to_rgb(image))
        tensor = v2.functional.to_image(image)
        if tensor.shape[-3] != 3:
            raise ValueError(
                f"image: expected a PIL image or a tensor [..., 3, H, W], got {list(tensor.shape)}; repeat grey"
                " images in three channels"
            )
        return tensor


def train_transform(
    backbone: ClipBackbone, *, scale: tuple[float, float] = (0.08, 1.0), flip: bool = True
) -> v2.Transform:
    """CoOp's training transform: random resized crop (bicubic), flip, CLIP's mean and deviation.

    Args:
        backbone: says size, mean and deviation.
        scale: area of the crop as a part of the image. CoOp's is (0.08, 1); open_clip's own default differs.
        flip: whether to mirror half of the images.

    Returns:
        A transform of PIL images or uint8 tensors [..., 3, H, W] to float tensors [..., 3, size, size]. PIL images
        of other modes become RGB by the rules of `open_image` (alpha on white, 16 bits / 257). Other tensors than
        of three channels are a ValueError: whether one channel is grey is for the caller to say.

    Raises:
        ValueError: no backbone, a scale that is no part, and (of the transform) tensors that are not of three channels.
        UnsupportedBackboneError: a backbone for images that are not square.

    Source: CoOp (Zhou et al., IJCV 2022), published configuration.

    Example:
        >>> from PIL import Image
        >>> from cdc_models import load_clip
        >>> transform = train_transform(load_clip("bundled"), scale=(0.5, 1.0))
        >>> transform(Image.new("L", (100, 60))).shape  # grey, of any size
        torch.Size([3, 48, 48])
    """
    check_backbone(backbone)
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: expected 0 < low <= high <= 1, got {scale}")
    size = backbone.image_size
    return v2.Compose(
        [
            _ToRgbImage(),
            v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(0.5 if flip else 0.0),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(backbone.image_mean, backbone.image_std),
            v2.ToPureTensor(),
        ]
    )


def test_transform(backbone: ClipBackbone) -> v2.Transform:
    """CoOp's test transform: shorter side to size (bicubic), centre crop, CLIP's mean and deviation.

    Takes what `train_transform`'s takes.

    Raises:
        ValueError, UnsupportedBackboneError: as `train_transform`.

    Source: CoOp (Zhou et al., IJCV 2022), published configuration.

    Example:
        >>> from PIL import Image
        >>> from cdc_models import load_clip
        >>> transform = test_transform(load_clip("bundled"))
        >>> transform(Image.new("RGB", (100, 60))).shape
        torch.Size([3, 48, 48])
    """
    check_backbone(backbone)
    size = backbone.image_size
    return v2.Compose(
        [
            _ToRgbImage(),
            v2.Resize(size, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(backbone.image_mean, backbone.image_std),
            v2.ToPureTensor(),
        ]
    )


test_transform.__test__ = False  # type: ignore[attr-defined]  # pytest: a name, not a test


# What a view does to an image in [0, 1]; strengths are ours.
VIEWS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda size: nn.Identity(),
    "flip": lambda size: v2.RandomHorizontalFlip(0.5),
    "colour": lambda size: v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "rotation": lambda size: v2.RandomRotation(20, interpolation=InterpolationMode.BILINEAR),
    "blur": lambda size: v2.GaussianBlur(kernel_size=2 * (size // 32) + 1, sigma=(0.1, size / 48)),
    "grey": lambda size: v2.RandomGrayscale(1.0),
    "crop": lambda size: v2.RandomResizedCrop(size, scale=(0.4, 1.0), antialias=True),
}


class Views(nn.Module):
    """Every template its own augmentation: [B, 3, H, W] -> [B, M, 3, H, W].

    Visual-language dual semantic decoupling trains template m on images changed by its own augmentation A_m.
    The paper names the idea; the set of augmentations and their strengths are **our reading**.

    Args:
        names: the augmentation of each of the M templates, keys of `VIEWS`; "+" joins several ("flip+crop").
        mean, std: what the images were normalised with; augmentations act on images in [0, 1].

    Raises:
        ValueError: for an unknown augmentation or none at all, or not three channels.

    Source: CDC (Zhang et al., NeurIPS 2024), visual side of VSD.

    Example:
        >>> views = Views(["none", "grey"], mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> views(torch.randn(4, 3, 48, 48)).shape
        torch.Size([4, 2, 3, 48, 48])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, names: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"names: expected a non-empty sequence of augmentations, got {names!r}")
        unknown = sorted({part for name in names for part in name.split("+")} - set(VIEWS))
        if unknown:
            raise ValueError(f"names: unknown augmentations {unknown}; known are {sorted(VIEWS)}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean, std: expected three numbers each, deviations above 0, got {mean}, {std}")
        self.names = tuple(names)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[-1]
        pixels = (images * self.std + self.mean).clamp(0, 1)
        views = []
        for name in self.names:
            steps = [VIEWS[part](size) for part in name.split("+") if part != "none"]
            if not steps:
                views.append(images)
                continue
            augment = nn.Sequential(*steps)
            changed = torch.stack([augment(image) for image in pixels])  # every image its own draw
            views.append((changed.clamp(0, 1) - self.mean) / self.std)
        return torch.stack(views, dim=1)
