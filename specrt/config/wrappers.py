"""Text models inside of multimodal ones: where their configuration and their tensors are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Of the wrapper where the text model's own configuration does not say.
_SHARED = (
    "tie_word_embeddings", "quantization_config", "dtype", "torch_dtype", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
_TEXT = re.compile(
    r"^(?:language_model\.(?P<whole>(?:model|lm_head)\..*)"
    r"|model\.language_model\.(?P<base>.*)"
    r"|(?P<head>lm_head\..*)"
    r"|model\.(?P<layers>(?:embed_tokens|layers|norm)\..*))$"
)


def wrapper_of(data: Mapping[str, Any]) -> str | None:
    """The ``model_type`` of a configuration that has its text model's inside, or None."""
    inner = data.get("text_config")
    return str(data.get("model_type")) if isinstance(inner, Mapping) else None


def text_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's configuration in a multimodal one's."""
    text = dict(data["text_config"])
    shared = {key: data[key] for key in _SHARED if data.get(key) is not None and key not in text}
    return {**text, **shared}


def text_key(key: str) -> str | None:
    """What a tensor of a multimodal checkpoint is called in its text model's own, or None for one
    of another part."""
    found = _TEXT.match(key)
    if found is None:
        return None
    base = found["base"] or found["layers"]
    return f"model.{base}" if base else found["whole"] or found["head"]
