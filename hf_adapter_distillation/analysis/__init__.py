"""What the fusion makes of each teacher, as numbers and figures."""
