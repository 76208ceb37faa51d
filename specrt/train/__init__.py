"""Training of drafters for a target that stays as it is."""
