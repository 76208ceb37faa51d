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
) -> None:
    """Write a drafter (ours, or an official FSPAD or EAGLE-1/2 one) in specrt's own format."""
    from specrt.config import ModelConfig, config_fingerprint
    from specrt.draft.eesd.checkpoint import is_exit_checkpoint
    from specrt.draft.fspad.checkpoint import read_checkpoint, reduce_vocabulary, write_checkpoint
    from specrt.draft.fspad.vocabulary import keep_tokens
    from specrt.draft.kinds import drafter_directory
    from specrt.models.opening import adapter_hash
    from specrt.train.data.token_counts import count_tokens

    place = Path(destination)
    if (place / "config.json").exists():
        raise ValueError(f"{place}: expected a new directory, got one with a checkpoint")
    directory, name = target_directory(target)
    adapter = adapter_directory(lora)
    model = ModelConfig.from_directory(directory, adapter=adapter)
    _check_reduction(draft_vocab, corpus, hot_tokens, model.vocab_size)
    found = drafter_directory(source)
    if is_exit_checkpoint(found):
        raise ValueError(f"{found}: expected an FSPAD or EAGLE drafter; EESD has no other layout")
    config, tensors = read_checkpoint(found, model)
    config = replace(
        config,
        target_name=name,
        target_fingerprint=config_fingerprint(model),
        target_adapter=adapter_hash(adapter) or config.target_adapter,
    )
    notes = _settle_tables(found, tensors, model, (directory, adapter))
    _add_biases(config, tensors)
    if hot_tokens is not None:
        config, tensors = keep_tokens(config, tensors, hot_tokens, draft_vocab)
    elif draft_vocab is not None:
        counts = count_tokens(corpus or (), directory, model.vocab_size)
        config, tensors = reduce_vocabulary(config, tensors, counts.ranking, draft_vocab)
        notes.append(counts.coverage(tensors))
    write_checkpoint(place, config, tensors)
    for line in [*_found(config, tensors), *notes]:
        print(line)
    print(f"written to {place} for {config.target_name} ({config.target_fingerprint})")


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


def _found(config: DraftConfig, tensors: dict[str, torch.Tensor]) -> list[str]:
    layer = config.layer
    weights = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights})
    lines = [
        f"{config.arch}: feature sampling {_yes(config.has_feature_sampling)}, "
        f"split output {_yes(config.has_split_output)}",
        f"hidden size {layer.hidden_size}, intermediate size {layer.intermediate_size}, "
        f"{layer.num_heads} heads ({layer.num_kv_heads} of keys and values) of {layer.head_dim}, "
        f"vocabulary {layer.vocab_size}",
        f"{sum(tensor.numel() for tensor in weights)} parameters, {', '.join(dtypes)}",
    ]
    if config.draft_vocab_size is not None:
        lines.append(f"drafts {config.draft_vocab_size} of {layer.vocab_size} tokens")
    return lines


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"
