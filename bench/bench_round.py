"""Whole rounds of plain decoding and of trees on a GPU, measured or predicted.

``--device cuda``: random targets of the shapes of Llama-3-8B, Vicuna-7B and a quarter of
Llama-3-70B, made on the device. Plain decoding, and trees whose acceptance is *replayed* from a
recorded trace, so that a speed-up says what a drafter of that acceptance could win at the most.
``gpu ms``: the captured steps of a round by events; ``host gap %``: the rest of the round. ``% of
limit``: what a copy of the bytes that it must read takes, measured in the same run. Stages are
those of a round launched one by one. ``price %`` is what exactness costs: ours against cuBLAS at
the true number of rows in its place, both in the same graph, in turn. transformers: its forward
pass over a static cache, a replayed graph too.

``--predict`` needs no GPU: stages from bytes, FLOP and launches, on an H100 and an H200; no figure
of it is measured. Without a GPU, and where nothing else is asked for, it is all there is.

``--drafter``: whole rounds of ours, drafting included, in place of those, on Llama-3-8B's shape or
the ``--model``'s. Measured: see ``draft_rounds_cuda.py``; ``draft ms`` and so on by the device's
own clock, ``draft x streaming`` by the time in which its weights are read. Predicted: ``level 0``
gives the root's children, ``target`` is all that is not the drafter's, ``x plain round`` a round by
one of plain decoding.
"""

from __future__ import annotations

import torch

from bench import draft_rounds, gpu, limits, round_model
from bench.harness import parser, report, start
from bench.planted import recorded_trace
from bench.random_target import SPECS


def predict(model: str | None, prefix: int) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Rows and verdicts for one model, or all of them."""
    models = {name: limits.TARGETS[name] for name in SPECS if model in (None, name)}
    rows = round_model.prediction(models, prefix, _tau())
    return rows, round_model.verdicts(rows)


def predict_drafts(
    drafter: str, model: str | None, prefix: int
) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Rows and verdicts of whole rounds of one of our drafters."""
    name = model or round_model.NAME_OF_GOALS
    return draft_rounds.prediction(drafter, {name: limits.TARGETS[name]}, prefix, _tau())


def _tau() -> float:
    lengths = recorded_trace(round_model.TREE_NODES).accept_lengths
    return 1 + sum(lengths) / len(lengths)


def main() -> None:
    """The command."""
    arguments = parser(__doc__)
    gpu.add_arguments(arguments)
    arguments.set_defaults(device=None)
    arguments.add_argument("--predict", action="store_true", help="without a GPU; not measured")
    arguments.add_argument("--model", choices=list(SPECS), help="one shape; default: all")
    arguments.add_argument("--drafter", choices=draft_rounds.DRAFTERS, help="ours, and its rounds")
    arguments.add_argument("--prefix", type=int, default=2048, help="tokens of the prompt")
    args = start(arguments)
    is_bare = args.device is None and not args.dry and not torch.cuda.is_available()
    if args.drafter and (args.predict or is_bare):
        rows, said = predict_drafts(args.drafter, args.model, args.prefix)
        report(f"round_predicted_{args.drafter}", rows, save=args.save, summary=said)
        return
    if args.predict or is_bare:
        rows, said = predict(args.model, args.prefix)
        report("round_predicted", rows, save=args.save, summary=said)
        return
    args.device = args.device or "cuda"
    if args.device != "cuda":
        raise SystemExit("bench_round: --device cuda or --predict; a CPU's are bench_loop's")
    device = gpu.chosen_device(args)
    from bench import draft_rounds_cuda, round_cuda

    (draft_rounds_cuda if args.drafter else round_cuda).run(args, device)


if __name__ == "__main__":
    main()
