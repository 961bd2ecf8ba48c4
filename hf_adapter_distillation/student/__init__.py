"""A student on a model, from its addition to its files.

Reading order: `adding`, `blocks`, `preparing`, `choosing`, `fusions`, `warm_start`, `least_squares`, `training_run`,
`summary`, `provenance`, `digests`, `saving`, `peft_export`, `peft_heads`.
"""
