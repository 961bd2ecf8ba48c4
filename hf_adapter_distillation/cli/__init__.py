"""The command line `adapter-distill`, which distils, evaluates, runs and shares adapters for labelled texts.

Reading order: `main`, `parser`, `options`, `train`, `progress`, `evaluate`, `predict`, `retrieval`, `models`, `tasks`,
`data`, `saved`, `export`.
"""

from .main import main

__all__ = ["main"]
