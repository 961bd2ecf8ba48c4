"""A student on a model: add it, place its fusions, start it, save it."""
