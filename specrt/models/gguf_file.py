"""A GGUF file as a target: its tensors under Hugging Face's names, in Hugging Face's order of rows.

Values stay in the file, which is memory-mapped, until they are asked for.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from specrt.config import ModelConfig
from specrt.config.gguf_header import BLOCK_SIZES, TensorPlace, read_gguf_header
from specrt.models.families import EMBED, HEAD
from specrt.models.layouts import expected_shapes
from specrt.types import CheckpointError

_TABLES = {
    "token_embd.weight": EMBED,
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROTARY_FACTORS = "rope_freqs.weight"  # part of the configuration
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor of a GGUF file, a matrix ``[N, K]`` or a vector ``[N]``."""

    name: str
    """What the file calls it."""
    shape: tuple[int, ...]
    kind: str
    """``F32``, ``F16``, ``BF16``, ``Q8_0``, … (:data:`specrt.config.gguf_header.BLOCK_SIZES`).
    Vectors are of the first three."""
    _bytes: torch.Tensor = field(repr=False)
    """``[N, bytes a row]`` uint8, mapped, in the file's order."""
    _num_heads: int = 0
    """Heads whose rows the file has in another order: the two rows of a rotary pair side by side,
    where Hugging Face keeps a head's halves apart. 0: none."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the values; None where they lie in blocks."""
        return _DTYPES.get(self.kind)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, of a vector of one value."""
        return int(self._bytes.shape[1])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """``[stop - start, row_bytes]`` uint8: rows as the file has them, in Hugging Face's order.

        They may be mapped from the file: use them before :meth:`GgufFile.release`.
        """
        if not self._num_heads:
            return self._bytes[start:stop]
        num_rows = len(self._bytes)
        places = torch.arange(num_rows).view(self._num_heads, -1, 2).transpose(1, 2).reshape(-1)
        return self._bytes[places[start:stop]]

    def values(self, start: int, stop: int) -> torch.Tensor:
        """``[stop - start, K]`` or ``[stop - start]`` of :attr:`dtype`, as :meth:`rows`.

        Raises:
            ValueError: they lie in blocks.
        """
        if self.dtype is None:
            raise ValueError(f"{self.name}: expected a tensor of single values, got {self.kind}")
        return self.rows(start, stop).view(self.dtype).view(-1, *self.shape[1:])


class GgufFile:
    """A ``.gguf`` file of the Llama, Qwen2 or Qwen3 architecture.

    Args:
        path: the file.

    Raises:
        CheckpointError: it cannot be read, is no model that specrt runs, or its tensors are not
            those of its own metadata; the message names the file and what in it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.header = read_gguf_header(self.path)
        self.config = ModelConfig.from_gguf(self.header)
        self._places = self._named(self.header.tensors)
        self._check()
        self._map: mmap.mmap | None = None

    @cached_property
    def tensors(self) -> Mapping[str, GgufTensor]:
        """All tensors by Hugging Face's names (:func:`specrt.models.layouts.expected_shapes`)."""
        with self.path.open("rb") as content:
            # Private and writable, as torch wants memory; nobody writes.
            self._map = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_COPY)
        memory = torch.frombuffer(self._map, dtype=torch.uint8)
        return {
            key: GgufTensor(
                name,
                place.shape,
                place.kind,
                memory[place.start : place.start + place.num_bytes].view(place.shape[0], -1),
                self._turned_heads(key),
            )
            for key, (name, place) in self._places.items()
        }

    def release(self) -> None:
        """Give up the pages that were read; otherwise they all count as this process's memory."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            with suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED)

    def _turned_heads(self, key: str) -> int:
        """Heads of a tensor that llama.cpp's converter has put into its order of rotary pairs."""
        if self.config.architecture != "llama":
            return 0
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        return heads.get(key.split(".")[-2], 0)

    def _named(self, found: Mapping[str, TensorPlace]) -> dict[str, tuple[str, TensorPlace]]:
        named = {}
        for name, place in found.items():
            key = _TABLES.get(name)
            layer = _LAYER_NAME.fullmatch(name)
            if layer is not None and layer[2] in _LAYER:
                key = f"model.layers.{int(layer[1])}.{_LAYER[layer[2]]}.{layer[3]}"
            if key is not None:
                named[key] = (name, place)
            elif name != _ROTARY_FACTORS:
                raise CheckpointError(
                    f"{self.path}: unknown tensor {name} {list(place.shape)}, which may change "
                    "what the model computes"
                )
        return named

    def _check(self) -> None:
        """Compare what is there with what the metadata tell of."""
        if self.config.num_layers > len(self._places):  # before a name is made for each
            raise CheckpointError(
                f"{self.path}: {self.config.architecture}.block_count: expected no more layers "
                f"than there are tensors ({len(self._places)}), got {self.config.num_layers}"
            )
        expected = expected_shapes(self.config)
        for key, shape in expected.items():
            if key not in self._places:
                raise CheckpointError(f"{self.path}: missing tensor {_name(key)} {list(shape)}")
            name, place = self._places[key]
            if place.shape != shape:
                raise CheckpointError(
                    f"{self.path}: {name}: expected {list(shape)}, got {list(place.shape)}"
                )
            if len(shape) == 1 and BLOCK_SIZES[place.kind].values > 1:
                raise CheckpointError(
                    f"{self.path}: {name}: expected single values, got blocks ({place.kind})"
                )
        for key, (name, place) in self._places.items():
            if key not in expected:
                raise CheckpointError(
                    f"{self.path}: {name} {list(place.shape)} is not of a model of "
                    f"{self.config.num_layers} layers of {self.config.architecture}"
                )


def _name(key: str) -> str:
    """What a GGUF file calls the tensor of one of Hugging Face's names."""
    for name, theirs in _TABLES.items():
        if theirs == key:
            return name
    index, inner = key.removeprefix("model.layers.").split(".", 1)
    module, ending = inner.rsplit(".", 1)
    return f"blk.{index}.{next(n for n, theirs in _LAYER.items() if theirs == module)}.{ending}"
