"""Target models and their weights."""
