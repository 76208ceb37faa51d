"""Content in parts, and messages that are none, under templates of several kinds."""

from __future__ import annotations

from typing import Any

import pytest

from tests.train.chat_tokenizers import CHATML, THINKING, letter_tokenizer

PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }};{% endif %}{% endfor %}"
EACH = "{% for m in messages %}[{{ m.role }}]BODY{% endfor %}"
JOINING = {
    "ChatML": CHATML,
    "Qwen3": THINKING,
    "Llama 3": EACH.replace("BODY", "{{ m['content'] | trim }}"),
    "concatenating": EACH.replace("BODY", "{{ 'said: ' + m.content }}"),
    "strict": EACH.replace(
        "BODY", "{% if m.content is string %}{{ m.content }}{% else %}{% endif %}"
    ),
    "JSON": EACH.replace("BODY", "{{ m.content | tojson }}"),
}
TAKING = {
    "parts alone": EACH.replace("BODY", PARTS),
    "text too": EACH.replace(
        "BODY", "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"
    ),
}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def told(template: str, *messages: dict[str, Any]) -> str:
    tokenizer = letter_tokenizer(template)
    return str(tokenizer.inner.decode(tokenizer.apply_chat_template(messages)))


@pytest.mark.parametrize("template", JOINING.values(), ids=JOINING)
def test_parts_are_joined_for_templates_that_take_text(template: str) -> None:
    parts = [{"type": "text", "text": "one "}, "two", {"type": "input_text", "text": "!"}]
    last = {"role": "user", "content": "three"}
    expected = told(template, {"role": "user", "content": "one two!"}, last)
    assert told(template, {"role": "user", "content": parts}, last) == expected
    assert "one two!" in expected


@pytest.mark.parametrize("template", TAKING.values(), ids=TAKING)
def test_parts_stay_for_templates_that_go_through_them(template: str) -> None:
    parts = [{"type": "text", "text": "one"}, "two"]
    assert told(template, {"role": "user", "content": parts}) == "[user]one;two;"


def test_null_beside_tool_calls() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert told(CHATML, message).startswith("<|im_start|>assistant\n<|im_end|>")
    concatenating = JOINING["concatenating"]
    assert told(concatenating, message) == "[assistant]said: "
    knowing = EACH.replace("BODY", "{% if m.tool_calls %}{{ m.content is defined }}{% endif %}")
    assert told(knowing, message) == "[assistant]False"
    without = {key: value for key, value in message.items() if key != "content"}
    assert told(knowing, without) == "[assistant]False"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"content": "x"}, 'expected a "role" of text, got keys content'),
        ({"role": 5, "content": "x"}, 'expected a "role" of text, got 5'),
        ({"role": "user"}, 'expected "content" of text or parts of text, got none'),
        ({"role": "user", "content": 5}, "of text or parts of text, got int"),
        ({"role": "user", "content": None}, "of text or parts of text, got NoneType"),
        ({"role": "user", "content": {"type": "text"}}, "of text or parts of text, got dict"),
        (
            {"role": "user", "content": ["x", {"type": "image_url", "image_url": {}}]},
            r"content\[1\]: expected text, got a part of type 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, r'content\[0\]: .*"text", got dict'),
        ({"role": "user", "content": [None]}, r'content\[0\]: .* with "text", got NoneType'),
        ({"role": "user", "content": "ab\ud83d"}, r"got half of one, '\\ud83d', at position 2"),
        ({"role": "user", "content": ["\ude00"]}, r"content\[0\]: .* '\\ude00', at position 0"),
    ],
)
def test_a_message_that_is_none_is_named(message: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^prompt: messages\[1\]: {named}|: .*{named}"):
        told(CHATML, {"role": "user", "content": "fine"}, message)
    with pytest.raises(ValueError, match=r"messages\[1\]"):
        told(CHATML, {"role": "user", "content": "fine"}, message)


def test_whatever_a_template_raises_is_one_line() -> None:
    for body, said in (
        ("{{ 1 + m.content }}", "fails: TypeError: "),
        ("{{ m.content | int // 0 }}", "fails: ZeroDivisionError: "),
        ("{{ raise_exception('users only') }}", "refuses it: users only"),
    ):
        with pytest.raises(ValueError, match=f"^prompt: the chat template {said}"):
            told(EACH.replace("BODY", body), {"role": "user", "content": "x"})
    with pytest.raises(ValueError, match="^prompt: expected at least one message, got none"):
        told(CHATML)
