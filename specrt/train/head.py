"""What a drafter in training uses of its target: embedding, LM head, and what becomes of logits.

V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from specrt.device import Device


@dataclass(frozen=True)
class TargetHead:
    """The target's LM head, frozen; with :class:`specrt.config.Form`'s change of its product, which
    the target's logits and a drafter's get alike."""

    weight: torch.Tensor
    """``[V, H]``; its dtype is that of the product."""
    bias: torch.Tensor | None = None
    """``[V]`` of the weight's dtype."""
    scale: float = 1.0
    cap: float | None = None

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, V]`` of ``rows [n, H]``, bias included, neither scaled nor capped."""
        return functional.linear(rows.to(self.weight.dtype), self.weight, self.bias)

    def changed(self, product: torch.Tensor) -> torch.Tensor:
        """Logits of what :meth:`product` gives: that itself, or float32."""
        if self.scale == 1.0 and self.cap is None:
            return product
        logits = product.float() * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def by_product(self, logits: torch.Tensor) -> torch.Tensor | float:
        """The derivative of :meth:`changed`, element by element, where it gives ``logits``."""
        if self.cap is None:
            return self.scale
        return self.scale * (1.0 - (logits / self.cap).square())

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, V]`` of ``rows [n, H]``."""
        return self.changed(self.product(rows))

    def only(self, token_ids: torch.Tensor) -> TargetHead:
        """The head of these tokens ``[R]`` alone, in their order."""
        bias = None if self.bias is None else self.bias[token_ids]
        return replace(self, weight=self.weight[token_ids], bias=bias)

    def to(self, device: Device, dtype: torch.dtype) -> TargetHead:
        """The same, which is the host's, in another place and dtype."""
        bias = None if self.bias is None else device.moved(self.bias.to(dtype))
        return replace(self, weight=device.moved(self.weight.to(dtype)), bias=bias)


@dataclass(frozen=True)
class TargetTables:
    """What a drafter uses of its target."""

    embed: torch.Tensor
    """``[V, H]``: rows as they are, whatever the target multiplies them by or adds to them."""
    head: TargetHead
    """Its weight may be ``embed`` itself."""
    token_ids: torch.Tensor | None = None
    """``[R]`` int64, increasing: the only tokens the drafter proposes."""

    @property
    def draft_head(self) -> TargetHead:
        """By which the drafter proposes."""
        return self.head if self.token_ids is None else self.head.only(self.token_ids)

    def to(self, device: Device, dtype: torch.dtype) -> TargetTables:
        """The same, which are the host's, in another place and dtype."""
        head = self.head.to(device, dtype)
        is_tied = self.head.weight is self.embed
        embed = head.weight if is_tied else device.moved(self.embed.to(dtype))
        ids = self.token_ids
        return TargetTables(embed, head, None if ids is None else device.moved(ids))
