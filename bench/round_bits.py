"""Kernels of a round that have a twin on the CPU with the same bits, by each of their ways.

Sums of masses are integers, exponentials one polynomial, ties go by number: nothing is left to
rounding, so the host runs the same calls and all that is written must be equal. Rows of one batch
ask for different things, as sequences do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu import Place
from specrt import ops
from specrt.ops import registry
from specrt.ops.draft_control import ControlKind, ControlSettings, prior_beliefs
from specrt.ops.history_append import report_size
from specrt.ops.tree_accept import gpu_workspace_size, workspace_size
from specrt.ops.tree_build import expand_gpu_workspace_size, expand_workspace_size
from specrt.sampling import SamplingParams, SamplingTable

Tensor = torch.Tensor
Arguments = dict[str, Any]

EDITS = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}
SETTINGS = (
    SamplingParams(),
    SamplingParams(**EDITS, logit_bias={7: 3.0, 11: -2.0}),
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=1.0, seed=2, top_p=0.9),
    SamplingParams(temperature=1.0, seed=3, top_p=0.999999),
    SamplingParams(temperature=0.9, seed=4, top_k=50, top_p=0.9, **EDITS),
    SamplingParams(temperature=1.2, seed=5, top_k=5000, min_p=0.001),
    SamplingParams(temperature=1.0, seed=6, min_p=0.2),
)
ROWS = ((131, 2.0), (18_011, 3.0), (18_011, 0.0))
"""Vocabulary and spread of logits: in one chunk, in several, and so flat that more tokens may be
the last one kept than are sorted."""
LAYOUTS = ((131, 4), (9001, 10))
"""Rows of a draft head and children of a node."""


@dataclass(frozen=True)
class Call:
    """What is run on the host and on a device."""

    name: str
    run: Callable[[Arguments], None]
    arguments: Mapping[str, Any]
    """The host's; each run has copies."""
    written: Sequence[str]
    scratch: Callable[[bool], Tensor] | None = None
    """A workspace, for a GPU or not."""


def run_round_bits(place: Place, *, is_quick: bool = False) -> int:
    """The number of calls that gave equal bits; with ``is_quick`` of short rows alone.

    Raises:
        RuntimeError: one has written something else than on the host.
    """
    calls = [
        *_accepts(is_quick),
        *_growths(is_quick),
        *_controls(),
        _append(),
        _lookup(),
    ]
    for call in calls:
        ours, theirs = (_outcome(call, device) for device in (place.device, "cpu"))
        for name, a, b in zip(call.written, ours, theirs, strict=True):
            if not torch.equal(a, b):
                raise RuntimeError(f"{call.name}: {name} has other bits than on the CPU")
    return len(calls)


def _outcome(call: Call, device: str) -> list[Tensor]:
    there = {
        name: value.to(device, copy=True) if isinstance(value, Tensor) else value
        for name, value in call.arguments.items()
    }
    if call.scratch:
        is_on_gpu = any(isinstance(x, Tensor) and registry.is_on_gpu(x) for x in there.values())
        there["workspace"] = call.scratch(is_on_gpu).to(device)
    call.run(there)
    return [_bits(there[name].cpu()) for name in call.written]


def _bits(values: Tensor) -> Tensor:
    """As integers; NaN is one value."""
    if not values.is_floating_point():
        return values
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    return values.nan_to_num(nan=12345.0, posinf=torch.inf, neginf=-torch.inf).view(whole)


def _ints(*shape: int) -> Tensor:
    return torch.full(shape, -77, dtype=torch.int32)


