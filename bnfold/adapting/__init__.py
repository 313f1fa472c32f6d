"""Statistics of a target domain."""
