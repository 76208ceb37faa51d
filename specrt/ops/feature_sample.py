"""The draft model's input: token embedding and feature joined, with FSPAD's feature sampling."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from specrt import _C
from specrt.ops.linear import Float8Matrix, Matrix, linear
from specrt.ops.registry import register
from specrt.ops.rms_norm import rms_norm
from specrt.ops.silu_mul import silu_mul

_INPUTS = (
    "Tensor tokens, Tensor? source, Tensor features, Tensor? embed, Tensor fc, Tensor? fc_bias, "
    "Tensor? norm, Tensor? gate, Tensor? up, Tensor? down, Tensor? token_fc, Tensor? token_gate, "
    "float eps, Tensor(a!) workspace"
)
register(f"feature_sample({_INPUTS}, Tensor(b!) out, Tensor? is_open) -> ()", _C.feature_sample)
register(f"feature_gather({_INPUTS}, Tensor out, Tensor? is_open) -> ()", _C.feature_gather)


class FeatureWeights(NamedTuple):
    """What :func:`feature_sample` multiplies by and looks up."""

    embed: torch.Tensor | None
    fc: Matrix
    fc_bias: torch.Tensor | None
    norm: torch.Tensor | None
    gate: Matrix | None
    up: Matrix | None
    down: Matrix | None
    token_fc: torch.Tensor | None
    token_gate: torch.Tensor | None

    @property
    def has_float8(self) -> bool:
        """Whether any matrix is one of :func:`~specrt.ops.linear.linear`'s alone."""
        return any(isinstance(weight, Float8Matrix) for weight in self)

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """In this order; of matrices with a scale, the values."""
        return [one.values if isinstance(one, Float8Matrix) else one for one in self]


