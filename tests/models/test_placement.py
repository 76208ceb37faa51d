"""Devices by name, what a GPU is asked to run, weights on their way; none of it needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specrt import ops
from specrt.cache import CacheBatch, KVCache
from specrt.config import Form, LayerKind, ModelConfig
from specrt.device import Device
from specrt.models import placement
from specrt.models.gate_up import interleaved
from specrt.models.loader import LayerWeights, Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import (
    CPU,
    check_placed,
    check_sizes,
    choose_dtype,
    choose_head_dim,
    parse_device,
    place_weights,
)
from specrt.models.step import FINAL_TAP, GpuScratch
from specrt.ops import registry
from specrt.tree import TreeBuilder
from tests.checkpoints import make_checkpoint
from tests.families import build
from tests.family_cases import Case
from tests.trees import trees_of

# A device whose memory nobody can read, or copy from: stands for a GPU wherever kernels are not
# what is tested.
META = torch.device("meta")
THERE = Device(META)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, head_dim=64, dtype=torch.bfloat16, attention_bias=True)
    return path


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes torch and the build say that there are so many GPUs."""

    def pretend(
        count: int,
        cuda: str | None = "13.0",
        capability: tuple[int, int] = (9, 0),
        driver: int = 13000,
        why: str = "none found",
    ) -> None:
        def init() -> None:
            raise RuntimeError(why)

        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        build = replace(placement.build_info(), cuda=cuda)
        monkeypatch.setattr(placement, "build_info", lambda: build)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: count - 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    return pretend


# --- devices by name ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "auto", torch.device("cpu")], ids=str)
def test_the_cpu(device: str | torch.device) -> None:
    assert parse_device(device) == torch.device("cpu")


def test_drivers_newer_than_the_kernels_and_of_their_kind(gpus: Callable[..., None]) -> None:
    for cuda, driver in (("12.8", 12000), ("12.8", 13010), ("13.2", 13000), ("13.0", -1)):
        gpus(1, cuda=cuda, driver=driver)
        assert parse_device("cuda").type == "cuda"


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda", "cuda:1"), ("cuda:0", "cuda:0"), (torch.device("cuda", 1), "cuda:1")],
)
def test_a_gpu_that_is_there(
    gpus: Callable[..., None], device: str | torch.device, expected: str
) -> None:
    gpus(2)  # the second is the current one
    assert parse_device(device) == torch.device(expected)


@pytest.mark.parametrize("device", ["tpu", "gpu", "mps", "cuda:x", "cuda:-1", "", "meta", 1.5])
def test_no_device(gpus: Callable[..., None], device: Any) -> None:
    gpus(2)
    with pytest.raises(
        ValueError, match="device: expected 'cpu', 'cuda' or 'cuda:N', got"
    ) as error:
        parse_device(device)
    assert repr(str(device)) in str(error.value)


@pytest.mark.parametrize(
    ("machine", "device", "words"),
    [
        ({"count": 0}, "cuda", "'cuda': torch sees no CUDA GPU"),
        ({"count": 0}, "cuda:1", "'cuda:1': torch sees no CUDA GPU"),
        ({"count": 1, "cuda": None}, "cuda", "has no CUDA kernels.*builds them$"),
        ({"count": 0, "cuda": None}, "cuda", r"builds them \(and torch sees no CUDA GPU here\)$"),
        ({"count": 1}, "cuda:1", "only cuda:0 is there, got 'cuda:1'"),
        ({"count": 3}, "cuda:3", r"cuda:0 \.\. cuda:2 are there, got 'cuda:3'"),
        ({"count": 1, "capability": (7, 5)}, "cuda", "8.0 or above, cuda:0 has 7.5"),
        (
            {"count": 1, "driver": 12040},
            "cuda",
            r"the driver is of CUDA 12\.4, .* by 13\.0 and need",
        ),
        ({"count": 1, "driver": 12080}, "cuda", "a driver of CUDA 13, release 580 or newer"),
        (
            {"count": 0, "why": "The driver is too old (found version 1). Get"},
            "cuda",
            r"no CUDA GPU: The driver is too old \(found version 1\) \(.* need .* release 580",
        ),
    ],
)
def test_no_usable_gpu(
    gpus: Callable[..., None], machine: dict[str, Any], device: str, words: str
) -> None:
    gpus(**machine)
    with pytest.raises(ValueError, match=f"device: .*{words}"):
        parse_device(device)


