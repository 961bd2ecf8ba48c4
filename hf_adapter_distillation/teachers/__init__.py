"""Teachers: where they come from, whether they fit, how good they are.

Reading order: `loading`, `projections`, `peft_lora`, `peft_conversion`, `peft_model`, `compatibility`, `ranking`,
`class_head`, `learner`, `weighing`, `relevance`, `pool`.
"""
