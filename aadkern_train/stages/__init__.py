"""The stages, one file each: the networks it owns, their losses, who updates when, its settings.

A stage of one's own is a subclass of ``Stage``, or of one that is here, under ``@register("kind")`` (docs/training.md).
"""

from aadkern_train.engine.recipe import StageSettings
from aadkern_train.stages.base import KINDS, Stage, register

__all__ = ["KINDS", "Stage", "StageSettings", "register"]
