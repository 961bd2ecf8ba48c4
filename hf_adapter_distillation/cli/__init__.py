"""The command line `adapter-distill`, which distils, evaluates and shares adapters for text classification.

Reading order: `main`, `train`, `evaluate`, `data`, `saved`, `export`.
"""

from .main import main

__all__ = ["main"]
