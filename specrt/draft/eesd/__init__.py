"""EESD: the target's first layers and a trained exit draft."""
