"""Train a student in two stages.

Reading order: `arguments`, `trainers`, `trainer`, `preparation`, `optimizer`, `steps`, `reading`, `writing`, `data`,
`checkpoint`, `callbacks`, `checks`, `loss_log`.
"""
