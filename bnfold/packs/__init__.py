"""Domain packs: one model, the statistics of many domains."""
