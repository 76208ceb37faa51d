"""The plain data that travels between the stages of a round.

Shapes: B sequences, N tree nodes, D + 1 path entries, V vocabulary, H hidden size,
W = ceil(N / 64).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the key and the shapes.

    It is one printable line of bounded length, whatever the checkpoint's own words in it.
    """

    def __init__(self, message: str) -> None:
        escaped = (c if c.isprintable() else repr(c)[1:-1] for c in message)
        line = "".join(escaped)
        super().__init__(line if len(line) <= 1200 else f"{line[:800]} ... {line[-200:]}")


class GenerationError(RuntimeError):
    """A sequence that cannot go on (NaN logits, no memory for its cache)."""


class QueueFullError(RuntimeError):
    """An engine has as many waiting requests as it may; nothing was added."""


@dataclass(frozen=True, eq=False)
class RequestHandle:
    """Names a request of one engine, of which :meth:`Engine.add` gave it."""

    id: int
    """Counts an engine's requests."""
    owner: object = field(repr=False)
    """Tells engines apart."""


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a drafter proposes: for each sequence a tree of M nodes, its root (node 0) included.

    Nothing of it is believed. The root's token is the sequence's last one whatever stands there,
    and a tree ends before its first node whose parent does not come before it, or whose token is
    not in the vocabulary (:func:`specrt.tree.settle`). A drafter gets its proposal back when it
    is told what came of it; what it wants to find there, it keeps in a subclass.
    """

    draft_tokens: torch.Tensor
    """``[B, M]`` int32."""
    parents: torch.Tensor
    """``[B, M]`` int32."""
    num_nodes: torch.Tensor
    """``[B]`` int32; nodes from there on are padding."""
    draft_probs: torch.Tensor | None = None
    """``[B, M, V]`` float32: row i is the law node i's children were drawn from, independently.
    Given only by drafters that sample; acceptance then uses rejection with residuals. A tree ends
    before the first child of a row that is no law: NaN, negative, or of a sum that is not 1."""


@dataclass(frozen=True)
class DraftTree:
    """A tree of proposed tokens for each sequence; node 0 is the root, the last committed token.

    Parents come before children (``parents[i] < i``), so a path's node indices increase.
    Nodes at ``num_nodes[b]`` and beyond are padding. The engine makes it of a :class:`Proposal`.
    """

    draft_tokens: torch.Tensor
    """``[B, N]`` int32."""
    parents: torch.Tensor
    """``[B, N]`` int32; the root's is -1."""
    depth: torch.Tensor
    """``[B, N]`` int32; distance from the root."""
    ancestors: torch.Tensor
    """``[B, N, W]`` int64 holding unsigned bits: bit j of row i means node j is i or above it."""
    num_nodes: torch.Tensor
    """``[B]`` int32, 1..N."""
    draft_probs: torch.Tensor | None = None
    """``[B, N, V]`` float32: row i is the law node i's children were drawn from, independently.
    Given only by drafters that sample; acceptance then uses rejection with residuals."""


class VerifyOutput(NamedTuple):
    """What the target says about every node of a tree."""

    logits: torch.Tensor
    """``[B, N, V]`` float32, unprocessed. Valid until the target's next forward pass."""
    taps: Mapping[str, torch.Tensor]
    """Hidden states a drafter asked for, ``[B, N, H]``, by name. Valid as ``logits``."""


@dataclass(frozen=True, eq=False)
class RoundReport:
    """What the host has read of a round, as drafters see it."""

    num_nodes: npt.NDArray[np.int32]
    """``[B]``, of each tree, its root included."""
    accept_length: npt.NDArray[np.int32]
    """``[B]``: as :attr:`AcceptResult.accept_length`, and so the last one."""
    num_taken: npt.NDArray[np.int32]
    """``[B]``: tokens that the output goes on with, up to a stop token and the token limit."""
    path: npt.NDArray[np.int32]
    """``[B, N]``"""

    def of(self, rows: Sequence[int]) -> RoundReport:
        """Of some of the sequences, in this order."""
        index = list(rows)
        return RoundReport(
            self.num_nodes[index], self.accept_length[index], self.num_taken[index],
            self.path[index],
        )  # fmt: skip


