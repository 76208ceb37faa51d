"""Weights of a checkpoint, packed for streaming.

Decoding is bound by reading every matrix once a step, so all of them lie in one arena in the order
a step reads them: layer by layer qkv, o, gate_up, down, then the head. Each tensor is converted
straight from its mapped file into its place, so loading needs hardly more memory than the arena.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch

from specrt.config import ModelConfig
from specrt.models.checkpoint import Checkpoint, TensorInfo
from specrt.models.gguf_checkpoint import open_checkpoint
from specrt.models.heads import pad_heads
from specrt.models.layouts import (
    EMBED,
    HEAD,
    dtype_name,
    expected_shapes,
    fit,
    layer_matrices,
    weight_bytes,
)
from specrt.types import CheckpointError

ALIGNMENT = 64
"""Bytes; where a matrix of an arena may begin."""
_HUGE_PAGE = 2 << 20
# Elements converted at a time: few enough that torch does not split them over threads (waking those
# costs more than it wins on a busy machine) and that they are still cached for the check.
_CHUNK = (1 << 15) - 1


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Matrices have the loaded dtype; norms and biases are float32.

    H hidden size, I intermediate size, d head size, Q query heads, K key-value heads.
    """

    input_norm: torch.Tensor
    """``[H]``"""
    qkv: torch.Tensor
    """``[(Q + 2K) * d, H]``: the rows of q, then k, then v."""
    qkv_bias: torch.Tensor | None
    """``[(Q + 2K) * d]``"""
    q_norm: torch.Tensor | None
    """``[d]``"""
    k_norm: torch.Tensor | None
    """``[d]``"""
    o: torch.Tensor
    """``[H, Q * d]``"""
    o_bias: torch.Tensor | None
    """``[H]``"""
    post_norm: torch.Tensor
    """``[H]``: the norm before the MLP."""
    gate_up: torch.Tensor
    """``[2I, H]``: the rows of gate, then up; or interleaved (:attr:`Weights.is_interleaved`)."""
    gate_up_bias: torch.Tensor | None
    """``[2I]``"""
    down: torch.Tensor
    """``[H, I]``"""
    down_bias: torch.Tensor | None
    """``[H]``"""


@dataclass(frozen=True)
class Weights:
    """All weights of a target; every matrix is a contiguous view of ``arena``."""

    arena: torch.Tensor
    """``[bytes]`` uint8: layer by layer qkv, o, gate_up, down; then lm_head; then embed if it is
    another matrix. Starts on a 2 MiB boundary, each matrix on 64 bytes."""
    embed: torch.Tensor
    """``[V, H]``"""
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    """``[H]`` float32"""
    lm_head: torch.Tensor
    """``[V, H]``; the very tensor ``embed`` when the head is tied."""
    is_interleaved: bool = False
    """Whether rows of gate and up lie in turn (:mod:`specrt.models.gate_up`), as on a GPU."""


def load_weights(
    path: str | os.PathLike[str],
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    progress: bool = False,
    tables: tuple[torch.Tensor, torch.Tensor] | None = None,
    others: Collection[str] = (),
    head_dim: int | None = None,
    check_size: Callable[[int], None] = lambda num_bytes: None,
) -> Weights:
    """Load safetensors or PyTorch weights, single or sharded, or a GGUF file's, into one arena.

    Args:
        path: a local Hugging Face directory, or a GGUF file.
        config: that model's configuration.
        dtype: of the matrices: float32, bfloat16 or float16.
        progress: show a bar on stderr, if that is a terminal.
        tables: embedding and LM head of another model, ``[V, H]`` each, where the checkpoint has
            none.
        others: keys that the checkpoint has beside the model's; they are left to the caller.
        head_dim: the head size that kernels shall run (:mod:`specrt.models.heads`); None: the
            model's own.
        check_size: told the bytes of what is about to be loaded, before any of it is read; may
            raise.

    Raises:
        ValueError: ``dtype`` is another one.
        CheckpointError: files missing or corrupt; tensors missing, unknown, misshaped, of a wrong
            dtype, not finite, or out of ``dtype``'s range.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    checkpoint = open_checkpoint(path)
    config = fit(checkpoint, config, dtype, has_tables=tables is None, others=others)
    padded = replace(config, head_dim=head_dim or config.head_dim)
    check_size(weight_bytes(padded, dtype, has_tables=tables is None))
    with _progress(progress and sys.stderr.isatty(), config.num_layers + 1) as advance:
        return _Loader(checkpoint, config, dtype, tables, head_dim).load(advance)


def load_tables(
    path: str | os.PathLike[str], config: ModelConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Load only the embedding and the LM head, ``[V, H]`` each; one tensor when they are tied.

    Raises:
        CheckpointError: as for :func:`load_weights`; all tensors are checked but not all read.
    """
    checkpoint = open_checkpoint(path)
    config = fit(checkpoint, config, dtype)
    weights = _Loader(checkpoint, replace(config, num_layers=0), dtype).load(lambda: None)
    return weights.embed, weights.lm_head


