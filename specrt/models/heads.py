"""Where the elements of a head lie when kernels run it.

Kernels pair element i of a head with i + P / 2 and turn all pairs. Checkpoints may pair neighbours
or turn a part of a head alone, and heads may be of a size that no kernel takes. So rows of q and k
are put into another order as they are loaded: turned pairs first in each half, in their order,
then what is not turned (whose angles are 0, :mod:`specrt.models.rope`), then zeros. The order is
one for q and k, so their products stay what they are; v and o are padded alone. Zeros are rows of
q, k and v and columns of o: dot products, sums over values and outputs stay what they are, and
softmax is scaled by the true size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specrt.config import ModelConfig

_TURNED = tuple(f"self_attn.{name}_proj.{part}" for name in "qk" for part in ("weight", "bias"))
_ROWS = (*_TURNED, "self_attn.v_proj.weight", "self_attn.v_proj.bias")
_COLUMNS = ("self_attn.o_proj.weight",)
_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


@dataclass(frozen=True)
class HeadLayout:
    """The order of a head's elements: stored, and as run."""

    head_dim: int
    """d, even"""
    padded: int
    """P, even, at least d"""
    rotary_dim: int | None = None
    """Elements that are turned, the first ones stored; None: all."""
    is_interleaved: bool = False
    """Whether stored neighbours make a pair."""

    @classmethod
    def of(cls, config: ModelConfig, padded: int) -> HeadLayout:
        """That of a model whose kernels run heads of ``padded``."""
        form = config.form
        return cls(config.head_dim, padded, form.rotary_dim, form.is_rotary_interleaved)

    def order(self, *, is_turned: bool = True) -> torch.Tensor:
        """``[P]`` int64: the stored element that each one is; -1: a zero.

        Args:
            is_turned: of q and k; False: of v and o, which are padded alone.
        """
        turned = self.rotary_dim if is_turned and self.rotary_dim is not None else self.head_dim
        rotary = torch.arange(turned)
        is_paired = is_turned and self.is_interleaved
        pairs = rotary.view(-1, 2).t() if is_paired else rotary.view(2, -1)
        rest = torch.arange(turned, self.head_dim).view(2, -1)
        zeros = torch.full((2, (self.padded - self.head_dim) // 2), -1)
        return torch.cat([pairs, rest, zeros], dim=1).flatten()

    def axis(self, key: str) -> int | None:
        """The dimension along which a tensor's heads change; None: it stays as it is.

        Args:
            key: Hugging Face's name.
        """
        is_padded = self.padded != self.head_dim
        if key.endswith(_COLUMNS):
            return 1 if is_padded else None
        if not key.endswith((*_ROWS, *_NORMS)):
            return None
        is_turned = key.endswith((*_TURNED, *_NORMS))
        same = torch.arange(self.head_dim)
        return 0 if is_padded or not torch.equal(self.order(is_turned=is_turned), same) else None

    def arranged(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of an attention layer as kernels run it; any other as it is.

        A norm of q or k, of each head or of all together, takes its mean over P elements a head
        then: its weight makes up for it, and its epsilon must be :func:`norm_eps`.

        Args:
            key: Hugging Face's name.
            tensor: as stored, or some of its rows: whole heads.
        """
        axis = self.axis(key)
        if axis is None:
            return tensor
        if key.endswith(_NORMS) and self.padded != self.head_dim:
            tensor = tensor.float() * (self.head_dim / self.padded) ** 0.5
        order = self.order(is_turned=key.endswith((*_TURNED, *_NORMS)))
        heads: torch.Tensor = tensor.unflatten(axis, (-1, self.head_dim))
        wide = heads.index_select(axis + 1, order.clamp(min=0))
        if self.padded != self.head_dim:
            wide.index_fill_(axis + 1, (order < 0).nonzero().flatten(), 0)
        return wide.flatten(axis, axis + 1)


def pad_heads(key: str, tensor: torch.Tensor, head_dim: int, padded: int) -> torch.Tensor:
    """A tensor of a layer whose heads keep their order, as :meth:`HeadLayout.arranged` has it."""
    return HeadLayout(head_dim, padded).arranged(key, tensor)


def norm_eps(eps: float, head_dim: int, padded: int) -> float:
    """What a norm over P elements a head adds to their mean square; d of them may differ from 0."""
    return eps * (head_dim / padded)
