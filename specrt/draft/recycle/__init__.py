"""Token Recycling: what the target found likely before drafts."""
