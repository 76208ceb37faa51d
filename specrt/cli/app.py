"""The commands and their options; what they do is in the modules beside this one.

Nothing here imports torch before a command runs, so that ``specrt --help`` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from specrt.cli import bench, convert, distill, errors, replay, train
from specrt.cli.engine_options import (
    ChatEngine,
    Controller,
    Drafter,
    EngineOptions,
    ServedEngine,
    drafter_name,
    load_engine,
)
from specrt.cli.options import (
    INPUT,
    RUNTIME,
    AddSpecialTokens,
    Chat,
    Device,
    Jsonl,
    Threads,
    with_options,
)
from specrt.cli.sampling_options import (
    ChatSampling,
    DemoSampling,
    SamplingOptions,
    left_to_the_model,
)
from specrt.cli.serve import EngineSizes
from specrt.serve.options import ServeOptions
from specrt.targets import BUILTIN, SMOLLM2, how_to_install, is_installed

app = typer.Typer(
    name="specrt",
    help="Speculative decoding that changes nothing but the speed.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

app.add_typer(train.app)


@app.command()
@with_options
def demo(
    *,
    target: Annotated[
        str | None,
        typer.Option(
            help=f"As for generate; default: {SMOLLM2!r} where it is installed, else the bundled "
            "model."
        ),
    ] = None,
    drafter: Drafter = "auto",
    controller: Controller = None,
    prompt: Annotated[str | None, typer.Option(help="Instead of the demo's own.")] = None,
    sampling: DemoSampling,
    device: Device = "cpu",
    # In float32 the bundled model outgrows a CPU's caches, as real models do in any dtype.
    dtype: Annotated[
        str | None,
        typer.Option(help="As for generate; default: float32 for the bundled one on a CPU."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Plain decoding and speculation side by side, on a model that is here."""
    from specrt.cli import demo as command

    params = sampling.params()
    if target is None:
        target = SMOLLM2 if is_installed(SMOLLM2) else BUILTIN
        if target == BUILTIN:
            errors.note(f"the bundled model runs; a real one, {how_to_install(SMOLLM2)}")
    is_small = target == BUILTIN and not device.startswith("cuda")
    engine = load_engine(
        target,
        drafter,
        device=device,
        dtype=dtype or ("float32" if is_small else "auto"),
        threads=threads,
        controller=controller,
        max_shared_tokens=0,  # who is compared computes the prompt
    )
    own = engine.target
    shown = drafter_name(drafter, own.config, is_gpu=own.device.is_gpu)
    command.run(engine, shown, prompt, params, target)


@app.command()
@with_options
def chat(
    context: typer.Context,
    *,
    options: ChatEngine,
    system: Annotated[
        str | None,
        typer.Option("--system", help="What the model is told first.", rich_help_panel=INPUT),
    ] = None,
    sampling: ChatSampling,
) -> None:
    """Talk to a model in the terminal, or to a pipe's lines."""
    from specrt.cli import chat as command

    sampling.check_shown(is_json=False, where="generate --json")
    if sampling.n != 1:
        raise ValueError(f"n: expected 1, as a chat goes on from one answer, got {sampling.n}")
    params = sampling.params()
    engine = options.load(max_batch=1)
    if sampling.model_defaults:
        params = replace(params, **left_to_the_model(context, engine))
    command.run(command.Conversation(engine, params, system))


@app.command()
@with_options
def generate(
    context: typer.Context,
    *,
    options: EngineOptions,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt.", rich_help_panel=INPUT)
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", "-f", help="A file with the prompt; '-' is stdin.", rich_help_panel=INPUT
        ),
    ] = None,
    jsonl: Jsonl = False,
    chat: Chat = False,
    add_special_tokens: AddSpecialTokens = True,
    json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object per result.", rich_help_panel=INPUT),
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Show text as it comes.", rich_help_panel=INPUT)
    ] = False,
    sampling: SamplingOptions,
    max_batch: Annotated[
        int, typer.Option(help="Prompts that run together.", rich_help_panel=RUNTIME)
    ] = 8,
) -> None:
    """Answer prompts: from --prompt, a file or a pipe."""
    from specrt.cli import generate as command
    from specrt.cli.prompts import encode, own_sampling, read_prompts

    sampling.check_shown(is_json=json, where="--json")
    common = sampling.params()
    prompts = read_prompts(prompt, file, is_jsonl=jsonl, is_chat=chat)
    params = own_sampling(prompts, common)
    engine = options.load(max_batch=max_batch)
    if sampling.model_defaults:
        params = own_sampling(prompts, replace(common, **left_to_the_model(context, engine)))
    encoded = encode(engine, prompts, add_special_tokens=add_special_tokens)
    write = command.write_stream if stream else command.write_results
    write(engine, encoded, params, is_json=json)


@app.command()
@with_options
def serve(*, options: ServedEngine, sizes: EngineSizes, server: ServeOptions) -> None:
    """Serve a model to OpenAI's clients, and a page to talk to it."""
    from specrt.cli import serve as command

    command.run(options, sizes, server)


@app.command()
def info(
    target: Annotated[
        str | None, typer.Argument(help="A directory, GGUF file or name: its weights too.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Versions, CPU, GPUs and bundled models; what a target's weights are."""
    from specrt.cli import info as command

    command.show(command.collect(target), is_json=json)


app.command("bench")(bench.bench)
app.command("distill-data")(distill.distill_data)
app.command("convert")(convert.convert)
app.command("replay")(replay.replay)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from specrt import __version__

        print(f"specrt {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show it."),
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (the process's own by default); return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command = typer.main.get_command(app)

    def invoke() -> None:
        # Not command.main(), which has its own way with errors and Ctrl-C.
        with command.make_context("specrt", arguments) as context:
            command.invoke(context)

    return errors.run(invoke, is_last=argv is None)
