"""How far a drafter's chains would be accepted, measured on held-out sequences.

From every position a chain is drafted along the sequence itself: the drafter's own r is fed back as
it is when serving, the tokens are the true ones. On text the target has written greedily this is
what a greedy chain would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specrt.train.features.source import FeatureSource
from specrt.train.fspad.module import DraftModel
from specrt.train.head import TargetHead, TargetTables

_MAX_SEQUENCES = 64
_ROWS = 256  # queries, or logits, at a time


@dataclass(frozen=True)
class Acceptance:
    """Counts of drafted tokens by depth, from 1."""

    proposed: tuple[int, ...]
    """Chains whose tokens before this depth were all accepted."""
    accepted: tuple[int, ...]
    num_sequences: int

    @property
    def rates(self) -> tuple[float, ...]:
        """The acceptance rate at each depth, given that all before it were accepted."""
        pairs = zip(self.accepted, self.proposed, strict=True)
        return tuple(accepted / max(1, proposed) for accepted, proposed in pairs)

    @property
    def tau(self) -> float:
        """Expected tokens of a round with a greedy chain of this depth, the bonus included."""
        return self.taus[-1]

    @property
    def taus(self) -> tuple[float, ...]:
        """The same for chains of every depth from 0, which is plain decoding, to this one."""
        reached, taus = 1.0, [1.0]
        for rate in self.rates:
            reached *= rate
            taus.append(taus[-1] + reached)
        return tuple(taus)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "num_sequences": self.num_sequences,
            "acceptance_rate": list(self.rates),
            "tau": self.tau,
            "proposed": list(self.proposed),
        }


class ChainCounter:
    """Counts how far chains from every position would be accepted.

    Args:
        depth: of the chains.
    """

    def __init__(self, depth: int) -> None:
        self._proposed, self._accepted = [0] * depth, [0] * depth
        self._num_sequences = 0

    def add(self, hits: Sequence[torch.Tensor], is_wanted: torch.Tensor) -> None:
        """Count one sequence.

        Args:
            hits: for each depth, from 1, ``[>= n - d]`` bool by position: the chain from there
                guesses its token d right, whatever came before.
            is_wanted: ``[n - 1]`` bool: the first token of the chain from there is to be predicted.
        """
        alive = torch.ones(len(hits[0]), dtype=torch.bool, device=is_wanted.device)
        for level, hit in enumerate(hits):
            wanted = is_wanted[level:]
            alive = alive[: len(wanted)] & wanted
            self._proposed[level] += int(alive.sum())
            alive = alive & hit[: len(wanted)]
            self._accepted[level] += int(alive.sum())
        self._num_sequences += 1

    @property
    def acceptance(self) -> Acceptance:
        """What was counted."""
        return Acceptance(tuple(self._proposed), tuple(self._accepted), self._num_sequences)


def spread(indices: Sequence[int]) -> list[int]:
    """At most 64 of the held-out sequences, evenly spaced."""
    step = max(1.0, len(indices) / _MAX_SEQUENCES)
    return [indices[int(i * step)] for i in range(min(len(indices), _MAX_SEQUENCES))]


@torch.no_grad()
def chain_acceptance(
    model: DraftModel,
    target: TargetTables,
    source: FeatureSource,
    indices: Sequence[int],
    depth: int,
) -> Acceptance:
    """Draft a chain of ``depth`` tokens from every position and compare with the target's argmax.

    Args:
        model: the drafter, in the dtype of ``target``.
        target: embedding and head.
        source: of the sequences.
        indices: the held-out ones; at most 64 of them are used, evenly spaced.
        depth: of the chains.
    """
    counter = ChainCounter(depth)
    for index in spread(indices):
        (sample,) = source.batch([index])
        device = target.embed.device
        hits = _chain_hits(
            model,
            target,
            sample.token_ids.to(device),
            sample.features.to(device, torch.float32),
            depth,
        )
        counter.add(hits, sample.loss_mask[2:].to(device))
    return counter.acceptance


def _chain_hits(
    model: DraftModel,
    target: TargetTables,
    token_ids: torch.Tensor,
    features: torch.Tensor,
    depth: int,
) -> list[torch.Tensor]:
    """Where a chain from position t guesses right at each depth, whatever came before.

    Returns:
        For depth d (from 1) ``[n - 1 - d]`` bool, by t: the drafter's token t + d + 1 is the
        target's likeliest. Empty where the sequence is too short.
    """
    layer, attention = model.layer, model.layer.self_attn
    length = len(token_ids)
    wanted = _argmax(features, target.head)  # of token t + 1, by t
    draft_head = target.draft_head
    rope = model.rope_rows(length)
    embeddings = target.embed[token_ids]
    fed = features[:-1]
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    hits = []
    for level in range(1, depth + 1):
        count = length - 1 - level
        if count < 1:
            hits.append(torch.zeros(0, dtype=torch.bool, device=token_ids.device))
            continue
        # Row t: the pair of position t + level - 1.
        hidden = model.pair(embeddings[level : level + count], fed[:count])[None]
        q, k, v = attention.project(hidden, rope[level - 1 : level - 1 + count])
        keys.append(k)
        values.append(v)
        attended = _chain_attention(q, keys, values)
        predicted, regressed = layer.output(hidden + attention.merge(attended))
        guessed = _argmax(predicted[0], draft_head)
        if target.token_ids is not None:
            guessed = target.token_ids[guessed]
        hits.append(guessed == wanted[level : level + count])
        fed = regressed[0]
    return hits


def _chain_attention(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
) -> torch.Tensor:
    """Attend from each chain's node to the true pairs up to its root, and to its own nodes.

    Args:
        q: ``[1, Q, c, d]``: chain t's query in row t.
        keys, values: ``[1, K, >= c, d]`` by level; row t of level 1 is the true pair t, of the
            other levels chain t's own.
    """
    groups, count = q.shape[1] // keys[0].shape[1], q.shape[2]
    scale = q.shape[-1] ** -0.5
    own_k, own_v = (
        [level[:, :, :count].repeat_interleave(groups, 1) for level in levels]
        for levels in (keys, values)
    )
    out = []
    for start in range(0, count, _ROWS):
        rows = slice(start, min(start + _ROWS, count))
        part = q[:, :, rows] * scale
        scores = part @ own_k[0].transpose(-1, -2)
        is_later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu_(start + 1)
        scores = scores.masked_fill(is_later, float("-inf"))
        tails = [(part * level[:, :, rows]).sum(-1, keepdim=True) for level in own_k[1:]]
        weights = torch.cat([scores, *tails], -1).softmax(-1)
        attended = weights[..., :count] @ own_v[0]
        for number, level in enumerate(own_v[1:]):
            column = weights[..., count + number : count + number + 1]
            attended = attended + column * level[:, :, rows]
        out.append(attended)
    return torch.cat(out, 2)


def _argmax(features: torch.Tensor, head: TargetHead) -> torch.Tensor:
    return torch.cat([head.logits(part).argmax(-1) for part in features.split(_ROWS)])
