"""Drafters stored in a byte a weight: what files hold, what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import specrt
from specrt.config import ModelConfig
from specrt.draft.eesd.checkpoint import exit_matrices, load_exit, read_exit, read_exit_tensors
from specrt.draft.files import in_bytes
from specrt.draft.fspad.checkpoint import ARCHS, matrix_keys, read_checkpoint, write_checkpoint
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.models.dense import dense
from specrt.models.model import LlamaModel
from specrt.ops import MatrixKind, pack_matrix
from specrt.sampling import SamplingParams
from specrt.types import CheckpointError
from tests.checkpoints import (
    edit_config,
    edit_tensors,
    make_draft_checkpoint,
    make_exit_checkpoint,
    make_official_draft,
)
from tests.cli.test_cli import expect_one_line, run
from tests.engine.support import make_engine, prompts, sampled, texts

VOCAB = 97
KINDS = (*ARCHS, "eesd")
SETTINGS = {
    "greedy": SamplingParams(max_new_tokens=30, ignore_eos=True),
    "seed": sampled(1, ignore_eos=True),
}
MLP = "layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter of each kind in bfloat16, and under ``int8`` the same as the command stores it."""
    folder = tmp_path_factory.mktemp("drafters")
    for arch in ARCHS:
        make_draft_checkpoint(target, folder / arch, arch, dtype=torch.bfloat16)
        edit_tensors(folder / arch, narrow)
    make_exit_checkpoint(target, folder / "eesd", 2, noise=0.1, dtype=torch.bfloat16)
    edit_tensors(folder / "eesd", narrow)
    return folder


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        tensors[key] = tensor.bfloat16()


@pytest.fixture(scope="module")
def stored(target: Path, folder: Path) -> Path:
    for kind in KINDS:
        convert(folder / kind, folder / "int8" / kind, target, "--quantize", "int8")
    return folder / "int8"


def convert(source: Path, place: Path, target: Path, *args: str) -> None:
    from specrt.cli.convert import convert as command

    options = dict(zip(args[::2], args[1::2], strict=True))
    command(str(source), str(place), str(target), quantize=options.get("--quantize"))


