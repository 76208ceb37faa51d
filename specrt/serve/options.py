"""What a server is told, by the names of its command line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

API_KEY_NAME = "SPECRT_API_KEY"
"""Of the environment variable."""
_SERVER, _LIMITS = "Server", "Limits"


def _server(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_SERVER, **options)


def _limit(**options: Any) -> Any:
    return typer.Option(rich_help_panel=_LIMITS, **options)


@dataclass(frozen=True)
class ServeOptions:
    """A server's address, keys, limits and logs.

    Raises:
        ValueError: a field is out of range; names it.
    """

    host: Annotated[str, _server(help="Address to listen at; 0.0.0.0 is all of them.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, _server(help="0: any free one.")] = 8000
    served_model_name: Annotated[
        str | None, _server(help="What clients call the model; default: the target's name.")
    ] = None
    api_key: Annotated[
        list[str] | None,
        _server(help="A key that clients give; repeatable.", envvar=API_KEY_NAME),
    ] = None
    api_key_file: Annotated[
        str | None, _server(help="A file of such keys, one a line; # begins a comment.")
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        _server(help="Origin of web pages that may call (CORS), or '*'; repeatable."),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        _server(
            help="Name by which clients may call; repeatable; default: this machine's loopback "
            "names where it listens there alone, else any."
        ),
    ] = None
    json_logs: Annotated[bool, _server("--json-logs", help="One JSON object a line.")] = False
    log_prompts: Annotated[
        bool, _server("--log-prompts", help="Let logs have what was asked and answered.")
    ] = False
    page: Annotated[bool, _server("--page/--no-page", help="Serve the playground at /.")] = True

    max_body_bytes: Annotated[int, _limit(help="Of a request's body.")] = 4 << 20
    max_prompt_tokens: Annotated[int | None, _limit(help="Of a prompt; default: the context.")] = (
        None
    )
    max_output_tokens: Annotated[int | None, _limit(help="Of an answer; default: the context.")] = (
        None
    )
    max_choices: Annotated[int, _limit(help="Answers of a request: prompts times n.")] = 64
    body_seconds: Annotated[float, _limit(help="In which a body has to come.")] = 30.0
    request_seconds: Annotated[float, _limit(help="In which a request has to end.")] = 600.0
    ping_seconds: Annotated[
        float, _limit(help="After which a silent stream gets a comment; 0: never.")
    ] = 15.0
    drain_seconds: Annotated[
        float, _limit(help="That running requests have to end after SIGTERM or Ctrl-C.")
    ] = 30.0

    def __post_init__(self) -> None:
        ranges: tuple[tuple[str, float, float | None], ...] = (
            ("port", 0, 65535),
            ("max_body_bytes", 1, None),
            ("max_prompt_tokens", 1, None),
            ("max_output_tokens", 1, None),
            ("max_choices", 1, None),
            ("body_seconds", 0, None),
            ("request_seconds", 0, None),
            ("ping_seconds", 0, None),
            ("drain_seconds", 0, None),
        )
        for name, least, most in ranges:
            value = getattr(self, name)
            if value is None or (value >= least and (most is None or value <= most)):
                continue
            bounds = f"at least {least}" if most is None else f"{least}..{most}"
            raise ValueError(f"{name}: expected {bounds}, got {value!r}")

    def keys(self) -> tuple[str, ...]:
        """All keys, of the file too; none: anybody may call.

        Raises:
            ValueError: the file cannot be read or has none, or a key is empty or not of printable
                ASCII.
        """
        keys = [*(self.api_key or ()), *self._keys_of_file()]
        for key in keys:
            if not key:
                raise ValueError("api_key: expected a key, got an empty one")
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError("api_key: expected printable ASCII without spaces, got another")
        return tuple(dict.fromkeys(keys))

    def _keys_of_file(self) -> list[str]:
        if self.api_key_file is None:
            return []
        try:
            lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(
                f"api_key_file: {self.api_key_file} cannot be read: {reason}"
            ) from error
        found = [line.strip() for line in lines]
        keys = [line for line in found if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"api_key_file: expected keys, found none in {self.api_key_file}")
        return keys

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can call."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def need_packages() -> None:
    """Refuse to serve without the packages that it takes.

    Raises:
        ValueError: one is missing; names it and what installs it.
    """
    for name in ("fastapi", "uvicorn", "httptools", "prometheus_client"):
        try:
            __import__(name)
        except ModuleNotFoundError:
            raise ValueError(
                f"serve: needs the package {name}; pip install 'specrt[serve]' has it"
            ) from None


def url_of(host: str, port: int) -> str:
    """Where a browser finds the server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def default_name(target: str) -> str:
    """What clients call a target that has no other name."""
    return target.rstrip(os.sep).rsplit(os.sep, 1)[-1] if os.path.exists(target) else target
