"""Where networks run, and the proof that they did."""
