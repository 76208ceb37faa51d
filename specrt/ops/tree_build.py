"""The dynamic draft tree (EAGLE-2): children level by level, then the best of all as a tree.

Shapes: B sequences, F nodes of a frontier (1 at level 0 and in chains, else K), K = top_k, R rows
of the draft head, C >= K + depth * K * K candidates in the pool, W words of ancestor bits, N tree
nodes.
"""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.draft_control import DraftDecision
from specrt.ops.linear import DraftMaxima
from specrt.ops.registry import register

register(
    "tree_expand(Tensor logits, Tensor scores, Tensor candidates, Tensor ancestors, "
    "Tensor? token_map, Tensor? sampling, Tensor? position, float noise_scale_temperature, "
    "int level, "
    "Tensor(a!) workspace, Tensor(b!) pool_tokens, Tensor(c!) pool_parents, "
    "Tensor(d!) pool_scores, Tensor(e!) frontier_tokens, Tensor(f!) frontier_scores, "
    "Tensor(g!) frontier_candidates, Tensor(h!) frontier_source, "
    "Tensor(i!) frontier_ancestors, Tensor? is_open, Tensor(j!)? level_score, "
    "Tensor? keys, Tensor? masses, int? kind, int? step, Tensor? settings, Tensor? costs, "
    "Tensor? posterior, Tensor? slots, Tensor? seed, Tensor? control_position, Tensor? limit, "
    "Tensor? is_sampled, Tensor? slope, Tensor? score, Tensor? evidence, "
    "Tensor(k!)? still_open, Tensor(l!)? drafted, Tensor(m!)? length, Tensor(n!)? confidence, "
    "Tensor(o!)? num_nodes) -> ()",
    _C.tree_expand,
)
register(
    "tree_rerank(Tensor pool_tokens, Tensor pool_parents, Tensor pool_scores, "
    "int num_candidates, Tensor roots, Tensor(a!) draft_tokens, "
    "Tensor(b!) parents, Tensor(c!) num_nodes, Tensor(d!) node_scores) -> ()",
    _C.tree_rerank,
)


def expand_workspace_size(num_rows: int) -> int:
    """Floats of scratch that one thread of ``tree_expand`` needs for R = ``num_rows``."""
    return _C.tree_expand_workspace(num_rows)


def expand_gpu_workspace_size(batch: int, width: int, num_rows: int, top_k: int) -> int:
    """Floats of ``workspace`` that ``tree_expand`` needs on a GPU, for all threads together.

    It is zero before the first call, and its tickets are zero again after each. One made for the
    largest sizes serves all smaller ones; of two calls at the same time each has its own.

    Args:
        batch: B.
        width: F of the widest level, which is ``top_k`` but for the root's.
        num_rows: R.
        top_k: K.
    """
    return _C.tree_expand_gpu_workspace(batch, width, num_rows, top_k)


