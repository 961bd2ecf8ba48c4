"""Train a student in two stages.

Reading order: `trainer`, `preparation`, `optimizer`, `steps`, `data`, `checkpoint`, `callbacks`, `checks`, `loss_log`.
"""
