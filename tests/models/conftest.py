"""Tests here that ask for a ``backend`` run on each, as those of the kernels do."""

from importlib.util import find_spec

from tests.ops.conftest import backend, pytest_generate_tests, stand_in_linear

# What is written and dequantised there is a package's, for development alone.
collect_ignore_glob = [] if find_spec("gguf") else ["test_gguf_*.py"]

__all__ = ["backend", "pytest_generate_tests", "stand_in_linear"]
