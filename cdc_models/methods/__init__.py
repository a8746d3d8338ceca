"""Methods as recipes of parts."""

from cdc_models.methods.base import Method, Prediction
from cdc_models.methods.cdc import CDC
from cdc_models.methods.coop import CoOp
from cdc_models.methods.maple import MaPLe
from cdc_models.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (ZeroShot, CoOp, MaPLe, CDC)}

__all__ = ["CDC", "METHODS", "CoOp", "MaPLe", "Method", "Prediction", "ZeroShot"]
