"""``specrt convert``: drafters of any known layout in specrt's own format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specrt.cli.engine_options import Lora, adapter_directory, target_directory
from specrt.cli.options import Target

if TYPE_CHECKING:
    import torch

    from specrt.config import ModelConfig
    from specrt.draft.eesd.checkpoint import ExitConfig
    from specrt.draft.fspad.checkpoint import DraftConfig


def convert(
    source: Annotated[
        str, typer.Argument(help="A drafter's directory, of any known layout, or a bundled one.")
    ],
    destination: Annotated[str, typer.Argument(help="The directory to write.")],
    target: Target,
    lora: Lora = None,
    draft_vocab: Annotated[
        int | None,
        typer.Option(help="Draft only so many tokens, the most frequent of the corpus or list."),
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help="Any form of training data, to count tokens in; repeatable."),
    ] = None,
    hot_tokens: Annotated[
        Path | None,
        typer.Option(
            help="In place of a corpus, a file of token ids, most frequent first (JSON, or .pt "
            "as FR-Spec and SGLang have it); default: all of them are kept."
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="int8: its matrices are stored as a byte a weight, with a scale a row; none: as "
            "values; default: as they are stored now."
        ),
    ] = None,
) -> None:
    """Write a drafter (ours, or an official FSPAD or EAGLE-1/2 one) in specrt's own format."""
    from specrt.config import ModelConfig
    from specrt.draft.eesd.checkpoint import is_exit_checkpoint
    from specrt.draft.fspad.checkpoint import reduce_vocabulary, write_checkpoint
    from specrt.draft.fspad.vocabulary import keep_tokens
    from specrt.draft.kinds import drafter_directory
    from specrt.train.data.token_counts import count_tokens

    place = _new_directory(destination)
    directory, name = target_directory(target)
    adapter = adapter_directory(lora)
    model = ModelConfig.from_directory(directory, adapter=adapter)
    _check_reduction(draft_vocab, corpus, hot_tokens, model.vocab_size)
    _check_quantize(quantize)
    found = drafter_directory(source, model, directory)
    if is_exit_checkpoint(found):
        is_reduced = draft_vocab is not None or hot_tokens is not None
        return _convert_exit(found, place, (model, adapter), None if is_reduced else quantize)
    config, tensors = _read(found, model, quantize)
    config = _made_for(config, name, model, adapter)
    notes = _settle_tables(found, tensors, model, (directory, adapter))
    _add_biases(config, tensors)
    if hot_tokens is not None:
        config, tensors = keep_tokens(config, tensors, hot_tokens, draft_vocab)
    elif draft_vocab is not None:
        counts = count_tokens(corpus or (), directory, model.vocab_size)
        config, tensors = reduce_vocabulary(config, tensors, counts.ranking, draft_vocab)
        notes.append(counts.coverage(tensors))
    write_checkpoint(place, config, tensors)
    _say(place, config, tensors, [*_architecture(config), *notes])


def _new_directory(destination: str) -> Path:
    place = Path(destination)
    if (place / "config.json").exists():
        raise ValueError(f"{place}: expected a new directory, got one with a checkpoint")
    return place


def _check_reduction(
    draft_vocab: int | None,
    corpus: Sequence[Path] | None,
    hot_tokens: Path | None,
    vocab_size: int,
) -> None:
    if corpus and hot_tokens is not None:
        raise ValueError("corpus, hot_tokens: expected one of them")
    if hot_tokens is None and (draft_vocab is None) != (not corpus):
        raise ValueError(
            "draft_vocab, corpus: expected both or neither, or hot_tokens in the corpus' place"
        )
    if draft_vocab is not None and not 1 <= draft_vocab <= vocab_size:
        raise ValueError(f"draft_vocab: expected 1..{vocab_size}, got {draft_vocab}")


def _settle_tables(
    source: Path,
    tensors: dict[str, torch.Tensor],
    model: ModelConfig,
    paths: tuple[Path, Path | None],
) -> list[str]:
    """Leave out an embedding and a head that are the target's own; what to say of them."""
    from specrt.draft.fspad.checkpoint import EMBED
    from specrt.draft.fspad.official import HEAD, settle_head
    from specrt.models.layouts import is_rounded_copy

    if EMBED not in tensors and HEAD not in tensors:
        return []
    embed, head = _target_tables(model, *paths)
    notes = ["its head is left out: the target's is used"] if HEAD in tensors else []
    settle_head(source, tensors, head)
    if EMBED not in tensors:
        return notes
    if not is_rounded_copy(tensors[EMBED], embed):
        return [*notes, "its embedding differs from the target's and is kept"]
    del tensors[EMBED]
    return [*notes, "its embedding is left out: the target's is used"]


