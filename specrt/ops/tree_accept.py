"""The acceptance kernel, and the counter-based randomness it draws from."""

from __future__ import annotations

from enum import IntEnum

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "tree_accept(Tensor draft_tokens, Tensor parents, Tensor num_nodes, Tensor? draft_probs, "
    "Tensor logits, Tensor sampling, Tensor? bias_ids, Tensor? bias_values, Tensor history, "
    "Tensor history_len, Tensor(a!)? workspace, Tensor(b!) path, Tensor(c!) accept_length, "
    "Tensor(d!) tokens, Tensor(e!)? logprobs, Tensor? maxima, "
    "Tensor? logit_rows, Tensor(f!)? next_node) -> ()",
    _C.tree_accept,
)


class Purpose(IntEnum):
    """What a random number is for; draws of different purposes are independent."""

    TARGET = 0
    ACCEPT = 1
    RESIDUAL = 2
    DRAFT = 3
    CONTROL = 4


def workspace_size(vocab_size: int) -> int:
    """Floats of scratch that one walk of ``tree_accept`` needs on a CPU."""
    return _C.tree_accept_workspace(vocab_size)


def workspace_parts(batch: int, vocab_size: int) -> int:
    """How many times :func:`workspace_size` B walks use on a CPU: one each where threads share the
    rows of a large vocabulary, else one a thread."""
    return max(1, _C.tree_accept_parts(batch, vocab_size, torch.get_num_threads()))


def gpu_workspace_size(
    batch: int, num_nodes: int, vocab_size: int, *, has_draft_probs: bool = False
) -> int:
    """Elements of the workspace that ``tree_accept`` needs on a GPU.

    It is one float32 tensor, all zeros before the first call with these sizes; what a call leaves
    in it is what the next one needs. One call at a time may use it.

    Args:
        batch: B.
        num_nodes: N.
        vocab_size: V.
        has_draft_probs: whether calls have ``draft_probs``.
    """
    return _C.tree_accept_gpu_workspace(batch, num_nodes, vocab_size, has_draft_probs)


def tree_accept(
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    draft_probs: torch.Tensor | None,
    logits: torch.Tensor,
    sampling: torch.Tensor,
    bias_ids: torch.Tensor | None,
    bias_values: torch.Tensor | None,
    history: torch.Tensor,
    history_len: torch.Tensor,
    workspace: torch.Tensor | None,
    path: torch.Tensor,
    accept_length: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor | None,
    maxima: torch.Tensor | None = None,
    logit_rows: torch.Tensor | None = None,
    next_node: torch.Tensor | None = None,
) -> None:
    """Walk each sequence's tree; see ``specrt.accept.accept`` for the rules.

    Contents out of range reach no other memory: ids that are no token's are passed over, counts are
    clamped. The same logits give the same bits on a CPU and a GPU; there nothing is read by the
    host, and N is at most 128. N times V is below 2^31.

    Args:
        draft_tokens: ``[B, N]`` int32.
        parents: ``[B, N]`` int32.
        num_nodes: ``[B]`` int32.
        draft_probs: ``[B, N, V]`` float32, or None.
        logits: ``[B, N, V]`` float32.
        sampling: ``[B, 8]`` int64, ``SamplingTable.rows``.
        bias_ids: ``[K]`` int32, or None.
        bias_values: ``[K]`` float32, or None.
        history: ``[B, T]`` int32.
        history_len: ``[B]`` int32.
        workspace: ``[parts, workspace_size(V)]`` float32; None if all sequences are greedy without
            bias or penalties. With B parts all threads share the rows of a large vocabulary. On a
            GPU always: ``[gpu_workspace_size(...)]`` float32 or longer, zeros before the first
            call.
        path: ``[B, N]`` int32, written.
        accept_length: ``[B]`` int32, written.
        tokens: ``[B, N]`` int32, written.
        logprobs: ``[B, N]`` float32, written; None if not wanted.
        maxima: on a GPU, ``TileMaxima.keys`` that :func:`linear` left of these very logits,
            ``sampling``, ``history_len`` and the trees' depths. The best of a row that has neither
            bias nor penalties is found in them: the logits need not be read for it.
        logit_rows: ``[B, N]`` int32, on a CPU; ``logits`` are then ``[R, V]``, and this says which
            row of them a node has. Any other number: none yet.
        next_node: ``[B]`` int32, with ``logit_rows``: where each walk begins, 0 at first; written:
            the node whose logits it lacks, -1 where it has ended. Called again with them and the
            same results, it goes on there.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    op = torch.ops.specrt.tree_accept if torch.compiler.is_compiling() else _C.tree_accept
    op(
        draft_tokens,
        parents,
        num_nodes,
        draft_probs,
        logits,
        sampling,
        bias_ids,
        bias_values,
        history,
        history_len,
        workspace,
        path,
        accept_length,
        tokens,
        logprobs,
        maxima,
        logit_rows,
        next_node,
    )


def gumbel_noise(
    seed: int, position: int, vocab_size: int, purpose: Purpose = Purpose.TARGET
) -> torch.Tensor:
    """The noise that draws the token at ``position``: the target emits
    ``argmax(processed_logits + gumbel_noise(seed, position, V))``.

    A drafter may rank its candidates with the TARGET noise to guess better, but must draw from
    DRAFT noise when it hands over ``draft_probs``.

    Args:
        seed: 64 bits; negative values wrap.
        position: the token's index in the sequence (prompt included), >= 0.
        vocab_size: V.
        purpose: which of the independent streams.

    Returns:
        ``[V]`` float32, standard Gumbel noise.
    """
    noise = torch.empty(vocab_size)
    _C.gumbel_noise(seed % 2**64, position, int(purpose), noise)
    return noise
