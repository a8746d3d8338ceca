"""Data: protocol rules, scenes, the bundled benchmark, transforms and views."""

from cdc_models.data.emoji import EmojiBenchmark, ImageSet, emoji_benchmark
from cdc_models.data.protocol import base_new_split, few_shot_indices, harmonic_mean
from cdc_models.data.scenes import compose_scenes
from cdc_models.data.transforms import VIEWS, Views, test_transform, train_transform

__all__ = [
    "VIEWS",
    "EmojiBenchmark",
    "ImageSet",
    "Views",
    "base_new_split",
    "compose_scenes",
    "emoji_benchmark",
    "few_shot_indices",
    "harmonic_mean",
    "test_transform",
    "train_transform",
]
