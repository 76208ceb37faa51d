"""Checkpoint directories that are broken in one place each, by seed.

``python -m tests.mutants WORK FIRST LAST`` makes and loads those of a range of seeds, and prints a
JSON line before and after each.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import resource
import shutil
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import specrt
from specrt import SamplingParams
from specrt.types import CheckpointError
from tests.checkpoints import (
    make_checkpoint,
    make_draft_checkpoint,
    make_exit_checkpoint,
    store_as_bin,
)
from tests.cli.test_cli import write_tokenizer

TARGETS = ("one file", "shards", "bin", "bin shards")
DRAFTERS = ("fspad", "eesd", "small")
HOSTILE: tuple[Any, ...] = (
    *(2147483647, 2**29, 2**31, 2**40, 2**63, 10**400, -1, -(2**63), 0, 1, 2, 3, 7, 65, 1000),
    *(0.5, 1e308, -1e308, 5e-324, -0.0, math.nan, math.inf, -math.inf),
    *("", "x", "7", "a\nb", "\ud800", "x" * 5000, "../config.json", "/dev/zero", "a\0b"),
    *([], [1], [[]], [None], [2**63], [-1], ["x"], list(range(100)), {}, {"a": 1}, {"": None}),
    *(None, True, False),
)
_NEW_KEYS = ("head_dim", "rope_scaling", "rope_theta", "sliding_window", "layer_types", "a\nb")
_MEMORY = 6 << 30  # bytes of address space beyond what the process has when it begins


class Mutant(NamedTuple):
    """A broken directory."""

    kind: str
    path: Path
    change: str


def make_bases(work: Path) -> None:
    """Write a whole checkpoint of each kind under ``work``, to be copied and broken."""
    sizes: dict[str, Any] = {"eos_token_id": 1, "bos_token_id": 0, "num_hidden_layers": 2}
    for kind in (*TARGETS, "small"):
        path = work / kind
        model = make_checkpoint("qwen3" if kind == "small" else "llama3", path, **sizes)
        if "shards" in kind:
            (path / "model.safetensors").unlink()
            model.save_pretrained(path, max_shard_size="100KB")
        if "bin" in kind:
            store_as_bin(path)
        write_tokenizer(path)
    make_draft_checkpoint(work / "one file", work / "fspad")
    make_exit_checkpoint(work / "one file", work / "eesd", 1)


def make_mutant(work: Path, seed: int) -> Mutant:
    """Copy a base and break it in one place."""
    rng = random.Random(seed)
    kind = rng.choice(TARGETS + DRAFTERS)
    path = work / "mutant"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(work / kind, path)
    file = _choose_file(path, rng)
    draw = rng.random()
    if draw < 0.1:
        change = _replace(file, rng)
    elif draw < 0.25 or file.suffix not in _EDITS:
        change = _break_bytes(file, rng)
    else:
        change = _EDITS[file.suffix](file, rng)
    return Mutant(kind, path, f"{kind}: {file.name}: {change}"[:200])


def fault(work: Path, mutant: Mutant) -> str | None:
    """Load a mutant: None if it runs or is refused as it should be, else what is wrong."""
    try:
        _run(work, mutant)
    except CheckpointError as error:
        message = str(error)
        is_right = message.startswith(str(mutant.path)) and message.isprintable()
        return None if is_right else f"message: {message!r}"
    except BaseException as error:  # a Rust library's panic is no Exception
        return f"{type(error).__name__}: {error!r}"
    return None


def _run(work: Path, mutant: Mutant) -> None:
    if mutant.kind in DRAFTERS:
        engine = specrt.load(work / "one file", mutant.path, progress=False)
    else:
        engine = specrt.load(mutant.path, progress=False)
    if engine.target.config.max_positions > 4:
        engine.generate([5, 6, 7, 8], SamplingParams(max_new_tokens=3, ignore_eos=True))


def _choose_file(path: Path, rng: random.Random) -> Path:
    files = sorted(path.iterdir())
    weights = [file for file in files if file.suffix in (".safetensors", ".bin")]
    draw = rng.random()
    if draw < 0.45:
        return path / "config.json"
    return rng.choice(weights if draw < 0.8 else files)


def _replace(file: Path, rng: random.Random) -> str:
    what = rng.choice(("nothing", "FIFO", "directory", "socket", "loop", "empty", "device", "LFS"))
    file.unlink()
    if what == "FIFO":
        os.mkfifo(file)
    elif what == "directory":
        file.mkdir()
    elif what == "socket":
        _make_socket(file)
    elif what == "loop":
        file.symlink_to(file)
    elif what == "device":
        file.symlink_to("/dev/zero")
    elif what != "nothing":
        file.write_text("version https://git-lfs.github.com/spec/v1\n" if what == "LFS" else "")
    return f"becomes {what}"


def _make_socket(file: Path) -> None:
    """Bound from its own folder: a socket's path may have 107 letters only."""
    here = Path.cwd()
    os.chdir(file.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
    finally:
        os.chdir(here)


def _break_bytes(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    if rng.random() < 0.4:
        length = rng.choice((0, 1, 7, 8, 9, rng.randrange(len(content))))
        file.write_bytes(content[:length])
        return f"cut to {length} bytes"
    # Where the structure is, as a rule.
    end = min(len(content), rng.choice((16, 512, 1 << 30)))
    for place in rng.choices(range(end), k=rng.choice((1, 3, 20))):
        content[place] = rng.randrange(256)
    file.write_bytes(content)
    return f"bytes among the first {end} changed"


def _break_json(file: Path, rng: random.Random) -> str:
    data = json.loads(file.read_text())
    change = _break_object(data, rng)
    file.write_text(json.dumps(data))
    return change


def _break_object(data: Any, rng: random.Random) -> str:
    """Change, add or remove a value somewhere in an object or a list."""
    inner = data
    path = []
    while inner and isinstance(inner, (dict, list)):
        holder = inner
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        path.append(key)
        inner = inner[key]
        if rng.random() < 0.3:
            break
    if not path:
        return "nothing"
    if isinstance(holder, dict) and rng.random() < 0.1:
        del holder[path[-1]]
        return f"{path} removed"
    if isinstance(holder, dict) and rng.random() < 0.1:
        path[-1] = rng.choice(_NEW_KEYS)
    holder[path[-1]] = rng.choice(HOSTILE)
    return f"{path} becomes {str(holder[path[-1]])[:40]!r}"


def _break_header(file: Path, rng: random.Random) -> str:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + size], content[8 + size :]
    draw = rng.random()
    if draw < 0.15:
        size = rng.choice((0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1))
        file.write_bytes(struct.pack("<Q", size) + header + data)
        return f"header of {size} bytes"
    parsed = json.loads(header)
    key = rng.choice(sorted(parsed))
    if draw < 0.3:
        changed = header.rstrip()[:-1] + b"," + json.dumps({key: parsed[key]}).encode()[1:]
        change = f"{key} is there twice"
    elif draw < 0.5 and key != "__metadata__":
        parsed[key]["dtype"] = rng.choice(("F64", "F16", "BF16", "I8", "F8_E4M3", "F4", "C64", "X"))
        parsed[key]["shape"] = rng.choice(([], [0], [1], [2**40], [2**32, 2**32], [-1], [97, 64]))
        changed, change = json.dumps(parsed).encode(), f"{key} becomes {parsed[key]}"
    else:
        change = _break_object(parsed, rng)
        changed = json.dumps(parsed).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + data)
    return change


