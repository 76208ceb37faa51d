"""``specrt serve``: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specrt.cli import errors
from specrt.serve.options import ServeOptions, default_name, need_packages, url_of

if TYPE_CHECKING:
    from specrt.cli.engine_options import EngineOptions


def run(engine_options: EngineOptions, options: ServeOptions, limits: dict[str, int | None]) -> None:
    """Load a target and serve it until a signal ends that.

    Raises:
        ValueError: a package is missing, the address is taken, a key is none.
        OSError: the file of keys cannot be read.
        CheckpointError: of the target or the drafter.
    """
    need_packages()
    keys = options.keys()
    from specrt.serve.running import listen

    socket = listen(options)
    try:
        if not options.is_loopback and not keys:
            errors.note(f"anybody who reaches {options.host} may call: no --api-key is set")
        engine = engine_options.load(**limits)
        _serve(engine, engine_options.target, options, socket)
    finally:
        socket.close()


def _serve(engine, target, options, socket) -> None:
    import asyncio

    from specrt.engine.async_engine import AsyncEngine
    from specrt.serve import logs
    from specrt.serve.app import make_app
    from specrt.serve.running import Server, config_of

    logs.set_up(options.json_logs)
    name = options.served_model_name or default_name(target)
    url = url_of(options.host, socket.getsockname()[1])

    def say() -> None:
        print(f"specrt: {name} at {url}", flush=True)

    with_engine = AsyncEngine(engine)
    try:
        app = make_app(with_engine, name, options)
        server = Server(config_of(app, options), app.state.service, say)
        asyncio.run(server.serve([socket]))
    finally:
        with_engine.close()
