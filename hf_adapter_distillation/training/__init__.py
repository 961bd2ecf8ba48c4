"""Train a student in two stages.

Reading order: `trainers`, `trainer`, `preparation`, `optimizer`, `steps`, `reading`, `data`, `checkpoint`,
`callbacks`, `checks`, `loss_log`.
"""
