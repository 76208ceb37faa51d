"""The draft model of FSPAD, EAGLE-2 and the two between them, as a torch module to train.

One decoder layer over pairs (f_t, e_{t+1}): the target's feature at position t and the embedding of
the token that was chosen there (arXiv 2408.15562, section 3). Parameters carry the official names,
so a state dict is a checkpoint. What serves is :mod:`specrt.draft.fspad.drafter`.
"""

from __future__ import annotations

import torch
from torch import nn

from specrt.config import ModelConfig
from specrt.draft.fspad.checkpoint import DraftConfig
from specrt.train.layers import Attention, GatedMlp, Norm, Rope, product_flop


class _FeatureSampling(nn.Module):
    """Lets the embedding choose, in the wide space, what of the feature belongs to its token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.fc = nn.Linear(2 * hidden_size, hidden_size)
        self.mlp = GatedMlp(hidden_size, config.intermediate_size, hidden_size)
        self.post_attention_layernorm = Norm(hidden_size, config.rms_norm_eps)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.fc(pairs)
        embeddings = pairs[..., : hidden.shape[-1]]
        sampled: torch.Tensor = self.mlp(embeddings, self.post_attention_layernorm(hidden))
        return hidden + sampled


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, out_size: int) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(hidden_size, config.intermediate_size, out_size)

    def forward(
        self, hidden: torch.Tensor, rope: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """p and r of whole sequences; the attention has no norm before it."""
        return self.output(hidden + self.self_attn(hidden, rope))

    def output(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What comes after attention: ``[..., H]`` to p and r, the same tensor without a split."""
        normed = self.post_attention_layernorm(hidden)
        change: torch.Tensor = self.mlp(normed, normed)
        if change.shape[-1] == hidden.shape[-1]:
            return hidden + change, hidden + change
        for_head, regressed = change.chunk(2, dim=-1)
        return hidden + for_head, hidden + regressed


class DraftModel(nn.Module):
    """A drafter in training; embedding and LM head are the target's and not part of it.

    Shapes: B sequences, m pairs each, H hidden size, V vocabulary, d head size.
    """

    def __init__(self, config: DraftConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        hidden_size = config.layer.hidden_size
        if config.has_feature_sampling:
            self.fc: nn.Module = _FeatureSampling(config.layer)
        else:
            self.fc = nn.Linear(2 * hidden_size, hidden_size)
        num_halves = 2 if config.has_split_output else 1
        self.layers = nn.ModuleList([_Layer(config.layer, num_halves * hidden_size)])
        self.rope = Rope(config.layer)
        self._initialise(seed)

    @property
    def layer(self) -> _Layer:
        """The one decoder layer."""
        (layer,) = self.layers
        assert isinstance(layer, _Layer)
        return layer

    def flop(self) -> int:
        """Of a pair's matrix products, forward and back; attention's left out."""
        inputs_alone = [self.fc]
        if isinstance(self.fc, _FeatureSampling):
            inputs_alone = [self.fc.fc, self.fc.mlp.gate_proj]
        return product_flop(self, inputs_alone)

    def pair(self, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The layer's input x ``[..., H]`` for pairs of embeddings and features ``[..., H]``."""
        out: torch.Tensor = self.fc(torch.cat([embeddings, features], dim=-1))
        return out

    def rope_rows(self, num_positions: int) -> torch.Tensor:
        """``[num_positions, d]``: cosines, then sines, of positions 0 on."""
        return self.rope.rows(num_positions)

    def forward(
        self, features: torch.Tensor, embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run whole sequences; the pair in column t has rotary position t.

        Padding belongs at the end, where no other pair attends to it.

        Args:
            features: ``[B, m, H]``: f_0 … f_{m-1}.
            embeddings: ``[B, m, H]``: e_1 … e_m.

        Returns:
            p and r, ``[B, m, H]`` each: LMhead(p_t) are the logits of token t + 2, r_t is the guess
            at f_{t+1}. Without a split they are the same.
        """
        hidden = self.pair(embeddings, features)
        # Called as a module, so that FSDP can wrap it.
        out: tuple[torch.Tensor, torch.Tensor]
        out = self.layers[0](hidden, self.rope_rows(hidden.shape[1]))
        return out

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Norms 1, biases 0, matrices normal with variance 1 / fan-in: a function of ``seed``.

        What the feature adds, and what attention and MLPs do, starts at nothing. The first output
        is then a projection of the embedding: a better start than noise as large as the features.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                parameter.zero_()
            elif parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0)
        pairing = self.fc.fc if isinstance(self.fc, _FeatureSampling) else self.fc
        assert isinstance(pairing, nn.Linear)
        pairing.weight[:, self.config.layer.hidden_size :].zero_()
