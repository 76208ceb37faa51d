"""Tests here that ask for a ``backend`` run on each, as those of the kernels do."""

from tests.ops.conftest import backend, pytest_generate_tests, stand_in_linear

__all__ = ["backend", "pytest_generate_tests", "stand_in_linear"]
