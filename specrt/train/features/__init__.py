"""The frozen target, and the hidden states that drafters learn from."""
