"""The target as training sees it: frozen, its features for whole sequences at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional

from specrt.config import ModelConfig, checkpoint_path, gguf_path
from specrt.device import Device
from specrt.models.dense import dense
from specrt.models.loader import LayerWeights, load_weights
from specrt.models.packing import Packing
from specrt.models.rope import RotaryTable
from specrt.ops import Matrix

_BLOCKS = Packing(keeps_blocks=True)


class FrozenTarget(Protocol):
    """Gives the hidden states after the final norm, what the LM head multiplies, and taps."""

    config: ModelConfig

    def features(self, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Features on the target's device of each sequence, ``[n]`` token ids.

        Returns:
            ``[n, (T + 1) * H]`` each: the outputs of the T tapped layers in their order, then the
            hidden state after the final norm.
        """
        ...


def load_frozen_target(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    taps: tuple[int, ...] = (),
) -> FrozenTarget:
    """Load a target for training: by ``transformers`` on a GPU, by specrt's own loader elsewhere.

    specrt's float8 storage is unknown to ``transformers``, and a GGUF file's blocks have more
    exact values here: specrt reads both on any device.

    Args:
        path: a local Hugging Face directory or GGUF file.
        dtype: of its weights; the checkpoint's by default.
        device: where it shall be.
        taps: increasing numbers N of layers: also give the hidden state after the first N, which
            ``transformers`` calls ``hidden_states[N]`` and the engine ``layer_tap(N - 1)``.

    Raises:
        CheckpointError: the checkpoint is missing, broken or of an unsupported family.
        ValueError: ``taps`` are not increasing numbers of 1..L-1.
    """
    directory = checkpoint_path(path)
    config = ModelConfig.from_directory(directory)
    chosen = dtype or config.dtype
    place = torch.device(device)
    is_ours = config.float8_scale_suffix is not None or gguf_path(directory) is not None
    if place.type == "cpu" or is_ours:
        return PackedTarget(directory, config, chosen, place, taps)
    return TransformersTarget(directory, config, chosen, place, taps)


