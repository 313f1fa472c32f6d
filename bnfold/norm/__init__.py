"""Batch normalization and its variants, as torch modules that fold to plain weights."""
