"""Learned prompts and hand-crafted templates."""

from cdc_models.prompts.context import PromptContext
from cdc_models.prompts.coupled import CoupledPrompts, default_depth
from cdc_models.prompts.templates import ENSEMBLE, HAND_CRAFTED, fill_templates

__all__ = ["ENSEMBLE", "HAND_CRAFTED", "CoupledPrompts", "PromptContext", "default_depth", "fill_templates"]
