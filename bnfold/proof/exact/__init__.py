"""What a graph is and computes, in float64."""