class _Scratch(NamedTuple):
    """Parts of M rows of a workspace."""

    pair: torch.Tensor
    """``[M, 2 H]``: e and f."""
    e: torch.Tensor
    f: torch.Tensor
    """Later h's norm."""
    h: torch.Tensor
    gate_up: torch.Tensor
    """``[M, 2 I]``"""
    gate: torch.Tensor
    """Later silu(gate) * up."""
    up: torch.Tensor

    @classmethod
    def of(cls, workspace: torch.Tensor, hidden: int, wide: int) -> _Scratch:
        h, gate, _ = _layout(hidden, wide)
        pair, gate_up = workspace[:, : 2 * hidden], workspace[:, gate : gate + 2 * wide]
        return cls(
            pair,
            pair[:, :hidden],
            pair[:, hidden:],
            workspace[:, h : h + hidden],
            gate_up,
            gate_up[:, :wide],
            gate_up[:, wide:],
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _layout(hidden_size: int, intermediate_size: int) -> tuple[int, int, int]:
    """Where h and gate begin in a row of the workspace, and how long it is."""
    return _C.feature_sample_layout(hidden_size, intermediate_size)


def feature_sample_workspace(hidden_size: int, intermediate_size: int) -> int:
    """Values of scratch that ``feature_sample`` needs a row; ``intermediate_size`` 0 for EAGLE."""
    _, _, size = _layout(hidden_size, intermediate_size)
    return int(size)


def feature_sample(
    tokens: torch.Tensor,
    source: torch.Tensor | None,
    features: torch.Tensor,
    embed: torch.Tensor | None,
    fc: Matrix,
    fc_bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    gate: Matrix | None = None,
    up: Matrix | None = None,
    down: Matrix | None = None,
    token_fc: torch.Tensor | None = None,
    token_gate: torch.Tensor | None = None,
    *,
    eps: float,
    workspace: torch.Tensor | None = None,
    linear_workspace: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    is_open: torch.Tensor | None = None,
) -> torch.Tensor:
    """Join each token's embedding e with a feature f: ``h = fc @ [e ; f] + fc_bias``.

    Without ``norm``, ``gate``, ``up`` and ``down`` (EAGLE) the result is h; with them (FSPAD) it is
    ``h + down @ (silu(gate @ e) * (up @ rms_norm(h, norm, eps)))``. A row of the result depends on
    its token and its feature alone, to the bit: a long prompt may be given in pieces, which bounds
    the workspace.

    What depends on the token alone may be folded into tables made beforehand: ``token_fc``, the
    embedding's half of ``fc`` times e, plus ``fc_bias``, and ``token_gate``, ``gate @ e``. The
    folded argument is then left out, and ``fc`` is its feature half.

    Of float32 rows (on the CPU) all of it is one call of the extension, and weights and tables are
    float32, bfloat16 or float16, each as it likes. Rows of 16 bits (on a GPU) are multiplied by
    :func:`~specrt.ops.linear.linear`: features, weights, tables, ``workspace`` and ``out`` have one
    type, and what is kept between two launches is rounded to it. Where a matrix is a
    :class:`~specrt.ops.linear.Float8Matrix`, rows of either type go that way.

    Token ids and source rows out of range are clamped into it, for padding rows may hold anything;
    what such a row gives is of no meaning. Nothing is read out of bounds.

    Args:
        tokens: ``[M]`` int32.
        source: ``[M]`` int32, row m's row of ``features``; None for row m.
        features: ``[S, H]`` float32, on a GPU bfloat16 or float16; rows may be strided.
        embed: ``[V, H]``; rows may be strided. None if neither h nor the gate needs e.
        fc: ``[H, 2 H]``, the embedding's half first; ``[H, H]`` with ``token_fc``.
        fc_bias: ``[H]`` float32; None with ``token_fc``.
        norm: ``[H]`` float32.
        gate: ``[I, H]``; None with ``token_gate``.
        up: ``[I, H]``.
        down: ``[H, I]``.
        token_fc: ``[V, H]``; rows may be strided.
        token_gate: ``[V, I]``, before silu; rows may be strided.
        eps: added to the mean square; unused by EAGLE.
        workspace: ``[>= M, >= feature_sample_workspace(H, I)]`` of the features' type, contents of
            no meaning; made if not given, which a captured graph must not rely on.
        linear_workspace: ``linear``'s on a GPU, for all of its matrices here; likewise.
        out: ``[M, H]`` of the features' type; made if not given. Must not overlap any other
            argument.
        is_open: ``[B]`` int32 flags of sequences, whatever the rows. If all of them are 0 ``out``
            stays as it is; ``workspace`` may not.

    Weights are contiguous.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.

    Source: FSPAD's feature sampling; EAGLE's fully connected layer.
    """
    num_rows, hidden_size = tokens.shape[0], features.shape[-1]
    if workspace is None:
        intermediate_size = 0 if up is None else up.shape[0]
        size = feature_sample_workspace(hidden_size, intermediate_size)
        workspace = features.new_empty(num_rows, size)
    if out is None:
        out = features.new_empty(num_rows, hidden_size)
    weights = FeatureWeights(embed, fc, fc_bias, norm, gate, up, down, token_fc, token_gate)
    if features.dtype != torch.float32 or weights.has_float8:
        feature_gather(tokens, source, features, weights, eps, workspace, out)
        parts = _Scratch.of(workspace[:num_rows], hidden_size, 0 if up is None else len(up))
        _multiply(weights, eps, parts, linear_workspace, out, is_open)
        return out
    op = torch.ops.specrt.feature_sample if torch.compiler.is_compiling() else _C.feature_sample
    op(tokens, source, features, *weights.tensors, eps, workspace, out, is_open)
    return out


def feature_gather(
    tokens: torch.Tensor,
    source: torch.Tensor | None,
    features: torch.Tensor,
    weights: FeatureWeights,
    eps: float,
    workspace: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The first launch of :func:`feature_sample` of rows of 16 bits; it checks all arguments. On
    the CPU rows may be float32.

    What a row's token and source choose comes into its row of ``workspace``: e, f, and from tables
    h and gate.

    Args:
        tokens, source, features, eps, workspace, out: as for :func:`feature_sample`.
        weights: its other tensors.

    Raises:
        ValueError: as :func:`feature_sample`.
    """
    op = torch.ops.specrt.feature_gather if torch.compiler.is_compiling() else _C.feature_gather
    op(tokens, source, features, *weights.tensors, eps, workspace, out, None)


def _multiply(
    w: FeatureWeights,
    eps: float,
    at: _Scratch,
    scratch: torch.Tensor | None,
    out: torch.Tensor,
    is_open: torch.Tensor | None,
) -> None:
    """The launches behind the gather: ``linear``'s, with a norm and an activation between them."""
    h = out if w.down is None else at.h
    product = partial(linear, workspace=scratch, is_open=is_open)
    if w.token_fc is None:
        product(at.pair, w.fc, w.fc_bias, out=h)
    else:
        product(at.f, w.fc, residual=at.h, out=h)
    if w.norm is None or w.up is None or w.down is None:
        return
    rms_norm(h, w.norm, eps, out=at.f)
    if w.gate is not None:
        product(at.e, w.gate, out=at.gate)
    product(at.f, w.up, out=at.up)
    silu_mul(at.gate_up, out=at.gate)
    product(at.gate, w.down, residual=h, out=out)
