"""The draft model's input: token embedding and feature joined, with FSPAD's feature sampling."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "feature_sample(Tensor tokens, Tensor? source, Tensor features, Tensor? embed, Tensor fc, "
    "Tensor? fc_bias, Tensor? norm, Tensor? gate, Tensor? up, Tensor? down, Tensor? token_fc, "
    "Tensor? token_gate, float eps, Tensor(a!) workspace, Tensor(b!) out) -> ()",
    _C.feature_sample,
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def feature_sample_workspace(hidden_size: int, intermediate_size: int) -> int:
    """Floats of scratch that ``feature_sample`` needs a row; ``intermediate_size`` 0 for EAGLE."""
    return _C.feature_sample_workspace(hidden_size, intermediate_size)


def feature_sample(
    tokens: torch.Tensor,
    source: torch.Tensor | None,
    features: torch.Tensor,
    embed: torch.Tensor | None,
    fc: torch.Tensor,
    fc_bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    token_fc: torch.Tensor | None = None,
    token_gate: torch.Tensor | None = None,
    *,
    eps: float,
    workspace: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Join each token's embedding e with a feature f: ``h = fc @ [e ; f] + fc_bias``.

    Without ``norm``, ``gate``, ``up`` and ``down`` (EAGLE) the result is h; with them (FSPAD) it is
    ``h + down @ (silu(gate @ e) * (up @ rms_norm(h, norm, eps)))``. A row of the result depends on
    its token and its feature alone, to the bit: a long prompt may be given in pieces, which bounds
    the workspace.

    What depends on the token alone may be folded into tables made beforehand: ``token_fc``, the
    embedding's half of ``fc`` times e, plus ``fc_bias``, and ``token_gate``, ``gate @ e``. The
    folded argument is then left out, and ``fc`` is its feature half.

    Token ids and source rows out of range are clamped into it, for padding rows may hold anything;
    what such a row gives is of no meaning. Nothing is read out of bounds.

    Args:
        tokens: ``[M]`` int32.
        source: ``[M]`` int32, row m's row of ``features``; None for row m.
        features: ``[S, H]`` float32; rows may be strided.
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
        workspace: ``[>= M, >= feature_sample_workspace(H, I)]`` float32, contents of no meaning;
            made if not given, which a captured graph must not rely on.
        out: ``[M, H]`` float32; made if not given. Must not overlap any other argument.

    Weights and tables are float32, bfloat16 or float16, each as it likes; weights are contiguous.

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
    op = torch.ops.specrt.feature_sample if torch.compiler.is_compiling() else _C.feature_sample
    op(
        tokens,
        source,
        features,
        embed,
        fc,
        fc_bias,
        norm,
        gate,
        up,
        down,
        token_fc,
        token_gate,
        eps,
        workspace,
        out,
    )
    return out
