"""Acceptance: which part of a draft tree the target agrees with, and its own token behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from specrt.device import Device
from specrt.ops.history_append import HEADER_SIZE, ReportWord
from specrt.ops.linear import TILE_TOKENS, TileMaxima
from specrt.ops.tree_accept import gpu_workspace_size, tree_accept
from specrt.reuse import Recent
from specrt.sampling import SamplingParams, SamplingTable
from specrt.types import AcceptResult, DraftTree, RoundReport

_MAX_SHAPES = 32  # of rounds on a GPU, whose scratch is kept
_LAW_TOLERANCE = 1e-4  # of a law's sum: float32's rounding, but not bfloat16's


def accept(
    tree: DraftTree,
    logits: torch.Tensor,
    sampling: SamplingTable,
    history: torch.Tensor,
    history_len: torch.Tensor,
    *,
    want_logprobs: bool = False,
    workspace: torch.Tensor | None = None,
    out: AcceptResult | None = None,
    maxima: TileMaxima | None = None,
    logit_rows: torch.Tensor | None = None,
    next_node: torch.Tensor | None = None,
) -> AcceptResult:
    """Walk each tree from its root; every emitted token follows the target's law exactly.

    At a node, the target's token is the argmax of the processed logits (temperature 0, lowest id on
    ties), or of processed logits + Gumbel(seed, position) over the kept tokens, where the position
    is ``history_len + depth``. If a child holds it, the walk goes on there; else it is the bonus
    token. So the text depends on the seed alone, not on trees, drafters or batches.

    With ``tree.draft_probs`` and temperature > 0, a node's children, which must be independent
    draws from its row of ``draft_probs``, are tried in order: accepted with probability
    min(1, target / draft), the target law becoming normalize(relu(target - draft)) after each
    rejection; the bonus token is drawn from what is left (SpecInfer, arXiv 2305.09781, multi-step
    speculative sampling). The text then depends on the tree; its law does not.

    Where a row of ``draft_probs`` is no law over the vocabulary (NaN, negative, not of sum 1), its
    children cannot have been drawn from it: a tree ends before the first of them. That is for the
    laws alone to say, which stood before anything was drawn from them; a rule that looked at the
    draws would bias the text. From a root without children the target's token is that of the seed.

    Penalties count the tokens of ``history`` and of the node's ancestors. History tokens outside
    the vocabulary are not counted.

    Args:
        tree: trees of N nodes; nodes from ``num_nodes`` on are ignored.
        logits: ``[B, N, V]`` float32, unprocessed; only rows on the path are read.
        sampling: the batch's parameters.
        history: ``[B, T]`` int32; ``history[b, :history_len[b]]`` is the prompt and the output so
            far, its last token the tree's root.
        history_len: ``[B]`` int32.
        want_logprobs: report log-softmax of the *unprocessed* logits at each emitted token.
        workspace: on a GPU (``ops.tree_accept``); None: that of ``sampling``.
        out: of :func:`empty_result`, to be written; None: a new one.
        maxima: on a GPU, what the product that made ``logits`` left of them: the same result,
            sooner.
        logit_rows, next_node: on a CPU, where logits come by and by, as for ``ops.tree_accept``:
            ``logits`` are ``[R, V]``. Called again with the same ``out``, walks go on.

    Returns:
        ``path`` and ``tokens`` ``[B, N]`` int32 padded with -1, ``accept_length`` ``[B]`` int32,
        ``logprobs`` ``[B, N]`` float32 padded with NaN. A sequence whose path meets NaN, +inf or
        nothing but -inf gets ``accept_length`` -1 and no tokens; the others are untouched.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    result = out or empty_result(tree, want_logprobs)
    num_nodes, draft_probs = _drawn(tree, logits.shape[-1])
    tree_accept(
        tree.draft_tokens,
        tree.parents,
        num_nodes,
        draft_probs,
        logits,
        sampling.rows,
        sampling.bias_ids,
        sampling.bias_values,
        history,
        history_len,
        sampling.workspace if workspace is None else workspace,
        result.path,
        result.accept_length,
        result.tokens,
        result.logprobs,
        None if maxima is None else maxima.keys,
        logit_rows,
        next_node,
    )
    return result


def empty_result(tree: DraftTree, want_logprobs: bool) -> AcceptResult:
    """Of :func:`accept` for trees of this size, where they are."""
    path, tokens = torch.empty_like(tree.draft_tokens), torch.empty_like(tree.draft_tokens)
    logprobs = torch.empty_like(path, dtype=torch.float32) if want_logprobs else None
    return AcceptResult(path, torch.empty_like(tree.num_nodes), tokens, logprobs)


