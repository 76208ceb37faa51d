"""The table of rotary angles, for Hugging Face's rope types."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from specrt.config import ModelConfig
from specrt.config.form import RopeChoice
from specrt.device import Device
from specrt.reuse import power_of_two
from specrt.tree import MAX_NODES

# Positions computed at a time, always so many and from a multiple of it on: the bits of a row must
# not depend on how far a table reaches. Few enough that torch does not split them over threads.
_BLOCK = 128


@dataclass(frozen=True)
class _Turns:
    """What a table is a function of."""

    frequencies: tuple[float, ...]
    """One a pair that is turned."""
    factor: float = 1.0
    """Of their cosines and sines."""

    def fill(self, table: torch.Tensor, first: int) -> None:
        """Compute the rows ``[R, P]`` from position ``first`` on.

        Pairs beyond those that are turned have an angle of 0: what heads are padded with
        (:mod:`specrt.models.heads`), and what partial rotary embedding leaves as it is.
        """
        half, num_turned = table.shape[1] // 2, len(self.frequencies)
        frequencies = torch.zeros(half, dtype=torch.float64)
        frequencies[:num_turned] = torch.tensor(self.frequencies, dtype=torch.float64)
        last = first + len(table)
        for start in range(first - first % _BLOCK, last, _BLOCK):
            positions = torch.arange(start, start + _BLOCK, dtype=torch.float64)
            angles = positions[:, None] * frequencies
            block = torch.stack([angles.cos(), angles.sin()], dim=1)
            block[..., :num_turned] *= self.factor
            begin, end = max(start, first), min(start + _BLOCK, last)
            table[begin - first : end - first] = block.flatten(1)[begin - start : end - start]


def rope_table(
    head_dim: int,
    theta: float,
    max_positions: int,
    scaling: Mapping[str, Any] | None = None,
    *,
    padded_head_dim: int | None = None,
    rotary_dim: int | None = None,
) -> torch.Tensor:
    """Cosines, then sines, of every position's angles, computed in float64.

    Args:
        head_dim: d, even.
        theta: the base of the frequencies.
        max_positions: rows of the table.
        scaling: a :attr:`~specrt.config.ModelConfig.rope_scaling`: types default, linear, llama3,
            yarn and longrope.
        padded_head_dim: P, even, where heads are padded (:mod:`specrt.models.heads`); what is put
            in is not turned. None: d.
        rotary_dim: elements of a head that are turned, even; pairs of the others have an angle of
            0. None: d.

    Returns:
        ``[max_positions, P]`` float32; the first P / 2 columns are cosines.

    Raises:
        ValueError: the rope type is not supported, or a size is odd.
    """
    table = torch.empty(max_positions, padded_head_dim or head_dim)
    size = head_dim if rotary_dim is None else rotary_dim
    _turns(size, theta, scaling).fill(table, 0)
    return table


class RotaryTable:
    """The rotary table of a model as far as sequences have needed it.

    Several models may share one. It never writes to a tensor that it has given away: whoever needs
    more positions takes the longer one, and captured launches over the shorter one stay right while
    somebody keeps it.

    Args:
        config: the model's.
        padded_head_dim: the head size that its kernels run.
        device: where the rows lie.
        choice: for which of its layers.

    Raises:
        ValueError: the rope type is not supported, or heads are of an odd size.
    """

    def __init__(
        self,
        config: ModelConfig,
        padded_head_dim: int,
        device: Device,
        choice: RopeChoice = "main",
    ) -> None:
        self._turns = _chosen(config, choice)
        # Nodes of a tree at the context limit may lie past it; they are never accepted.
        self.limit = config.max_positions + MAX_NODES
        """Rows that are enough for any sequence."""
        self._device = device
        self._rows = device.empty(0, padded_head_dim)

    def serves(
        self,
        config: ModelConfig,
        padded_head_dim: int,
        device: Device,
        choice: RopeChoice = "main",
    ) -> bool:
        """Whether another model's table would hold the same rows at the same place."""
        is_there = self._rows.shape[1] == padded_head_dim and self._device.place == device.place
        return is_there and self._turns == _chosen(config, choice)

    def reaching(self, num_positions: int) -> torch.Tensor:
        """``[R, P]`` float32, R at least ``num_positions`` or :attr:`limit`.

        R is rounded up to a power of two, so that rows are copied about once.
        """
        have = len(self._rows)
        if min(num_positions, self.limit) > have:
            wanted = min(self.limit, max(_BLOCK, power_of_two(num_positions)))
            longer = self._device.empty(wanted, self._rows.shape[1])
            longer[:have] = self._rows
            more = torch.empty(wanted - have, self._rows.shape[1])
            self._turns.fill(more, have)
            self._device.upload(more, longer[have:])
            self._rows = longer
        return self._rows


