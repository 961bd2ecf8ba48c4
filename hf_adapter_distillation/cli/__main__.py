"""Run the command line as `python -m hf_adapter_distillation.cli`, which `accelerate launch --module` needs."""

import sys

from .main import main

sys.exit(main())
