"""The draft model's input: token embedding and feature joined, with FSPAD's feature sampling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from specrt import _C
from specrt.ops.linear import GatheredRows, Rows, linear, row_scratch
from specrt.ops.matrix import Matrix, PackedMatrix, layout_of, scale_of, values_of
from specrt.ops.registry import register
from specrt.ops.rms_norm import rms_norm

_INPUTS = (
    "Tensor tokens, Tensor? source, Tensor features, Tensor? embed, Tensor fc, Tensor? fc_bias, "
    "Tensor? norm, Tensor? gate, Tensor? up, Tensor? down, Tensor? token_fc, Tensor? token_gate, "
    "float eps, Tensor(a!) workspace"
)
_REST = (
    "Tensor? is_open, Tensor? fc_scale, Tensor? gate_scale, Tensor? up_scale, Tensor? down_scale, "
    "Tensor? linear_workspace, int[] embed_layout, int[] fc_layout, int[] gate_layout, "
    "int[] up_layout, int[] down_layout"
)
register(f"feature_sample({_INPUTS}, Tensor(b!) out, {_REST}) -> ()", _C.feature_sample)
register(f"feature_check({_INPUTS}, Tensor out, {_REST}) -> ()", _C.feature_check)


class FeatureWeights(NamedTuple):
    """What :func:`feature_sample` multiplies by and looks up."""

    embed: torch.Tensor | PackedMatrix | None
    fc: Matrix
    fc_bias: torch.Tensor | None
    norm: torch.Tensor | None
    gate: Matrix | None
    up: Matrix | None
    down: Matrix | None
    token_fc: torch.Tensor | None
    token_gate: torch.Tensor | None

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """In this order; of matrices that are no tensors, the values."""
        return [values_of(one) for one in self]

    @property
    def scales(self) -> list[torch.Tensor | None]:
        """Of ``fc``, ``gate``, ``up`` and ``down``, where they have any."""
        return [scale_of(one) for one in (self.fc, self.gate, self.up, self.down)]

    @property
    def layouts(self) -> list[list[int]]:
        """Of ``embed``, ``fc``, ``gate``, ``up`` and ``down``."""
        return [layout_of(one) for one in (self.embed, self.fc, self.gate, self.up, self.down)]

    @property
    def packed_depth(self) -> int:
        """The most columns of a packed one."""
        matrices = self.fc, self.gate, self.up, self.down
        return max([0, *(m.num_inputs for m in matrices if isinstance(m, PackedMatrix))])


class _Scratch(NamedTuple):
    """Parts of M rows of a workspace."""

    normed: torch.Tensor
    """``[M, H]``: the norm of h."""
    h: torch.Tensor
    gate: torch.Tensor
    """``[M, I]``"""
    gated: torch.Tensor
    """Likewise: silu(gate) * up."""

    @classmethod
    def of(cls, workspace: torch.Tensor, hidden: int, wide: int) -> _Scratch:
        h, gate, _ = _layout(hidden, wide)
        firsts, widths = (0, h, gate, gate + wide), (hidden, hidden, wide, wide)
        return cls(*(workspace[:, i : i + n] for i, n in zip(firsts, widths, strict=True)))


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
    embed: torch.Tensor | PackedMatrix | None,
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
    float32, bfloat16, float16, packed (``embed`` and matrices) or (matrices) a
    :class:`~specrt.ops.matrix.Float8Matrix`, each as it likes. Rows of 16 bits (on a GPU) are
    launches of :func:`~specrt.ops.linear.linear` and a norm: features, weights, tables,
    ``workspace`` and ``out`` have one type, but for matrices of float8, and what is kept between
    two launches is rounded to it. H and I are multiples of 8 then, and rows of ``features``,
    ``embed`` and ``workspace`` lie at multiples of 16 bytes.

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
        linear_workspace: ``linear``'s on a GPU, or with packed matrices, for all of those here;
            likewise.
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
    if linear_workspace is None and weights.packed_depth > 0:
        linear_workspace = row_scratch(weights.packed_depth, num_rows)
    given = (
        tokens,
        source,
        features,
        *weights.tensors,
        eps,
        workspace,
        out,
        is_open,
        *weights.scales,
        linear_workspace,
        *weights.layouts,
    )
    module = torch.ops.specrt if torch.compiler.is_compiling() else _C
    if features.dtype == torch.float32:
        module.feature_sample(*given)
        return out
    module.feature_check(*given)
    parts = _Scratch.of(workspace[:num_rows], hidden_size, 0 if up is None else len(up))
    multiply = partial(linear, workspace=linear_workspace, is_open=is_open)
    _launch(weights, tokens, source, features, eps, parts, out, multiply)
    return out


def _launch(
    w: FeatureWeights,
    tokens: torch.Tensor,
    source: torch.Tensor | None,
    features: torch.Tensor,
    eps: float,
    at: _Scratch,
    out: torch.Tensor,
    multiply: Callable[..., torch.Tensor],
) -> None:
    """Rows of 16 bits: products that fetch what a row's token and source choose, and a norm."""
    f = features[: len(tokens)] if source is None else GatheredRows(features, source)
    h = out if w.down is None else at.h
    gate: Rows = at.gate
    if w.token_gate is not None:
        gate = GatheredRows(w.token_gate, tokens)
    elif w.gate is not None and isinstance(w.embed, torch.Tensor):
        multiply(GatheredRows(w.embed, tokens), w.gate, out=gate)
    if w.token_fc is not None:
        multiply(f, w.fc, residual=GatheredRows(w.token_fc, tokens), out=h)
    elif isinstance(w.embed, torch.Tensor):
        multiply(GatheredRows(w.embed, tokens), w.fc, w.fc_bias, second=f, out=h)
    if w.norm is None or w.up is None or w.down is None:
        return
    rms_norm(h, w.norm, eps, out=at.normed)
    multiply(at.normed, w.up, gate=gate, out=at.gated)
    multiply(at.gated, w.down, residual=h, out=out)
