"""The command line `adapter-distill`."""

from .main import main

__all__ = ["main"]
