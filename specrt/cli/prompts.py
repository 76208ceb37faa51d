"""Prompts from the command line, a file or a pipe."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrt.cli.errors import note
from specrt.json_lines import JsonItem, iter_items

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.engine.prompts import Prompt
    from specrt.sampling import SamplingParams

STDIN = "-"
_JSON_NAMES = (".jsonl", ".json")
_IDS = ("prompt_token_ids", "prompt_ids", "input_ids")
_FORMS = (*_IDS, "prompt", "messages", "turns")
# Keys of training data, where there is none of those; and what belongs to them.
_TRAINING = ("conversations", "question", "instruction")
_TRAINING_REST = ("input", "system", "history")
# What data sets say about a prompt beside it, and what is not part of it.
_NOTES = frozenset(
    """
    id _id idx index uid uuid unique_id custom_id question_id prompt_id problem_id task_id
    conversation_id data_id sample_id task name title category subcategory type subject topic domain
    tag tags level difficulty language lang source dataset dataset_name datasplit split url license
    author annotator date created timestamp model generator target reference references answer
    answers answer_type answerKey gold label labels solution canonical_solution final_answer code
    completion response output outputs expected expected_output ground_truth rationale explanation
    chosen rejected score score_chosen score_rejected rating response_ids finish_reason entry_point
    test tests test_list test_setup_code challenge_test_list test_imports num_tokens num_turns
    metadata meta info extra comment comments note notes
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt and what its line says about it."""

    name: str
    """What error messages call it."""
    prompt: Prompt
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its own sampling parameters."""
    message: str | None = None
    """What a user says, where the target has a chat template: asked in place of ``prompt``."""
    category: str | None = None
    """What its line says its task or category is."""


def read_prompts(
    prompt: str | None, file: str | None, *, is_jsonl: bool, is_chat: bool
) -> list[NamedPrompt]:
    """The prompts asked for.

    An object has its prompt under one of ``prompt``, ``messages``, ``prompt_token_ids``, ``turns``
    (of which the first is asked, as a message where the target chats) or a key of training data.
    Its other keys are sampling parameters of its own, or notes that data sets make (``id``,
    ``category``, ``answer``, ...).

    Args:
        prompt: the text itself, or None.
        file: a path, ``"-"`` for stdin, or None; with neither, text comes from a pipe.
        is_jsonl: JSON objects, one a line or in an array; taken as given where the name ends in
            ``.jsonl`` or ``.json``.
        is_chat: texts are user messages.

    Raises:
        ValueError: options that exclude each other, or an object that is not what it should be;
            names it and the key.
        OSError: the file cannot be read.
    """
    if prompt is not None and file is not None:
        raise ValueError("prompt: expected --prompt or --file, got both")
    if prompt is not None:
        if is_jsonl:
            raise ValueError("jsonl: goes with --file or a pipe, not with --prompt")
        return [NamedPrompt("prompt", _as_chat(prompt, is_chat))]
    name, data = _read(file)
    if is_jsonl or name.endswith(_JSON_NAMES):
        objects = [JsonItem(i.where, i.value()) for i in iter_items(name, BytesIO(data))]
        prompts = [_parse_object(item, is_chat) for item in objects]
        _tell_of_turns(name, objects)
        return prompts
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8 text: {error}") from error
    # Editors end a file with a newline that is not meant as part of the prompt.
    return [NamedPrompt(name, _as_chat(text.removesuffix("\n").removesuffix("\r"), is_chat))]


def prompts_or_bundled(
    file: str | None, count: int | None, *, num_bundled: int, is_jsonl: bool, is_chat: bool
) -> list[NamedPrompt]:
    """The first ``count`` prompts of a file, or problems the bundled target has not seen.

    Args:
        file: None: ``count`` bundled ones, or ``num_bundled``.
        count: None: all of the file.
        is_jsonl, is_chat: as for :func:`read_prompts`; of a file alone.

    Raises:
        ValueError: as :func:`read_prompts`, or there are not so many.
        OSError: the file cannot be read.
    """
    from specrt.builtin import heldout_prompts

    if count is not None and count < 1:
        raise ValueError(f"num_prompts: expected at least 1, got {count}")
    if file is not None:
        return read_prompts(None, file, is_jsonl=is_jsonl, is_chat=is_chat)[:count]
    for name, is_given in (("jsonl", is_jsonl), ("chat", is_chat)):
        if is_given:
            raise ValueError(f"{name}: goes with --prompts, of which there are none")
    before, behind = "Question: ", "\nAnswer:"  # the bundled target's own template puts them there
    try:
        found = heldout_prompts(count or num_bundled)
    except ValueError as error:
        raise ValueError(f"num_prompts: {str(error).removeprefix('count: ')}") from error
    return [
        NamedPrompt(f"problem {i}", text, message=text.removeprefix(before).removesuffix(behind))
        for i, text in enumerate(found, start=1)
    ]


