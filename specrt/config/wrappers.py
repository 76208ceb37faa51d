"""Text models inside of multimodal ones: where their configuration is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of the wrapper where the text model's own configuration does not say.
_SHARED = (
    "tie_word_embeddings", "quantization_config", "dtype", "torch_dtype", "bos_token_id",
    "eos_token_id",
)  # fmt: skip


def wrapper_of(data: Mapping[str, Any]) -> str | None:
    """The ``model_type`` of a configuration that has its text model's inside, or None."""
    inner = data.get("text_config")
    return str(data.get("model_type")) if isinstance(inner, Mapping) else None


def text_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration, or that of the text model in a multimodal one's."""
    if wrapper_of(data) is None:
        return dict(data)
    text = dict(data["text_config"])
    shared = {key: data[key] for key in _SHARED if data.get(key) is not None and key not in text}
    return {**text, **shared}
