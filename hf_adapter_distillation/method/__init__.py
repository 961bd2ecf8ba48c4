"""One training forward pass of a distilled student."""
