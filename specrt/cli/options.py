"""Options that several commands share, and dataclasses as a command's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

INPUT = "Input and output"
RUNTIME = "Runtime"
SAMPLING = "Sampling"

Target = Annotated[
    str,
    typer.Option(
        help="A Hugging Face directory, a GGUF file, OWNER/NAME of the Hub, 'builtin' or "
        "'smollm2'.",
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
NumPrompts = Annotated[
    int | None,
    typer.Option("--num-prompts", "--limit", help="The first so many.", rich_help_panel=INPUT),
]
PromptFile = Annotated[
    str | None,
    typer.Option(
        help="A file as for generate; default: problems the bundled model has not seen.",
        rich_help_panel=INPUT,
    ),
]
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


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses: of each field typer makes an option.

    Name, type and default are the field's, the help is in its ``Annotated``. Other parameters stay
    what they are. What a dataclass refuses ends the command as its own errors do.

    Args:
        command: its parameters are given by name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: one for name, one in hints.items() if is_dataclass(one)}

    @wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{one.name: given.pop(one.name) for one in fields(group)})
        command(**given)

    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _parameters(groups[name])
        else:
            parameters.append(_by_name(name, hints[name], parameter.default))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_by_name(one.name, hints[one.name], _default(one)) for one in fields(group)]


def _by_name(name: str, hint: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=hint, default=default)


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default
