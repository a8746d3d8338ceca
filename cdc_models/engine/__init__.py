"""Training, calibration, evaluation and adapter files."""

from cdc_models.engine.adapters import AdapterError, adapter_info, load_adapter, push_adapter, save_adapter
from cdc_models.engine.calibrate import calibrate
from cdc_models.engine.checkpoint import CheckpointError
from cdc_models.engine.evaluate import Evaluation, Features, evaluate, extract_features
from cdc_models.engine.feature_cache import CachedFeatures, FeatureLoader, cache_features
from cdc_models.engine.fit import FitResult, fit, learning_rate

__all__ = [
    "AdapterError",
    "CachedFeatures",
    "CheckpointError",
    "Evaluation",
    "FeatureLoader",
    "Features",
    "FitResult",
    "adapter_info",
    "cache_features",
    "calibrate",
    "evaluate",
    "extract_features",
    "fit",
    "learning_rate",
    "load_adapter",
    "push_adapter",
    "save_adapter",
]
