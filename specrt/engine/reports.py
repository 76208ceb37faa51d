"""What is told of rounds and prompts beside their tokens, where somebody asked for it.

Log-probabilities are acceptance's own, to the bit. Of a row of raw logits it gives that of the best
token, which is minus the logarithm of the row's weights relative to the best; another token's is
its logit less the best one, less that logarithm. So they are the same alone, in a batch, on any
path of any tree, however a prompt was cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from specrt.accept import Accepting, Read, logprobs_from_best
from specrt.device import Device
from specrt.engine.request import Request, TokenLaw
from specrt.engine.results import RoundTree, TokenLogprob
from specrt.models.model import LlamaModel
from specrt.models.step import FINAL_TAP
from specrt.sampling import SamplingParams, SamplingRows
from specrt.tree import ChainTrees
from specrt.types import AcceptResult, DraftTree

_ROWS_A_PIECE = 16
"""Rows of logits that are looked at together: 10 MB of the largest vocabularies, 20 of ranks."""

RowOf = Callable[[int, int], torch.Tensor]
"""Gives the raw logits ``[V]`` float32 of a sequence, by its row, and a node on its path."""


class Told(NamedTuple):
    """What is told of a round of one sequence."""

    top_logprobs: list[list[TokenLogprob]] | None = None
    """Of each token that its output may take."""
    tree: RoundTree | None = None
    """With the whole path, whatever the output takes of it."""


class Reports:
    """Reads laws off rows of logits, and trees off their device.

    Args:
        target: whose logits they are.
    """

    def __init__(self, target: LlamaModel) -> None:
        self._target = target
        self._device = target.device
        self._laws = _LawReader(target.config.vocab_size, target.device)

    # --- rounds -------------------------------------------------------------------------------

    def of_round(
        self, requests: Sequence[Request], tree: DraftTree, read: Read, row_of: RowOf
    ) -> list[Told]:
        """What is told of a round.

        Args:
            requests: the B sequences.
            tree: what was verified.
            read: what came of it.
            row_of: the round's logits.

        Returns:
            B of them, or none where nobody asked.
        """
        if not any(r.params.top_logprobs or r.params.report_trees for r in requests):
            return []
        tops, trees = self._tops(requests, read, row_of), self._trees(requests, tree, read)
        return [Told(*told) for told in zip(tops, trees, strict=True)]

    def _tops(
        self, requests: Sequence[Request], read: Read, row_of: RowOf
    ) -> list[list[list[TokenLogprob]] | None]:
        paths = read.for_drafters().path
        found: list[list[list[TokenLogprob]] | None] = []
        for b, (request, outcome) in enumerate(zip(requests, read.outcomes, strict=True)):
            if request.params.top_logprobs == 0:
                found.append(None)
                continue
            tokens = read.tokens[b][: outcome.num_taken]
            rows = [row_of(b, node) for node in paths[b, : len(tokens)].tolist()]
            firsts = range(0, len(rows), _ROWS_A_PIECE)
            pieces = (torch.stack(rows[first : first + _ROWS_A_PIECE]) for first in firsts)
            laws = self._laws.read(pieces, tokens, request.params.top_logprobs)
            found.append([law.top for law in laws])
        return found

    def _trees(
        self, requests: Sequence[Request], tree: DraftTree, read: Read
    ) -> list[RoundTree | None]:
        if not any(request.params.report_trees for request in requests):
            return [None] * len(requests)
        tokens, parents = self._device.read(torch.stack([tree.draft_tokens, tree.parents])).tolist()
        paths = read.for_drafters().path
        found: list[RoundTree | None] = []
        for b, (request, outcome) in enumerate(zip(requests, read.outcomes, strict=True)):
            if not request.params.report_trees or outcome.accept_length < 0:
                found.append(None)
                continue
            count, path = outcome.num_nodes, paths[b, : outcome.accept_length + 1].tolist()
            found.append(RoundTree(tokens[b][:count], parents[b][:count], path))
        return found

    # --- prompts ------------------------------------------------------------------------------

    def prompt_taps(self, request: Request, taps: tuple[str, ...]) -> tuple[str, ...]:
        """Taps of a request's prompt: those that are read for its drafter, and here."""
        return (*taps, FINAL_TAP) if request.reads_prompt and FINAL_TAP not in taps else taps

    def take_prompt(self, request: Request, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """Note a request's laws of a piece of its prompt, as far as they are not known.

        Args:
            request: whose.
            start: the index of the piece's first token.
            taps: ``[1, n, H]`` of its n tokens.
        """
        if not request.reads_prompt:
            return
        # Of a prompt that gave way some are known.
        features, first = taps[FINAL_TAP][0], len(request.prompt_laws)
        end = min(start + len(features), request.prompt_len - 1)
        if first >= end:
            return
        assert start <= first, "a prompt of which this is told is run from its beginning"
        ids = request.token_ids[first + 1 : end + 1]
        logits = self._logits(features[first - start : end - start])
        request.prompt_laws += self._laws.read(logits, ids, request.params.prompt_logprobs or 0)

    def _logits(self, features: torch.Tensor) -> Iterator[torch.Tensor]:
        """Of features ``[n, H]``, piece by piece in the same memory."""
        logits = self._device.empty(_ROWS_A_PIECE, self._target.config.vocab_size)
        for piece in features.split(_ROWS_A_PIECE):
            rows = logits[: len(piece)]
            self._target.launch_logits(piece, rows)
            yield rows


class _LawReader:
    """Reads laws off rows of logits.

    Args:
        vocab_size: V.
        device: where they are.
    """

    def __init__(self, vocab_size: int, device: Device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._accepting = Accepting(vocab_size, device)
        self._trees = ChainTrees(device)
        greedy = SamplingRows(_ROWS_A_PIECE, vocab_size, device)
        for row in range(_ROWS_A_PIECE):
            greedy.write(row, SamplingParams(logprobs=True), 1)
        self._greedy = greedy.table(_ROWS_A_PIECE)
        self._zeros = device.zeros(_ROWS_A_PIECE, 1, dtype=torch.int32)
        self._ones = device.zeros(_ROWS_A_PIECE, dtype=torch.int32).fill_(1)
        self._from_last = device.there(torch.arange(vocab_size, 0, -1, dtype=torch.int32))

    def read(
        self, pieces: Iterable[torch.Tensor], tokens: Sequence[int], count: int
    ) -> list[TokenLaw]:
        """The laws that rows of logits are.

        Args:
            pieces: ``[r, V]`` float32, r at most 16, all but the last of 16; R rows in all. Each is
                read before the next is asked for.
            tokens: R of them, whose log-probabilities are wanted.
            count: how many of the likeliest are wanted; beyond V all.

        Returns:
            R of them.
        """
        if not tokens:
            return []
        count = min(count, self._vocab_size)
        there = self._device.there(torch.tensor(tokens)).split(_ROWS_A_PIECE)
        words = [self._words(rows, ids, count) for rows, ids in zip(pieces, there, strict=True)]
        ids, bits = self._device.read(torch.cat(words)).split([count, count + 1], dim=1)
        logprobs = bits.contiguous().view(torch.float32).tolist()
        return [
            TokenLaw(own, [] if math.isnan(own) else [*map(TokenLogprob, top, values)])
            for top, (*values, own) in zip(ids.tolist(), logprobs, strict=True)
        ]

    def _words(self, rows: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """``[r, 2 * count + 1]`` int32: the likeliest ids, then the bits of log-probabilities, of
        these and of ``tokens``."""
        ids = torch.cat([self._likeliest(rows, count), tokens[:, None]], dim=1)
        logprobs = logprobs_from_best(rows, ids, self._best(rows))
        return torch.cat([ids[:, :count].int(), logprobs.view(torch.int32)], dim=1)

    def _best(self, rows: torch.Tensor) -> AcceptResult:
        """Best tokens and their log-probabilities, NaN where there is no law."""
        count = len(rows)
        zeros, ones = self._zeros[:count], self._ones[:count]
        table = replace(self._greedy, rows=self._greedy.rows[:count])
        return self._accepting.accept(self._trees.of(zeros), rows[:, None], table, zeros, ones)

    def _likeliest(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """``[r, count]`` int64: ids by their logits, of equal ones the lowest first."""
        if count == 0:
            return rows.new_empty(len(rows), 0, dtype=torch.int64)
        last = rows.topk(count, dim=1).values[:, -1:]
        # Fewer than `count` are above the last one; of its equals the first ids come along.
        above = 2 * self._vocab_size
        ranks = torch.where(rows > last, above, torch.where(rows == last, self._from_last, 0))
        ids = ranks.topk(count, dim=1).indices.sort(dim=1).values
        order = rows.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
        return ids.gather(1, order)
