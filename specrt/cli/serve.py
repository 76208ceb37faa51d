"""``specrt serve``: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from specrt.cli import errors
from specrt.cli.options import RUNTIME
from specrt.serve.options import API_KEY_NAME, ServeOptions, default_name, need_packages, url_of

if TYPE_CHECKING:
    from specrt.cli.engine_options import EngineOptions
    from specrt.engine.engine import Engine


@dataclass(frozen=True)
class EngineSizes:
    """What an engine that serves holds at once."""

    max_batch: Annotated[
        int, typer.Option(help="Requests that run together.", rich_help_panel=RUNTIME)
    ] = 32
    max_waiting: Annotated[
        int,
        typer.Option(help="Requests that wait; more get 503.", rich_help_panel=RUNTIME),
    ] = 256
    prefill_chunk: Annotated[
        int,
        typer.Option(help="Prompt tokens run between two rounds.", rich_help_panel=RUNTIME),
    ] = 512
    max_cached_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of all requests; default: by memory.", rich_help_panel=RUNTIME),
    ] = None
    max_shared_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of ended requests kept for later prompts; 0: none.",
            rich_help_panel=RUNTIME,
        ),
    ] = None


def run(engine_options: EngineOptions, sizes: EngineSizes, options: ServeOptions) -> None:
    """Load a target and serve it until a signal ends that.

    What is wrong is said as soon as it can be known: first what options and configurations tell,
    then whether the address is free, then what only weights tell.

    Raises:
        ValueError: a package is missing, the address is taken, a key is none.
        CheckpointError: of the target or the drafter.
    """
    need_packages()
    from specrt.engine.limits import EngineLimits
    from specrt.serve.running import listen

    keys = options.keys()
    if not keys and API_KEY_NAME in os.environ:  # a secret that did not come is no wish for none
        raise ValueError(f"{API_KEY_NAME}: expected a key, got an empty one")
    EngineLimits(max_nodes=engine_options.max_nodes, **vars(sizes))
    engine_options.check()
    with listen(options) as listening:  # before what takes long
        if not options.is_loopback and not keys:
            errors.note(f"anybody who reaches {options.host} may call: there is no --api-key")
        with engine_options.load(**vars(sizes)) as engine:
            _serve(engine, engine_options.target, options, listening)


def _serve(engine: Engine, target: str, options: ServeOptions, listening: socket.socket) -> None:
    from specrt.engine.async_engine import AsyncEngine
    from specrt.serve import logs
    from specrt.serve.app import make_app
    from specrt.serve.running import Server, config_of

    logs.set_up(options.json_logs)
    name = options.served_model_name or default_name(target)
    url = url_of(options.host, listening.getsockname()[1])

    def say() -> None:
        print(f"specrt: serving {name} at {url}", flush=True)

    served = AsyncEngine(engine)
    try:
        app = make_app(served, name, options)
        server = Server(config_of(app, options), app.state.service, say)
        asyncio.run(server.serve([listening]))
    finally:
        served.close()
