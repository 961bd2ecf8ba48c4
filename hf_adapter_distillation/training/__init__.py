"""The two stages of a training."""
