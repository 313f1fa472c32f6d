"""Gates B and C: errors, and what they are held against."""
