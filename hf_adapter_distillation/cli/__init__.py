"""The command line `adapter-distill`, which distils, evaluates, runs and shares adapters for labelled texts.

Reading order: `main`, `parser`, `options`, `train`, `progress`, `evaluate`, `predict`, `tasks`, `data`, `saved`,
`export`.
"""

from .main import main

__all__ = ["main"]
