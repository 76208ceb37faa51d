"""End to end: ours, with every drafter, against transformers and llama.cpp.

Same weights, same dtype, same threads, same prompts, in turn. Rates are of decoding alone; ``vs X``
is how many times as fast as X: the median over prompts of the ratio of medians over repeats. Our
drafters must equal our plain decoding token for token; otherwise the run fails. ``differs`` counts
positions (behind a first difference everything usually differs), ``prompts`` whole outputs.

``share_of_streaming`` is how near plain decoding comes to reading its weights and doing nothing
else: the time of our ``linear`` over the very matrices of a step, by the time of a step.

``--gguf FILE`` alone has that file run by us and by llama.cpp: ``generate_gguf.py``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import generate_gguf
from bench.bench_linear import Pass
from bench.contenders import (
    LLAMA_CPP,
    PLAIN,
    TRANSFORMERS,
    TRANSFORMERS_LOOKUP,
    Contender,
    LlamaCpp,
    Ours,
    Output,
    Request,
    Transformers,
    has_llama_cpp,
    known_drafters,
)
from bench.harness import Row, parser, report, start
from bench.memory import Probe, peak_growth
from bench.prompts import HELDOUT, load_prompts
from specrt.config import ModelConfig
from specrt.targets import BUILTIN, target_path
from specrt.types import CheckpointError
from tools.export_checkpoint import export

LOOKUP_TOKENS = 10
PEERS = (TRANSFORMERS, TRANSFORMERS_LOOKUP, LLAMA_CPP)


@dataclass
class Field:
    """The contenders of one dtype, how to probe their memory, and their outputs."""

    dtype: str
    config: ModelConfig
    contenders: dict[str, Contender]
    probes: dict[str, Probe]
    matrices: list[torch.Tensor]
    """What our plain decoding reads in a step."""
    outputs: dict[str, list[list[Output]]] = field(default_factory=dict)
    """By contender, prompt and repeat."""
    pass_seconds: list[float] = field(default_factory=list)


def make_field(args: argparse.Namespace, dtype: str, scratch: Path) -> Field:
    """Load every contender that was asked for and can be had."""
    config = ModelConfig.from_directory(target_path(args.target))
    plain = Ours(args.target, None, dtype)
    ours: dict[str, Contender] = {PLAIN: plain}
    blank = Probe("ours", args.target, dtype, torch.get_num_threads(), None, None, [], 0, [])
    probes = {PLAIN: blank}
    for name, drafter in drafters(args.drafters, args.target).items():
        try:
            ours[f"ours {name}"] = Ours(args.target, drafter, dtype)
        except CheckpointError as error:
            print(f"no drafter {name}: {error}")
            continue
        probes[f"ours {name}"] = replace(blank, drafter=drafter)
    peers = _transformers(args, config, dtype, scratch, blank)
    peers |= _llama_cpp(args, config, dtype, scratch, blank)
    contenders = {name: contender for name, (contender, _) in peers.items()} | ours
    probes |= {name: probe for name, (_, probe) in peers.items()}
    return Field(dtype, config, contenders, probes, _step_matrices(plain))


def drafters(names: str, target: str) -> dict[str, str]:
    """Drafters to run, by name: what :func:`specrt.load` takes. ``all``: what is bundled."""
    if names == "none":
        return {}
    chosen = known_drafters(target) if names == "all" else names.split(",")
    return {Path(name).name: name for name in chosen}


Peers = dict[str, tuple[Contender, Probe]]


def _transformers(
    args: argparse.Namespace, config: ModelConfig, dtype: str, scratch: Path, blank: Probe
) -> Peers:
    peers: Peers = {}
    if not args.peers & {TRANSFORMERS, TRANSFORMERS_LOOKUP}:
        return peers
    directory = target_path(args.target)
    if config.float8_scale_suffix:
        directory = scratch / f"hf-{dtype}"
        export(args.target, directory, dtype)
    for name, lookup in ((TRANSFORMERS, None), (TRANSFORMERS_LOOKUP, LOOKUP_TOKENS)):
        if name in args.peers:
            probe = replace(blank, kind=TRANSFORMERS, path=str(directory), lookup=lookup)
            peers[name] = (Transformers(directory, dtype, lookup), probe)
    return peers


def _llama_cpp(
    args: argparse.Namespace, config: ModelConfig, dtype: str, scratch: Path, blank: Probe
) -> Peers:
    if LLAMA_CPP not in args.peers or not (args.gguf or args.make_gguf):
        return {}
    if not has_llama_cpp():
        print("llama.cpp: llama-cpp-python is not installed")
        return {}
    gguf = args.gguf
    if gguf is None:
        from tools.make_gguf import make_gguf  # needs a package that only this needs

        gguf = scratch / f"{dtype}.gguf"
        make_gguf(args.target, gguf, dtype)
    context = min(config.max_positions, 4096)
    threads, stop_ids = torch.get_num_threads(), list(config.eos_ids)
    contender = LlamaCpp(gguf, dtype, threads=threads, context=context, stop_ids=stop_ids)
    probe = replace(blank, kind=LLAMA_CPP, path=str(gguf), stop_ids=stop_ids)
    return {LLAMA_CPP: (contender, probe)}


def _step_matrices(plain: Ours) -> list[torch.Tensor]:
    weights = plain.engine.target.weights
    layers = [(one.qkv, one.o, one.gate_up, one.down) for one in weights.layers]
    return [matrix for layer in layers for matrix in layer] + [weights.lm_head]


def run(field: Field, requests: Sequence[Request], repeats: int) -> None:
    """Every contender on every prompt, in turn, starting with another one each time."""
    one_row = Pass(field.matrices, 1)
    names = list(field.contenders)
    field.outputs = {name: [[] for _ in requests] for name in names}
    for contender in field.contenders.values():
        contender.run(replace(requests[0], max_new_tokens=8))
    for repeat in range(repeats):
        for index, request in enumerate(requests):
            shift = (repeat + index) % len(names)
            for name in names[shift:] + names[:shift]:
                field.outputs[name][index].append(field.contenders[name].run(request))
                if name == PLAIN:
                    field.pass_seconds.append(_median_time(one_row.ours, 20))


def _median_time(fn: Callable[[], None], count: int) -> float:
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        fn()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


# --- figures ----------------------------------------------------------------------------------


def prompt_rates(outputs: Sequence[Sequence[Output]]) -> list[float | None]:
    """Tokens a second on each prompt: medians over repeats."""
    rates = []
    for repeats in outputs:
        known = [output.rate for output in repeats if output.rate is not None]
        rates.append(statistics.median(known) if known else None)
    return rates


def speedup(rates: Sequence[float | None], baseline: Sequence[float | None]) -> float | None:
    """Median over prompts of how many times as fast as the baseline."""
    pairs = zip(rates, baseline, strict=True)
    return _median(a / b for a, b in pairs if a is not None and b is not None)


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def differences(
    outputs: Sequence[Sequence[Output]], baseline: Sequence[Sequence[Output]]
) -> tuple[int, int]:
    """Positions and prompts where the first repeats differ."""
    positions = prompts = 0
    for (first, *_), (other, *_) in zip(outputs, baseline, strict=True):
        a, b = first.token_ids, other.token_ids
        same = sum(x == y for x, y in zip(a, b, strict=False))
        positions += max(len(a), len(b)) - same
        prompts += a != b
    return positions, prompts


def rows_of(field: Field, temperature: float) -> list[Row]:
    """A line for each contender."""
    rates = {name: prompt_rates(outputs) for name, outputs in field.outputs.items()}
    rows = []
    for name, outputs in field.outputs.items():
        flat = [output for repeats in outputs for output in repeats]
        row: Row = {
            "contender": name,
            "dtype": field.dtype,
            "tokens/s": _median(rates[name]),
            "vs plain": speedup(rates[name], rates[PLAIN]),
        }
        for peer in PEERS:
            known = peer in rates
            row[f"vs {peer}"] = speedup(rates[name], rates[peer]) if known else None
        row["tau"] = sum(len(o.token_ids) for o in flat) / sum(o.num_rounds for o in flat)
        row["prefill_ms"] = 1e3 * statistics.median(o.prefill_seconds for o in flat)
        for label, other in (("plain", PLAIN), ("transformers", TRANSFORMERS)):
            # Sampled text is the same only among ours: others draw other numbers.
            is_comparable = temperature == 0 or (name.startswith("ours") and other == PLAIN)
            both = (
                differences(outputs, field.outputs[other])
                if other in field.outputs and is_comparable
                else (None, None)
            )
            row[f"differs {label}"], row[f"prompts {label}"] = both
        rows.append(row)
    return rows


def streaming(field: Field) -> dict[str, float]:
    """Plain decoding against the time its weights take to be read."""
    num_bytes = sum(matrix.nbytes for matrix in field.matrices)
    pass_seconds = statistics.median(field.pass_seconds)
    rate = _median(prompt_rates(field.outputs[PLAIN]))
    assert rate is not None
    return {
        "weight_MB_per_step": num_bytes / 1e6,
        "linear_GB/s": num_bytes / pass_seconds / 1e9,
        "limit_tokens/s": 1 / pass_seconds,
        "share_of_streaming": pass_seconds * rate,
    }


def add_memory(field: Field, rows: Sequence[Row], request: Request) -> None:
    """Peak growth of each contender in a fresh process, by weights + KV of one sequence."""
    config = field.config
    engine = field.contenders[PLAIN].engine  # type: ignore[attr-defined]
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    num_slots = len(request.prompt_ids) + request.max_new_tokens
    itemsize = engine.target.dtype.itemsize
    needed = engine.target.weights.arena.nbytes + num_slots * slot * itemsize
    for row in rows:
        probe = replace(
            field.probes[row["contender"]],
            prompt_ids=request.prompt_ids,
            max_new_tokens=request.max_new_tokens,
        )
        grown = peak_growth(probe)
        row["peak_MB"] = None if grown is None else grown / 1e6
        row["peak/needed"] = None if grown is None else grown / needed


def bench(args: argparse.Namespace, dtype: str, scratch: Path) -> tuple[list[Row], dict[str, Any]]:
    """All of one dtype."""
    prompts = load_prompts(args.prompts, args.problems, args.num_prompts, args.target)
    field = make_field(args, dtype, scratch)
    encode = field.contenders[PLAIN].engine.encode  # type: ignore[attr-defined]
    requests = [
        Request(encode(text), args.max_new_tokens, prompts.temperature, seed)
        for seed, text in enumerate(prompts.texts)
    ]
    run(field, requests, args.repeats)
    rows = rows_of(field, prompts.temperature)
    if not args.no_memory:
        add_memory(field, rows, requests[0])
    return rows, streaming(field)


def _arguments() -> argparse.ArgumentParser:
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("--target", help="a checkpoint directory; default: the bundled model")
    add("--drafters", help="all (the default), none, or names and paths with commas between")
    add(
        "--peers",
        help=f"all (default; of --gguf alone {LLAMA_CPP}), none, or some of: {', '.join(PEERS)}",
    )
    add(
        "--forms",
        nargs="+",
        choices=generate_gguf.FORMS,
        default=[generate_gguf.FILE],
        help="of --gguf alone: how we take its weights",
    )
    add("--cpu-time", action="store_true", help="of --gguf alone: of one thread, not wall time")
    add("--prompts", default="heldout", help="heldout, self-quoting, novel, unpredictable or JSONL")
    add("--problems", type=Path, default=HELDOUT, help="what the named sets are made of")
    add("--num-prompts", type=int, default=12)
    add("--max-new-tokens", type=int, help="default: 192; of --gguf alone 64")
    add("--prompt-tokens", type=int, default=512, help="of --gguf alone: tokens of its prompt")
    add("--repeats", type=int, default=3)
    add("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    add(
        "--gguf",
        type=Path,
        help="file or name, for llama.cpp in place of --target; alone: for us too",
    )
    add("--make-gguf", action="store_true", help="make it from the target")
    add("--no-memory", action="store_true", help="skip the processes that measure memory")
    return arguments


def _parse() -> argparse.Namespace:
    arguments = _arguments()
    args = start(arguments)
    args.is_of_gguf = args.gguf is not None and args.target is None
    args.peers = args.peers or (LLAMA_CPP if args.is_of_gguf else "all")
    args.peers = {
        "all": set(PEERS),
        "none": set(),
    }.get(args.peers, set(args.peers.split(",")))
    if args.peers - set(PEERS):
        arguments.error(f"--peers: expected some of {', '.join(PEERS)}")
    if args.gguf and args.target and len(args.dtype) > 1:
        arguments.error("--gguf: name its --dtype")
    args.gguf = args.gguf and target_path(str(args.gguf))
    if args.cpu_time and not (args.is_of_gguf and torch.get_num_threads() == 1):
        arguments.error("--cpu-time: goes with --gguf alone and --threads 1")
    args.drafters = args.drafters or (generate_gguf.DRAFTERS if args.is_of_gguf else "all")
    args.max_new_tokens = args.max_new_tokens or (64 if args.is_of_gguf else 192)
    args.target = args.target or BUILTIN
    if args.target != BUILTIN:
        args.target = str(target_path(args.target).resolve())
    if args.quick:
        args.num_prompts, args.repeats, args.max_new_tokens, args.no_memory = 1, 1, 8, True
        args.prompt_tokens, args.dtype = 16, args.dtype[:1]
    return args


def main() -> None:
    """Measure, report, and fail if a drafter changed the text."""
    args = _parse()
    if args.is_of_gguf:
        generate_gguf.run(args)
        return
    rows: list[Row] = []
    summary: dict[str, Any] = {
        "prompts": Path(args.prompts).name,
        "max_new_tokens": args.max_new_tokens,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in args.dtype:
            more, summary[dtype] = bench(args, dtype, Path(scratch))
            rows += more
    name = "generate" if args.prompts == "heldout" else f"generate_{Path(args.prompts).stem}"
    report(name, rows, save=args.save, summary=summary)
    changed = [row for row in rows if row["contender"].startswith("ours") and row["differs plain"]]
    if changed:
        raise SystemExit(f"not lossless: {', '.join(row['contender'] for row in changed)}")


if __name__ == "__main__":
    main()
