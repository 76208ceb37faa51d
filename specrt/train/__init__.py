"""Training drafters for a frozen target."""
