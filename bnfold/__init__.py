"""bnfold: fold, adapt, export and prove networks with batch normalization."""
