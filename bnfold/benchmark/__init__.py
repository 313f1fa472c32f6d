"""How fast networks run, and whether a difference is told from noise."""
