"""The commands and their options; what they do is in the modules beside this one.

Nothing here imports torch before a command runs, so that ``specrt --help`` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from specrt.cli import convert, distill, errors, replay, train
from specrt.cli.options import (
    INPUT,
    RUNTIME,
    SAMPLING,
    AddSpecialTokens,
    Chat,
    Controller,
    Device,
    Drafter,
    Dtype,
    Jsonl,
    MaxBatch,
    MaxNewTokens,
    MaxNodes,
    Seed,
    Target,
    Temperature,
    Threads,
)

app = typer.Typer(
    name="specrt",
    help="Speculative decoding that changes nothing but the speed.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

app.add_typer(train.app)


@app.command()
def demo(
    drafter: Drafter = "auto",
    controller: Controller = None,
    prompt: Annotated[str | None, typer.Option(help="Instead of the demo's own.")] = None,
    max_new_tokens: MaxNewTokens = 160,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    # In float32 the bundled model outgrows a CPU's caches, as real models do in any dtype.
    dtype: Annotated[
        str | None, typer.Option(help="As for generate; default: float32, on a GPU auto.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Plain decoding and speculation side by side, on the bundled model."""
    from specrt.cli import demo as command
    from specrt.cli.loading import drafter_name, load_engine
    from specrt.sampling import SamplingParams

    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    engine = load_engine(
        "builtin",
        drafter,
        device=device,
        dtype=dtype or ("auto" if device.startswith("cuda") else "float32"),
        threads=threads,
        controller=controller,
    )
    command.run(engine, drafter_name(drafter, "builtin", engine), prompt, sampling)


@app.command()
def generate(
    context: typer.Context,
    target: Target = "builtin",
    drafter: Drafter = "auto",
    controller: Controller = None,
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
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: Annotated[int, typer.Option(help="0 or -1: off.", rich_help_panel=SAMPLING)] = 0,
    top_p: Annotated[float, typer.Option(help="1: off.", rich_help_panel=SAMPLING)] = 1.0,
    min_p: Annotated[float, typer.Option(help="0: off.", rich_help_panel=SAMPLING)] = 0.0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="1: off; default: the model's own.", rich_help_panel=SAMPLING),
    ] = None,
    presence_penalty: Annotated[
        float, typer.Option(help="0: off.", rich_help_panel=SAMPLING)
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="0: off.", rich_help_panel=SAMPLING)
    ] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=VALUE,...", help="Added to logits; repeatable.", rich_help_panel=SAMPLING
        ),
    ] = None,
    suppress_tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Token that never comes; repeatable; default: the model's own.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    model_defaults: Annotated[
        bool,
        typer.Option(
            "--model-defaults",
            help="Take what is not given here from the model's generation_config.json.",
            rich_help_panel=SAMPLING,
        ),
    ] = False,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends the output; repeatable.", rich_help_panel=SAMPLING),
    ] = None,
    stop_token_ids: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID,...",
            help="Tokens that end the output; repeatable.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    include_stop_str_in_output: Annotated[
        bool,
        typer.Option(
            "--include-stop-str-in-output",
            help="Keep what ended the output in its text.",
            rich_help_panel=SAMPLING,
        ),
    ] = False,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Go on past its end.", rich_help_panel=SAMPLING),
    ] = False,
    logprobs: Annotated[
        bool,
        typer.Option("--logprobs", help="Add them to the JSON.", rich_help_panel=SAMPLING),
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    max_batch: MaxBatch = 8,
    max_nodes: MaxNodes = 64,
    threads: Threads = None,
) -> None:
    """Answer prompts: from --prompt, a file or a pipe."""
    from specrt.cli import generate as command
    from specrt.cli.loading import load_engine
    from specrt.cli.prompts import encode, own_sampling, read_prompts
    from specrt.sampling import SamplingParams

    if logprobs and not json:
        raise ValueError("logprobs: goes with --json, which shows them")
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=command.parse_logit_bias(logit_bias or ()) or None,
        suppress_tokens=tuple(suppress_tokens) if suppress_tokens else None,
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=command.parse_token_ids(stop_token_ids or ()),
        include_stop_str_in_output=include_stop_str_in_output,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    prompts = read_prompts(prompt, file, is_jsonl=jsonl, is_chat=chat)
    params = own_sampling(prompts, sampling)
    engine = load_engine(
        target,
        drafter,
        device=device,
        dtype=dtype,
        threads=threads,
        max_batch=max_batch,
        max_nodes=max_nodes,
        controller=controller,
    )
    if model_defaults:
        sampling = replace(sampling, **command.left_to_the_model(context, engine))
        params = own_sampling(prompts, sampling)
    encoded = encode(engine, prompts, add_special_tokens=add_special_tokens)
    write = command.write_stream if stream else command.write_results
    write(engine, encoded, params, is_json=json)


@app.command()
def bench(
    target: Target = "builtin",
    drafter: Drafter = "auto",
    controller: Controller = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file as for generate; default: problems the bundled model has not seen.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    jsonl: Jsonl = False,
    chat: Chat = False,
    add_special_tokens: AddSpecialTokens = True,
    num_prompts: Annotated[
        int | None, typer.Option(help="The first so many.", rich_help_panel=INPUT)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each.", rich_help_panel=RUNTIME)] = 3,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object.", rich_help_panel=INPUT)
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    max_nodes: MaxNodes = 64,
    threads: Threads = None,
) -> None:
    """Measure a drafter against plain decoding: speed-up, tau, equal tokens."""
    from specrt.cli import bench as command
    from specrt.cli.loading import drafter_name, load_engine
    from specrt.cli.prompts import encode, own_sampling, prompts_or_bundled
    from specrt.sampling import SamplingParams

    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    named = prompts_or_bundled(prompts, num_prompts, num_bundled=16, is_jsonl=jsonl, is_chat=chat)
    params = own_sampling(named, sampling)
    engine = load_engine(
        target,
        drafter,
        device=device,
        dtype=dtype,
        threads=threads,
        max_nodes=max_nodes,
        controller=controller,
    )
    encoded = encode(engine, named, add_special_tokens=add_special_tokens)
    name = drafter_name(drafter, target, engine)
    command.run(engine, name, encoded, params, repeats=repeats, is_json=json)


@app.command()
def info(
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Versions, CPU, GPUs and bundled models."""
    from specrt.cli import info as command

    command.show(command.collect(), is_json=json)


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

    return errors.run(invoke)
