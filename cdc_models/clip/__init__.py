"""CLIP towers that can be prompted, over open_clip's networks as they are."""

from cdc_models.clip.backbone import ClipBackbone, UnsupportedBackboneError, load_clip
from cdc_models.clip.image_tower import encode_prompted_image
from cdc_models.clip.text_tower import ClassTokens, encode_prompted_text, tokenize_classes

__all__ = [
    "ClassTokens",
    "ClipBackbone",
    "UnsupportedBackboneError",
    "encode_prompted_image",
    "encode_prompted_text",
    "load_clip",
    "tokenize_classes",
]
