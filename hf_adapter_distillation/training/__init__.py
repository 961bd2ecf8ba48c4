"""Train a student in two stages.

Reading order: `trainer`, `preparation`, `steps`, `data`, `checkpoint`, `callbacks`, `checks`, `loss_log`.
"""
