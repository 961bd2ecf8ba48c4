"""Memory of one base model with N LoRA, beside a model for each LoRA: the bytes of all parameters.

The base has the shape of SmolLM2-135M with random weights: the sizes do not depend on the values. Nothing is trained.

    python benchmarks/adapter_memory.py
    python benchmarks/adapter_memory.py --loras 1 2 --layers 2
    python benchmarks/report.py adapter_memory benchmarks/results/adapter_memory.json
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import adapters
import torch
from adapters import LoRAConfig
from measure import environment, write
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig

import hf_adapter_distillation as had  # noqa: F401


@dataclass
class Arguments:
    """Arguments of the benchmark."""

    loras: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Numbers of LoRA."})
    rank: int = field(default=8, metadata={"help": "Rank, in query, key, value, up and down projections."})
    layers: int = field(default=30, metadata={"help": "Layers of the base model."})
    output: str = field(default="benchmarks/results/adapter_memory.json", metadata={"help": "The JSON file."})


def base_model(layers: int) -> torch.nn.Module:
    """Return a causal language model with the shape of SmolLM2-135M, prepared for adapters."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    adapters.init(model)
    return model


def parameter_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters; shared ones count once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def main() -> None:
    """Add LoRA to one base model, and write the bytes of its parameters for each number."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    model = base_model(args.layers)
    base = parameter_bytes(model)
    projections = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}
    rows = []
    for number in sorted(args.loras):
        for added in range(len(model.adapters_config), number):
            model.add_adapter(f"lora{added}", config=LoRAConfig(r=args.rank, alpha=args.rank, **projections))
        shared = parameter_bytes(model)
        lora = (shared - base) / number
        separate = number * (base + lora)
        rows.append({"loras": number, "base": base, "lora": lora, "shared": shared, "separate": separate})
        print(", ".join(f"{key}: {value / 1e6:,.1f} MB" for key, value in rows[-1].items() if key != "loras"), number)
    write(Path(args.output), {"environment": environment("cpu"), "arguments": asdict(args), "rows": rows})


if __name__ == "__main__":
    main()
