"""Trainers of other libraries with both stages; each module needs the extra of its name.

`sentence_transformers`: embedding models and cross-encoders.
"""
