"""A fold that fails, reduced to what breaks it, and written."""
