"""Train a student in two stages.

Reading order: `arguments`, `trainers`, `mixin`, `preparation`, `optimizer`, `steps`, `reading`, `writing`, `data`,
`checkpoint`, `callbacks`, `checks`, `loss_log`, `sharding`.
"""
