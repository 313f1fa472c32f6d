"""What batch norms read of a data set, and the statistics that follow from it."""
