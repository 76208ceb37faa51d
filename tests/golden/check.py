"""Our drafter on a file of reference vectors (format: tests/golden/README.md)."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from specrt.cache import CacheBatch, KVCache
from specrt.draft.base import Budget, DraftParams
from specrt.draft.fspad.checkpoint import EMBED, read_checkpoint
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.fspad.layer import DraftLayer, Rows
from specrt.draft.fspad.weights import fold, pack_weights
from specrt.draft.length.costs import RoundCost
from specrt.tree import MAX_NODES, chain_tree
from specrt.types import AcceptResult, Proposal, SequenceState

TOLERANCE = 1e-4
TokenPath = tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What came of one file."""

    arch: str
    errors: dict[str, float]
    """Largest error of each output, relative to that output's largest value."""
    trees: dict[str, tuple[bool, int]]
    """For each round: whether the trees are equal, and their nodes."""

    @property
    def is_good(self) -> bool:
        """Whether everything agrees."""
        is_near = all(error <= TOLERANCE for error in self.errors.values())
        return is_near and all(same for same, _ in self.trees.values())


def check(path: str | Path, *, is_folded: bool = False) -> Report:
    """Run a file's forward pass and both its rounds.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    if missing := {"config", "tree"} - metadata.keys():
        raise ValueError(f"no {' and '.join(sorted(missing))} in the metadata")
    layer = _layer(tensors, metadata["config"], is_folded)
    return Report(
        layer.config.arch, _forward_errors(layer, tensors), _rounds(layer, tensors, metadata)
    )


def _layer(tensors: dict[str, torch.Tensor], config: str, is_folded: bool) -> DraftLayer:
    """Through a checkpoint in the official layout, as a user's would come."""
    prefix = "weights."
    weights = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    with tempfile.TemporaryDirectory() as directory:
        save_file(weights, Path(directory) / "model.safetensors")
        (Path(directory) / "config.json").write_text(config)
        found, read = read_checkpoint(directory)
        packed = pack_weights(found, read, read[EMBED], tensors["head.weight"], torch.float32)
    return DraftLayer(found, fold(packed) if is_folded else packed)


def _forward_errors(layer: DraftLayer, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    features, tokens = tensors["in.features"][0], tensors["in.token_ids"][0, 1:].int()
    predicted, regressed = forward(layer, tokens, features)
    errors = {"predict": _relative(predicted, tensors["out.predict"][0])}
    if "out.regress" in tensors:
        errors["regress"] = _relative(regressed, tensors["out.regress"][0])
    return errors


def forward(
    layer: DraftLayer, tokens: torch.Tensor, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """p and r of every pair, each ``[S, H]``."""
    cache = KVCache(layer.padded, torch.float32)
    layer.reserve(len(tokens) + MAX_NODES)
    sequence = cache.open(len(tokens))
    predicted, regressed = [], []
    for start in range(0, len(tokens), MAX_NODES):
        piece = slice(start, start + MAX_NODES)
        tree = chain_tree(tokens[None, piece].contiguous())
        count = tree.draft_tokens.shape[1]
        work = layer.activations(count, count)
        batch = CacheBatch(cache, [sequence])
        first = torch.zeros(1, dtype=torch.int32)
        rows = Rows(tree.depth, batch.kv_len, first, tree.num_nodes, batch.block_table)
        layer.sample_features(tokens[piece], None, features[piece], work)
        q = layer.append(0, rows, cache, work)
        out = torch.empty(count, features.shape[1])
        layer.finish(q, tree.ancestors, rows, cache, work, out)
        is_split = layer.weights.down_regress is not None
        predicted.append(work.predicted[:count].clone() if is_split else out)
        regressed.append(out)
        batch.commit(tree.depth, tree.num_nodes)
    return torch.cat(predicted), torch.cat(regressed)


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _rounds(
    layer: DraftLayer, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> dict[str, tuple[bool, int]]:
    drafter = FspadDrafter(layer)
    tokens = tensors["in.token_ids"][0].tolist()
    accepted = tensors["in.accepted_tokens"][0].tolist()
    room = len(tokens) + len(accepted) + MAX_NODES
    state = SequenceState(tokens, len(tokens), room, seed=0, temperature=0.0)
    shape = json.loads(metadata["tree"])
    shape["depth"] += 1  # EAGLE counts levels below the root's children
    budget = Budget(MAX_NODES, RoundCost(), DraftParams(**shape))
    drafter.start(state)
    drafter.prefill(state, 0, {"final": tensors["in.features"]})
    first = drafter.propose([state], budget)
    rounds = {"round1": _compare(first, tensors, "round1")}
    count = len(accepted)
    path = torch.arange(count, dtype=torch.int32)[None]
    length = torch.tensor([count - 1], dtype=torch.int32)
    result = AcceptResult(path, length, tensors["in.accepted_tokens"].int())
    drafter.observe([state], first, result, {"final": tensors["in.accepted_features"]})
    state.token_ids += accepted
    rounds["round2"] = _compare(drafter.propose([state], budget), tensors, "round2")
    drafter.finish(state)
    return rounds


def _compare(tree: Proposal, tensors: dict[str, torch.Tensor], name: str) -> tuple[bool, int]:
    """Whether the sets of root-to-node token paths are equal, and the size of the reference's."""
    theirs = tensors[f"{name}.draft_tokens"][0].tolist()
    paths = set()
    for leaf in tensors[f"{name}.retrieve_indices"].tolist():
        walk = tuple(theirs[node] for node in leaf if node >= 0)
        paths |= {walk[:end] for end in range(1, len(walk) + 1)}
    return token_paths(tree) == paths, len(paths)


def token_paths(tree: Proposal, row: int = 0) -> set[TokenPath]:
    """Root-to-node token paths of one sequence's tree."""
    tokens, parents = tree.draft_tokens[row].tolist(), tree.parents[row].tolist()
    paths: list[TokenPath] = []
    for node in range(int(tree.num_nodes[row])):
        above = paths[parents[node]] if parents[node] >= 0 else ()
        paths.append((*above, tokens[node]))
    return set(paths)
