"""Networks trained with batch normalization."""
