"""Sampling parameters as kernels read them: one row format, for acceptance and coupled trees."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specrt.device import Device
from specrt.ops.tree_accept import workspace_parts, workspace_size
from specrt.reuse import power_of_two
from specrt.sampling.params import SamplingParams
from specrt.sampling.structured import refusal

# csrc/core/sampling_row.h, SamplingRow.
_ROW = struct.Struct("=d5f3iQ2q")
_ROW_WORDS = _ROW.size // 8
_BIAS_BOUNDS = _ROW_WORDS - 2  # the word of bias_begin; bias_end follows


def sampling_row(params: SamplingParams, prompt_len: int) -> torch.Tensor:
    """One request's sampling as kernels read it.

    Args:
        params: a request that samples needs a seed (``with_seed``).
        prompt_len: presence and frequency penalties count the history from there on.

    Returns:
        ``[8]`` int64, the fields of ``csrc/core/sampling_row.h``; without biases, whose places in a
        batch :class:`SamplingRows` knows.

    Raises:
        ValueError: the seed is missing.
    """
    p = params.with_defaults()
    if p.seed is None and not p.is_greedy:
        raise refusal("seed", "a seed for a sequence that samples (see with_seed)", None)
    packed = _ROW.pack(
        p.top_p,
        p.temperature,
        p.min_p,
        p.repetition_penalty,
        p.presence_penalty,
        p.frequency_penalty,
        p.top_k or 0,
        prompt_len,
        0,
        (p.seed or 0) % 2**64,
        0,
        0,
    )
    return torch.frombuffer(bytearray(packed), dtype=torch.int64)


@dataclass(frozen=True)
class SamplingTable:
    """The sampling parameters of a batch as the kernels read them (:class:`SamplingRows`)."""

    rows: torch.Tensor
    """``[B, 8]`` int64: a :func:`sampling_row` each, and where its biases lie."""
    bias_ids: torch.Tensor | None
    """``[K]`` int32: every sequence's logit_bias ids, packed; rows hold the bounds."""
    bias_values: torch.Tensor | None
    """``[K]`` float32."""
    workspace: torch.Tensor | None
    """``[parts, size]`` float32 scratch on the CPU; None where every sequence is greedy and
    unedited. One acceptance at a time may use it."""
    vocab_size: int
    want_logprobs: bool
    """Whether any sequence asked for log-probabilities."""

    @classmethod
    def build(
        cls, params: Sequence[SamplingParams], prompt_lens: Sequence[int], vocab_size: int
    ) -> SamplingTable:
        """The table of B parameter sets, once.

        Args:
            params: one per sequence. A sequence that samples needs a seed (``with_seed``).
            prompt_lens: the length of each prompt; presence and frequency penalties count the
                history from there on.
            vocab_size: V of the logits.

        Raises:
            ValueError: lengths differ, a seed is missing, or a logit_bias id is not below V.
        """
        if len(params) != len(prompt_lens):
            raise refusal("prompt_lens", f"{len(params)} lengths", list(prompt_lens))
        rows = SamplingRows(len(params), vocab_size)
        for row, (p, prompt_len) in enumerate(zip(params, prompt_lens, strict=True)):
            rows.write(row, p, prompt_len)
        return rows.table(len(params))


class SamplingRows:
    """Rows of sampling parameters, written one at a time as sequences come and go.

    Args:
        capacity: rows there are.
        vocab_size: V of the logits.
        device: where kernels read them; None: the CPU.
    """

    def __init__(self, capacity: int, vocab_size: int, device: Device | None = None) -> None:
        self._vocab_size = vocab_size
        self._device = device or Device()
        self._rows = torch.zeros(capacity, _ROW_WORDS, dtype=torch.int64)
        self._view = self._rows.numpy()  # the same memory
        self._there = self._device.there(self._rows)
        self._biases = self._device.zeros(2, 0, dtype=torch.int32)  # ids, and values' bits
        self._params = [SamplingParams()] * capacity
        self._workspace: torch.Tensor | None = None

    def write(self, row: int, params: SamplingParams, prompt_len: int) -> None:
        """A sequence's parameters.

        Raises:
            ValueError: a seed is missing, or a logit_bias id is not below V.
        """
        params = params.with_defaults()
        most = max(params.logit_bias or (), default=0)
        if most >= self._vocab_size:
            raise refusal(f"logit_bias (row {row})", f"token ids < {self._vocab_size}", most)
        self._view[row] = sampling_row(params, prompt_len).numpy()
        self._params[row] = params

    def move(self, source: int, row: int) -> None:
        """A row takes another's place."""
        self._view[row] = self._view[source]
        self._params[row] = self._params[source]

    def table(self, count: int) -> SamplingTable:
        """The first ``count`` rows, valid until one is written."""
        params = self._params[:count]
        bias_ids, bias_values = self._biases_there(*self._packed_biases(count))
        needs_scratch = any(not p.is_greedy or p.edits_logits for p in params)
        needs_scratch = needs_scratch and not self._device.is_gpu
        if self._device.is_gpu:
            self._device.upload(self._rows[:count], self._there[:count])
        return SamplingTable(
            rows=self._there[:count],
            bias_ids=bias_ids,
            bias_values=bias_values,
            workspace=self._scratch(count) if needs_scratch else None,
            vocab_size=self._vocab_size,
            want_logprobs=any(p.wants_logprobs for p in params),
        )

    def _packed_biases(self, count: int) -> tuple[list[int], list[float]]:
        """Ids and values of all rows; each row is told its bounds."""
        ids: list[int] = []
        values: list[float] = []
        for row, p in enumerate(self._params[:count]):
            begin = len(ids)
            for token, bias in sorted((p.logit_bias or {}).items()):
                ids.append(token)
                values.append(bias)
            self._view[row, _BIAS_BOUNDS:] = begin, len(ids)
        return ids, values

    def _biases_there(
        self, ids: Sequence[int], values: Sequence[float]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Where they stay, unless there are more than ever before; rows say which are whose."""
        if not ids:
            return None, None
        if len(ids) > self._biases.shape[1]:
            self._biases = self._device.zeros(2, power_of_two(len(ids)), dtype=torch.int32)
        packed = torch.tensor([ids, [0] * len(ids)], dtype=torch.int32)
        packed[1] = torch.tensor(values, dtype=torch.float32).view(torch.int32)
        self._device.upload(packed, self._biases[:, : len(ids)])
        bias_ids, bits = self._biases[:, : len(ids)]
        return bias_ids, bits.view(torch.float32)

    def _scratch(self, count: int) -> torch.Tensor:
        num_parts = workspace_parts(count, self._vocab_size)
        if self._workspace is None or len(self._workspace) < num_parts:
            self._workspace = torch.empty(num_parts, workspace_size(self._vocab_size))
        return self._workspace[:num_parts]
