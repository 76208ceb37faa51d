"""One seed, one text: alone, among others, drafted or not.

OpenAI promises "best effort" for ``seed``; that a batch or a drafter changes nothing is ours.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import openai
import pytest

LENGTH = 12
PROMPTS = [f"Question: Ann has {count} coins. Tell of them.\nAnswer:" for count in range(8)]


def said(client: openai.OpenAI, model: str, number: int, **options: Any) -> str:
    """The text of one request."""
    answer = client.completions.create(
        model=model,
        prompt=PROMPTS[number],
        max_tokens=LENGTH,
        **{"temperature": 1.0, "seed": number, **options},
    )
    return str(answer.choices[0].text)


def together(client: openai.OpenAI, model: str, **options: Any) -> list[str]:
    """All eight at once."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(partial(said, client, model, **options), range(8)))


@pytest.fixture(scope="module")
def alone(client: openai.OpenAI, model: str) -> list[str]:
    """Each by itself."""
    return [said(client, model, number) for number in range(8)]


def test_again(client: openai.OpenAI, model: str, alone: list[str]) -> None:
    assert [said(client, model, number) for number in range(8)] == alone


@pytest.mark.extension
def test_in_a_batch(client: openai.OpenAI, model: str, alone: list[str]) -> None:
    assert together(client, model) == alone


@pytest.mark.extension
def test_as_one_request(client: openai.OpenAI, model: str) -> None:
    """Prompts of one request share its seed, as eight requests of that seed would."""
    answer = client.completions.create(
        model=model, prompt=PROMPTS, max_tokens=LENGTH, temperature=1.0, seed=77
    )
    expected = [said(client, model, number, seed=77) for number in range(8)]
    assert [choice.text for choice in answer.choices] == expected


@pytest.mark.extension
@pytest.mark.parametrize(
    "speculative", [{"enabled": False}, {"enabled": True}, {"enabled": True, "max_tokens": 2}]
)
def test_drafted_or_not(
    client: openai.OpenAI, model: str, alone: list[str], speculative: dict[str, Any]
) -> None:
    body = {"speculative": speculative}
    assert together(client, model, extra_body=body) == alone


@pytest.mark.extension
@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"temperature": 0.5, "presence_penalty": 1}])
def test_whatever_the_law(client: openai.OpenAI, model: str, options: dict[str, Any]) -> None:
    off = {"speculative": {"enabled": False}}
    plain = [said(client, model, number, extra_body=off, **options) for number in range(4)]
    assert together(client, model, **options)[:4] == plain


@pytest.mark.extension
def test_a_choice_is_a_seed(client: openai.OpenAI, model: str) -> None:
    """Choice i of a seed is the text of that seed + i."""
    answer = client.completions.create(
        model=model, prompt=PROMPTS[0], max_tokens=LENGTH, temperature=1.0, seed=40, n=3
    )
    expected = [said(client, model, 0, seed=40 + i) for i in range(3)]
    assert [choice.text for choice in answer.choices] == expected


@pytest.mark.extension
def test_a_stream_says_the_same(client: openai.OpenAI, model: str, alone: list[str]) -> None:
    stream = client.completions.create(
        model=model, prompt=PROMPTS[3], max_tokens=LENGTH, temperature=1.0, seed=3, stream=True
    )
    assert "".join(c.choices[0].text for c in stream if c.choices) == alone[3]


@pytest.mark.extension
def test_the_prefix_cache_changes_nothing(client: openai.OpenAI, model: str) -> None:
    prompt = "Question: Bob walks nine miles a day. " * 8 + "\nAnswer:"
    texts = {
        client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=8,
            temperature=1.0,
            seed=1,
            extra_body={"cache_salt": salt},
        )
        .choices[0]
        .text
        for salt in ("a", "a", "b")
    }
    assert len(texts) == 1
