"""Weights of a checkpoint, arranged for streaming.

Decoding is bound by reading every matrix once a step, so all of them lie in one arena in the order
a step reads them: layer by layer qkv, o, gate_up, down, then the head. Each tensor goes straight
from its mapped file into its place and its form (:mod:`specrt.models.packing`).
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from specrt.config import ModelConfig
from specrt.models.arena import Arena
from specrt.models.checkpoint import Checkpoint
from specrt.models.families import EMBED, HEAD, HEAD_BIAS, POSITIONS
from specrt.models.filling import Part, Pieces, parts_of, write_rows
from specrt.models.heads import HeadLayout
from specrt.models.layouts import (
    dtype_name,
    expected_shapes,
    fit,
    layer_norms,
    matrix_keys,
    matrix_parts,
    weight_bytes,
)
from specrt.models.opening import adapter_hash, open_checkpoint
from specrt.models.packing import ROWS, Form, Packing
from specrt.models.stored import float8_scale
from specrt.ops import Float8Matrix, Matrix, MatrixKind, PackedMatrix, StackedMatrix
from specrt.types import CheckpointError


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Matrices are kept as was asked for; norms and biases are float32.

    H hidden size, I intermediate size, d head size, Q query heads, K key-value heads.
    """

    input_norm: torch.Tensor | None
    """``[H]``: the norm before attention; None where nothing is normed before."""
    qkv: Matrix
    """``[(Q + 2K) * d, H]``: the rows of q, then k, then v."""
    qkv_bias: torch.Tensor | None
    """``[(Q + 2K) * d]``"""
    q_norm: torch.Tensor | None
    """``[d]``, or ``[Q * d]`` (:attr:`~specrt.config.Form.is_qk_norm_full`)"""
    k_norm: torch.Tensor | None
    """``[d]``, or ``[K * d]``"""
    o: Matrix
    """``[H, Q * d]``"""
    o_bias: torch.Tensor | None
    """``[H]``"""
    post_norm: torch.Tensor | None
    """``[H]``: the norm before the MLP; None where it has none of its own."""
    gate_up: Matrix
    """``[2I, H]``: the rows of gate, then up; or interleaved (:attr:`Weights.is_interleaved`).
    ``[I, H]`` of an MLP that is not gated."""
    gate_up_bias: torch.Tensor | None
    """``[2I]`` or ``[I]``"""
    down: Matrix
    """``[H, I]``"""
    down_bias: torch.Tensor | None
    """``[H]``"""
    input_norm_bias: torch.Tensor | None = None
    """``[H]``"""
    post_norm_bias: torch.Tensor | None = None
    """``[H]``"""
    attended_norm: torch.Tensor | None = None
    """``[H]``: of what attention gives, before it is added."""
    mlp_norm: torch.Tensor | None = None
    """``[H]``: of what the MLP gives, before it is added."""


