"""Drafters: small systems that propose trees of tokens for the target to verify."""