def _target_tables(
    model: ModelConfig, directory: Path, adapter: Path | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[V, H]`` each, as stored, or in the configuration's dtype where no kernel reads that."""
    import torch

    from specrt.models.loader import load_tables
    from specrt.models.opening import open_checkpoint

    info = open_checkpoint(directory).infos.get("model.embed_tokens.weight")
    dtype = model.dtype
    if info is not None and info.dtype in (torch.float32, torch.bfloat16, torch.float16):
        dtype = info.dtype
    tables = load_tables(directory, model, dtype, adapter)
    assert isinstance(tables.embed, torch.Tensor), "rows"
    assert isinstance(tables.lm_head, torch.Tensor), "rows"
    return tables.embed, tables.lm_head


def _add_biases(config: DraftConfig, tensors: dict[str, torch.Tensor]) -> None:
    """A bias of zero may be left out."""
    from specrt.draft.fspad.checkpoint import tensor_shapes

    for key, shape in tensor_shapes(config).items():
        if key not in tensors:
            tensors[key] = tensors[f"{key.removesuffix('bias')}weight"].new_zeros(shape)


def _made_for(
    config: DraftConfig, name: str, model: ModelConfig, adapter: Path | None
) -> DraftConfig:
    """A drafter that says which target it is for."""
    from specrt.config import config_fingerprint
    from specrt.models.opening import adapter_hash

    return replace(
        config,
        target_name=name,
        target_fingerprint=config_fingerprint(model),
        target_adapter=adapter_hash(adapter) or config.target_adapter,
    )


def _check_quantize(quantize: str | None) -> None:
    from specrt.draft.files import STORED_AS

    if quantize not in (None, *STORED_AS):
        raise ValueError(f"quantize: expected one of {', '.join(STORED_AS)}, got {quantize!r}")


def _read(
    source: Path, model: ModelConfig, quantize: str | None
) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
    """An FSPAD or EAGLE drafter, to be stored as ``quantize`` says."""
    from specrt.draft.fspad.checkpoint import matrix_keys, read_checkpoint

    config, tensors = read_checkpoint(source, model)
    if quantize is None:
        return config, tensors
    if config.is_int8 and quantize == "none":
        _round(tensors, matrix_keys(config), config.layer.dtype)
    return replace(config, is_int8=quantize == "int8"), tensors


def _round(tensors: dict[str, torch.Tensor], matrices: Sequence[str], dtype: torch.dtype) -> None:
    """What bytes stand for, in the drafter's dtype."""
    for key in matrices:
        tensors[key] = tensors[key].to(dtype)


def _convert_exit(
    source: Path, place: Path, target: tuple[ModelConfig, Path | None], quantize: str | None
) -> None:
    """The same exit, stored otherwise: all that there is to convert of one."""
    from specrt.draft.eesd.checkpoint import (
        exit_matrices,
        read_exit,
        read_exit_tensors,
        write_exit,
    )
    from specrt.models.opening import adapter_hash

    if quantize is None:
        raise ValueError(
            f"{source}: expected an FSPAD or EAGLE drafter; EESD has no other layout, and takes "
            "--quantize alone"
        )
    model, adapter = target
    config = read_exit(source, model)
    tensors = read_exit_tensors(source, config)
    if config.is_int8 and quantize == "none":
        _round(tensors, exit_matrices(config), config.layer.dtype)
    config = replace(
        config,
        is_int8=quantize == "int8",
        target_adapter=adapter_hash(adapter) or config.target_adapter,
    )
    write_exit(place, config, tensors)
    _say(place, config, tensors, [f"eesd: reads layer {config.exit_layer}"])


def _say(
    place: Path,
    config: DraftConfig | ExitConfig,
    tensors: dict[str, torch.Tensor],
    lines: Sequence[str],
) -> None:
    """What was found, and written."""
    weights = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights})
    stored = "matrices as int8" if config.is_int8 else ", ".join(dtypes)
    for line in (*lines, f"{sum(tensor.numel() for tensor in weights)} parameters, {stored}"):
        print(line)
    print(f"written to {place} for {config.target_name} ({config.target_fingerprint})")


def _architecture(config: DraftConfig) -> list[str]:
    layer = config.layer
    lines = [
        f"{config.arch}: feature sampling {_yes(config.has_feature_sampling)}, "
        f"split output {_yes(config.has_split_output)}",
        f"hidden size {layer.hidden_size}, intermediate size {layer.intermediate_size}, "
        f"{layer.num_heads} heads ({layer.num_kv_heads} of keys and values) of {layer.head_dim}, "
        f"vocabulary {layer.vocab_size}",
    ]
    if config.draft_vocab_size is not None:
        lines.append(f"drafts {config.draft_vocab_size} of {layer.vocab_size} tokens")
    return lines


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"