@dataclass(frozen=True)
class Weights:
    """All weights of a target; every matrix lies in ``arena`` in one piece, or in parts."""

    arena: torch.Tensor
    """``[bytes]`` uint8: layer by layer qkv, o, gate_up, down; then lm_head; then embed if it is
    another matrix. Starts on a 2 MiB boundary, each matrix on 64 bytes."""
    embed: torch.Tensor | PackedMatrix
    """``[V, H]``"""
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    """``[H]`` float32"""
    lm_head: torch.Tensor | PackedMatrix
    """``[V, H]``; the very matrix ``embed`` when the head is tied."""
    dtype: torch.dtype
    """Of keys and values, and of matrices in rows that have no other in their file."""
    packing: Packing = ROWS
    """What was asked for; what it came to, each matrix says."""
    is_interleaved: bool = False
    """Whether rows of gate and up lie in turn (:mod:`specrt.models.gate_up`), as on a GPU."""
    may_interleave: bool = True
    """Whether a GPU takes them so: those of an MLP gated by silu."""
    final_norm_bias: torch.Tensor | None = None
    """``[H]`` float32"""
    head_bias: torch.Tensor | None = None
    """``[V]`` float32"""
    positions: torch.Tensor | None = None
    """``[P, H]`` of ``dtype``: the table of learned positions."""
    adapter: str | None = None
    """Which adapter is merged into them (:func:`~specrt.models.opening.adapter_hash`)."""

    @property
    def matrices(self) -> list[torch.Tensor | PackedMatrix]:
        """All that lie in the arena or are lent tables, each once, in its order."""
        found: list[Matrix] = []
        for one in self.layers:
            found += (one.qkv, one.o, one.gate_up, one.down)
        found += [self.lm_head] if self.lm_head is self.embed else [self.lm_head, self.embed]
        return [part for matrix in found for part in parts_in(matrix)]

    @property
    def forms(self) -> dict[str, int]:
        """Bytes of matrices, by the name of a dtype or of a :class:`~specrt.ops.MatrixKind`."""
        sizes: Counter[str] = Counter()
        for matrix in self.matrices:
            form = matrix.kind if isinstance(matrix, PackedMatrix) else matrix.dtype
            sizes[dtype_name(form)] += matrix.nbytes
        return dict(sizes.most_common())

    @property
    def form(self) -> str:
        """What matrices are kept as: ``"BF16_SPLIT"``, ``"Q4_K + Q6_K"``, ``"float32"``."""
        return " + ".join(self.forms)

    @property
    def packed_inputs(self) -> int:
        """The most columns of a packed matrix; 0 where all lie in rows."""
        packed = (m.num_inputs for m in self.matrices if isinstance(m, PackedMatrix))
        return max(packed, default=0)


def parts_in(matrix: Matrix) -> tuple[torch.Tensor | PackedMatrix, ...]:
    """What a matrix of a target is made of: itself, or a stack's parts."""
    if isinstance(matrix, StackedMatrix):
        return matrix.parts
    assert not isinstance(matrix, Float8Matrix), "drafters' alone"
    return (matrix,)