def logprobs_of(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Log-softmax at a token each, the very bits that :func:`accept` reports.

    Args:
        logits: ``[R, V]`` float32 on the host, without NaN or +inf.
        tokens: R of them.

    Returns:
        ``[R]`` float32.
    """
    count, vocab_size = logits.shape
    sampling = SamplingTable.build([SamplingParams(logprobs=True)] * count, [0] * count, vocab_size)
    roots, lone = torch.zeros(count, 1, dtype=torch.int32), torch.ones(count, dtype=torch.int32)
    tree = DraftTree(roots, roots - 1, roots, roots[:, :, None].long(), lone)
    result = accept(tree, logits[:, None], sampling, roots, lone, want_logprobs=True)
    return logprobs_from_best(logits, torch.tensor(tokens)[:, None], result)[:, 0]


def logprobs_from_best(
    logits: torch.Tensor, tokens: torch.Tensor, best: AcceptResult
) -> torch.Tensor:
    """Log-softmax at any tokens of rows, from what acceptance reports of the best ones.

    Args:
        logits: ``[R, V]`` float32.
        tokens: ``[R, k]`` int64.
        best: of walks of one node each, greedy and with log-probabilities.

    Returns:
        ``[R, k]`` float32, the very bits that :func:`accept` reports of these tokens where it takes
        them; NaN in rows that are no law.
    """
    assert best.logprobs is not None, "asked for"
    tops = best.tokens.clamp(min=0).long()
    # (In the order in which the kernel takes the differences.)
    return logits.gather(1, tokens) - logits.gather(1, tops) + best.logprobs


def empty_maxima(tree: DraftTree, sampling: SamplingTable, history_len: torch.Tensor) -> TileMaxima:
    """For the product that makes the logits of these trees, on a GPU."""
    num_tiles = -(-sampling.vocab_size // TILE_TOKENS)
    keys = tree.depth.new_empty(tree.depth.numel(), num_tiles, dtype=torch.int64)
    return TileMaxima(keys, sampling.rows, history_len, tree.depth)


def gpu_scratch(tree: DraftTree, vocab_size: int, device: Device) -> torch.Tensor:
    """A workspace of :func:`accept` for trees of this size, on a GPU."""
    batch, num_nodes = tree.draft_tokens.shape
    has_probs = tree.draft_probs is not None
    return device.zeros(gpu_workspace_size(batch, num_nodes, vocab_size, has_draft_probs=has_probs))


class Accepting:
    """:func:`accept` on a device, with scratch that is kept.

    Args:
        vocab_size: V.
        device: where trees and logits are.
    """

    def __init__(self, vocab_size: int, device: Device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._scratches: Recent[tuple[int, int, bool], torch.Tensor] = Recent(_MAX_SHAPES)

    def accept(
        self,
        tree: DraftTree,
        logits: torch.Tensor,
        sampling: SamplingTable,
        history: torch.Tensor,
        history_len: torch.Tensor,
    ) -> AcceptResult:
        """As :func:`accept`, which see."""
        return accept(
            tree,
            logits,
            sampling,
            history,
            history_len,
            want_logprobs=sampling.want_logprobs,
            workspace=self._scratch(tree) if self._device.is_gpu else None,
        )

    def _scratch(self, tree: DraftTree) -> torch.Tensor:
        """A shape's own: what one call leaves in it is what the next of that shape needs."""
        shape = (*tree.draft_tokens.shape, tree.draft_probs is not None)
        scratch = self._scratches.get(shape)
        if scratch is None:
            made = gpu_scratch(tree, self._vocab_size, self._device)
            scratch = self._scratches.put(shape, made)
        return scratch


class Outcome(NamedTuple):
    """The header of a sequence's report (``ops.history_append``)."""

    num_nodes: int
    deepest: int
    accept_length: int
    num_taken: int
    ending: int


class Read:
    """What the host has read of a round, for the engine: no drafter has these numbers in hand.

    Args:
        rows: ``[B, R]``, as ``ops.history_append`` reports.
        size: N, entries of a path.
    """

    def __init__(self, rows: npt.NDArray[np.int32], size: int) -> None:
        first, second = HEADER_SIZE + size, HEADER_SIZE + 2 * size
        self._rows = rows
        self._path = slice(first, second)
        words = rows[:, :first].tolist()
        self.outcomes = [Outcome(*row[: len(Outcome._fields)]) for row in words]
        self.tokens: list[list[int]] = [row[HEADER_SIZE:] for row in words]
        """``[B][N]``: accepted tokens, then the bonus token; padded."""
        self.logprobs: list[list[float]] | None = None
        """``[B][N]``, if any were asked for."""
        if rows.shape[1] > second:
            self.logprobs = rows[:, second:].view(np.float32).tolist()

    def for_drafters(self) -> RoundReport:
        """Views, which they may write to."""
        rows = self._rows
        return RoundReport(
            num_nodes=rows[:, ReportWord.NUM_NODES],
            accept_length=rows[:, ReportWord.ACCEPT_LENGTH],
            num_taken=rows[:, ReportWord.NUM_TAKEN],
            path=rows[:, self._path],
        )


def _drawn(tree: DraftTree, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``num_nodes`` up to the first node that no law was there to draw from, and the laws."""
    probs = tree.draft_probs
    if probs is None:
        return tree.num_nodes, None
    if probs.shape[-1] != vocab_size:
        return torch.ones_like(tree.num_nodes), None
    probs = probs.detach()
    # NaN is neither at least 0 nor near 1.
    is_law = (probs.amin(dim=-1) >= 0) & ((probs.sum(dim=-1) - 1).abs() <= _LAW_TOLERANCE)
    parents = tree.parents.clamp(0, probs.shape[1] - 1).long()
    is_drawn = is_law.gather(1, parents)
    is_drawn[:, 0] = True  # the root is no draft
    num_drawn = is_drawn.int().cumprod(dim=1).sum(dim=1, dtype=torch.int32)
    return torch.minimum(tree.num_nodes, num_drawn), probs