class PackedTarget:
    """The Llama family in plain torch; sequences lie behind one another, so nothing is padding.

    Linear layers see all rows at once, attention one sequence at a time, on a GPU all of a pass,
    padded. On a CPU it computes in
    float32 on weights of ``dtype`` and rounds keys and values to it, as the engine does: features
    then agree with the engine's taps.

    Args:
        path: a local Hugging Face directory or GGUF file, whose blocks stand for their values.
        config: its configuration.
        dtype: of the weights that are not in blocks.
        device: where to compute.
        taps: as for :func:`load_frozen_target`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        taps: tuple[int, ...] = (),
    ) -> None:
        self.config = config
        self._taps = _checked_taps(config, taps)
        self._dtype = dtype
        self._device = Device(device)
        compute = torch.float32 if device.type == "cpu" else dtype
        weights = load_weights(path, config, dtype, packing=_BLOCKS)

        def placed(tensor: Matrix | None) -> torch.Tensor | None:
            return None if tensor is None else dense(tensor).to(device, compute)

        self._layers = [_Layer(layer, placed) for layer in weights.layers]
        self._embed = dense(weights.embed).to(device, compute)
        self._final_norm = weights.final_norm.to(device)
        self._rope = RotaryTable(config, config.head_dim, self._device)

    @torch.no_grad()  # inference tensors could not be saved for a backward pass
    def features(self, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As :class:`FrozenTarget` says.

        Raises:
            ValueError: a token is outside the vocabulary, or a sequence longer than the context.
        """
        _check(self.config, sequences)
        lengths = [len(sequence) for sequence in sequences]
        there = self._device.there
        positions = there(torch.cat([torch.arange(length) for length in lengths]))
        angles = self._rope.reaching(max(lengths))[positions][:, None]
        hidden = self._embed[there(torch.cat(list(sequences)))]
        parts = []
        for number, layer in enumerate(self._layers, start=1):
            normed = self._norm(hidden, layer.input_norm)
            attended = self._attention(layer, normed, angles, lengths)
            hidden = hidden + functional.linear(attended, layer.o, layer.o_bias)
            normed = self._norm(hidden, layer.post_norm)
            gate, up = functional.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            mlp = functional.linear(functional.silu(gate) * up, layer.down, layer.down_bias)
            hidden = hidden + mlp
            if number in self._taps:
                parts.append(hidden)
        parts.append(self._norm(hidden, self._final_norm))
        return list(torch.cat(parts, -1).split(lengths))

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        eps = self.config.rms_norm_eps
        normed = functional.rms_norm(hidden.float(), weight.shape, weight.float(), eps)
        return normed.to(hidden.dtype)

    def _attention(
        self, layer: _Layer, normed: torch.Tensor, angles: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """``[T, Q * d]`` of ``normed`` ``[T, H]``."""
        config = self.config
        heads = functional.linear(normed, layer.qkv, layer.qkv_bias)
        heads = heads.view(len(normed), -1, config.head_dim)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        q, k = _rotated(q, angles), _rotated(k, angles)
        k, v = k.to(self._dtype).to(q.dtype), v.to(self._dtype).to(q.dtype)  # as the engine's cache
        if self._device.is_gpu:
            return self._attended_together(q, k, v, lengths)
        parts = []
        for q_part, k_part, v_part in zip(
            q.split(lengths), k.split(lengths), v.split(lengths), strict=True
        ):
            attended = _attended(q_part[None], k_part[None], v_part[None])
            parts.append(attended[0])
        return torch.cat(parts).flatten(1)

    def _attended_together(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """All sequences in one launch, padded at the end, where nobody attends to it."""
        longest = max(lengths)
        places = torch.cat([torch.arange(n) + row * longest for row, n in enumerate(lengths)])
        places = self._device.there(places)

        def padded(heads: torch.Tensor) -> torch.Tensor:
            rows = heads.new_zeros(len(lengths) * longest, *heads.shape[1:])
            rows.index_copy_(0, places, heads)
            return rows.view(len(lengths), longest, *heads.shape[1:])

        attended = _attended(padded(q), padded(k), padded(v)).flatten(0, 1)
        return attended.index_select(0, places).flatten(1)


class TransformersTarget:
    """Any supported target through ``transformers``, in padded batches.

    Args:
        path: a local Hugging Face directory.
        config: its configuration.
        dtype: of weights and activations.
        device: where to put it.
        taps: as for :func:`load_frozen_target`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        taps: tuple[int, ...] = (),
    ) -> None:
        from transformers import AutoModel  # slow to import, and not needed on a CPU

        self.config = config
        self._taps = _checked_taps(config, taps)
        self._device = device
        # The model without its head: its last hidden state is the one after the final norm.
        model = AutoModel.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        self._model: Any = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()  # inference tensors could not be saved for a backward pass
    def features(self, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As :class:`FrozenTarget` says.

        Raises:
            ValueError: a token is outside the vocabulary, or a sequence longer than the context.
        """
        _check(self.config, sequences)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        output = self._model(
            input_ids=padded.to(self._device),
            attention_mask=mask.long().to(self._device),
            use_cache=False,
            output_hidden_states=bool(self._taps),
        )
        tapped = [output.hidden_states[number] for number in self._taps]
        hidden = torch.cat([*tapped, output.last_hidden_state], -1)
        return [row[:length] for row, length in zip(hidden, lengths.tolist(), strict=True)]


def passes(lengths: Sequence[int], num_tokens: int) -> Iterator[slice]:
    """Neighbours that go through a target together.

    Args:
        lengths: of the sequences.
        num_tokens: that a pass has at most, but for one that a single sequence fills.
    """
    start, count = 0, 0
    for end, length in enumerate(lengths):
        if count and count + length > num_tokens:
            yield slice(start, end)
            start, count = end, 0
        count += length
    yield slice(start, len(lengths))


class _Layer:
    """One layer's weights where and as they are computed with."""

    def __init__(self, layer: LayerWeights, placed: Any) -> None:
        self.input_norm: torch.Tensor = placed(layer.input_norm)
        self.qkv: torch.Tensor = placed(layer.qkv)
        self.qkv_bias: torch.Tensor | None = placed(layer.qkv_bias)
        self.q_norm: torch.Tensor | None = placed(layer.q_norm)
        self.k_norm: torch.Tensor | None = placed(layer.k_norm)
        self.o: torch.Tensor = placed(layer.o)
        self.o_bias: torch.Tensor | None = placed(layer.o_bias)
        self.post_norm: torch.Tensor = placed(layer.post_norm)
        self.gate_up: torch.Tensor = placed(layer.gate_up)
        self.gate_up_bias: torch.Tensor | None = placed(layer.gate_up_bias)
        self.down: torch.Tensor = placed(layer.down)
        self.down_bias: torch.Tensor | None = placed(layer.down_bias)


def _checked_taps(config: ModelConfig, taps: tuple[int, ...]) -> tuple[int, ...]:
    """The last layer's output cannot be tapped: ``transformers`` gives it behind the norm only."""
    last = config.num_layers - 1
    if list(taps) != sorted(set(taps)) or any(not 1 <= number <= last for number in taps):
        raise ValueError(f"taps: expected increasing numbers of 1..{last}, got {list(taps)}")
    return taps


def _check(config: ModelConfig, sequences: Sequence[torch.Tensor]) -> None:
    limit, vocab = config.max_positions, config.vocab_size
    for sequence in sequences:
        if len(sequence) > limit:
            raise ValueError(
                f"token_ids: {len(sequence)} tokens are more than the target's context of {limit}"
            )
        largest = int(sequence.max())
        if largest >= vocab:
            raise ValueError(
                f"token_ids: token id {largest} is outside the vocabulary 0..{vocab - 1}"
            )


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of ``[B, n, heads, d]`` each; ``[B, n, Q, d]``."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    attended: torch.Tensor = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    return attended.transpose(1, 2)


def _rotated(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``heads`` ``[T, h, d]`` by ``angles`` ``[T, 1, d]``: cosines, sines."""
    cos, sin = angles.chunk(2, dim=-1)
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(heads.dtype)