def _nans(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


# --- acceptance -----------------------------------------------------------------------------------


def _accepts(is_quick: bool) -> Iterator[Call]:
    for vocab, scale in ROWS[: 1 if is_quick else None]:
        for has_law in (False, True):
            yield _accept(vocab, scale, has_law)


def _accept(vocab: int, scale: float, has_law: bool) -> Call:
    """Trees 0-1-3, 0-2 of what is likely, and what is accepted of them by equality or by law."""
    generator, batch = torch.Generator().manual_seed(vocab), len(SETTINGS)
    logits = torch.randn(batch, 4, vocab, generator=generator) * scale
    best = logits.topk(2).indices.int()
    tokens = torch.stack([best[:, 0, 0], best[:, 0, 0], best[:, 0, 1], best[:, 1, 0]], 1)
    history = torch.randint(0, vocab, (batch, 9), generator=generator, dtype=torch.int32)
    history[:, 3:5] = best[:, 0]
    logits[-1, 1, 0] = float("nan")
    table = SamplingTable.build(SETTINGS, [4] * batch, vocab)
    arguments = {
        "draft_tokens": tokens,
        "parents": torch.tensor([[-1, 0, 0, 1]] * batch, dtype=torch.int32),
        "num_nodes": torch.full((batch,), 4, dtype=torch.int32),
        "draft_probs": (0.8 * logits.nan_to_num()).softmax(-1) if has_law else None,
        "logits": logits,
        "sampling": table.rows,
        "bias_ids": table.bias_ids,
        "bias_values": table.bias_values,
        "history": history,
        "history_len": torch.full((batch,), 9, dtype=torch.int32),
        "path": _ints(batch, 4),
        "accept_length": _ints(batch),
        "tokens": _ints(batch, 4),
        "logprobs": _nans(batch, 4),
    }

    def scratch(is_on_gpu: bool) -> Tensor:
        if is_on_gpu:
            return torch.zeros(gpu_workspace_size(batch, 4, vocab, has_draft_probs=has_law))
        return torch.zeros(1, workspace_size(vocab))

    written = ("path", "accept_length", "tokens", "logprobs")
    name = f"tree_accept of {vocab} tokens{' by law' if has_law else ''}"
    return Call(name, lambda a: ops.tree_accept(**a), arguments, written, scratch)


# --- draft trees ----------------------------------------------------------------------------------


def _growths(is_quick: bool) -> Iterator[Call]:
    for num_rows, top_k in LAYOUTS[: 1 if is_quick else None]:
        for is_coupled in (False, True):
            for scale in (3.0, 0.0):
                yield _growth(num_rows, top_k, scale, is_coupled)


def _growth(num_rows: int, top_k: int, scale: float, is_coupled: bool) -> Call:
    """Two levels, of a head of fewer rows than tokens if coupled, and the best of both."""
    generator, batch = torch.Generator().manual_seed(num_rows), len(SETTINGS)
    size, nodes, words = top_k + top_k * top_k, 2 * top_k, -(-2 * top_k // 64)
    table = SamplingTable.build(SETTINGS, [4] * batch, num_rows)
    arguments: Arguments = {
        "sampling": table.rows if is_coupled else None,
        "position": torch.arange(batch, dtype=torch.int32) if is_coupled else None,
        "token_map": torch.arange(num_rows, dtype=torch.int32) * 2 if is_coupled else None,
        "roots": torch.arange(batch, dtype=torch.int32),
        "top_scores": torch.zeros(batch, 1),
        "top_candidates": torch.full((batch, 1), -1, dtype=torch.int32),
        "top_ancestors": torch.zeros(batch, 1, words, dtype=torch.int64),
        "pool_tokens": _ints(batch, size),
        "pool_parents": _ints(batch, size),
        "pool_scores": _nans(batch, size),
        "draft_tokens": _ints(batch, nodes),
        "parents": _ints(batch, nodes),
        "num_nodes": _ints(batch),
        "node_scores": _nans(batch, nodes),
    }
    for level, width in enumerate((1, top_k)):
        logits = torch.randn(batch, width, num_rows, generator=generator) * scale
        logits[0, -1, -1] = float("nan")
        arguments |= {
            f"logits{level}": logits,
            f"tokens{level}": _ints(batch, top_k),
            f"scores{level}": _nans(batch, top_k),
            f"candidates{level}": _ints(batch, top_k),
            f"source{level}": _ints(batch, top_k),
            f"ancestors{level}": torch.zeros(batch, top_k, words, dtype=torch.int64),
        }

    def scratch(is_on_gpu: bool) -> Tensor:
        if is_on_gpu:
            return torch.zeros(expand_gpu_workspace_size(batch, top_k, num_rows, top_k))
        return torch.zeros(1, expand_workspace_size(num_rows))

    written = [name for name in arguments if name.startswith(("pool", "tokens", "scores", "cand"))]
    written += ["source0", "source1", "ancestors0", "ancestors1"]
    written += ["draft_tokens", "parents", "num_nodes", "node_scores"]
    name = f"draft tree of {num_rows} rows{' coupled' if is_coupled else ''}"
    return Call(name, _grow, arguments, written, scratch)


def _grow(a: Arguments) -> None:
    pool = a["pool_tokens"], a["pool_parents"], a["pool_scores"]
    above = a["top_scores"], a["top_candidates"], a["top_ancestors"]
    for level in range(2):
        below = [a[f"{name}{level}"] for name in ("tokens", "scores", "candidates")]
        below += [a[f"source{level}"], a[f"ancestors{level}"]]
        chosen = a["token_map"], a["sampling"], a["position"]
        ops.tree_expand(
            a[f"logits{level}"], *above, *chosen, level, a["workspace"], *pool, *below
        )  # fmt: skip
        above = below[1], below[2], below[4]
    out = a["draft_tokens"], a["parents"], a["num_nodes"], a["node_scores"]
    ops.tree_rerank(*pool, pool[0].shape[1], a["roots"], *out)


# --- how long to draft, and what is told ----------------------------------------------------------


def _controls() -> Iterator[Call]:
    for kind in ControlKind:
        for has_head in (False, True):
            yield _control(kind, has_head)


def _control(kind: ControlKind, has_head: bool) -> Call:
    """A round of three sequences, one of which has ended its draft, and what is learned of it."""
    settings = ControlSettings(
        draft_len=3, threshold=0.5, adapt_rate=0.1, target_rejection=0.3, alpha=1.5, beta=0.7,
        bias_mean=-0.05, bias_var=0.04, noise_var=0.2, discount=0.9, gain_mean=0.4,
        gain_weight=1.5, gain_var=0.3,
    ).tensor()  # fmt: skip

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    arguments: Arguments = {
        "settings": settings,
        "costs": torch.tensor([0.06, 0.2, 0.12, 0.9, 0.07], dtype=torch.float64),
        "posterior": prior_beliefs(settings).repeat(3, 1),
        "slots": ints(2, 0, 1),
        "seed": torch.tensor([1, -2, 3]),
        "position": ints(5, 6, 7),
        "limit": ints(4, 3, 2),
        "is_sampled": ints(0, 1, 1),
        "slope": torch.tensor([1.0, 0.8]) if has_head else None,
        "score": torch.tensor([-0.1, -0.5, float("nan")]),
        "evidence": torch.zeros(3, 2) if has_head else None,
        "is_open": ints(1, 1, 0),
        "drafted": ints(0, 0, 0),
        "length": ints(0, 0, 0),
        "confidence": torch.full((3, 4), 0.6),
        "accept_length": ints(1, 0, -1),
    }

    def run(a: Arguments) -> None:
        told = {name: a[name] for name in a if name != "accept_length"}
        ops.draft_control(kind, 0, **told | {"score": None, "evidence": None})
        for step in (1, 2):
            ops.draft_control(kind, step, **told)
        ops.draft_control_update(
            kind, a["settings"], a["costs"], a["slots"], a["limit"], a["drafted"], a["length"],
            a["confidence"], a["accept_length"], a["posterior"],
        )  # fmt: skip

    written = ("is_open", "drafted", "length", "confidence", "posterior")
    return Call(f"draft_control, {kind.name}", run, arguments, written)


def _append() -> Call:
    """One that stops, one that is full, one of bad logits; with log-probabilities."""
    batch, nodes, generator = 3, 65, torch.Generator().manual_seed(1)

    def below(most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=generator, dtype=torch.int32)

    tokens = below(500, batch, nodes)
    arguments = {
        "num_nodes": torch.tensor([nodes, 40, 1], dtype=torch.int32),
        "depth": below(nodes, batch, nodes),
        "path": below(nodes, batch, nodes),
        "accept_length": torch.tensor([nodes - 1, 30, -1], dtype=torch.int32),
        "tokens": tokens,
        "logprobs": torch.randn(batch, nodes, generator=generator),
        "stop_ids": torch.stack([tokens[:, 50], tokens[:, 50]], 1),
        "max_len": torch.tensor([140, 20, 140], dtype=torch.int32),
        "history": _ints(batch, 140),
        "history_len": torch.tensor([3, 17, 9], dtype=torch.int32),
        "roots": _ints(batch),
        "num_path": _ints(batch),
        "report": _ints(batch, report_size(nodes, True)),
    }
    written = ("history", "history_len", "roots", "num_path", "report")
    return Call("history_append", lambda a: ops.history_append(**a), arguments, written)


def _lookup() -> Call:
    """Histories of few tokens and of several chunks, one of them full."""
    batch, slots, nodes = 4, 20_000, 65
    generator = torch.Generator().manual_seed(2)
    alphabet = torch.tensor([[2], [3], [40], [5000]])
    drawn = torch.rand(batch, slots, generator=generator, dtype=torch.float64) * alphabet
    arguments = {
        "history": drawn.int(),
        "history_len": torch.tensor([30, slots, 700, 19_000], dtype=torch.int32),
        "max_len": torch.tensor([90, slots, 710, slots], dtype=torch.int32),
        "max_ngram": 9,
        "min_ngram": 1,
        "num_continuations": 8,
        "depth": 30,
        "draft_tokens": _ints(batch, nodes),
        "parents": _ints(batch, nodes),
        "num_nodes": _ints(batch),
        "match_len": _ints(batch),
        "longest": _ints(batch),
    }
    written = ("draft_tokens", "parents", "num_nodes", "match_len", "longest")
    return Call("prompt_lookup", lambda a: ops.prompt_lookup(**a), arguments, written)
