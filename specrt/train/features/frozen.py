"""The target as training sees it: frozen, its features for whole sequences at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from specrt.config import ModelConfig, checkpoint_path, config_file, gguf_path, read_json
from specrt.config.quantization import stored_quantization
from specrt.config.wrappers import wrapper_of
from specrt.device import Device
from specrt.models.dense import dense
from specrt.models.loader import load_weights
from specrt.models.packing import Packing
from specrt.models.rope import RotaryTable
from specrt.train.features.decoder import FrozenLayer, Rows, normed

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
    adapter: str | os.PathLike[str] | None = None,
) -> FrozenTarget:
    """Load a target for training: by ``transformers`` on a GPU, by specrt's own loader elsewhere.

    What specrt serves as no file has it (float8, a GGUF file's blocks, other quantised matrices, an
    adapter merged in float32), and the text model inside of a multimodal one, specrt reads itself
    on any device.

    Args:
        path: a local Hugging Face directory or GGUF file.
        dtype: of its weights; the checkpoint's by default.
        device: where it shall be.
        taps: increasing numbers N of layers: also give the hidden state after the first N, which
            ``transformers`` calls ``hidden_states[N]`` and the engine ``layer_tap(N - 1)``.
        adapter: a directory with a LoRA adapter that is merged into it.

    Raises:
        CheckpointError: the checkpoint is missing, broken or of an unsupported family, or the
            adapter is not of it.
        ValueError: ``taps`` are not increasing numbers of 1..L-1.
    """
    directory = checkpoint_path(path)
    config = ModelConfig.from_directory(directory, adapter=adapter)
    chosen = dtype or config.dtype
    place = torch.device(device)
    if place.type == "cpu" or adapter is not None or _is_ours(directory, config):
        return PackedTarget(directory, config, chosen, place, taps, adapter)
    return TransformersTarget(directory, config, chosen, place, taps)


def _is_ours(directory: Path, config: ModelConfig) -> bool:
    """Whether ``transformers`` would read another model, or none."""
    if config.float8_scale_suffix is not None or gguf_path(directory) is not None:
        return True
    is_inside = wrapper_of(read_json(config_file(directory))) is not None
    return is_inside or stored_quantization(directory) is not None


class PackedTarget:
    """Any supported target in plain torch; sequences lie behind one another, so nothing is padding.

    Linear layers see all rows at once, attention one sequence at a time, on a GPU all of a pass,
    padded. On a CPU it computes in
    float32 on weights of ``dtype`` and rounds keys and values to it, as the engine does: features
    then agree with the engine's taps.

    Args:
        path: a local Hugging Face directory or GGUF file, whose blocks stand for their values.
        config: its configuration.
        dtype: of the weights that are not in blocks.
        device: where to compute.
        taps, adapter: as for :func:`load_frozen_target`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        taps: tuple[int, ...] = (),
        adapter: str | os.PathLike[str] | None = None,
    ) -> None:
        self.config = config
        self._taps = _checked_taps(config, taps)
        self._device = Device(device)
        compute = torch.float32 if device.type == "cpu" else dtype
        weights = load_weights(path, config, dtype, packing=_BLOCKS, adapter=adapter)
        self._layers = [
            FrozenLayer(
                config, index, layer, cache_dtype=dtype, device=self._device, compute=compute
            )
            for index, layer in enumerate(weights.layers)
        ]
        scale = torch.tensor(config.form.embed_scale, dtype=dtype).item()
        embed = dense(weights.embed).to(device, compute)
        self._embed = embed if scale == 1.0 else embed * scale
        table = weights.positions
        self._positions = None if table is None else table.to(device, compute)
        bias = weights.final_norm_bias
        self._final_norm = weights.final_norm.to(device)
        self._final_norm_bias = None if bias is None else bias.to(device)
        kinds = {config.form.layer(index).rope for index in range(config.num_layers)}
        self._ropes = {
            kind: RotaryTable(config, config.head_dim, self._device, choice=kind) for kind in kinds
        }

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
        longest = max(lengths)
        angles = {k: t.reaching(longest)[positions][:, None] for k, t in self._ropes.items()}
        hidden = self._embed[there(torch.cat(list(sequences)))]
        if self._positions is not None:
            hidden = hidden + self._positions[positions + (self.config.form.position_offset or 0)]
        parts = []
        for number, layer in enumerate(self._layers, start=1):
            hidden = layer(hidden, Rows(lengths, angles))
            if number in self._taps:
                parts.append(hidden)
        parts.append(normed(self.config, hidden, self._final_norm, self._final_norm_bias))
        return list(torch.cat(parts, -1).split(lengths))


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
