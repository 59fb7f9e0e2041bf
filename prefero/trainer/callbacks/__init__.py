"""What can be hooked into a trainer's loop."""

from prefero.trainer.callbacks.base import Callback
from prefero.trainer.callbacks.performance_evaluator import PerformanceEvaluator
from prefero.trainer.callbacks.save_checkpoint import SaveCheckpoint

__all__ = ["Callback", "PerformanceEvaluator", "SaveCheckpoint"]
