"""The seed's path to experience and its makers."""

from prefero.trainer.experience import ExperienceMaker, NaiveExperienceMaker
from prefero.types import Experience

__all__ = ["Experience", "ExperienceMaker", "NaiveExperienceMaker"]
