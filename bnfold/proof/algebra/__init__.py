"""Gate A: constants against exact ones, without data."""
