"""The list of models."""

from __future__ import annotations

import openai
import pytest


def test_the_list(client: openai.OpenAI, model: str) -> None:
    page = client.models.list()
    assert page.object == "list"
    assert model in [one.id for one in page.data]
    for one in page.data:
        assert one.object == "model"
        assert isinstance(one.created, int) and one.owned_by


def test_one(client: openai.OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model


def test_an_unknown_one(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")
