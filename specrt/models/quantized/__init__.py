"""Matrices stored as small integers or float8 with scales: read as the values they stand for."""
