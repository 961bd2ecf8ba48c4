"""The student on the Hugging Face Hub, with its model card.

Reading order: `card`, `push`, `trainer_mixin`.
"""
