"""Reference vectors: what the authors' own programs gave for random weights (docs/training.md)."""
