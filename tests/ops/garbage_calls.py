"""Kernels that read the contents of tensors, valid arguments of each, and what may be spoiled.

Shapes are tiny, B is 3, and the cache has one page more than the sequences use: its last, where
page numbers out of range end up.
"""

from __future__ import annotations

import ctypes

import torch

from specrt import ops
from specrt.ops.draft_control import NUM_COSTS, ControlSettings, prior_beliefs
from specrt.ops.history_append import report_size
from specrt.ops.tree_accept import gpu_workspace_size, workspace_size
from specrt.ops.tree_build import expand_gpu_workspace_size, expand_workspace_size
from specrt.sampling import SamplingParams, SamplingTable
from tests.ops.conftest import Backend
from tests.ops.garbage_kernel import (
    BATCH,
    NODES,
    TOP_K,
    VOCAB,
    Arguments,
    Kernel,
    dtype_of,
    generator,
    ints,
)
from tests.oracles.paged import lineage, pack_bits, random_parents

Tensor = torch.Tensor
PAGE_SIZES = (1, 3, 4, 16, 5, 64)


# --- the cache


def pages_of(variant: int) -> tuple[Arguments, int]:
    """Page table and lengths, and P. In the last variant several leaves of attention fit in."""
    page_size = PAGE_SIZES[variant]
    each = -(-(300 if page_size == 64 else 24) // page_size)
    table = torch.randperm(BATCH * each, generator=generator(variant)).view(BATCH, each)
    return {"block_table": table.int(), "kv_len": ints(4, 0, 7)}, BATCH * each + 1


def commit_arguments(variant: int, backend: Backend) -> Arguments:
    g, depth = generator(variant), (5, 11)[variant % 2]
    paged, num_pages = pages_of(variant)
    width = (8, 5)[variant // 3]  # rows of 16-byte pieces, or not
    kv = torch.randn(2, 2, num_pages, PAGE_SIZES[variant], 1, width, generator=g)
    paths = [torch.randperm(15, generator=g)[:depth].sort().values for _ in range(BATCH)]
    return paged | {
        "kv": kv.to(dtype_of(backend, variant)),
        "path": torch.stack(paths).int(),
        "num_path": ints(depth, 3, 0),
        "tickets": ints(0, 0, 0),
    }


def row_arguments(variant: int, backend: Backend) -> tuple[Arguments, Arguments]:
    """What attention and ``rope_append`` share, and what rotation needs."""
    g, dtype, dim = generator(variant), dtype_of(backend, variant), 64
    paged, num_pages = pages_of(variant)
    if not backend.runs_cuda_source:
        dim = (16, 32)[variant % 2]
    cache, new = (num_pages, PAGE_SIZES[variant], 2, dim), (BATCH, NODES, 2, dim)
    # Each of a storage of its own, whose borders the shim guards.
    k_cache, v_cache, k, v = (
        torch.randn(shape, generator=g).to(dtype) for shape in (cache, cache, new, new)
    )
    counts = {"first_node": ints(0, 2, 0), "num_nodes": ints(6, 4, 1)}
    q = torch.randn(BATCH, NODES, 4, dim, generator=g).to(dtype)
    depth = torch.randint(0, 4, (BATCH, NODES), generator=g, dtype=torch.int32)
    angles = {"k": k, "v": v, "depth": depth, "cos_sin": torch.randn(13, dim, generator=g)}
    return paged | counts | {"q": q, "k_cache": k_cache, "v_cache": v_cache}, angles


def rope_arguments(variant: int, backend: Backend) -> Arguments:
    rows, angles = row_arguments(variant, backend)
    return rows | angles


def attention_arguments(variant: int, backend: Backend) -> Arguments:
    rows, _ = row_arguments(variant, backend)
    words, parents = 1 + variant % 2, random_parents(NODES + 2, generator(variant))
    nodes = [range(first, first + NODES) for first in rows["first_node"].tolist()]
    bits = [pack_bits([lineage(parents, node) for node in row], words) for row in nodes]
    rows |= {"ancestors": torch.stack(bits), "scale": 0.2, "out": torch.zeros_like(rows["q"])}
    if variant % 2:
        rows |= {"window": 3, "num_sinks": 1}
    if backend.runs_cuda_source:
        slots = rows["block_table"].shape[1] * PAGE_SIZES[variant]
        floats = ops.tree_attention_workspace(BATCH, 4, 2, 64, NODES, slots, backend.device)
        rows["workspace"] = torch.zeros(floats)
    return rows


def attention_append_arguments(variant: int, backend: Backend) -> Arguments:
    return attention_arguments(variant, backend) | row_arguments(variant, backend)[1]


def attend_appending(a: Arguments) -> None:
    rest = dict(a)
    append = ops.Append(*(rest.pop(name) for name in ("k", "v", "depth", "cos_sin")))
    ops.tree_attention(**rest, append=append)


# --- acceptance

SAMPLED = SamplingParams(
    temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, presence_penalty=2.0,
    logit_bias={3: 1.0, 64: -2.0}, seed=7,
)  # fmt: skip
EDITED = SamplingParams(logit_bias={1: 0.5}, repetition_penalty=1.2)


def accept_arguments(variant: int, backend: Backend) -> Arguments:
    g = generator(variant)
    plain, greedy = SamplingParams(temperature=1.0, seed=3), SamplingParams()
    params = [greedy] * 3 if variant == 5 else [EDITED, SAMPLED, plain]
    table = SamplingTable.build(params, [2, 3, 1], VOCAB)
    parents = torch.tensor([random_parents(NODES, g) for _ in range(BATCH)], dtype=torch.int32)
    shape = (BATCH, NODES)
    law = torch.rand(*shape, VOCAB, generator=g).softmax(-1)
    keys = torch.randint(-(2**63), 2**63 - 1, (BATCH * NODES, 2), generator=g)
    workspace = None if variant == 5 else torch.zeros(1, workspace_size(VOCAB))
    if backend.runs_cuda_source:
        workspace = torch.zeros(gpu_workspace_size(*shape, VOCAB, has_draft_probs=True))
    by_need = variant in (1, 4) and not backend.runs_cuda_source
    logits = torch.randn(*shape, VOCAB, generator=g)
    logit_rows = torch.arange(BATCH * NODES, dtype=torch.int32).view(shape)
    return {
        "draft_tokens": torch.randint(0, VOCAB, shape, generator=g, dtype=torch.int32),
        "parents": parents,
        "num_nodes": ints(6, 4, 1),
        "draft_probs": law if variant % 2 else None,
        "logits": logits.flatten(0, 1) if by_need else logits,
        "sampling": table.rows.clone(),
        "bias_ids": table.bias_ids,
        "bias_values": table.bias_values,
        "history": torch.randint(0, VOCAB, (BATCH, 9), generator=g, dtype=torch.int32),
        "history_len": ints(9, 8, 1),
        "workspace": workspace,
        "path": torch.zeros(shape, dtype=torch.int32),
        "accept_length": ints(0, 0, 0),
        "tokens": torch.zeros(shape, dtype=torch.int32),
        "logprobs": torch.zeros(shape) if variant % 3 else None,
        "maxima": keys if backend.runs_cuda_source and variant in (0, 2, 5) else None,
        "logit_rows": logit_rows if by_need else None,
        "next_node": ints(0, 2, -1) if by_need else None,
    }


def maxima_arguments(variant: int, backend: Backend) -> Arguments:
    g, dtype = generator(variant), dtype_of(backend, variant)
    params = [SamplingParams(), SamplingParams(temperature=1.0, seed=3), SAMPLED]
    is_gpu = backend.runs_cuda_source
    return {
        "x": torch.randn(BATCH, 16, generator=g).to(dtype if is_gpu else torch.float32),
        "weight": torch.randn(VOCAB, 16, generator=g).to(dtype),
        "logits": torch.zeros(BATCH, VOCAB),
        "keys": torch.zeros(BATCH, 2, dtype=torch.int64),
        "sampling": SamplingTable.build(params, [2, 3, 1], VOCAB).rows.clone(),
        "history_len": ints(9, 8, 1),
        "depth": ints(0, 3, 1)[:, None],
        "workspace": torch.zeros(0) if is_gpu else None,
    }


def linear_with_maxima(a: Arguments) -> None:
    maxima = None
    if a["x"].dtype != torch.float32:  # a GPU's
        maxima = ops.TileMaxima(a["keys"], a["sampling"], a["history_len"], a["depth"])
    ops.linear(a["x"], a["weight"], out=a["logits"], workspace=a["workspace"], maxima=maxima)


def operands_arguments(variant: int, backend: Backend) -> Arguments:
    """Every operand that may be gathered is."""
    g, dtype = generator(variant), dtype_of(backend, variant)

    def matrix(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=g)
        return values.to(dtype) if backend.runs_cuda_source else values

    return {
        "x": matrix(5, 16),
        "second": matrix(VOCAB, 24),
        "weight": torch.randn(72, 40, generator=g).to(dtype),
        "gate": matrix(VOCAB, 72),
        "residual": matrix(VOCAB, 72),
        "x_rows": ints(4, 0, 2),
        "second_rows": ints(69, 3, 0),
        "gate_rows": ints(1, 2, 69),
        "residual_rows": ints(5, 5, 68),
        "out": matrix(BATCH, 72),
        "workspace": torch.zeros(0) if backend.runs_cuda_source else None,
    }


def linear_with_operands(a: Arguments) -> None:
    names = "x", "second", "gate", "residual"
    rows = {name: ops.GatheredRows(a[name], a[f"{name}_rows"]) for name in names}
    if a["x"].dtype == torch.float32:  # the CPU's has rows only
        rows = {"x": torch.cat([a["x"][:BATCH], a["second"][:BATCH]], -1)}
    ops.linear(weight=a["weight"], out=a["out"], workspace=a["workspace"], **rows)


# --- trees


def coupling() -> Arguments:
    params = [
        SamplingParams(temperature=0.7, top_p=0.9, seed=1),
        SamplingParams(temperature=1.0, top_k=40, min_p=0.05, seed=-2),
        SamplingParams(),
    ]
    return {"sampling": SamplingTable.build(params, [1] * 3, VOCAB).rows, "position": ints(5, 6, 7)}


def expand_arguments(variant: int, backend: Backend) -> Arguments:
    """Level 2 of a tree, whose frontier has K nodes."""
    g, size, width = generator(variant), TOP_K + 2 * TOP_K**2, (BATCH, TOP_K)
    zeros = torch.zeros(4, *width, dtype=torch.int32)
    token_map = torch.randperm(2 * VOCAB, generator=g)[:VOCAB].int()
    workspace = torch.zeros(1, expand_workspace_size(VOCAB))
    tiles: dict[str, Tensor | None] = {"keys": None, "masses": None}
    if backend.runs_cuda_source:
        workspace = torch.zeros(expand_gpu_workspace_size(BATCH, TOP_K, VOCAB, TOP_K))
    if backend.runs_cuda_source and variant % 4 < 2:
        rows = BATCH * TOP_K, 2
        tiles = {"keys": torch.randint(-(2**40), 0, rows), "masses": torch.rand(rows)}
    return (coupling() if variant % 2 else dict.fromkeys(coupling())) | {
        "logits": torch.randn(*width, VOCAB, generator=g),
        "scores": -torch.rand(width, generator=g),
        "candidates": torch.arange(9, dtype=torch.int32).view(width) + TOP_K,
        "ancestors": torch.ones(*width, 1, dtype=torch.int64),
        "token_map": token_map if variant % 3 else None,
        "level": 2,
        "workspace": workspace,
        "pool_tokens": torch.zeros(BATCH, size, dtype=torch.int32),
        "pool_parents": torch.zeros(BATCH, size, dtype=torch.int32),
        "pool_scores": torch.zeros(BATCH, size),
        "frontier_tokens": zeros[0].clone(),
        "frontier_scores": torch.zeros(width),
        "frontier_candidates": zeros[1].clone(),
        "frontier_source": zeros[2].clone(),
        "frontier_ancestors": torch.zeros(*width, 1, dtype=torch.int64),
        "is_open": ints(1, 0, 1) if variant % 2 else None,
        "level_score": torch.zeros(BATCH) if variant // 3 else None,
        **tiles,
    }


def grow_level(a: Arguments) -> None:
    rest = dict(a)
    keys, masses = rest.pop("keys"), rest.pop("masses")
    if keys is not None:
        rest["maxima"] = ops.DraftMaxima(keys, masses)
    ops.tree_expand(**rest)


def rerank_arguments(variant: int, backend: Backend) -> Arguments:
    g, shape, size = generator(variant), (BATCH, NODES), TOP_K + TOP_K**2
    parents = torch.tensor([-1] * TOP_K + [i // TOP_K for i in range(TOP_K**2)])
    scores = -torch.rand(BATCH, size, generator=g)
    scores[:, TOP_K:] += scores.gather(1, parents[TOP_K:].expand(BATCH, -1))
    return {
        "pool_tokens": torch.randint(0, VOCAB, (BATCH, size), generator=g, dtype=torch.int32),
        "pool_parents": parents.int().repeat(BATCH, 1),
        "pool_scores": scores,
        "num_candidates": size,
        "roots": ints(1, 2, 3),
        "draft_tokens": torch.zeros(shape, dtype=torch.int32),
        "parents": torch.zeros(shape, dtype=torch.int32),
        "num_nodes": ints(0, 0, 0),
        "node_scores": torch.zeros(shape),
    }


def settle_arguments(variant: int, backend: Backend) -> Arguments:
    g, given, nodes = generator(variant), (6, 70, 40)[variant % 3], (6, 40, 128)[variant // 2]
    shape = (BATCH, nodes)
    parents = [random_parents(given, g) for _ in range(BATCH)]
    return {
        "draft_tokens": torch.randint(0, VOCAB, (BATCH, given), generator=g, dtype=torch.int32),
        "parents": torch.tensor(parents, dtype=torch.int32),
        "num_nodes": ints(given, 4, 1),
        "roots": ints(1, 2, 3),
        "max_nodes": ints(64, 128, 3),
        "vocab_size": VOCAB,
        "settled_tokens": torch.zeros(shape, dtype=torch.int32),
        "settled_parents": torch.zeros(shape, dtype=torch.int32),
        "depth": torch.zeros(shape, dtype=torch.int32),
        "ancestors": torch.zeros(*shape, 2, dtype=torch.int64),
        "num_settled": ints(0, 0, 0),
    }


# --- the end of a round


def append_arguments(variant: int, backend: Backend) -> Arguments:
    g, nodes, slots = generator(variant), (1, 6, 40, 64, 65, 128)[variant], (140, 30)[variant % 2]
    shape, has_logprobs = (BATCH, nodes), variant % 2 == 1

    def below(most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=g, dtype=torch.int32)

    return {
        "num_nodes": ints(nodes, 4, 1),
        "depth": below(nodes, *shape),
        "path": below(nodes, *shape),
        "accept_length": ints(nodes - 1, 3, -1),
        "tokens": below(VOCAB, *shape),
        "logprobs": torch.randn(shape, generator=g) if has_logprobs else None,
        "stop_ids": below(VOCAB, BATCH, (1, 2, 4)[variant // 2]),
        "max_len": ints(140, 20, 9),
        "history": below(VOCAB, BATCH, slots),
        "history_len": ints(3, 17, 9),
        "roots": ints(1, 2, 3),
        "num_path": ints(0, 0, 0),
        "report": torch.zeros(BATCH, report_size(nodes, has_logprobs), dtype=torch.int32),
    }


def lookup_arguments(variant: int, backend: Backend) -> Arguments:
    """Of few tokens and many, in trees of one word and of two."""
    slots, nodes = (5, 40, 600)[variant % 3], (6, 128)[variant % 2]
    tokens = torch.randint(
        0, (2, VOCAB)[variant // 3], (BATCH, slots), generator=generator(variant)
    )
    results = torch.zeros(3, BATCH, dtype=torch.int32)
    return {
        "history": tokens.int(),
        "history_len": ints(slots, slots - 3, 1),
        "max_len": ints(slots + 9, slots, 700),
        "max_ngram": variant + 1,
        "min_ngram": 1 + variant // 4,
        "num_continuations": (1, 3, 9)[variant // 2],
        "depth": (4, 30)[variant % 2],
        "draft_tokens": torch.zeros(BATCH, nodes, dtype=torch.int32),
        "parents": torch.zeros(BATCH, nodes, dtype=torch.int32),
        "num_nodes": results[0].clone(),
        "match_len": results[1].clone(),
        "longest": results[2].clone(),
    }


# --- draft control

SETTINGS = ControlSettings(
    draft_len=3, threshold=0.5, adapt_rate=0.1, target_rejection=0.3, alpha=1.5, beta=0.7,
    bias_mean=-0.05, bias_var=0.04, noise_var=0.2, discount=0.9, gain_mean=0.4, gain_weight=1.5,
    gain_var=0.3,
)  # fmt: skip


def control_arguments(variant: int, backend: Backend) -> Arguments:
    settings = SETTINGS.tensor()
    return {
        "kind": variant,  # of six
        "settings": settings,
        "costs": torch.full((NUM_COSTS,), 0.1, dtype=torch.float64),
        "posterior": prior_beliefs(settings).repeat(BATCH, 1),
        "slots": ints(0, 1, 2),
        "limit": ints(4, 3, 2),
        "drafted": ints(1, 1, 1),
        "length": ints(1, 1, 1),
        "confidence": torch.full((BATCH, 4), 0.6),
    }


def decide_arguments(variant: int, backend: Backend) -> Arguments:
    has_head = variant % 2 == 1
    return control_arguments(variant, backend) | {
        "seed": torch.tensor([1, -2, 3]),
        "position": ints(5, 6, 7),
        "is_sampled": ints(0, 1, 1),
        "is_open": ints(1, 1, 0),
        "score": torch.tensor([-0.1, -0.5, -1.0]),
        "num_nodes": ints(2, 2, 2) if has_head else None,
        "slope": torch.tensor([1.0, 0.8]) if has_head else None,
        "evidence": torch.zeros(BATCH, 2) if has_head else None,
    }


def decide(a: Arguments) -> None:
    """After the second token; then as a round begins."""
    ops.draft_control(step=2, **a)
    ops.draft_control(step=0, **a | {"score": None, "evidence": None})


def learn_arguments(variant: int, backend: Backend) -> Arguments:
    return control_arguments(variant, backend) | {"accept_length": ints(1, 0, -1)}


# --- features


def tail_arguments(variant: int, backend: Backend) -> Arguments:
    g = generator(variant)
    return {
        "history": torch.randint(0, VOCAB, (BATCH, 9), generator=g, dtype=torch.int32),
        "history_len": ints(9, 3, 1),
        "tokens": torch.zeros(BATCH, 2 + variant, dtype=torch.int32),
        "start": ints(0, 0, 0),
    }


def pairs_arguments(variant: int, backend: Backend) -> Arguments:
    """Of each type, in rows of 16-byte pieces or not; kept or not."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[variant % 3]
    width, pairs = (16, 11)[variant // 3], 4
    counts, g = ("source", "kv_len", "kv_len_after", "num_earlier"), generator(variant)
    return {
        "taps": torch.randn(BATCH, 5, width, generator=g).to(dtype),
        "path": torch.tensor([[0, 1, 4], [0, 2, 3], [0, 1, 2]], dtype=torch.int32),
        "num_path": ints(3, 1, 2),
        "history": torch.randint(0, VOCAB, (BATCH, 9), generator=g, dtype=torch.int32),
        "history_len": ints(9, 3, 4),
        "features": torch.zeros(BATCH, pairs, width, dtype=dtype),
        "tokens": torch.zeros(pairs, BATCH, dtype=torch.int32),
        **{name: ints(0, 0, 0) for name in counts},
        "bits": torch.zeros(BATCH, 2, dtype=torch.int64),
        "are_kept": variant % 2 == 1,
    }


def embed_arguments(variant: int, backend: Backend) -> Arguments:
    """Of one type or of two, in rows of 16-byte pieces or not."""
    dtypes = torch.float32, torch.bfloat16, torch.float16
    width = (16, 11)[variant // 3]
    table = torch.randn(VOCAB, width, generator=generator(variant))
    return {
        "tokens": ints(4, 0, 69),
        "table": table.to(dtypes[variant % 3]),
        "out": torch.zeros(BATCH, width, dtype=dtypes[variant // 2]),
        "ids": ints(0, 0, 0),
        "is_open": ints(0, 1, 0),
    }


def positions_arguments(variant: int, backend: Backend) -> Arguments:
    """A row a sequence, and fewer positions than some of them stand at."""
    given = embed_arguments(variant, backend)
    table = torch.randn(40, given["table"].shape[1], generator=generator(variant))
    dtypes = torch.float32, torch.bfloat16, torch.float16
    places = {"positions": table.to(dtypes[variant // 2]), "kv_len": ints(7, 0, 39)}
    return given | places | {"depth": ints(0, 2, 5)[:, None], "scale": 0.5, "offset": 2}


def embed_at_positions(a: Arguments) -> None:
    given = {**a}
    places = [given.pop(name) for name in ("positions", "depth", "kv_len", "offset")]
    ops.embed(**given, positions=ops.EmbedPositions(*places))


# --- recycled trees


def recycle_propose_arguments(variant: int, backend: Backend) -> Arguments:
    """Each sequence has the slot of its number, and one is nobody's."""
    g = generator(variant)
    return {
        "tables": torch.randint(0, VOCAB, (BATCH + 1, VOCAB, 8), generator=g, dtype=torch.int32),
        "slots": ints(0, 1, 2),
        "roots": ints(4, 0, 69),
        "parents": torch.tensor(random_parents(NODES, g), dtype=torch.int32),
        "ranks": torch.randint(0, 8, (NODES,), generator=g, dtype=torch.int32),
        "draft_tokens": torch.zeros(BATCH, NODES, dtype=torch.int32),
    }


def recycle_learn_arguments(variant: int, backend: Backend) -> Arguments:
    g, shape = generator(variant), (BATCH, NODES)
    workspace = torch.zeros(ops.recycle_learn_workspace(BATCH * NODES, VOCAB, 8))
    return {
        "logits": torch.randn(*shape, VOCAB, generator=g),
        "draft_tokens": torch.randint(0, VOCAB, shape, generator=g, dtype=torch.int32),
        "num_nodes": ints(6, 4, 1),
        "path": torch.tensor([[0, 2, 5], [0, 3, -1], [0, -1, -1]], dtype=torch.int32),
        "accept_length": ints(2, 1, 0),
        "slots": ints(0, 1, 2),
        "tables": torch.zeros(BATCH + 1, VOCAB, 8, dtype=torch.int32),
        "is_own": torch.zeros(BATCH + 1, VOCAB, dtype=torch.int32),
        "workspace": workspace if backend.runs_cuda_source else None,
    }


def feature_arguments(variant: int, backend: Backend) -> Arguments:
    g, size = generator(variant), 16

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    return {
        "tokens": ints(4, 0, 69),
        "source": ints(1, 4, 0),
        "features": matrix(5, size),
        "embed": matrix(VOCAB, size),
        "fc": matrix(size, 2 * size),
        "norm": matrix(size),
        "gate": matrix(size, size),
        "up": matrix(size, size),
        "down": matrix(size, size),
        "eps": 1e-5,
        "workspace": torch.zeros(BATCH, ops.feature_sample_workspace(size, size)),
        "out": torch.zeros(BATCH, size),
    }


COUNTS = ("block_table", "kv_len", "first_node", "num_nodes")
CACHES = {"k_cache": 0, "v_cache": 0}
KERNELS = {
    "kv_commit": Kernel(
        commit_arguments,
        lambda a: ops.kv_commit(**a),
        own=("block_table", "kv_len", "path", "num_path", "tickets"),
        results=("kv_len",),
        pages={"kv": 2},
        has_cuda_source=True,
    ),
    "rope_append": Kernel(
        rope_arguments,
        lambda a: ops.rope_append(**a),
        own=(*COUNTS, "depth"),
        results=("q",),
        pages=CACHES,
        has_cuda_source=True,
    ),
    "tree_attention": Kernel(
        attention_arguments,
        lambda a: ops.tree_attention(**a),
        own=(*COUNTS, "ancestors"),
        shared=("workspace",),
        results=("out",),
        has_cuda_source=True,
    ),
    "tree_attention_append": Kernel(
        attention_append_arguments,
        attend_appending,
        own=(*COUNTS, "ancestors", "depth"),
        shared=("workspace",),
        results=("out",),
        pages=CACHES,
        has_cuda_source=True,
    ),
    "tree_accept": Kernel(
        accept_arguments,
        lambda a: ops.tree_accept(**a),
        own=(
            "draft_tokens", "parents", "num_nodes", "history", "history_len", "sampling",
            "logit_rows",
        ),
        shared=("bias_ids", "bias_values", "maxima"),
        results=("path", "accept_length", "tokens", "logprobs", "next_node"),
        has_cuda_source=True,
    ),
    "linear_maxima": Kernel(
        maxima_arguments,
        linear_with_maxima,
        own=("sampling", "history_len", "depth"),
        results=("keys",),
        has_cuda_source=True,
    ),
    "linear_operands": Kernel(
        operands_arguments,
        linear_with_operands,
        own=("x_rows", "second_rows", "gate_rows", "residual_rows"),
        results=("out",),
        has_cuda_source=True,
    ),
    "tree_expand": Kernel(
        expand_arguments,
        grow_level,
        own=("sampling", "position", "scores", "candidates", "ancestors", "is_open"),
        shared=("token_map", "workspace", "keys", "masses"),
        results=(
            "pool_tokens", "pool_parents", "pool_scores", "frontier_tokens", "frontier_scores",
            "frontier_candidates", "frontier_source", "frontier_ancestors", "level_score",
        ),
        has_cuda_source=True,
    ),
    "tree_rerank": Kernel(
        rerank_arguments,
        lambda a: ops.tree_rerank(**a),
        own=("pool_tokens", "pool_parents", "pool_scores", "roots"),
        results=("draft_tokens", "parents", "num_nodes", "node_scores"),
        has_cuda_source=True,
    ),
    "tree_settle": Kernel(
        settle_arguments,
        lambda a: ops.tree_settle(**a),
        own=("draft_tokens", "parents", "num_nodes", "roots", "max_nodes"),
        results=("settled_tokens", "settled_parents", "depth", "ancestors", "num_settled"),
        has_cuda_source=True,
    ),
    "recycle_propose": Kernel(
        recycle_propose_arguments,
        lambda a: ops.recycle_propose(**a),
        own=("tables", "slots", "roots"),
        shared=("parents", "ranks"),
        results=("draft_tokens",),
        has_cuda_source=True,
    ),
    "recycle_learn": Kernel(
        recycle_learn_arguments,
        lambda a: ops.recycle_learn(**a),
        own=("draft_tokens", "num_nodes", "path", "accept_length", "slots"),
        results=("tables", "is_own"),
        has_cuda_source=True,
    ),
    "history_append": Kernel(
        append_arguments,
        lambda a: ops.history_append(**a),
        own=(
            "num_nodes", "depth", "path", "accept_length", "tokens", "logprobs", "stop_ids",
            "max_len", "history", "history_len", "roots",
        ),
        results=("max_len", "history", "history_len", "roots", "num_path", "report"),
        has_cuda_source=True,
    ),
    "history_tail": Kernel(
        tail_arguments,
        lambda a: ops.history_tail(**a),
        own=("history", "history_len"),
        results=("tokens", "start"),
        has_cuda_source=True,
    ),
    "draft_pairs": Kernel(
        pairs_arguments,
        lambda a: ops.draft_pairs(**a),
        own=("path", "num_path", "history", "history_len", "kv_len"),
        # And tokens, whose columns are the sequences'.
        results=("features", "source", "kv_len", "kv_len_after", "num_earlier", "bits"),
        has_cuda_source=True,
    ),
    "prompt_lookup": Kernel(
        lookup_arguments,
        lambda a: ops.prompt_lookup(**a),
        own=("history", "history_len", "max_len"),
        results=("draft_tokens", "parents", "num_nodes", "match_len", "longest"),
        has_cuda_source=True,
    ),
    "draft_control": Kernel(
        decide_arguments,
        decide,
        own=(
            "posterior", "slots", "seed", "position", "limit", "is_sampled", "score", "evidence",
            "is_open", "drafted", "length", "confidence",
        ),
        shared=("settings", "costs", "slope"),
        results=("is_open", "drafted", "length", "confidence", "num_nodes"),
        has_cuda_source=True,
    ),
    "draft_control_update": Kernel(
        learn_arguments,
        lambda a: ops.draft_control_update(**a),
        own=("posterior", "slots", "limit", "drafted", "length", "confidence", "accept_length"),
        shared=("settings", "costs"),
        results=("posterior",),
        has_cuda_source=True,
    ),
    "embed": Kernel(
        embed_arguments,
        lambda a: ops.embed(**a),
        own=("tokens",),
        shared=("is_open",),
        results=("out", "ids"),
        has_cuda_source=True,
    ),
    "embed_positions": Kernel(
        positions_arguments,
        embed_at_positions,
        own=("tokens", "depth", "kv_len"),
        shared=("is_open",),
        results=("out", "ids"),
        has_cuda_source=True,
    ),
    "feature_sample": Kernel(
        feature_arguments,
        lambda a: ops.feature_sample(**a),
        own=("tokens", "source"),
        results=("out",),
    ),
}  # fmt: skip


def read_where_told(a: Arguments) -> None:
    ctypes.string_at(a["index"].data_ptr() + 4 * int(a["index"][0]), 1)


PLANTED = Kernel(lambda variant, backend: {"index": ints(0)}, read_where_told, own=("index",))
"""One that trusts what it reads."""
