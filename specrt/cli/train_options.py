"""Options that the kinds of ``specrt train`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DATA, RECIPE, RUN = "Data", "Recipe", "Run"

Target = Annotated[str, typer.Option(help="A Hugging Face directory, or 'builtin'.")]
Out = Annotated[Path, typer.Option(help="The drafter's directory.")]
DataFiles = Annotated[
    list[Path],
    typer.Option(help="JSONL or JSON with conversations; repeatable.", rich_help_panel=DATA),
]
MaxLength = Annotated[int, typer.Option(help="Longer sequences are cut.", rich_help_panel=DATA)]
HeldOut = Annotated[float, typer.Option(help="Share of the data kept apart.", rich_help_panel=DATA)]
Features = Annotated[
    str | None,
    typer.Option(
        help="'online', or a directory for the target's features; default: OUT/features, "
        "removed at the end, and online where no sequence is seen twice.",
        rich_help_panel=DATA,
    ),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Skip malformed lines.", rich_help_panel=DATA)
]
Epochs = Annotated[int, typer.Option(rich_help_panel=RECIPE)]
MaxSteps = Annotated[
    int | None, typer.Option(help="At most so many steps.", rich_help_panel=RECIPE)
]
Batch = Annotated[int, typer.Option(help="Sequences a step, in all.", rich_help_panel=RECIPE)]
Accumulate = Annotated[
    int, typer.Option(help="In so many parts a process.", rich_help_panel=RECIPE)
]
Lr = Annotated[float, typer.Option(rich_help_panel=RECIPE)]
Schedule = Annotated[str, typer.Option(help="linear or cosine.", rich_help_panel=RECIPE)]
Warmup = Annotated[
    int | None,
    typer.Option(help="Steps; default: 2000, at most a tenth of the run.", rich_help_panel=RECIPE),
]
WeightDecay = Annotated[float, typer.Option(rich_help_panel=RECIPE)]
ClipValue = Annotated[float, typer.Option(help="Of each gradient; 0: off.", rich_help_panel=RECIPE)]
ClipNorm = Annotated[float, typer.Option(help="Of all gradients; 0: off.", rich_help_panel=RECIPE)]
TrainSeed = Annotated[int, typer.Option(rich_help_panel=RECIPE)]
Precision = Annotated[str, typer.Option(help="auto, bf16 or float32.", rich_help_panel=RUN)]
MaxMinutes = Annotated[
    float | None, typer.Option(help="Stop then; going on is possible.", rich_help_panel=RUN)
]
SaveSteps = Annotated[
    int | None, typer.Option(help="Save the state so often.", rich_help_panel=RUN)
]
SaveMinutes = Annotated[float, typer.Option(rich_help_panel=RUN)]
LogSteps = Annotated[int, typer.Option(rich_help_panel=RUN)]
SaveDtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.", rich_help_panel=RUN)]
Depth = Annotated[int, typer.Option(help="Of the chains on held-out data.", rich_help_panel=RUN)]
Tensorboard = Annotated[bool, typer.Option(help="Write OUT/tensorboard.", rich_help_panel=RUN)]
Restart = Annotated[
    bool, typer.Option("--restart", help="Forget what OUT holds.", rich_help_panel=RUN)
]
Threads = Annotated[int | None, typer.Option(help="Default: torch's.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option("--json", help="The summary as JSON.", rich_help_panel=RUN)]