def values_of(path: Path, model: ModelConfig) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What is read, and which of it are matrices."""
    if path.name.startswith("eesd"):
        config = read_exit(path, model)
        return read_exit_tensors(path, config), exit_matrices(config)
    draft, tensors = read_checkpoint(path, model)
    return tensors, matrix_keys(draft)


# --- bytes ----------------------------------------------------------------------------------------


def test_bytes_are_the_nearest_and_those_of_the_kernels() -> None:
    rows = torch.randn(40, 96, generator=torch.Generator().manual_seed(3)) ** 3
    rows[7] = 0
    rows[8] = 1e-42
    rows[9, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # ties
    rows[9, 4:] = 0
    parts = in_bytes({"m.weight": rows, "m.bias": rows[0]}, ["m.weight"])
    codes, scale = parts["m.weight"], parts["m.weight_scale"]
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (40, 1))
    assert torch.equal(parts["m.bias"], rows[0])
    values = codes * scale
    # Half a step, and what float32 cannot tell apart.
    assert ((values - rows).abs() <= scale * 0.50001).all()
    usual = torch.ones(40, dtype=torch.bool)
    usual[[7, 8]] = False
    assert (codes[usual].abs().amax(1) == 127).all()
    assert codes[9, :4].tolist() == [127, 0, 2, -2]
    assert not codes[7].any()
    packed = dense(pack_matrix(rows, MatrixKind.INT8))
    assert torch.equal(values[usual], packed[usual])
    again = in_bytes({"m.weight": values}, ["m.weight"])
    assert torch.equal(again["m.weight"], codes)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_read_as_the_format_means_it(
    target: Path, folder: Path, stored: Path, kind: str
) -> None:
    model = ModelConfig.from_directory(target)
    wide, matrices = values_of(folder / kind, model)
    read, _ = values_of(stored / kind, model)
    raw = load_file(stored / kind / "model.safetensors")
    assert raw.keys() == read.keys() | {f"{key}_scale" for key in matrices}
    assert wide.keys() == read.keys()
    for key, tensor in read.items():
        if key not in matrices:
            assert torch.equal(tensor, wide[key]) and tensor.dtype == torch.bfloat16, key
            continue
        scale = raw[f"{key}_scale"]
        assert (raw[key].dtype, scale.dtype) == (torch.int8, torch.float32)
        # compressed-tensors' own: codes in the scale's dtype, times the scale.
        assert torch.equal(tensor, raw[key].to(scale.dtype) * scale), key
        assert ((tensor - wide[key].float()).abs() <= 0.51 * scale).all(), key
    said = json.loads((stored / kind / "config.json").read_text())
    assert said["quantization_config"]["quant_method"] == "compressed-tensors"
    assert said["quantization_config"]["format"] == "int-quantized"
    assert said["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["fspad", "eesd"])
def test_a_file_is_stored_as_it_was_unless_it_is_told(
    target: Path, stored: Path, tmp_path: Path, kind: str
) -> None:
    model = ModelConfig.from_directory(target)
    convert(stored / kind, tmp_path / kind, target, "--quantize", "int8")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / kind / name).read_bytes() == (stored / kind / name).read_bytes()
    convert(stored / kind, tmp_path / f"{kind}-wide", target, "--quantize", "none")
    read, _ = values_of(stored / kind, model)
    wide, _ = values_of(tmp_path / f"{kind}-wide", model)
    assert all(torch.equal(wide[key], read[key].bfloat16()) for key in read)
    assert "quantization_config" not in (tmp_path / f"{kind}-wide" / "config.json").read_text()


def test_a_reduced_vocabulary_stays_in_bytes(target: Path, stored: Path, tmp_path: Path) -> None:
    from specrt.draft.fspad.checkpoint import reduce_vocabulary

    config, tensors = read_checkpoint(stored / "fspad")
    write_checkpoint(tmp_path, *reduce_vocabulary(config, tensors, torch.arange(97), 9))
    again, read = read_checkpoint(tmp_path, ModelConfig.from_directory(target))
    assert again.is_int8 and again.draft_vocab_size == 9
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


# --- drafting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_targets(model: LlamaModel, target: Path, stored: Path, kind: str) -> None:
    plain = make_engine(model, max_batch=1)
    engine = specrt.load(target, stored / kind, max_batch=3)
    for params in SETTINGS.values():
        results = engine.generate(prompts(5, VOCAB), params)
        assert texts(results) == texts(plain.generate(prompts(5, VOCAB), params))


def test_an_exit_is_the_one_that_is_read(model: LlamaModel, stored: Path) -> None:
    config = read_exit(stored / "eesd", model.config)
    layer = load_exit(stored / "eesd", config, model.weights).layer.layers[0]
    read = read_exit_tensors(stored / "eesd", config)
    down = read["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(dense(layer.down).float(), down.bfloat16().float())
    assert torch.equal(dense(layer.o), read["model.layers.0.self_attn.o_proj.weight"].bfloat16())


def test_official_layouts_may_be_quantised_too(target: Path, stored: Path, tmp_path: Path) -> None:
    """As others' tools store them; and a target's format says nothing of a drafter in values."""
    tensors = make_official_draft(tmp_path / "src", target, "fspad")
    quantization = json.loads((stored / "fspad" / "config.json").read_text())["quantization_config"]
    edit_config(tmp_path / "src", quantization_config=quantization)
    config, read = read_checkpoint(tmp_path / "src")
    assert not config.is_int8 and "quantization_config" not in config.extra
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())
    edit_tensors(tmp_path / "src", in_fewer)
    config, read = read_checkpoint(tmp_path / "src")
    assert not config.is_int8
    assert ((read[MLP] - tensors[MLP].float()).abs() < 0.01).all()


def in_fewer(tensors: dict[str, torch.Tensor]) -> None:
    small = in_bytes(tensors, [MLP])
    tensors.clear()
    tensors.update({f"model.{key}": tensor for key, tensor in small.items()})


# --- refusals -------------------------------------------------------------------------------------


Tensors = dict[str, torch.Tensor]


def scale_of(tensors: Tensors) -> str:
    return next(key for key in tensors if key.endswith("up_proj.weight_scale"))


def scaled(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[scale_of(tensors)] = change(tensors[scale_of(tensors)].clone()).contiguous()

    return edit


def coded(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        key = scale_of(tensors).removesuffix("_scale")
        tensors[key] = change(tensors[key])

    return edit


def in_row_2(value: float) -> Callable[[Tensors], None]:
    return scaled(lambda scale: scale.index_fill_(0, torch.tensor([2]), value))


def without_scale(tensors: Tensors) -> None:
    del tensors[scale_of(tensors)]


def without_codes(tensors: Tensors) -> None:
    del tensors[scale_of(tensors).removesuffix("_scale")]


_SHAPE = r"up_proj.weight_scale: expected float32 \[112, 1\], a factor for each row of \S*, got "
_VALUE = "up_proj.weight_scale: expected positive finite values, got "
_CODES = r"up_proj.weight: expected int8 of two dimensions beside \S*up_proj.weight_scale, got "
BREAKS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no scale": (without_scale, r"missing tensor \S*up_proj.weight_scale, which goes with \S+"),
    "no codes": (without_codes, r"missing tensor \S*up_proj.weight, which goes with \S+_scale"),
    "short": (scaled(lambda scale: scale[1:]), rf"{_SHAPE}float32 \[111, 1\]"),
    "turned": (scaled(lambda scale: scale.T), rf"{_SHAPE}float32 \[1, 112\]"),
    "one": (scaled(lambda scale: scale[0]), rf"{_SHAPE}float32 \[1\]"),
    "ints": (scaled(lambda scale: scale.int()), rf"{_SHAPE}int32 "),
    "bf16": (scaled(lambda scale: scale.bfloat16()), rf"{_SHAPE}bfloat16 "),
    "NaN": (in_row_2(torch.nan), f"{_VALUE}nan for row 2"),
    "infinite": (in_row_2(torch.inf), f"{_VALUE}inf for row 2"),
    "zero": (in_row_2(0.0), f"{_VALUE}0.0 for row 2"),
    "negative": (in_row_2(-1.0), f"{_VALUE}-1.0 for row 2"),
    "words": (coded(lambda codes: codes.short()), rf"{_CODES}int16 \[112, 64\]"),
    "unsigned": (coded(lambda codes: codes.view(torch.uint8)), f"{_CODES}uint8 "),
    "float8": (coded(lambda codes: codes.to(torch.float8_e4m3fn)), f"{_CODES}float8_e4m3fn "),
    "values": (coded(lambda codes: codes.float()), f"{_CODES}float32 "),
    "vector": (coded(lambda codes: codes[0].clone()), rf"{_CODES}int8 \[64\]"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BREAKS)
def test_malformed_files(
    model: LlamaModel, stored: Path, tmp_path: Path, kind: str, case: str
) -> None:
    """Each says file, tensor and fault, and nothing of formats that it has not."""
    shutil.copytree(stored / kind, tmp_path / kind)
    edit, message = BREAKS[case]
    edit_tensors(tmp_path / kind, edit)
    with pytest.raises(CheckpointError, match=rf"{kind}/model.safetensors: \S*{message}") as caught:
        load_drafter(tmp_path / kind, model, None, DrafterOptions())
    assert "this checkpoint is" not in str(caught.value)


@pytest.mark.parametrize("kind", ["fspad", "eesd"])
def test_what_is_unknown_beside_bytes_is_no_other_format(
    model: LlamaModel, stored: Path, tmp_path: Path, kind: str
) -> None:
    shutil.copytree(stored / kind, tmp_path / kind)
    edit_tensors(tmp_path / kind, lambda tensors: tensors.update({"more.bias": torch.ones(3)}))
    file = tmp_path / kind / "model.safetensors"
    with pytest.raises(CheckpointError, match=rf"^{file}: unknown tensor more.bias \[3\]$"):
        load_drafter(tmp_path / kind, model, None, DrafterOptions())


@pytest.mark.parametrize("kind", ["fspad", "eesd"])
def test_bytes_that_the_configuration_does_not_tell_of(
    target: Path, folder: Path, tmp_path: Path, kind: str
) -> None:
    convert(folder / kind, tmp_path / kind, target, "--quantize", "int8")
    edit_config(tmp_path / kind, quantization_config=...)
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*weight"):
        specrt.load(target, tmp_path / kind)
    edit_config(tmp_path / kind, quantization_config={"quant_method": "hqq"})
    with pytest.raises(CheckpointError, match=r"config.json: quantization_config: .* HQQ"):
        specrt.load(target, tmp_path / kind)


def test_what_is_not_finite_is_not_stored(target: Path, tmp_path: Path) -> None:
    make_draft_checkpoint(target, tmp_path)
    config, tensors = read_checkpoint(tmp_path)
    tensors[MLP][1, 2] = torch.inf
    with pytest.raises(ValueError, match=rf"tensors\['{MLP}'\]: expected finite values"):
        write_checkpoint(tmp_path / "out", replace(config, is_int8=True), tensors)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses(
    capsys: pytest.CaptureFixture[str], target: Path, folder: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    args = ["--target", str(target), "--quantize", "int4"]
    said = run(capsys, "convert", str(folder / "fspad"), out, *args)
    expect_one_line(said, "quantize: expected one of int8, none, got 'int4'")
    said = run(capsys, "convert", str(folder / "eesd"), out, *args[:2])
    expect_one_line(said, "EESD has no other layout, and takes --quantize alone")
    (tmp_path / "hot.json").write_text("[1, 2]")
    args = [*args[:3], "int8", "--hot-tokens", str(tmp_path / "hot.json")]
    said = run(capsys, "convert", str(folder / "eesd"), out, *args)
    expect_one_line(said, "EESD has no other layout, and takes --quantize alone")


def test_the_command_says_what_it_wrote(
    capsys: pytest.CaptureFixture[str], target: Path, folder: Path, tmp_path: Path
) -> None:
    for kind, word in (("fspad", "feature sampling yes"), ("eesd", "reads layer 2")):
        place = tmp_path / kind
        args = ["--target", str(target), "--quantize", "int8"]
        code, out, err = run(capsys, "convert", str(folder / kind), str(place), *args)
        assert (code, err) == (0, "")
        assert word in out and "parameters, matrices as int8" in out and str(place) in out
