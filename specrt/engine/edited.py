"""Acceptance of a round in which somebody edits logits: on the host, whatever the target is on.

For equal logits the host's acceptance gives a GPU's tokens and log-probabilities, bit for bit; so
of a GPU's logits those rows alone are copied that walks come to.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from specrt.device import Device
from specrt.engine.batch import Batch
from specrt.engine.head_by_need import HeadByNeed
from specrt.engine.walks import (
    Accepted,
    AllLogits,
    CopiedLogits,
    Edits,
    History,
    RawLogits,
    walk,
)
from specrt.models.step import FINAL_TAP
from specrt.sampling import SamplingTable
from specrt.types import AcceptResult, DraftTree, RequestHandle, VerifyOutput


class EditedAcceptance:
    """Accepts what requests with editors are given.

    Args:
        head: of a CPU's target, whose logits may come by need.
        vocab_size: V.
        device: the target's.
    """

    def __init__(self, head: HeadByNeed, vocab_size: int, device: Device) -> None:
        self._head = head
        self._vocab_size = vocab_size
        self._device = device
        self._sampling: tuple[list[RequestHandle], SamplingTable] | None = None

    def accept(self, tree: DraftTree, output: VerifyOutput, batch: Batch) -> Accepted:
        """As ``specrt.accept.accept`` of edited logits.

        Args:
            tree: B trees, where the target is.
            output: of its pass over them.
            batch: the B sequences.
        """
        tree = self._on_host(tree)
        edits, history = Edits(batch.requests, tree), self._history(batch)
        if output.logits.shape[1] == 0:
            return self._head.accept(tree, output.taps[FINAL_TAP], history, edits)
        raw = RawLogits(output.logits)
        if not self._device.is_gpu:
            result, _ = walk(tree, AllLogits(output.logits), history, edits)
            return Accepted(result, raw, edits.errors)
        result, _ = walk(tree, CopiedLogits(output.logits, self._device), history, edits)
        return Accepted(self._there(result), raw, edits.errors)

    def _on_host(self, tree: DraftTree) -> DraftTree:
        """What acceptance reads of it."""
        read, probs = self._device.read, tree.draft_probs
        return replace(
            tree,
            draft_tokens=read(tree.draft_tokens),
            parents=read(tree.parents),
            num_nodes=read(tree.num_nodes),
            draft_probs=None if probs is None else read(probs),
        )

    def _there(self, result: AcceptResult) -> AcceptResult:
        there, logprobs = self._device.there, result.logprobs
        return AcceptResult(
            there(result.path),
            there(result.accept_length),
            there(result.tokens),
            None if logprobs is None else there(logprobs),
        )

    def _history(self, batch: Batch) -> History:
        if not self._device.is_gpu:
            return History(batch.sampling, batch.history, batch.history_len)
        requests = batch.requests
        handles = [request.handle for request in requests]
        if self._sampling is None or self._sampling[0] != handles:
            params = [request.params for request in requests]
            prompt_lens = [request.prompt_len for request in requests]
            table = SamplingTable.build(params, prompt_lens, self._vocab_size)
            self._sampling = handles, table
        rows = [torch.tensor(request.token_ids, dtype=torch.int32) for request in requests]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        return History(self._sampling[1], tokens, lengths)
