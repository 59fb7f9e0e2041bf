"""prefero: align language models with human feedback, and prove it."""

__version__ = "0.1.0"
