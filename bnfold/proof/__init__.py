"""That two networks are the same function: the algebra, the network, the runtimes."""
