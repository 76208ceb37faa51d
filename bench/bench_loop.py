"""The engine's own Python: a step with what computes left out, against a bare loop over the same.

Drafting, the target's pass, acceptance and the operations of settling and committing are replaced
by stubs that hand back fixed tensors. ``engine_us`` is a step of :class:`Engine` over them,
``bare_us`` a loop that calls the same stubs and appends the tokens, ``own_us`` the difference: what
a round pays for requests that may come, go and fail. ``ratio`` is bare / engine.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

from bench.harness import Row, parser, report, start
from bench.random_target import SilentTokenizer, random_weights
from specrt import SamplingParams
from specrt.accept import Accepting
from specrt.config import ModelConfig
from specrt.draft.base import EmptyDrafter
from specrt.engine.engine import Engine
from specrt.models.model import LlamaModel
from specrt.tree import TreeBuilder, stack
from specrt.types import AcceptResult, Proposal, VerifyOutput

VOCAB = 64
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1 << 20,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


class Fixed(EmptyDrafter):
    """Proposes the same trees every round."""

    def __init__(self, batch: int, num_nodes: int) -> None:
        tree = TreeBuilder(1)
        tree.add_path([3] * (num_nodes - 1), num_nodes)
        self.proposal = stack([tree] * batch)

    def propose(self, states: Any, budget: Any) -> Proposal:
        return self.proposal


class Stubs:
    """What stands for everything that computes."""

    def __init__(self, batch: int, num_nodes: int, accept_length: int) -> None:
        self.result = AcceptResult(
            path=torch.arange(num_nodes, dtype=torch.int32).repeat(batch, 1),
            accept_length=torch.full((batch,), accept_length, dtype=torch.int32),
            tokens=torch.full((batch, num_nodes), 3, dtype=torch.int32),
        )
        self.output = VerifyOutput(torch.zeros(batch, num_nodes, VOCAB), {})

    def forward(self, *_: object, **__: object) -> VerifyOutput:
        return self.output

    def accept(self, *_: object, **__: object) -> AcceptResult:
        return self.result

    def nothing(self, *_: object) -> None: ...

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In the places of what they stand for."""
        with ExitStack() as patches:
            patches.enter_context(patch.object(LlamaModel, "forward", self.forward))
            patches.enter_context(patch.object(Accepting, "accept", self.accept))
            patches.enter_context(patch("specrt.tree.ops.tree_settle", self.nothing))
            patches.enter_context(patch("specrt.cache.ops.kv_commit", self.nothing))
            yield


def make_engine(drafter: Fixed, batch: int) -> Engine:
    config = ModelConfig.from_dict(CONFIG)
    model = LlamaModel(config, random_weights(config, "cpu", torch.float32))
    tokenizer: Any = SilentTokenizer()
    return Engine(model, drafter, tokenizer, max_batch=batch, max_shared_tokens=0)


def bare_round(stubs: Stubs, drafter: Fixed, outputs: Sequence[list[int]]) -> None:
    """The least that a loop over the stubs can do."""
    drafter.propose(None, None)
    stubs.nothing()
    stubs.forward()
    result = stubs.accept()
    stubs.nothing()
    lengths, tokens = result.accept_length.tolist(), result.tokens.tolist()
    for row, output in enumerate(outputs):
        output += tokens[row][: lengths[row] + 1]


def median_us(call: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        begun = perf_counter()
        call()
        times.append(perf_counter() - begun)
    return 1e6 * statistics.median(times)


def bench(batch: int, num_nodes: int, accept_length: int, count: int, num_shown: int) -> Row:
    """One size."""
    stubs, drafter = Stubs(batch, num_nodes, accept_length), Fixed(batch, num_nodes)
    engine = make_engine(drafter, batch)
    params = SamplingParams(max_new_tokens=1 << 19, ignore_eos=True)
    with stubs.installed():
        for _ in range(batch):
            engine.add([1], params)
        outputs: list[list[int]] = [[] for _ in range(batch)]
        bare, engines = [], []
        for _ in range(5):  # in turn
            bare.append(median_us(lambda: bare_round(stubs, drafter, outputs), count))
            engines.append(median_us(engine.step, count))
        if num_shown:
            show_profile(engine, count, num_shown)
    bare_us, engine_us = statistics.median(bare), statistics.median(engines)
    return {
        "batch": batch,
        "nodes": num_nodes,
        "engine_us": engine_us,
        "bare_us": bare_us,
        "own_us": engine_us - bare_us,
        "ratio": bare_us / engine_us,
    }


def show_profile(engine: Engine, count: int, num_shown: int) -> None:
    """What takes most of a step, by the time of each function alone."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(count):
        engine.step()
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(num_shown)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--profile", type=int, default=0, metavar="N", help="show N functions")
    args = start(arguments)
    count = 50 if args.quick else 1000
    rows = [
        bench(batch, nodes, length, count, args.profile)
        for batch in args.batch
        for nodes, length in ((1, 0), (16, 3))
    ]
    report("loop", rows, save=args.save, summary={"goal_us": 60})


if __name__ == "__main__":
    main()