def load_weights(
    path: str | os.PathLike[str],
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    progress: bool = False,
    tables: tuple[torch.Tensor | PackedMatrix, torch.Tensor | PackedMatrix] | None = None,
    others: Collection[str] = (),
    head_dim: int | None = None,
    packing: Packing = ROWS,
    check_size: Callable[[int], None] = lambda num_bytes: None,
    adapter: str | os.PathLike[str] | None = None,
) -> Weights:
    """Load safetensors or PyTorch weights, single or sharded, or a GGUF file's, into one arena.

    Args:
        path: a local Hugging Face directory, or a GGUF file.
        config: that model's configuration.
        dtype: of the weights: float32, bfloat16 or float16. Where a file's blocks are kept, that of
            keys and values alone, and matrices that are none keep their own.
        progress: show a bar on stderr, if that is a terminal.
        tables: embedding and LM head of another model, ``[V, H]`` each, where the checkpoint has
            none.
        others: keys that the checkpoint has beside the model's; they are left to the caller.
        head_dim: the head size that kernels shall run (:mod:`specrt.models.heads`); None: the
            model's own.
        packing: how matrices are kept.
        check_size: told the bytes of what is about to be loaded, before any of it is read; may
            raise.
        adapter: a directory with a LoRA adapter that is merged (:mod:`specrt.models.adapted`).

    Raises:
        ValueError: ``dtype`` is another one.
        CheckpointError: files missing or corrupt; tensors missing, unknown, misshaped, of a wrong
            dtype, not finite, or out of ``dtype``'s range.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    checkpoint = open_checkpoint(path, adapter)
    has_tables = tables is None
    checkpoint, config = fit(checkpoint, config, dtype, has_tables=has_tables, others=others)
    padded = replace(config, head_dim=head_dim or config.head_dim)
    check_size(weight_bytes(padded, dtype, has_tables=has_tables))
    with _progress(progress and sys.stderr.isatty(), config.num_layers + 1) as advance:
        loaded = _Loader(checkpoint, config, dtype, packing, tables, head_dim).load(advance)
    return replace(loaded, adapter=adapter_hash(adapter))


def load_tables(
    path: str | os.PathLike[str],
    config: ModelConfig,
    dtype: torch.dtype,
    adapter: str | os.PathLike[str] | None = None,
) -> Weights:
    """Load what lies outside of layers alone: embedding and head are rows.

    Raises:
        CheckpointError: as for :func:`load_weights`; all tensors are checked but not all read.
    """
    checkpoint, config = fit(open_checkpoint(path, adapter), config, dtype)
    loader = _Loader(checkpoint, replace(config, num_layers=0), dtype, ROWS)
    return loader.load(lambda: None)


class _Loader:
    """Fills an arena from a checkpoint whose keys, shapes and dtypes have been checked."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        packing: Packing,
        tables: tuple[torch.Tensor | PackedMatrix, torch.Tensor | PackedMatrix] | None = None,
        head_dim: int | None = None,
    ) -> None:
        self._checkpoint, self._pieces = checkpoint, Pieces(checkpoint)
        self._heads = HeadLayout.of(config, head_dim or config.head_dim)
        self._config = config = replace(config, head_dim=self._heads.padded)
        self._tables = tables
        self._dtype, self._packing = dtype, packing
        self._shapes = expected_shapes(config, has_tables=tables is None)
        self._names, self._norms = matrix_parts(config), layer_norms(config)
        matrices = matrix_keys(config, has_tables=tables is None)
        self._forms = {key: self._form_of(key) for keys in matrices for key in keys}
        parts = (part for keys in matrices for part in self._parts_of(keys))
        self._arena = Arena(part.num_bytes for part in parts)

    def load(self, advance: Callable[[], None]) -> Weights:
        layers = []
        for index in range(self._config.num_layers):
            layers.append(self._layer(f"model.layers.{index}."))
            advance()
        embed, lm_head = self._tables or self.own_tables()
        form, outer = self._config.form, self._outer()
        self._checkpoint.release()
        advance()
        return Weights(
            self._arena.memory,
            embed,
            tuple(layers),
            lm_head=lm_head,
            dtype=self._dtype,
            packing=self._packing,
            may_interleave=form.is_gated_by_silu,
            **outer,
        )

    def _outer(self) -> dict[str, Any]:
        """What lies outside of layers, but for embedding and head."""
        positions = None
        if POSITIONS in self._shapes:
            positions = torch.empty(self._shapes[POSITIONS], dtype=self._dtype)
            self._fill(positions, [POSITIONS])
        return {
            "final_norm": self._norm("model.norm"),
            "final_norm_bias": self._optional_vector(["model.norm.bias"]),
            "head_bias": self._optional_vector([HEAD_BIAS]),
            "positions": positions,
        }

    def own_tables(self) -> tuple[torch.Tensor | PackedMatrix, torch.Tensor | PackedMatrix]:
        """Embedding and head of the checkpoint."""
        is_tied = self._config.is_head_tied
        lm_head = self._table(EMBED if is_tied else HEAD)
        return (lm_head if is_tied else self._table(EMBED)), lm_head

    def _form_of(self, key: str) -> Form:
        """What a matrix becomes."""
        info, packing = self._checkpoint.infos[key], self._packing
        if isinstance(info.dtype, MatrixKind):
            stays = packing.keeps_blocks and packing.quantized is None
            return info.dtype if stays else packing.form_of(self._dtype)
        has_own = packing.keeps_blocks and self._checkpoint.has_blocks
        if has_own and isinstance(info.dtype, torch.dtype):
            return packing.form_of(info.dtype)
        return packing.form_of(self._dtype)

    def _parts_of(self, keys: Sequence[str]) -> list[Part]:
        return parts_of(keys, self._shapes, self._forms)

    def _layer(self, prefix: str) -> LayerWeights:
        names = self._names

        def matrix(name: str) -> Matrix:
            return self._matrix([f"{prefix}{part}.weight" for part in names[name]])

        def bias(name: str) -> torch.Tensor | None:
            return self._optional_vector([f"{prefix}{part}.bias" for part in names[name]])

        def norm(name: str) -> torch.Tensor | None:
            return self._norm(f"{prefix}{name}") if name in self._norms else None

        return LayerWeights(  # in the order a step reads the matrices
            input_norm=norm("input_layernorm"),
            qkv=matrix("qkv"),
            qkv_bias=bias("qkv"),
            q_norm=self._optional_vector([f"{prefix}self_attn.q_norm.weight"]),
            k_norm=self._optional_vector([f"{prefix}self_attn.k_norm.weight"]),
            o=matrix("o"),
            o_bias=bias("o"),
            post_norm=norm("post_attention_layernorm"),
            gate_up=matrix("gate_up"),
            gate_up_bias=bias("gate_up"),
            down=matrix("down"),
            down_bias=bias("down"),
            input_norm_bias=self._optional_vector([f"{prefix}input_layernorm.bias"]),
            post_norm_bias=self._optional_vector([f"{prefix}post_attention_layernorm.bias"]),
            attended_norm=norm("attended_layernorm"),
            mlp_norm=norm("mlp_layernorm"),
        )

    def _table(self, key: str) -> torch.Tensor | PackedMatrix:
        (part,) = self._parts_of([key])
        return self._filled(part)

    def _matrix(self, keys: list[str]) -> Matrix:
        """The arena's next matrix, filled with the rows of ``keys``."""
        matrices = [self._filled(part) for part in self._parts_of(keys)]
        return matrices[0] if len(matrices) == 1 else StackedMatrix(tuple(matrices))

    def _filled(self, part: Part) -> torch.Tensor | PackedMatrix:
        matrix = part.within(self._arena.take(part.num_bytes))
        self._fill(matrix, part.keys)
        return matrix

    def _norm(self, name: str) -> torch.Tensor:
        """A norm's weight, which is 1 where the family has none."""
        key = f"{name}.weight"
        if key in self._shapes:
            return self._vector([key])
        return torch.ones(self._config.hidden_size)

    def _optional_vector(self, keys: list[str]) -> torch.Tensor | None:
        """None where the architecture has no such tensor."""
        return self._vector(keys) if keys[0] in self._shapes else None

    def _vector(self, keys: list[str]) -> torch.Tensor:
        """``keys`` behind one another in float32."""
        vector = torch.empty(sum(self._shapes[key][0] for key in keys), dtype=torch.float32)
        self._fill(vector, keys)
        return vector

    def _fill(self, destination: torch.Tensor | PackedMatrix, keys: Sequence[str]) -> None:
        begin = 0
        for key in keys:
            info = self._checkpoint.infos[key]
            for start, rows in self._stored(key):
                write_rows(rows, destination, begin + start, info)
            begin += self._shapes[key][0]

    def _stored(self, key: str) -> Iterator[tuple[int, torch.Tensor]]:
        """First rows and rows, piece by piece: factors multiplied in, offsets added, heads as they
        are run."""
        info, heads = self._checkpoint.infos[key], self._heads
        is_float8 = info.dtype == torch.float8_e4m3fn
        scale_key = f"{key}{self._config.float8_scale_suffix}"
        scale = float8_scale(self._checkpoint, scale_key) if is_float8 else None
        offset = self._config.form.norm_offset if key.endswith("norm.weight") else 0.0
        axis = heads.axis(key)
        if axis == 1 and isinstance(info.dtype, MatrixKind):
            raise CheckpointError(
                f"{info.file}: {info.key}: expected heads of a multiple of 16 for weights in "
                f"{info.dtype.name}, got {heads.head_dim}"
            )
        unit, wide = (heads.head_dim, heads.padded) if axis == 0 else (1, 1)
        for start, rows in self._pieces.of(key, unit):
            if scale is not None:
                factors = scale[start : start + len(rows)] if len(scale) > 1 else scale
                rows = rows.float().mul_(factors)
            if offset:
                rows = rows.float() + offset
            yield start // unit * wide, rows if axis is None else heads.arranged(key, rows)


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
