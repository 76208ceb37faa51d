"""What is looked at when a model is loaded on a GPU of a kind not seen before; on the CPU here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specrt import ops
from specrt.config import ModelConfig
from specrt.models import row_check
from specrt.models.loader import Weights, load_weights
from specrt.models.row_check import check_products, check_rows, matrices

Spoil = Callable[[torch.Tensor, torch.Tensor], object]


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> Weights:
    return load_weights(checkpoint, ModelConfig.from_directory(checkpoint), torch.bfloat16)


@pytest.fixture
def there(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> Any:
    """They say that they are on a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    return replace(weights, embed=SimpleNamespace(device=torch.device("cuda", 1)))  # type: ignore


def test_each_shape_once(weights: Weights) -> None:
    layer = weights.layers[0]
    found = matrices(weights)
    assert found["qkv"] is layer.qkv and found["lm_head"] is weights.lm_head
    shapes = [tuple(tensor.shape) for tensor in found.values()]
    every = {tuple(x.shape) for x in (layer.qkv, layer.o, layer.gate_up, layer.down)}
    assert len(shapes) == len(set(shapes)) and set(shapes) == every | {weights.lm_head.shape}


def test_products_of_a_shape(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the docstring counts; rows of all sizes, at addresses that stay."""
    rows, linear = list[int](), ops.linear

    def counting(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        rows.append(len(x))
        return linear(x, weight, **rest)

    monkeypatch.setattr(ops, "linear", counting)
    check_products({"o": weights.layers[0].o})
    assert len(rows) == 33 and set(rows) == {1, 2, 8, 9, 32, 65, 101, 128}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out, _: out[64:].add_(1e-3), "128 at other places, .* alone"),
        (
            lambda out, _: out.mul_(1 if len(out) > 100 else 1.001),
            "rows differ .* among fewer, 8 a",
        ),
        (lambda out, _: out[3, 0].neg_() if len(out) == 128 else 0, "1 among fewer"),
        (lambda out, beside: out.add_(beside), "128 at other places, .* 8 alone"),
    ],
    ids=["by place", "by number", "one bit", "by what is beside"],
)
def test_rows_that_depend_on_others(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, spoil: Spoil, words: str
) -> None:
    linear = ops.linear

    def spoilt(
        x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor, workspace: torch.Tensor
    ) -> torch.Tensor:
        linear(x, weight, out=out)
        if weight.shape == weights.layers[0].down.shape:
            spoil(out, workspace[-1])
        return out

    monkeypatch.setattr(ops, "linear", spoilt)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # beside the first rows too
    shape = list(weights.layers[0].down.shape)
    with pytest.raises(ValueError, match=r"^linear: on cpu a row's bits .* by down \[") as caught:
        check_products(matrices(weights))
    assert f"by down {shape}, of 128 rows differ" in str(caught.value)
    assert caught.match(words) and str(caught.value).endswith("device='cpu' runs this model")


def test_it_is_said_once_that_nobody_has_looked(
    there: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="specrt"):
        check_rows(there)
    assert caplog.text.count("no test has seen a GPU of compute capability 8.9; in 5 products") == 1


def test_nothing_is_multiplied_where_somebody_has(
    there: Any, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_check, "SEEN_CAPABILITIES", frozenset({(8, 9)}))
    monkeypatch.setattr(ops, "linear", lambda *_, **__: pytest.fail("a product"))
    check_rows(there)
    monkeypatch.undo()
    check_rows(weights)  # on the CPU
