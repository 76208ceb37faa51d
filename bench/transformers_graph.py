"""``transformers``' forward pass of one token over a static cache, to be replayed as a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_TOKENS_A_PASS = 8
"""Between two resets, whose small launches then hardly show."""


class TransformersStep:
    """Greedy decoding, a token a launch; all that changes lies in tensors that stay.

    Args:
        model: its model.
        prompt: token ids.
        num_tokens: that are decoded at the most.
    """

    def __init__(self, model: Any, prompt: Sequence[int], num_tokens: int) -> None:
        from transformers import StaticCache

        self._model, self._size = model, len(prompt) + num_tokens
        self._cache = StaticCache(config=model.config, max_cache_len=self._size)
        ids = torch.tensor([list(prompt)], device=model.device)
        with torch.no_grad():
            logits = model(ids, past_key_values=self._cache, logits_to_keep=1).logits
        self._first = logits[:, -1:].argmax(-1)
        self._token = self._first.clone()
        self._position = torch.tensor([[len(prompt)]], device=model.device)
        self._start = self._position.clone()
        self._places = torch.arange(self._size, device=model.device)

    def launch(self) -> None:
        """Run the last token; the next one is its best."""
        # Made here, since transformers' own way to it asks the host.
        mask = (self._places <= self._position).view(1, 1, 1, -1)
        with torch.no_grad():
            output = self._model(
                self._token,
                attention_mask=mask,
                position_ids=self._position,
                past_key_values=self._cache,
            )
        self._token.copy_(output.logits[:, -1:].argmax(-1))
        self._position.add_(1)

    def reset(self) -> None:
        """Back to the end of the prompt."""
        self._token.copy_(self._first)
        self._position.copy_(self._start)
        for layer in self._cache.layers:
            layer.cumulative_length.copy_(self._start.view(()))

    def decode(self, count: int) -> list[int]:
        """The first tokens after the prompt."""
        self.reset()
        found = [int(self._token)]
        while len(found) < count:
            self.launch()
            found.append(int(self._token))
        return found

    @property
    def launches(self) -> list[Any]:
        """Of a pass of some tokens, each after :meth:`reset`."""
        return [self.launch] * min(_TOKENS_A_PASS, self._size - int(self._start))
