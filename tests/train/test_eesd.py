"""Exits in training: the module against the target's own layer, the loop, what is written."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specrt.cache import CacheBatch
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.eesd.checkpoint import (
    CALIBRATION,
    ExitConfig,
    exit_tensor_shapes,
    load_exit,
    read_exit,
    write_exit,
)
from specrt.draft.eesd.model import ExitModel
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.step import StepRows
from specrt.train.batches import collate_exits
from specrt.train.eesd.module import (
    ExitModule,
    ExitModules,
    exit_weights,
    parameter_groups,
    read_last_layer,
)
from specrt.train.features.frozen import load_frozen_target
from specrt.train.features.source import Sample
from specrt.train.loop.trainer import TrainingError
from specrt.tree import chain_tree
from tests.checkpoints import FAMILIES, make_checkpoint, store_as_float8
from tests.gguf_files import write_gguf
from tests.train.exit_support import (
    DEEP,
    OPTIONS,
    exit_config,
    make_exit_source,
    make_exit_trainer,
    random_layer,
    train_exits,
)
from tests.train.support import HIDDEN, MemorySource, curve

CPU = Device()
LEARNING = replace(OPTIONS, max_steps=120, epochs=100, lr=1e-2, log_steps=120)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# --- the module -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "float8", "blocks"])
def test_a_copy_of_the_last_layer_is_the_last_layer(tmp_path: Path, family: str) -> None:
    """Fed with what the last layer reads, an untrained exit gives the final feature."""
    sizes = {"intermediate_size": 128} if family == "blocks" else {}  # whole blocks
    make_checkpoint("llama" if family in ("float8", "blocks") else family, tmp_path, **sizes)
    if family == "float8":
        store_as_float8(tmp_path)
    path = tmp_path
    if family == "blocks":
        path = tmp_path / "model.gguf"
        write_gguf(tmp_path, path, kind="Q4_1")
    target = ModelConfig.from_directory(path)
    last = target.num_layers - 1
    config = ExitConfig.for_target(target, last, name="x")
    model = ExitModules([config], read_last_layer(path, target))
    ids = torch.randint(0, target.vocab_size, (37,), generator=torch.Generator().manual_seed(1))
    (rows,) = load_frozen_target(path, torch.float32, taps=(last,)).features([ids])
    hidden, feature = rows.chunk(2, -1)
    (output,) = model(hidden[None, :, None])
    torch.testing.assert_close(output.normed[0], feature, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(hidden, feature, atol=0.1)  # the layer did something
    assert output.evidence.abs().max() == 0 and output.slope.tolist() == [1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_is_a_checkpoint(tmp_path: Path, family: str) -> None:
    make_checkpoint(family, tmp_path)
    config = ExitConfig.for_target(ModelConfig.from_directory(tmp_path), 1, name="x")
    state = ExitModule(config).state_dict()
    assert {key: tuple(t.shape) for key, t in state.items()} == exit_tensor_shapes(config)


def test_causal_and_blind_to_padding() -> None:
    model = ExitModules([exit_config(1)], random_layer())
    hidden = torch.randn(1, 9, 1, HIDDEN, generator=torch.Generator().manual_seed(0))
    before = model(hidden)[0].normed
    hidden[:, 5:] = 9.0
    after = model(hidden)[0].normed
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


# --- batches --------------------------------------------------------------------------------------


def test_a_state_predicts_the_next_token() -> None:
    def sample(length: int) -> Sample:
        mask = torch.arange(length) >= length - 2
        rows = torch.arange(length).float()[:, None] + torch.tensor([0, 0, 10, 10, 20, 20])
        return Sample(100 + torch.arange(length), mask, rows)

    source = MemorySource([sample(5), sample(3), sample(1)], hidden_size=2)
    batch = collate_exits(source, [0, 1, 2], seed=0, epoch=0, device=CPU)
    assert batch.states.shape == (3, 4, 3, 2) and batch.num_tokens == 9
    assert batch.states[0, :, :, 0].tolist() == [[t, 10 + t, 20 + t] for t in range(4)]
    assert batch.states[1, :, 0, 1].tolist() == [0, 1, 0, 0]
    # Token 3 and 4 are to be predicted: by the states at 2 and 3.
    wanted = [[False, False, True, True], [True, True, False, False], [False] * 4]
    assert batch.is_counted.tolist() == wanted
    again = collate_exits(source, [2, 0], seed=0, epoch=0, device=CPU)
    assert again.draw_seeds == (batch.draw_seeds[2], batch.draw_seeds[0])
    for other in ({"seed": 1, "epoch": 0}, {"seed": 0, "epoch": 1}):
        assert collate_exits(source, [0], device=CPU, **other).draw_seeds != batch.draw_seeds[:1]


def test_bad_rows() -> None:
    source = make_exit_source()
    source.samples[2].features[3, 5] = float("nan")
    batch = collate_exits(source, [1, 2, 3], seed=0, epoch=0, device=CPU)
    assert batch.bad_rows() == [2]


# --- the loop -------------------------------------------------------------------------------------


def test_learns_what_a_state_determines(tmp_path: Path) -> None:
    summary = train_exits(tmp_path, LEARNING).summary
    first, last = summary["history"][0], summary["history"][-1]
    for exit_layer in (1, 3):
        name = f"exit-{exit_layer}"
        assert first[f"{name}/top1"] < 0.2 and last[f"{name}/top1"] > 0.9
        assert last[f"{name}/top1"] <= last[f"{name}/top2"] <= last[f"{name}/top3"]
        for mode in ("greedy", "sampled"):
            key = f"{name}/calibration_{mode}"
            assert last[key] < 0.5 * first[key]
    for one in summary["exits"]:
        assert one["held_out"]["acceptance_rate"][0] > 0.9
        assert one["held_out"]["num_sequences"] == 4


def test_cannot_learn_what_the_next_token_decides(tmp_path: Path) -> None:
    """So that the test above would notice an alignment that is off by one."""
    options = replace(LEARNING, epochs=4)
    source = make_exit_source(160, shift=1, exits=(1,))  # too many to learn by heart
    (late,) = train_exits(tmp_path / "a", options, source=source, exits=(1,)).summary["exits"]
    source = make_exit_source(160, exits=(1,))
    (right,) = train_exits(tmp_path / "b", options, source=source, exits=(1,)).summary["exits"]
    assert late["held_out"]["acceptance_rate"][0] < 0.3
    assert right["held_out"]["acceptance_rate"][0] > 0.95


@pytest.mark.parametrize("clip_norm", [0.0, 0.01])
def test_an_exit_learns_as_if_it_were_alone(tmp_path: Path, clip_norm: float) -> None:
    options = replace(OPTIONS, clip_norm=clip_norm)
    train_exits(tmp_path / "both", options)
    for exit_layer in (1, 3):
        alone = tmp_path / str(exit_layer)
        train_exits(alone, options, exits=(exit_layer,))
        assert same(alone, tmp_path / "both" / f"exit-{exit_layer}")
    assert not same(tmp_path / "1", tmp_path / "3")


def test_calibration_does_not_move_the_exit(tmp_path: Path) -> None:
    """Other draws of noise train another calibration head and the same exit."""
    trainer = make_exit_trainer(tmp_path)
    for name, parameter in trainer._model.named_parameters():
        if name.endswith("calibration.weight"):
            parameter.data += 0.5  # at 0 there would be no way back
    batch: Any = trainer._task.collate(make_exit_source(), [0, 1], 0)

    def gradients(seeds: tuple[int, ...]) -> dict[str, torch.Tensor]:
        trainer._model.zero_grad()
        changed = replace(batch, draw_seeds=seeds)
        trainer._task.losses(trainer._model, changed, has_hits=False).total.backward()
        return {k: p.grad.clone() for k, p in trainer._model.named_parameters()}

    one, other = gradients((1, 2)), gradients((3, 4))
    for name in one:
        assert torch.equal(one[name], other[name]) == ("calibration" not in name)


def test_layers_and_calibration_heads_are_clipped_apart(tmp_path: Path) -> None:
    model = make_exit_trainer(tmp_path)._model
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{names.pop(p).rsplit("exits.")[1][:7] for p in g} for g in parameter_groups(model)]
    assert groups == [{"1.model"}, {"1.calib"}, {"3.model"}, {"3.calib"}] and not names


def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = train_exits(tmp_path / "whole")
    source = make_exit_source()

    def interrupt(number: int) -> None:
        if number == 3:
            signal.raise_signal(signal.SIGTERM)

    source.on_batch = interrupt
    stopped = train_exits(tmp_path / "cut", source=source)
    assert (stopped.is_done, stopped.signal) == (False, signal.SIGTERM)
    assert curve(train_exits(tmp_path / "cut")) == curve(whole)
    for exit_layer in (1, 3):
        name = f"exit-{exit_layer}"
        assert same(tmp_path / "cut" / name, tmp_path / "whole" / name)


def test_a_bad_state_stops_the_run_and_is_named(tmp_path: Path) -> None:
    source = make_exit_source()
    source.samples[7].features[2, 5] = float("inf")
    with pytest.raises(TrainingError, match=r"not finite: loss .*exit-1/.*; sequences 7 \("):
        train_exits(tmp_path, replace(OPTIONS, epochs=9), source=source)


# --- what is written ------------------------------------------------------------------------------


def test_one_exit_is_the_drafter_itself(tmp_path: Path) -> None:
    options = replace(OPTIONS, save_dtype="bfloat16")
    summary = train_exits(tmp_path, options, exits=(3,)).summary
    tensors = weights(tmp_path)
    for key, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if key in CALIBRATION else torch.bfloat16)
    config = read_exit(tmp_path, DEEP)
    assert (config.exit_layer, config.target_name) == (3, "table")
    assert config.layer.dtype == torch.bfloat16
    assert config.extra["training"]["exits"] == summary["exits"]
    assert "history" not in config.extra["training"]
    assert sum(t.numel() for t in tensors.values()) == summary["exits"][0]["num_parameters"]
    with pytest.raises(ValueError, match="already holds a model"):
        make_exit_trainer(tmp_path, exits=(3,))


def test_several_exits_have_a_place_each(tmp_path: Path) -> None:
    train_exits(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exit-1", "exit-3", "training.json"]
    assert [read_exit(tmp_path / f"exit-{n}", DEEP).exit_layer for n in (1, 3)] == [1, 3]
    with pytest.raises(ValueError, match="already holds a model"):
        make_exit_trainer(tmp_path)
    others = tmp_path / "exit-2"  # trained by itself, and only lying there
    train_exits(others, exits=(2,))
    train_exits(tmp_path, exits=(2,), is_restart=True)
    assert read_exit(tmp_path, DEEP).exit_layer == read_exit(others, DEEP).exit_layer == 2
    assert list(tmp_path.glob("exit-*")) == [others]
    train_exits(tmp_path, is_restart=True)
    assert not (tmp_path / "config.json").exists() and (tmp_path / "exit-3").is_dir()
    (tmp_path / "training.json").write_text('{"exits": [{}]}')  # damaged, and about to be replaced
    assert train_exits(tmp_path, exits=(2,), is_restart=True).is_done


def test_what_is_written_loads(tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path / "target")
    target = ModelConfig.from_directory(tmp_path / "target")
    config = ExitConfig.for_target(target, 1, name="x")
    model = ExitModules([config], read_last_layer(tmp_path / "target", target))
    config = replace(config, layer=replace(config.layer, dtype=torch.float32))
    write_exit(tmp_path / "exit", config, exit_weights(model.state_dict(), 1))
    whole = load_weights(tmp_path / "target", target, torch.float32)
    loaded = load_exit(tmp_path / "exit", read_exit(tmp_path / "exit", target), whole)
    for name, tensor in vars(loaded.layer.layers[0]).items():
        wanted = getattr(whole.layers[-1], name)
        assert (tensor is None and wanted is None) or torch.equal(tensor, wanted)
    assert torch.equal(loaded.layer.final_norm, whole.final_norm)


def test_what_is_trained_is_what_serves(tmp_path: Path) -> None:
    """The kernels' logits and evidence are the module's."""
    make_checkpoint("qwen3", tmp_path / "target")
    target = ModelConfig.from_directory(tmp_path / "target")
    config = ExitConfig.for_target(target, 2, name="x")
    config = replace(config, layer=replace(config.layer, dtype=torch.float32))
    module = ExitModule(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    write_exit(tmp_path / "exit", config, module.state_dict())
    whole = load_weights(tmp_path / "target", target, torch.float32)
    weights = load_exit(tmp_path / "exit", read_exit(tmp_path / "exit", target), whole)
    served = ExitModel(config, weights, LlamaModel(target, whole))
    states = torch.randn(50, target.hidden_size, generator=generator)
    hidden, evidence = torch.empty_like(states), torch.empty(50, 2)
    logits = torch.empty(50, target.vocab_size)
    cache = served.new_cache()
    batch, shape = CacheBatch(cache, [cache.open(200)]), chain_tree(torch.zeros(1, 50).int())
    rows = StepRows(
        shape.depth,
        shape.ancestors,
        shape.num_nodes,
        torch.zeros_like(shape.num_nodes),
        batch.kv_len,
        batch.block_tables,
    )
    served.reserve(1, 50, batch.num_positions)
    served.launch_exit(states, rows, cache, hidden, logits, evidence)
    output = module(states[None])
    torch.testing.assert_close(hidden, output.normed[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(evidence, output.evidence[0], rtol=1e-4, atol=1e-4)
    wanted = output.normed[0] @ whole.lm_head.T
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(served.slope, output.slope)


def test_refuses_to_mix_runs(tmp_path: Path) -> None:
    source = make_exit_source()
    source.on_batch = lambda number: signal.raise_signal(signal.SIGINT) if number == 2 else None
    train_exits(tmp_path, source=source)
    with pytest.raises(ValueError, match=r"unfinished run with exit_layers \[1, 3\], not \[1\]"):
        make_exit_trainer(tmp_path, exits=(1,))