def tree_expand(
    logits: torch.Tensor,
    scores: torch.Tensor,
    candidates: torch.Tensor,
    ancestors: torch.Tensor,
    token_map: torch.Tensor | None,
    sampling: torch.Tensor | None,
    position: torch.Tensor | None,
    level: int,
    workspace: torch.Tensor,
    pool_tokens: torch.Tensor,
    pool_parents: torch.Tensor,
    pool_scores: torch.Tensor,
    frontier_tokens: torch.Tensor,
    frontier_scores: torch.Tensor,
    frontier_candidates: torch.Tensor,
    frontier_source: torch.Tensor,
    frontier_ancestors: torch.Tensor,
    *,
    noise_scale_temperature: float = 1.0,
    is_open: torch.Tensor | None = None,
    level_score: torch.Tensor | None = None,
    maxima: DraftMaxima | None = None,
    control: DraftDecision | None = None,
) -> None:
    """Give each frontier node its K best children, and pick the next frontier among them.

    A child's score is its parent's plus its log-probability. Best first; ties go to the lower row
    (among children of a node) or pool index (in the frontier). A node whose logits hold a NaN or
    +inf, or only -inf, has children of score NaN, which rank last, after -inf.

    With ``sampling``, sequences of temperature > 0 are ranked by what the target would draw if the
    draft law were its own: logits / temperature, filtered by top_k, top_p and min_p, plus the
    target's Gumbel noise. (Penalties and biases, which depend on the path, are not applied.) The
    score of a child adds the log-softmax of these over the K children. Where fewer than K tokens
    are kept, the first others fill up with score -inf. Token ids and pool indices are passed on as
    they are: none is looked up.

    Args:
        logits: ``[B, F, R]`` float32; the last dimension contiguous.
        scores: ``[B, F]`` float32, <= 0; the root's is 0.
        candidates: ``[B, F]`` int32: the nodes' pool indices, -1 for the root.
        ancestors: ``[B, F, W]`` int64 of bits over draft nodes; 0 for the root, which is none.
        token_map: ``[R]`` int32, the token of each row; None if they are the same.
        sampling: for coupled ranking: ``[B, 8]`` int64, rows as ``tree_accept`` reads them
            (``specrt.sampling.sampling_row``); or None.
        position: ``[B]`` int32, the index in the sequence of the token behind the root; None if
            ``sampling`` is.
        level: 0 for the root's children. Level ``l >= 1`` writes pool entries from
            ``K + (l - 1) * K * K`` on, one group of K a frontier node.
        workspace: ``[parts, expand_workspace_size(R)]`` float32; one part is used by one thread. On
            a GPU at least ``[expand_gpu_workspace_size(B, F, R, K)]``, of zeros when it was made.
        pool_tokens: ``[B, C]`` int32, written.
        pool_parents: ``[B, C]`` int32, written: pool indices, -1 for the root.
        pool_scores: ``[B, C]`` float32, written.
        frontier_tokens: ``[B, K]`` int32, written.
        frontier_scores: ``[B, K]`` float32, written.
        frontier_candidates: ``[B, K]`` int32, written: pool indices.
        frontier_source: ``[B, K]`` int32, written: ``b * F + f`` of the parent.
        frontier_ancestors: ``[B, K, W]`` int64, written: the parent's bits and the node's own,
            number ``level * K + j`` (left out where W words have no room for it).
        noise_scale_temperature: divides the noisy logits in the score; above 1 hedges.
        is_open: ``[B]`` int32; 0: a sequence that is closed. Its logits are not read, its nodes'
            children are the first tokens, all of score -inf, and its frontier is the first node's.
            None: all are open.
        level_score: ``[B]`` float32, written: ln of the frontier's probability given that of
            ``scores``, at most 0; -inf of a closed sequence, NaN if there was nothing to grow from
            or a score of either is NaN.
        maxima: on a GPU, what :func:`linear` left of these very logits, made with the same
            sampling, position, level and map. Of the logits few are read then; results are the
            same bits.
        control: what ``draft_control`` is told after this level, decided by the same launch: as
            if that one came next. Its ``score`` may be a result of this launch (``level_score``,
            the first column of ``frontier_scores``), and ``is_open`` be written that is read here.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or the frontier written is the
            one read; the argument is named.
    """
    op = torch.ops.specrt.tree_expand if torch.compiler.is_compiling() else _C.tree_expand
    op(
        logits,
        scores,
        candidates,
        ancestors,
        token_map,
        sampling,
        position,
        noise_scale_temperature,
        level,
        workspace,
        pool_tokens,
        pool_parents,
        pool_scores,
        frontier_tokens,
        frontier_scores,
        frontier_candidates,
        frontier_source,
        frontier_ancestors,
        is_open,
        level_score,
        *((maxima.keys, maxima.masses) if maxima else (None, None)),
        *(control or (None,) * len(DraftDecision._fields)),
    )


def tree_rerank(
    pool_tokens: torch.Tensor,
    pool_parents: torch.Tensor,
    pool_scores: torch.Tensor,
    num_candidates: int,
    roots: torch.Tensor,
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    node_scores: torch.Tensor,
) -> None:
    """Keep the N - 1 best candidates below the root; the outputs are a ``Proposal``'s fields.

    Candidates of score NaN or -inf are never taken. Nodes come best first, so parents come before
    children. Padding is zeros, with score -inf. A candidate whose parent is none of those taken
    before it, whatever ``pool_parents`` holds, is left out.

    Args:
        pool_tokens: ``[B, C]`` int32.
        pool_parents: ``[B, C]`` int32: pool indices, -1 for the root.
        pool_scores: ``[B, C]`` float32; no child above its parent.
        num_candidates: how many pool entries are valid.
        roots: ``[B]`` int32, the last committed tokens.
        draft_tokens: ``[B, N]`` int32, written; N <= 128.
        parents: ``[B, N]`` int32, written.
        num_nodes: ``[B]`` int32, written.
        node_scores: ``[B, N]`` float32, written; the root's is 0.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    op = torch.ops.specrt.tree_rerank if torch.compiler.is_compiling() else _C.tree_rerank
    op(
        pool_tokens,
        pool_parents,
        pool_scores,
        num_candidates,
        roots,
        draft_tokens,
        parents,
        num_nodes,
        node_scores,
    )