# --- what a GPU's kernels take --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "stored", "asked", "expected"),
    [
        ("cpu", torch.float32, None, torch.float32),
        ("cpu", torch.bfloat16, torch.float32, torch.float32),
        ("cuda:0", torch.float32, None, torch.bfloat16),
        ("cuda:0", torch.float16, None, torch.float16),
        ("cuda:0", torch.bfloat16, None, torch.bfloat16),
        ("cuda:0", torch.float32, torch.float16, torch.float16),
    ],
)
def test_dtypes(
    checkpoint: Path,
    device: str,
    stored: torch.dtype,
    asked: torch.dtype | None,
    expected: torch.dtype,
) -> None:
    config = replace(ModelConfig.from_directory(checkpoint), dtype=stored)
    assert choose_dtype(config, asked, torch.device(device)) == expected


def test_what_no_gpu_kernel_takes(checkpoint: Path) -> None:
    config, gpu = ModelConfig.from_directory(checkpoint), torch.device("cuda", 0)
    with pytest.raises(ValueError, match="dtype: .*tree_attention take, got float32"):
        choose_dtype(config, torch.float32, gpu)


@pytest.mark.parametrize(
    ("head_dim", "on_cpu", "on_gpu"),
    [(2, 16, 64), (16, 16, 64), (20, 32, 64), (64, 64, 64), (66, 80, 80), (100, 112, 128)],
)
def test_heads_run_with_the_next_size_that_kernels_take(
    checkpoint: Path, head_dim: int, on_cpu: int, on_gpu: int
) -> None:
    config = replace(ModelConfig.from_directory(checkpoint), head_dim=head_dim)
    assert choose_head_dim(config, CPU) == on_cpu
    assert choose_head_dim(config, torch.device("cuda", 0)) == on_gpu


def test_heads_that_no_kernel_takes(checkpoint: Path) -> None:
    config = ModelConfig.from_directory(checkpoint)
    large, larger = replace(config, head_dim=256), replace(config, head_dim=320)
    assert choose_head_dim(large, CPU) == 256
    with pytest.raises(ValueError, match="on CUDA takes at most 128, .* has 256; device='cpu'"):
        choose_head_dim(large, torch.device("cuda", 0))
    for device in (CPU, torch.device("cuda", 0)):
        with pytest.raises(ValueError, match=r"head_dim: .* at most \d+, the model has 320$"):
            choose_head_dim(larger, device)


@pytest.mark.parametrize(("max_nodes", "most"), [(64, 33554432), (60, 35791394), (128, 16777216)])
def test_vocabularies_whose_logits_are_too_many(
    checkpoint: Path, max_nodes: int, most: int
) -> None:
    config, gpu = ModelConfig.from_directory(checkpoint), torch.device("cuda", 0)
    check_sizes(replace(config, vocab_size=most), max_nodes, gpu)
    large = replace(config, vocab_size=most + 1)
    words = (
        rf"vocab_size: expected at most 2\^31 / max_nodes = {most} .*, the model has {most + 1};"
    )
    with pytest.raises(ValueError, match=words):
        check_sizes(large, max_nodes, gpu)
    check_sizes(large, max_nodes, CPU)


# --- weights on their way -------------------------------------------------------------------------