class _Foreign:
    """What no checkpoint should hold."""


def _break_pickle(file: Path, rng: random.Random) -> str:
    state = dict(torch.load(file, weights_only=True))
    key = rng.choice(sorted(state))
    tensor = state[key]
    strange: dict[str, Callable[[], Any]] = {
        "sparse": tensor.to_sparse,
        "meta": lambda: tensor.to("meta"),
        "complex": lambda: tensor.to(torch.complex64),
        "integers": lambda: tensor.to(torch.int64),
        "strided": lambda: torch.as_strided(tensor, tensor.shape, [0] * tensor.dim()),
        "expanded": lambda: torch.zeros(1).expand(2**40),
        "reversed": lambda: tensor.t() if tensor.dim() == 2 else tensor[::2],
        "quantised": lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([tensor, tensor]),
        "parameter": lambda: torch.nn.Parameter(tensor),
        "scalar": tensor.sum,
        "number": lambda: 3,
        "nan": lambda: torch.full_like(tensor, math.nan),
        "object": lambda: OrderedDict(inner=tensor),
    }
    whole: dict[str, Callable[[], Any]] = {
        "int keys": lambda: dict(enumerate(state.values())),
        "none": lambda: {None: tensor, **state},
        "bytes": lambda: {key.encode(): value for key, value in state.items()},
        "tuples": lambda: {(key, 1): value for key, value in state.items()},
        "wrapped": lambda: {"state_dict": state},
        "list": lambda: list(state.values()),
        "tensor": lambda: tensor,
        "foreign": lambda: {key: _Foreign()},
    }
    if rng.random() < 0.1:
        file.write_bytes(pickle.dumps({key: [1]}, protocol=rng.randrange(6)))
        return "a plain pickle"
    what = rng.choice([*strange, *whole])
    content = whole[what]() if what in whole else {**state, key: strange[what]()}
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    return f"{key}: {what}"


_EDITS = {".json": _break_json, ".safetensors": _break_header, ".bin": _break_pickle}


def main(work: Path, first: int, last: int) -> None:
    """Run the mutants of seeds ``first`` to ``last - 1`` within bounded memory."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # tokenizers' own words go to stdout.
    with os.fdopen(os.dup(1), "w") as report:
        os.dup2(2, 1)
        for seed in range(first, last):
            mutant = make_mutant(work, seed)
            print(json.dumps({"seed": seed, "change": mutant.change}), file=report, flush=True)
            print(json.dumps({"seed": seed, "fault": fault(work, mutant)}), file=report, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
