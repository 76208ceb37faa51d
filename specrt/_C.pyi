"""The compiled extension. Its calls are typed by the wrappers in ``specrt.ops``."""

from typing import Any

def __getattr__(name: str) -> Any: ...
