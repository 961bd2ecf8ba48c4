"""Kinds of adapters that teachers and students are tested with."""

from adapters import LoRAConfig, NoReftConfig

EVERYWHERE = {"intermediate_lora": True, "output_lora": True, "attn_matrices": ["q", "k", "v"]}
LORAS = {
    "default": "lora",
    "everywhere": LoRAConfig(**EVERYWHERE, r=4, alpha=16),
    "dropout": LoRAConfig(dropout=0.5),
    "rank-stabilised": LoRAConfig(r=4, alpha=2 * 4**0.5),  # scaled by alpha / sqrt(r)
}

LORA = LoRAConfig(attn_matrices=["q", "v"], r=4)
NOREFT = NoReftConfig(prefix_positions=2, suffix_positions=2)
METHODS = {  # the configs of three teachers, and that of the student
    "seq_bn": (["seq_bn"] * 3, "seq_bn"),
    "par_bn": (["par_bn"] * 3, "par_bn"),
    "compacter": (["compacter[reduction_factor=4]"] * 3, "compacter[reduction_factor=4]"),
    "lora": ([LORA] * 3, LORA),
    "dora": (["dora"] * 3, "dora"),
    "vera": (["vera"] * 3, "vera"),
    "ia3": (["ia3"] * 3, "ia3"),
    "prefix_tuning": (["prefix_tuning"] * 3, "prefix_tuning"),
    "noreft": ([NOREFT] * 3, NOREFT),
    "mam": (["mam"] * 3, "mam"),
    "unipelt": (["unipelt"] * 3, "unipelt"),
    "mixed": (["seq_bn", LORA, "ia3"], "seq_bn"),
}
