"""Run the command line as `python -m hf_adapter_distillation.cli`, which `accelerate launch --module` needs."""

from .main import main

raise SystemExit(main())
