"""Data: datasets on disk, protocol rules, scenes, the bundled benchmark, transforms and views."""

from cdc_models.data.datasets import ImageDataset, load_dataset
from cdc_models.data.emoji import EmojiBenchmark, ImageSet, emoji_benchmark
from cdc_models.data.image_list import ImageList
from cdc_models.data.image_loader import ImageLoader, scan
from cdc_models.data.image_paths import image_paths
from cdc_models.data.image_report import ImageReport, SkippedImage
from cdc_models.data.listing import DatasetError
from cdc_models.data.open_image import BadImageError, open_image
from cdc_models.data.protocol import base_new_split, few_shot_indices, harmonic_mean, hold_out
from cdc_models.data.published import BASE_TO_NEW, IMAGENET_VARIANTS, Published, find_published
from cdc_models.data.scenes import compose_scenes
from cdc_models.data.tar_shards import TarImages
from cdc_models.data.transforms import VIEWS, Views, test_transform, train_transform

__all__ = [
    "BASE_TO_NEW",
    "IMAGENET_VARIANTS",
    "VIEWS",
    "BadImageError",
    "DatasetError",
    "EmojiBenchmark",
    "ImageDataset",
    "ImageList",
    "ImageLoader",
    "ImageReport",
    "ImageSet",
    "Published",
    "SkippedImage",
    "TarImages",
    "Views",
    "base_new_split",
    "compose_scenes",
    "emoji_benchmark",
    "few_shot_indices",
    "find_published",
    "harmonic_mean",
    "hold_out",
    "image_paths",
    "load_dataset",
    "open_image",
    "scan",
    "test_transform",
    "train_transform",
]
