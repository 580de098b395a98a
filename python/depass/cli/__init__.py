"""The command ``depass``."""

from .main import main

__all__ = ["main"]
