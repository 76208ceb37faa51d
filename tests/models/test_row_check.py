"""What is looked at when a model is loaded on a GPU of a kind not seen before; on the CPU here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from specrt import ops
from specrt.device import Device
from specrt.models import row_check
from specrt.models.row_check import SHAPES, check_products, check_rows

Spoil = Callable[[torch.Tensor], object]
CPU = torch.device("cpu")
THERE = Device(torch.device("cuda", 1))


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.device, torch.dtype]]:
    """Products that are asked for, of a GPU that torch says is there."""
    found: list[tuple[torch.device, torch.dtype]] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(row_check, "check_products", lambda *asked: found.append(asked))
    return found


def test_products_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all sizes, in one workspace each."""
    seen, linear = dict[tuple[int, ...], set[int]](), ops.linear
    workspaces = set[int]()

    def counting(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        seen.setdefault(tuple(weight.shape), set()).add(len(x))
        workspaces.add(rest["workspace"].data_ptr())
        assert rest["workspace"].numel() >= ops.linear_workspace(*weight.shape, len(x))
        return linear(x, weight, **rest)

    monkeypatch.setattr(ops, "linear", counting)
    check_products(CPU, torch.float32)
    assert seen == {shape: {1, 2, 8, 9, 32, 65, 101, 128} for shape in SHAPES}
    assert len(workspaces) == len(SHAPES)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: out[64:].add_(1e-2), "128 at other places, .* alone"),
        (lambda out: out.mul_(1 if len(out) > 100 else 1.001), "among fewer, 8 alone"),
        (lambda out: out[3, 0].neg_() if len(out) == 128 else 0, "1 among fewer"),
    ],
    ids=["by place", "by number", "one bit"],
)
def test_rows_that_depend_on_others(
    monkeypatch: pytest.MonkeyPatch, spoil: Spoil, words: str
) -> None:
    linear = ops.linear

    def spoilt(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        out = linear(x, weight, **rest)
        if tuple(weight.shape) == SHAPES[1]:
            spoil(out)
        return out

    monkeypatch.setattr(ops, "linear", spoilt)
    with pytest.raises(ValueError, match=r"^linear: on cpu a row's bits .* by a matrix \[") as no:
        check_products(CPU, torch.float32)
    assert f"{list(SHAPES[1])}, of 128 rows differ" in str(no.value)
    assert no.match(words) and str(no.value).endswith("device='cpu' runs this model")


def test_it_is_said_once_that_nobody_has_looked(
    looked_at: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="specrt"):
        check_rows(THERE, torch.float16)
    assert looked_at == [(THERE.place, torch.float16)]
    assert caplog.text.count("no test has seen a GPU of compute capability 8.9; in 2 products") == 1


def test_nothing_is_multiplied_where_somebody_has(
    looked_at: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rows(Device(), torch.bfloat16)
    monkeypatch.setattr(row_check, "SEEN_CAPABILITIES", frozenset({(8, 9)}))
    check_rows(THERE, torch.bfloat16)
    assert not looked_at
