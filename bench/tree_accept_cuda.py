"""Acceptance on a GPU against torch, which draws for all nodes and then goes down the tree."""

from __future__ import annotations

import torch

from bench.gpu import Place
from bench.limits import Model
from specrt import _C, ops
from specrt.ops import registry
from specrt.ops.tree_accept import Purpose, gpu_workspace_size, workspace_size
from specrt.sampling import SamplingParams, SamplingTable

Tensors = tuple[torch.Tensor, ...]
FILTERED = SamplingParams(temperature=0.8, top_p=0.9, min_p=0.001, seed=1)


class TreeAccept:
    """A binary tree of ``rows`` nodes whose children hold what is likeliest; plain temperature.

    torch has the noise as a table, and no host that waits: as many steps as the tree is deep.
    """

    params = SamplingParams(temperature=0.8, seed=1)

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        there, vocab = place.device, model.vocab_size
        self._logits = 3 * torch.randn(1, rows, vocab, device=there)
        noise = torch.empty(rows.bit_length(), vocab)
        for depth, row in enumerate(noise):
            _C.gumbel_noise(self.params.seed, 1 + depth, Purpose.TARGET, row)
        self._noise = noise.to(there)
        self._temperature = torch.tensor(self.params.temperature or 1.0, device=there)
        table = SamplingTable.build([self.params], [1], vocab)
        node = torch.arange(rows, device=there)
        self._node, self._parent = node, (node - 1).div(2, rounding_mode="floor").clamp(min=-1)
        best = self._logits[0].topk(2).indices
        self._tokens = best[self._parent.clamp(min=0), (node + 1) % 2].int()
        self._depth = (node + 1).float().log2().long()
        self._read = (
            self._tokens[None],
            self._parent.int()[None],
            place.ints(rows),
            None,
            self._logits,
            table.rows.to(there),
            None,
            None,
            place.ints(0)[None],
            place.ints(1),
        )
        self._workspace = self._scratch()
        self._path = torch.full((1, rows), -77, dtype=torch.int32, device=there)
        self._written = self._path, place.ints(-77), torch.full_like(self._path, -77)

    def _scratch(self) -> torch.Tensor:
        if not registry.is_on_gpu(self._logits):
            return torch.zeros(1, workspace_size(self._logits.shape[-1]))
        return torch.zeros(gpu_workspace_size(*self._logits.shape), device=self._logits.device)

    def ours(self) -> Tensors:
        """Path, number of accepted tokens, tokens."""
        ops.tree_accept(*self._read, self._workspace, *self._written, None)
        return self._written

    def kept(self, scaled: torch.Tensor) -> torch.Tensor:
        """Of logits over temperature those that may be drawn."""
        return scaled

    def torchs(self) -> Tensors:
        scores = self.kept(self._logits[0] / self._temperature)
        drawn = (scores + self._noise[self._depth]).argmax(-1).int()
        path, tokens = (torch.full_like(self._path[0], -1) for _ in range(2))
        node, is_on = self._node[:1], torch.ones_like(self._node[:1], dtype=torch.bool)
        length = torch.full_like(self._written[1], -1)
        for step in range(len(self._noise)):
            path[step] = torch.where(is_on, node, -1)[0]
            tokens[step] = torch.where(is_on, drawn[node], -1)[0]
            length += is_on
            is_child = (self._parent == node) & (self._tokens == drawn[node])
            is_on = is_on & is_child.any()
            node = is_child.int().argmax()[None]
        return path[None], length, tokens[None]


class TreeAcceptFiltered(TreeAccept):
    """top_p and min_p besides, of every row."""

    params = FILTERED

    def kept(self, scaled: torch.Tensor) -> torch.Tensor:
        probs, order = scaled.softmax(-1).sort(-1, descending=True)
        is_out = probs.cumsum(-1) - probs >= self.params.top_p
        is_out |= probs < self.params.min_p * probs[:, :1]
        return scaled.masked_fill(is_out.scatter(1, order, is_out), float("-inf"))
