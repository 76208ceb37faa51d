"""The ``specrt`` command."""

from specrt.cli.app import main

__all__ = ["main"]