def rotary_table(
    config: ModelConfig,
    padded_head_dim: int,
    device: Device,
    others: Collection[RotaryTable] = (),
    choice: RopeChoice = "main",
) -> RotaryTable:
    """That of ``others`` which holds a model's rows, else a table of its own."""
    for other in others:
        if other.serves(config, padded_head_dim, device, choice):
            return other
    return RotaryTable(config, padded_head_dim, device, choice)


def rotary_tables(
    config: ModelConfig, padded_head_dim: int, device: Device, others: Collection[RotaryTable] = ()
) -> dict[RopeChoice, RotaryTable]:
    """One for each choice of a model's layers; ``others`` as for :func:`rotary_table`."""
    layers = [config.form.layer(index) for index in range(config.num_layers)]
    choices = dict.fromkeys(layer.rope for layer in layers)  # in their order
    return {
        choice: rotary_table(config, padded_head_dim, device, others, choice) for choice in choices
    }


def rope_of(config: ModelConfig, choice: RopeChoice) -> tuple[int, float, Mapping[str, Any] | None]:
    """What layers of a choice are turned by: elements of a head, and :func:`rope_table`'s ``theta``
    and ``scaling``."""
    form = config.form
    if choice == "none":
        return 0, config.rope_theta, None
    size = form.rotary_dim or config.head_dim
    if choice == "main":
        return size, config.rope_theta, config.rope_scaling
    assert form.local_rope_theta is not None, "whose layers choose it"
    return size, form.local_rope_theta, None


def _chosen(config: ModelConfig, choice: RopeChoice) -> _Turns:
    return _turns(*rope_of(config, choice))


def _turns(size: int, theta: float, scaling: Mapping[str, Any] | None) -> _Turns:
    """Of a head's first ``size`` elements."""
    if size % 2:
        raise ValueError(f"head_dim: expected an even number, got {size}")
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / max(1, size)
    frequencies = 1.0 / theta**exponents
    factor, scaling = 1.0, scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        frequencies = frequencies / float(scaling["factor"])
    elif kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif kind == "yarn":
        frequencies = _yarn(frequencies, theta, scaling)
        factor = float(scaling["attention_factor"])
    elif kind == "longrope":
        frequencies = frequencies / torch.tensor(scaling["factors"], dtype=torch.float64)
        factor = float(scaling["attention_factor"])
    elif kind != "default":
        raise ValueError(
            f"scaling: rope type {kind!r} is not supported (default, linear, llama3, yarn or "
            "longrope)"
        )
    return _Turns(tuple(frequencies.tolist()), factor)


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Long waves are slowed by ``factor``, short ones kept, those between interpolated."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    turns = context * frequencies / (2 * math.pi)  # within the original context
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies


def _yarn(frequencies: torch.Tensor, theta: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Waves that turn often within the original context are kept, those that turn seldom are slowed
    by ``factor``, those between are interpolated, by their number (arXiv 2309.00071)."""
    size = 2 * len(frequencies)
    context = float(scaling["original_max_position_embeddings"])

    def number_of(turns: float) -> float:
        """Of the wave that turns so often, a fraction."""
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = number_of(float(scaling["beta_fast"])), number_of(float(scaling["beta_slow"]))
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # as transformers does, rather than divide by 0
    numbers = torch.arange(size // 2, dtype=torch.float64)
    kept = 1 - ((numbers - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / float(scaling["factor"]) + kept * frequencies
