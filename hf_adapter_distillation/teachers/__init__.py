"""Teachers: where they come from, whether they fit, how good they are.

Reading order: `loading`, `peft_lora`, `compatibility`, `ranking`.
"""
