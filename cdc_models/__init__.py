"""CLIP towers that take prompts, adaptation methods built on them, data, training and evaluation."""

from cdc_models.clip import ClipBackbone, UnsupportedBackboneError, load_clip
from cdc_models.data import harmonic_mean
from cdc_models.engine import (
    Evaluation,
    FitResult,
    calibrate,
    evaluate,
    fit,
    load_adapter,
    push_adapter,
    save_adapter,
)
from cdc_models.methods import CDC, METHODS, CoOp, MaPLe, Method, Prediction, ZeroShot

__all__ = [
    "CDC",
    "METHODS",
    "ClipBackbone",
    "CoOp",
    "Evaluation",
    "FitResult",
    "MaPLe",
    "Method",
    "Prediction",
    "UnsupportedBackboneError",
    "ZeroShot",
    "calibrate",
    "evaluate",
    "fit",
    "harmonic_mean",
    "load_adapter",
    "load_clip",
    "push_adapter",
    "save_adapter",
]
