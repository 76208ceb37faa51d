"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from specrt.draft.kinds import describe_names

SAMPLING = "Sampling"
INPUT = "Input and output"
RUNTIME = "Runtime"

Target = Annotated[
    str, typer.Option(help="A Hugging Face directory, or 'builtin'.", rich_help_panel=RUNTIME)
]
Drafter = Annotated[
    str,
    typer.Option(
        help=f"{describe_names()}.",
        rich_help_panel=RUNTIME,
    ),
]
Controller = Annotated[
    str | None,
    typer.Option(
        help="How long a trained drafter drafts: fixed-K, threshold, adaptive-threshold, beta-ts, "
        "calibration-ts or cost-aware; default: EESD cost-aware, others by measured cost.",
        rich_help_panel=RUNTIME,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of weights and cache: auto, float32 (CPU only), bfloat16 or float16.",
        rich_help_panel=RUNTIME,
    ),
]
Device = Annotated[
    str,
    typer.Option(help="Where the target runs: cpu, cuda or cuda:N.", rich_help_panel=RUNTIME),
]
Threads = Annotated[
    int | None, typer.Option(help="Of the kernels; default: torch's.", rich_help_panel=RUNTIME)
]
MaxNodes = Annotated[
    int, typer.Option(help="Largest tree, its root included.", rich_help_panel=RUNTIME)
]
MaxBatch = Annotated[int, typer.Option(help="Prompts that run together.", rich_help_panel=RUNTIME)]
MaxNewTokens = Annotated[int, typer.Option(help="At most so many.", rich_help_panel=SAMPLING)]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.", rich_help_panel=SAMPLING)]
Jsonl = Annotated[
    bool,
    typer.Option(
        "--jsonl",
        help="The input has JSON objects, one a line or in an array (as given for names in .jsonl "
        "and .json), with 'prompt', 'messages', 'prompt_token_ids', 'turns' (the first one) or "
        "training data; their sampling parameters are their own.",
        rich_help_panel=INPUT,
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Prompts are user messages.", rich_help_panel=INPUT)
]
AddSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--add-special-tokens/--no-add-special-tokens",
        help="Whether the tokenizer puts its own (bos) before texts; not where they have them.",
        rich_help_panel=INPUT,
    ),
]
