"""Where teachers come from, whether they fit, and how good they are."""
