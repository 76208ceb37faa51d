"""The second request with a prompt: how much sooner its first token comes.

Prompts of random tokens, each asked for twice of one engine; nothing else runs. Columns: the
milliseconds to the first token of either, medians over prompts; ``ratio``, how many times sooner
the second one's comes (the median of pairs); tokens of the prompt that were found, the others are
run; pages that are kept at the end. Both answers must be the same.
"""

from __future__ import annotations

import random
from statistics import median
from time import perf_counter

import specrt
from bench.harness import Row, parser, report, start
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult

PLAIN = "none"


def answer(engine: Engine, prompt: list[int], num_tokens: int) -> tuple[float, GenerationResult]:
    """Seconds to the first token, and the whole answer."""
    begun, first = perf_counter(), None
    for chunk in engine.stream(prompt, max_new_tokens=num_tokens, ignore_eos=True):
        first = first or perf_counter() - begun
        if chunk.result is not None:
            return first, chunk.result
    raise AssertionError("an answer has an end")


def row(target: str, drafter: str, dtype: str, prompts: list[list[int]], num_tokens: int) -> Row:
    """Of one drafter; the first prompt is not counted."""
    with specrt.load(target, drafter, dtype=dtype, progress=False) as engine:
        pairs, found = [], 0
        for prompt in prompts:
            first, said = answer(engine, prompt, num_tokens)
            second, again = answer(engine, prompt, num_tokens)
            if said.token_ids != again.token_ids:
                raise SystemExit(f"{drafter}: other tokens the second time")
            pairs.append((first, second))
            found = again.stats.num_cached_tokens
        pairs = pairs[1:]
        return {
            "drafter": drafter,
            "prompt": len(prompts[0]),
            "first ms": 1e3 * median(first for first, _ in pairs),
            "second ms": 1e3 * median(second for _, second in pairs),
            "ratio": median(first / second for first, second in pairs),
            "found": found,
            "pages kept": engine.stats.num_shared_pages,
        }


def main() -> None:
    """The command."""
    arguments = parser(__doc__)
    arguments.add_argument("--target", default="builtin")
    arguments.add_argument("--drafters", nargs="+", default=[PLAIN, "fspad", "eesd"])
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("--prompt", type=int, default=1000, help="tokens")
    arguments.add_argument("--count", type=int, default=5, help="prompts")
    args = start(arguments)
    size, count = (200, 2) if args.quick else (args.prompt, 1 + args.count)
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 1000) for _ in range(size)] for _ in range(count)]
    rows = [row(args.target, one, args.dtype, prompts, 16) for one in args.drafters]
    report("prefixes", rows, save=args.save)


if __name__ == "__main__":
    main()