class _Arena:
    """Hands out consecutive aligned matrices of one allocation."""

    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._used = 0
        self.memory = _allocate(sum(self._size(shape) for shape in shapes))

    def take(self, shape: tuple[int, int]) -> torch.Tensor:
        end = self._used + math.prod(shape) * self._dtype.itemsize
        matrix = self.memory[self._used : end].view(self._dtype).view(shape)
        self._used += self._size(shape)
        return matrix

    def _size(self, shape: tuple[int, int]) -> int:
        size = math.prod(shape) * self._dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT


def _allocate(size: int) -> torch.Tensor:
    """``[size]`` bytes on a 2 MiB boundary, in huge pages where the system gives them."""
    room = size + _HUGE_PAGE
    if hasattr(mmap, "MAP_ANONYMOUS") and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapping = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no memory for {size} bytes of weights") from error
        with suppress(OSError):  # a kernel without huge pages: only slower
            mapping.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
    else:
        memory = torch.empty(room, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    return memory[start : start + size]


class _Loader:
    """Fills an arena from a checkpoint whose keys, shapes and dtypes have been checked."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        tables: tuple[torch.Tensor, torch.Tensor] | None = None,
        head_dim: int | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._head_dim = config.head_dim
        self._config = config = replace(config, head_dim=head_dim or config.head_dim)
        self._tables = tables
        self._shapes = expected_shapes(config)
        table = (config.vocab_size, config.hidden_size)
        num_tables = 0 if tables is not None else 1 if config.is_head_tied else 2
        matrices = [*layer_matrices(config).values()] * config.num_layers
        self._arena = _Arena(matrices + [table] * num_tables, dtype)

    def load(self, advance: Callable[[], None]) -> Weights:
        layers = []
        for index in range(self._config.num_layers):
            layers.append(self._layer(f"model.layers.{index}."))
            self._checkpoint.release()
            advance()
        embed, lm_head = self._tables or self._own_tables()
        final_norm = self._vector(["model.norm.weight"])
        self._checkpoint.release()
        advance()
        return Weights(self._arena.memory, embed, tuple(layers), final_norm, lm_head)

    def _own_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        is_tied = self._config.is_head_tied
        lm_head = self._matrix([EMBED if is_tied else HEAD])
        return (lm_head if is_tied else self._matrix([EMBED])), lm_head

    def _layer(self, prefix: str) -> LayerWeights:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qkv = [f"{attention}{name}_proj" for name in "qkv"]
        gate_up = [f"{mlp}gate_proj", f"{mlp}up_proj"]
        return LayerWeights(  # in the order a step reads the matrices
            input_norm=self._vector([f"{prefix}input_layernorm.weight"]),
            qkv=self._matrix([f"{name}.weight" for name in qkv]),
            qkv_bias=self._optional_vector([f"{name}.bias" for name in qkv]),
            q_norm=self._optional_vector([f"{attention}q_norm.weight"]),
            k_norm=self._optional_vector([f"{attention}k_norm.weight"]),
            o=self._matrix([f"{attention}o_proj.weight"]),
            o_bias=self._optional_vector([f"{attention}o_proj.bias"]),
            post_norm=self._vector([f"{prefix}post_attention_layernorm.weight"]),
            gate_up=self._matrix([f"{name}.weight" for name in gate_up]),
            gate_up_bias=self._optional_vector([f"{name}.bias" for name in gate_up]),
            down=self._matrix([f"{mlp}down_proj.weight"]),
            down_bias=self._optional_vector([f"{mlp}down_proj.bias"]),
        )

    def _matrix(self, keys: list[str]) -> torch.Tensor:
        """The arena's next matrix, filled with the rows of ``keys``."""
        num_rows = sum(self._shapes[key][0] for key in keys)
        matrix = self._arena.take((num_rows, self._shapes[keys[0]][1]))
        self._fill(matrix, keys)
        return matrix

    def _optional_vector(self, keys: list[str]) -> torch.Tensor | None:
        """None where the architecture has no such tensor."""
        return self._vector(keys) if keys[0] in self._shapes else None

    def _vector(self, keys: list[str]) -> torch.Tensor:
        """``keys`` behind one another in float32."""
        vector = torch.empty(sum(self._shapes[key][0] for key in keys), dtype=torch.float32)
        self._fill(vector, keys)
        return vector

    def _fill(self, destination: torch.Tensor, keys: list[str]) -> None:
        start = 0
        for key in keys:
            end = start + self._shapes[key][0]
            info = self._checkpoint.infos[key]
            source, scale = self._checkpoint.tensor(key), None
            if info.dtype == torch.float8_e4m3fn:
                scale = self._scale(key)
            if self._config.head_dim != self._head_dim:
                source, scale = (source if scale is None else source.float() * scale), None
                source = pad_heads(key, source, self._head_dim, self._config.head_dim)
            _convert(source, scale, destination[start:end], (key, info))
            start = end

    def _scale(self, key: str) -> torch.Tensor:
        """``[1, 1]`` or ``[rows, 1]`` float32: the factors of a float8 matrix."""
        scale_key = f"{key}{self._config.float8_scale_suffix}"
        scale = self._checkpoint.tensor(scale_key).to(torch.float32).reshape(-1, 1)
        mantissa, _ = torch.frexp(scale)
        # Only powers of two keep the dequantised weight exact in bfloat16.
        if not bool((mantissa == 0.5).all() and torch.isfinite(scale).all()):
            file = self._checkpoint.infos[scale_key].file
            raise CheckpointError(f"{file}: {scale_key}: expected positive powers of two")
        return scale


def _convert(
    source: torch.Tensor,
    scale: torch.Tensor | None,
    destination: torch.Tensor,
    origin: tuple[str, TensorInfo],
) -> None:
    """Copy ``source`` (times ``scale``) into ``destination``, refusing NaN and infinity."""
    num_rows = max(1, _CHUNK // max(1, math.prod(source.shape[1:])))
    for start in range(0, source.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        chunk = source[rows]
        if scale is not None:
            chunk = chunk.to(torch.float32).mul_(scale[rows] if len(scale) > 1 else scale)
        destination[rows].copy_(chunk)
        low, high = torch.aminmax(destination[rows])
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise _not_finite(chunk, destination.dtype, origin)


def _not_finite(
    chunk: torch.Tensor, dtype: torch.dtype, origin: tuple[str, TensorInfo]
) -> CheckpointError:
    key, info = origin
    if not bool(torch.isfinite(chunk).all()):
        return CheckpointError(f"{info.file}: {key}: has NaN or infinite values")
    largest = chunk.abs().max().item()
    return CheckpointError(
        f"{info.file}: {key}: {largest:g} is out of {dtype_name(dtype)}'s range; "
        "load as another dtype"
    )


@contextmanager
def _progress(is_shown: bool, total: int) -> Iterator[Callable[[], None]]:
    """A function to call after each of ``total`` steps."""
    if not is_shown:
        yield lambda: None
        return
    from rich.console import Console  # only where a bar is shown: importing it takes time
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=total)
        yield lambda: bar.advance(task)
