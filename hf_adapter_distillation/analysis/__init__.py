"""Measure and draw how much the fusion uses each teacher; read `observe`, then `plots`."""