def tensors_of(weights: Weights) -> dict[str, torch.Tensor]:
    named = {"embed": weights.embed, "lm_head": weights.lm_head, "norm": weights.final_norm}
    for index, layer in enumerate(weights.layers):
        named |= {f"{index}.{f.name}": getattr(layer, f.name) for f in fields(layer)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


@pytest.mark.parametrize("is_tied", [False, True])
def test_weights_keep_their_places_in_the_arena(tmp_path: Path, is_tied: bool) -> None:
    make_checkpoint("llama", tmp_path, tie_word_embeddings=is_tied, attention_bias=True)
    config = ModelConfig.from_directory(tmp_path)
    here = load_weights(tmp_path, config, torch.bfloat16)
    there = place_weights(here, THERE)
    assert there.arena.device == META and there.arena.shape == here.arena.shape
    assert (there.embed is there.lm_head) is is_tied
    before, after = tensors_of(here), tensors_of(there)
    assert before.keys() == after.keys()
    start = here.arena.storage_offset()
    for name, tensor in after.items():
        assert (tensor.device, tensor.dtype) == (META, before[name].dtype), name
        assert tensor.shape == before[name].shape and tensor.is_contiguous(), name
        if tensor.dim() == 2:
            old = before[name].storage_offset() * before[name].element_size() - start
            assert tensor.storage_offset() * tensor.element_size() == old, name
    assert place_weights(here, Device()) is here


def test_gate_and_up_lie_in_turn_where_a_gpu_is(checkpoint: Path) -> None:
    """One that has the CPU's memory, so its weights can be read, and are a copy."""
    config, place = ModelConfig.from_directory(checkpoint), Device(is_gpu=True)
    here = load_weights(checkpoint, config, torch.bfloat16)
    bias = torch.arange(2.0 * config.intermediate_size)
    here = replace(here, layers=tuple(replace(one, gate_up_bias=bias) for one in here.layers))
    there = place_weights(here, place)
    assert there.is_interleaved and not here.is_interleaved
    before, after = tensors_of(here), tensors_of(there)
    for name, tensor in after.items():
        is_moved = "gate_up" in name
        expected = interleaved(before[name]) if is_moved else before[name]
        assert torch.equal(tensor, expected) and is_moved != torch.equal(tensor, before[name])
    assert place_weights(there, place) is there
    with pytest.raises(ValueError, match="weights: expected as loaded, got a GPU's .* on cpu"):
        place_weights(there, Device())


def test_gate_and_up_of_another_activation_do_not(tmp_path: Path) -> None:
    """A GPU's gated product is silu's."""
    build(Case("Gemma 1", "gemma"), tmp_path)
    config, place = ModelConfig.from_directory(tmp_path), Device(is_gpu=True)
    here = load_weights(tmp_path, config, torch.bfloat16)
    there = place_weights(here, place)
    assert not there.is_interleaved and there.arena is here.arena
    check_placed(there, place)
    with pytest.raises(ValueError, match="weights: gate and up are interleaved, expected"):
        check_placed(replace(there, is_interleaved=True), place)


def test_all_that_lies_outside_of_layers_is_moved(tmp_path: Path) -> None:
    build(Case("GPT-2", "gpt2"), tmp_path)
    here = load_weights(tmp_path, ModelConfig.from_directory(tmp_path), torch.bfloat16)
    there = place_weights(replace(here, head_bias=torch.ones(97)), THERE)
    for name in ("embed", "final_norm", "final_norm_bias", "head_bias", "positions"):
        assert getattr(there, name).device == META, name
    for field in fields(LayerWeights):
        tensor = getattr(there.layers[1], field.name)
        assert tensor is None or tensor.device == META, field.name


def test_weights_of_another_layout_are_refused(checkpoint: Path) -> None:
    config, place = ModelConfig.from_directory(checkpoint), Device(is_gpu=True)
    here = load_weights(checkpoint, config, torch.bfloat16)
    with pytest.raises(ValueError, match="weights: gate and up are not interleaved, expected"):
        LlamaModel(config, here, place)
    with pytest.raises(ValueError, match="weights: gate and up are interleaved, expected the lay"):
        LlamaModel(config, place_weights(here, place))


def test_no_room_for_the_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    weights = load_weights(checkpoint, ModelConfig.from_directory(checkpoint), torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "to", refuse)
    with pytest.raises(MemoryError, match=r"no memory for \d+ MiB of weights on meta"):
        place_weights(weights, THERE)


# --- a model whose memory cannot be read ----------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """Kernels that check where their tensors lie and otherwise do nothing."""
    made: list[tuple[str, tuple[Any, ...]]] = []

    def spy(name: str) -> Callable[..., None]:
        def kernel(*args: Any, **named: Any) -> None:
            given = (*args, *named.values())
            for argument in given:
                assert not isinstance(argument, torch.Tensor) or argument.device == META, name
            made.append((name, given))

        return kernel

    kernels = "activate", "embed", "kv_commit", "linear", "rms_norm", "rope_append"
    for name in (*kernels, "tree_attention"):
        monkeypatch.setattr(ops, name, spy(name))
    monkeypatch.setattr(registry, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(ops, "tree_attention_workspace", lambda *shape, **_: 10 * shape[0])
    return made


def model_on_a_gpu(checkpoint: Path, device: Device = THERE) -> LlamaModel:
    config = ModelConfig.from_directory(checkpoint)
    weights = place_weights(load_weights(checkpoint, config, torch.bfloat16), device)
    return LlamaModel(config, weights, device)


class Capturing(Device):
    """Keeps what the launches of a step were given the first time."""

    def __init__(self, calls: list[tuple[str, tuple[Any, ...]]]) -> None:
        super().__init__(META)
        self.num_launches = 0
        self._calls = calls
        self._captured: dict[Any, tuple[torch.Tensor, ...]] = {}

    def run(self, key: Any, launch: Callable[[], None]) -> bool:
        self._calls.clear()
        launch()
        used = tuple(x for _, given in self._calls for x in given if isinstance(x, torch.Tensor))
        was_known = key in self._captured
        self.num_launches += was_known
        before = self._captured.setdefault(key, used)
        scratch = [given[-7] for name, given in self._calls if name == "tree_attention"]
        assert any(scratch[0] is x for x in before)
        return was_known

    def forget(self) -> None:
        super().forget()
        self._captured.clear()


def test_who_captures_on_a_gpu_hears_of_memory_that_moves(
    checkpoint: Path, calls: list[tuple[str, tuple[Any, ...]]]
) -> None:
    """A step that is known still has the memory with which it was captured."""
    device = Capturing(calls)
    model = model_on_a_gpu(checkpoint, device)
    cache = model.new_cache()
    sequences = [cache.open(300), cache.open(300)]
    lone, both = CacheBatch(cache, sequences[:1]), CacheBatch(cache, sequences)
    pair = TreeBuilder(3)
    pair.add(0, 5)
    # As many rows, so that only attention wants more for two sequences.
    trees = {lone: trees_of([pair]), both: trees_of([TreeBuilder(3)] * 2)}
    for batch in (lone, both, lone, both, lone):
        model.forward(trees[batch], batch)
    assert device.num_launches == 2


def test_attention_gets_room_for_every_window_of_a_models(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a launch wants is no matter of the longest one's alone."""
    wanted = {None: 40, 8: 100, 24: 10}
    monkeypatch.setattr(
        ops, "tree_attention_workspace", lambda *_, sliding_window: wanted[sliding_window]
    )
    config = ModelConfig.from_directory(checkpoint)
    layers = LayerKind(), LayerKind(8), LayerKind(24)
    config = replace(config, num_layers=3, form=Form(layers=layers))
    scratch = GpuScratch(config, [(8, 8)], Device())
    scratch.prepare(1, 1, 64)
    assert scratch.attention.numel() >= 100


def test_commits_count_on_the_host(
    checkpoint: Path, calls: list[tuple[str, tuple[Any, ...]]]
) -> None:
    config = ModelConfig.from_directory(checkpoint)
    cache = KVCache(config, torch.bfloat16, 16, device=THERE)
    sequences = [cache.open(40), cache.open(40), cache.open(40)]
    sequences[0].length = 3
    batch = CacheBatch(cache, sequences)
    path = torch.tensor([[0, 1], [0, -1], [-1, -1]], dtype=torch.int32)
    batch.commit(path, torch.tensor([2, 1, 0], dtype=torch.int32))
    batch.commit(path, torch.tensor([1, -1, 2], dtype=torch.int32))
    assert [sequence.length for sequence in sequences] == [6, 1, 2]
    assert [name for name, _ in calls] == ["kv_commit", "kv_commit"]
    assert cache.open(100).pages and cache.kv.device == META  # grown where it was


def test_a_pass_reads_nothing_back(
    checkpoint: Path, calls: list[tuple[str, tuple[Any, ...]]]
) -> None:
    device = Device(META)
    model = model_on_a_gpu(checkpoint, device)
    cache, config = model.new_cache(), model.config
    batch = CacheBatch(cache, [cache.open(300), cache.open(300)])
    tree = TreeBuilder(3)
    tree.add_path([1, 2], 8)
    tree.add_path([4], 8)
    output = model.forward(trees_of([tree, tree]), batch, taps=(FINAL_TAP, "layer.0"))
    assert device.num_reads == 0 and output.logits.is_meta
    assert output.logits.shape == (2, 4, 97) and output.logits.dtype == torch.float32
    assert {tap.dtype for tap in output.taps.values()} == {torch.bfloat16}
    names = [name for name, _ in calls]
    assert names.count("tree_attention") == 3 and names.count("linear") == 13
    assert "activate" not in names
    # Nothing is allocated by the kernels: their scratch is handed in.
    for kernel, place, size in (
        ("linear", 5, ops.linear_workspace(97, config.hidden_size, 8)),
        ("tree_attention", -7, 20),
    ):
        scratches = [given[place] for name, given in calls if name == kernel]
        assert len({id(scratch) for scratch in scratches}) == 1
        assert scratches[0].dtype == torch.float32 and scratches[0].numel() >= size
