"""Memory of one language model with N LoRA, beside a model for each LoRA. Nothing is trained.

The bytes of all parameters are counted, and the memory that the process has taken since before it loaded the model.

    python benchmarks/adapter_memory.py
    python benchmarks/adapter_memory.py --loras 1 2 --model path/to/llama
    python benchmarks/report.py adapter_memory benchmarks/results/adapter_memory.json
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import adapters
import psutil
import torch
from measure import check_output, environment, write
from transformers import AutoModelForCausalLM, HfArgumentParser

import hf_adapter_distillation as had  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from inputs import check_at_least, load_model  # noqa: E402
from llm_model import CACHE, check_projections, packaged_model, student_config  # noqa: E402


@dataclass
class Arguments:
    """Arguments of the benchmark."""

    loras: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Numbers of LoRA."})
    rank: int = field(default=8, metadata={"help": "Rank, in query, key, value, up and down projections."})
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a decoder like Llama. Default: the packaged SmolLM2."}
    )
    output: str = field(default="benchmarks/results/adapter_memory.json", metadata={"help": "The JSON file."})

    def __post_init__(self) -> None:
        check_at_least(self, {"rank": 1})
        if min(self.loras) < 1:
            raise ValueError(f"--loras {min(self.loras)} is out of range; it must be at least 1.")


def parameter_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters; shared ones count once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    return psutil.Process().memory_info().rss


def main() -> None:
    """Add LoRA to one base model, and write its memory for each number."""
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
        check_output(args.output)
        path = args.model or str(packaged_model(CACHE))
        before = resident_bytes()
        model = load_model(AutoModelForCausalLM.from_pretrained, path, dtype=torch.float32)
        check_projections(model)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"adapter_memory.py: {str(error).splitlines()[0]}") from error
    adapters.init(model)
    _ = [parameter.sum() for parameter in model.parameters()]  # else pages of a mapped file are not there yet
    base = parameter_bytes(model)
    rows = []
    for number in sorted(args.loras):
        for added in range(len(model.adapters_config), number):
            model.add_adapter(f"lora{added}", config=student_config(args.rank))
        shared = parameter_bytes(model)
        lora = (shared - base) / number
        separate = number * (base + lora)
        sizes = {"base": base, "lora": lora, "shared": shared, "separate": separate}
        rows.append({"loras": number, **sizes, "resident": resident_bytes() - before})
        print(", ".join(f"{key}: {value / 1e6:,.1f} MB" for key, value in rows[-1].items() if key != "loras"), number)
    write(Path(args.output), {"environment": environment("cpu"), "arguments": asdict(args), "rows": rows})


if __name__ == "__main__":
    main()
