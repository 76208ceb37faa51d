"""``specrt convert``: official FSPAD and EAGLE-1/2 drafters in specrt's own format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specrt.cli.options import Target

if TYPE_CHECKING:
    import torch

    from specrt.draft.checkpoint import DraftConfig


def convert(
    source: Annotated[str, typer.Argument(help="A drafter's directory, of any known layout.")],
    destination: Annotated[str, typer.Argument(help="The directory to write.")],
    target: Target,
) -> None:
    """Convert an official FSPAD or EAGLE-1/2 drafter to specrt's own format."""
    from specrt.cli.loading import target_directory
    from specrt.config import ModelConfig, config_fingerprint
    from specrt.draft.checkpoint import EMBED, read_checkpoint, tensor_shapes, write_checkpoint

    place = Path(destination)
    if (place / "config.json").exists():
        raise ValueError(f"{place}: expected a new directory, got one with a checkpoint")
    directory, name = target_directory(target)
    model = ModelConfig.from_directory(directory)
    config, tensors = read_checkpoint(source, model)
    config = replace(config, target_name=name, target_fingerprint=config_fingerprint(model))
    has_embedding = tensors.pop(EMBED, None) is not None  # it is the target's own
    for key, shape in tensor_shapes(config).items():
        if key not in tensors:  # a bias of zero may be left out
            tensors[key] = next(iter(tensors.values())).new_zeros(shape)
    write_checkpoint(place, config, tensors)
    for line in _found(config, tensors, has_embedding):
        print(line)
    print(f"written to {place} for {config.target_name} ({config.target_fingerprint})")


def _found(config: DraftConfig, tensors: dict[str, torch.Tensor], has_embedding: bool) -> list[str]:
    layer = config.layer
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    lines = [
        f"{config.arch}: feature sampling {_yes(config.has_feature_sampling)}, "
        f"split output {_yes(config.has_split_output)}",
        f"hidden size {layer.hidden_size}, intermediate size {layer.intermediate_size}, "
        f"{layer.num_heads} heads ({layer.num_kv_heads} of keys and values) of {layer.head_dim}, "
        f"vocabulary {layer.vocab_size}",
        f"{num_parameters} parameters, {', '.join(dtypes)}",
    ]
    if has_embedding:
        lines.append("its embedding is left out: the target's is used")
    return lines


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"