def own_sampling(prompts: Sequence[NamedPrompt], sampling: SamplingParams) -> list[SamplingParams]:
    """Each prompt's parameters: those given, but for what its line says.

    Raises:
        ValueError: a line's option is out of range; names both.
    """
    params = []
    for prompt in prompts:
        try:
            params.append(replace(sampling, **prompt.options) if prompt.options else sampling)
        except ValueError as error:
            raise ValueError(f"{prompt.name}: {error}") from error
    return params


def encode(
    engine: Engine, prompts: Sequence[NamedPrompt], *, add_special_tokens: bool = True
) -> list[Prompt]:
    """The prompts as token ids; what is odd about them is said on stderr.

    A :attr:`NamedPrompt.message` goes through the chat template, if the tokenizer has one.

    Raises:
        ValueError: a prompt is empty, no text, or does not fit the chat template; names it.
    """
    encoded: list[Prompt] = []
    has_template = engine.tokenizer.inner.chat_template is not None
    for one in prompts:
        is_said = has_template and one.message is not None
        prompt = _as_chat(one.message or "", is_chat=True) if is_said else one.prompt
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                encoded.append(engine.encode(prompt, add_special_tokens=add_special_tokens))
            except ValueError as error:
                reason = str(error).removeprefix("prompt: ")
                raise ValueError(f"{one.name}: {reason}") from error
        for warning in caught:
            note(f"{one.name}: {warning.message}")
    return encoded


def _read(file: str | None) -> tuple[str, bytes]:
    if file is None and sys.stdin.isatty():
        raise ValueError("prompt: expected --prompt TEXT, --file FILE or text on stdin, got none")
    if file is None or file == STDIN:
        return "stdin", sys.stdin.buffer.read()
    return file, Path(file).read_bytes()


def _as_chat(text: str, is_chat: bool) -> Prompt:
    return [{"role": "user", "content": text}] if is_chat else text


# --- JSON objects ---------------------------------------------------------------------------------


def _parse_object(item: JsonItem, is_chat: bool) -> NamedPrompt:
    where, data = item.where, item.content
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(data).__name__}")
    given = [key for key in _FORMS if key in data] or [key for key in _TRAINING if key in data]
    has_ids = bool(given) and given[0] in _IDS
    if len(given) != 1 and not (has_ids and given[1:] == ["prompt"]):
        forms = ", ".join((*_FORMS, *_TRAINING))
        keys = ", ".join(map(str, given or data)) or "no keys"
        raise ValueError(f"{where}: expected an object with one of {forms}; got {keys}")
    key = given[0]
    used = {*given, *(_TRAINING_REST if key in _TRAINING else _TRAINING)}
    options = _options(where, {k: value for k, value in data.items() if k not in used})
    prompt = _prompt(item, key, data[key], is_chat)
    said = data.get("task") or data.get("category")
    return NamedPrompt(
        where,
        prompt,
        options,
        message=prompt if key == "turns" and isinstance(prompt, str) else None,
        category=said if isinstance(said, str) else None,
    )


def _options(where: str, rest: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters among a line's other keys, notes left out; null is none."""
    from specrt.option_hints import unknown_option
    from specrt.sampling import SamplingParams

    known = [one.name for one in fields(SamplingParams)]
    for key in rest:
        if key not in known and key not in _NOTES:
            raise ValueError(
                f'{where}: {unknown_option(key, known)} (or a note, as "id" or "metadata")'
            )
    return {key: rest[key] for key in known if rest.get(key) is not None}


def _prompt(item: JsonItem, key: str, value: Any, is_chat: bool) -> Prompt:
    place = f'{item.where}: "{key}"'
    if key == "prompt" and isinstance(value, str):
        return _as_chat(value, is_chat)
    if key in _TRAINING or (key == "messages" and _is_sharegpt(value)):
        return _training_prompt(item, is_chat)
    if not isinstance(value, list):
        expected = "text or a list" if key == "prompt" else "a list"
        raise ValueError(f"{place}: expected {expected}, got {type(value).__name__}")
    if key == "turns":
        if not value or not isinstance(value[0], str):
            raise ValueError(f"{place}: expected a list of texts")
        return _as_chat(value[0], is_chat)
    return value


def _is_sharegpt(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(t, dict) and "from" in t for t in value)


def _training_prompt(item: JsonItem, is_chat: bool) -> Prompt:
    """What a line of training data has the target go on from."""
    from specrt.train.data.records import Chat, Pair, Problem, parse_record

    record = parse_record(item)
    if isinstance(record, Problem):
        record = record.as_chat() if is_chat else record.as_pair()
    if isinstance(record, Chat):
        return list(record.without_last_response().messages)
    return record.prompt if isinstance(record, Pair) else list(record.prompt_ids)


def _tell_of_turns(name: str, objects: Sequence[JsonItem]) -> None:
    count = sum(len(item.content.get("turns", ())) > 1 for item in objects)
    if count:
        note(f"{name}: several turns in {count} of {len(objects)} prompts; the first is asked")