@dataclass(frozen=True)
class AcceptResult:
    """The longest agreed path of each sequence and the target's own token behind it."""

    path: torch.Tensor
    """``[B, D + 1]`` int32: node indices from the root (0) down, padded with -1."""
    accept_length: torch.Tensor
    """``[B]`` int32: accepted draft tokens, the bonus token excluded; -1 where logits were NaN."""
    tokens: torch.Tensor
    """``[B, D + 1]`` int32: accepted tokens, then the bonus token, padded with -1."""
    logprobs: torch.Tensor | None = None
    """``[B, D + 1]`` float32: log-probability of each token under the target's unprocessed law."""
    report: RoundReport | None = None
    """The same on the host, which an engine reads once a round."""

    @property
    def lengths(self) -> list[int]:
        """``accept_length`` on the host. (Without a report a GPU is waited for.)"""
        found = self.accept_length if self.report is None else self.report.accept_length
        lengths: list[int] = found.tolist()
        return lengths

    @property
    def paths(self) -> npt.NDArray[np.int32]:
        """``path`` on the host, as :attr:`lengths`."""
        return self.path.numpy() if self.report is None else self.report.path


@dataclass(eq=False)
class SequenceState:
    """One sequence as drafters see it. The engine writes to it and reads nothing back."""

    token_ids: list[int]
    """Prompt, then output; the last one is the root of the next tree."""
    prompt_len: int
    max_len: int
    """The sequence ends when ``token_ids`` is this long (token or context limit)."""
    seed: int
    temperature: float
    sampling_row: torch.Tensor | None = None
    """``[8]`` int64: the request's sampling as kernels read it (``specrt.sampling.sampling_row``).
    Drafters that couple their trees to the target's noise need it; the engine always gives it."""
    cache_salt: str = ""
    """Of what is kept of it nothing may be used for a sequence with another."""

    @property
    def num_left(self) -> int:
        """Tokens that may still come; a tree deeper than this less one is wasted."""
        return self.max_len - len(self.token_ids)


@dataclass
class RoundStats:
    """Counts and times of one sequence's generation; times in milliseconds, of whole rounds.

    Counted is what was emitted. A round's ``accept_length`` is its tokens less one, the bonus
    token's place: where an output ends inside an accepted path the last drafted token takes that
    place, and what lies behind is not counted. So ``num_rounds + num_accepted_tokens`` tokens were
    emitted, and ``tau``, the mean of ``accept_length + 1`` per round, is tokens by rounds. A round
    that fails emits nothing and is not counted.
    """

    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    accept_ms: float = 0.0
    prefill_ms: float = 0.0
    num_cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were found, and not computed."""
    accept_lengths: list[int] = field(default_factory=list)
    proposed_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)

    def record(self, num_nodes: int, accept_length: int, deepest: int) -> None:
        """Count one round of ``accept_length + 1`` tokens.

        Args:
            num_nodes: of its tree.
            accept_length: what was emitted but for the last token.
            deepest: the largest distance of a node from the root.
        """
        self.num_rounds += 1
        self.num_draft_tokens += num_nodes - 1
        self.num_accepted_tokens += accept_length
        self.accept_lengths.append(accept_length)
        missing = max(0, deepest - len(self.proposed_by_depth))
        self.proposed_by_depth.extend([0] * missing)
        self.accepted_by_depth.extend([0] * missing)
        for level in range(deepest):
            self.proposed_by_depth[level] += 1
            self.accepted_by_depth[level] += accept_length > level

    @property
    def tau(self) -> float:
        """Mean of accept_length + 1 per round (bonus token included)."""
        return 1.0 + self.num_accepted_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def acceptance_rate(self) -> list[float]:
        """Accepted / rounds that proposed something, at each depth from 1."""
        pairs = zip(self.accepted_by_depth, self.proposed_by_depth, strict=True)
        return [accepted / proposed if proposed else 0.0 for accepted, proposed in pairs]
