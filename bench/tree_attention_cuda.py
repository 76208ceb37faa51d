"""Tree attention on a GPU: ours, SDPA, FlexAttention and FlashInfer, at large models' shapes.

SDPA is given keys and values gathered beforehand, the query heads of a KV head folded into rows
(so that nothing is repeated in memory) and an additive mask that is made once: it pays for
attention alone. FlashInfer reads the same pages as ours, its plan made beforehand. FlexAttention
compiles for each shape, some ten seconds each, so it runs where there is a goal only.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench import flashinfer_contender, gpu, limits
from bench.attention_inputs import Heads, Indices, Shape, Tensors, attend, tree_mask
from bench.gpu import OURS, Contender, Device, Place
from bench.gpu_report import Measured, run_bench
from bench.harness import Row
from specrt import ops
from specrt.ops import AttentionPlan, registry

BATCHES = (1, 4, 16)
PREFIXES = (2048, 8192, 512, 32768)
NODES = (60, 8, 1, 128)
PAGE_SIZE = 64
_ALIGNMENT = 16
"""Of a mask's rows, in elements: SDPA would copy a mask aligned to less."""
CONTENDERS = (OURS, "sdpa", "flex", "flashinfer")
Outputs = Callable[[], torch.Tensor]
"""Computes the first set and gives it as ``[B, N, Hq, d]``."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    model: limits.Model
    batch: int
    prefix: int
    nodes: int

    @property
    def shape(self) -> Shape:
        model = self.model
        heads = Heads(model.num_heads, model.num_kv_heads, model.head_dim)
        return Shape(heads, self.batch, self.prefix, self.nodes, PAGE_SIZE)

    @property
    def work(self) -> limits.Work:
        pairs = int(tree_mask(self.nodes).sum())
        return limits.tree_attention(self.model, self.batch, self.prefix, self.nodes, pairs)

    @property
    def held_bytes(self) -> int:
        """A set's cache, and its copies for those who want it gathered."""
        return 3 * self.work.num_bytes

    @property
    def has_flex(self) -> bool:
        return self.batch == 1 and self.nodes == 60 and self.prefix in PREFIXES[:2]

    def __str__(self) -> str:
        return f"{self.name} batch {self.batch} prefix {self.prefix} nodes {self.nodes}"


def cases(is_quick: bool, models: Mapping[str, limits.Model] = limits.MODELS) -> Iterator[Case]:
    """What the goals are stated for comes first, since a budget may cut the rest."""
    batches, nodes = ((1,), (60,)) if is_quick else (BATCHES, NODES)
    for batch in batches:
        for num_nodes in nodes:
            for prefix in PREFIXES[:2] if is_quick else PREFIXES:
                for name, model in models.items():
                    yield Case(name, model, batch, prefix, num_nodes)


class Bench:
    """The contenders of one case over rotating sets of inputs."""

    def __init__(self, case: Case, num_sets: int, place: Place) -> None:
        self.shape = case.shape
        self.device, self.dtype = device, dtype = place.device, place.dtype
        self.indices = Indices(self.shape, device)
        self.sets = [Tensors(self.shape, device, dtype, dtype) for _ in range(num_sets)]
        self.scale = self.shape.heads.head_dim**-0.5

    def contenders(
        self, has_flex: bool
    ) -> tuple[dict[str, Contender], dict[str, Outputs], dict[str, str]]:
        """Those that can be made here, their outputs, and why others cannot."""
        makers: dict[str, Callable[[], tuple[Contender, Outputs]]] = {
            OURS: self.ours,
            "sdpa": self.sdpa,
            "flashinfer": self.flashinfer,
        }
        if has_flex:
            makers["flex"] = self.flex
        made, outputs, failures = {}, {}, {}
        for name, make in makers.items():
            try:
                made[name], outputs[name] = make()
            except Exception as error:
                if name == OURS:
                    raise
                failures[name] = gpu.reason(error)
        return made, outputs, failures

    def ours(self, plan: AttentionPlan | None = None) -> tuple[Contender, Outputs]:
        """As the shape is planned by itself, or by ``plan``."""
        indices = self.indices
        workspace = self._workspace(plan) if registry.is_on_gpu(self.sets[0].q) else None

        def launch(tensors: Tensors) -> torch.Tensor:
            return attend(
                tensors,
                indices,
                self.scale,
                out=tensors.out,
                workspace=workspace,
                plan=plan,
            )

        return self._over_sets(launch), lambda: launch(self.sets[0])

    def _workspace(self, plan: AttentionPlan | None) -> torch.Tensor:
        heads = self.shape.heads
        size = ops.tree_attention_workspace(
            self.shape.batch,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            self.shape.nodes,
            self.shape.num_pages * PAGE_SIZE,
            self.sets[0].q.device,
            plan,
        )
        return torch.zeros(size, device=self.device)

    def sdpa(self) -> tuple[Contender, Outputs]:
        shape, heads = self.shape, self.shape.heads
        rows = shape.nodes * heads.group
        mask = torch.zeros(rows, _aligned(shape.total), device=self.device, dtype=self.dtype)
        mask = mask[:, : shape.total]
        mask.masked_fill_(~self.indices.mask.repeat_interleave(heads.group, 0), float("-inf"))
        mask = mask.expand(shape.batch, heads.num_kv_heads, -1, -1)
        split = (shape.batch, shape.nodes, heads.num_kv_heads, heads.group, heads.head_dim)
        folded = (shape.batch, heads.num_kv_heads, rows, heads.head_dim)
        inputs = [
            (
                tensors.q.view(split).transpose(1, 2).reshape(folded),
                *tensors.gathered(shape, self.indices.table),
            )
            for tensors in self.sets
        ]

        def launch(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=self.scale)

        def output() -> torch.Tensor:
            out = launch(inputs[0])
            heads_first = (out.shape[0], heads.num_kv_heads, shape.nodes, heads.group, -1)
            return out.view(heads_first).transpose(1, 2).reshape(self.sets[0].q.shape)

        return Contender([lambda i=i: launch(i) for i in inputs]), output

    def flex(self) -> tuple[Contender, Outputs]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        shape, prefix, last = self.shape, self.shape.prefix, self.shape.nodes - 1
        tree = self.indices.tree.to(self.device)

        def is_visible(b: Any, h: Any, row: Any, slot: Any) -> Any:
            return (slot < prefix) | tree[row, (slot - prefix).clamp(0, last)]

        mask = create_block_mask(
            is_visible, None, None, shape.nodes, shape.total, device=self.device
        )
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        inputs = [
            (tensors.q.transpose(1, 2), *tensors.gathered(shape, self.indices.table))
            for tensors in self.sets
        ]

        def launch(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
            out = compiled(*inputs, block_mask=mask, scale=self.scale, enable_gqa=True)
            assert isinstance(out, torch.Tensor)
            return out

        launches = [lambda i=i: launch(i) for i in inputs]
        return Contender(launches), lambda: launch(inputs[0]).transpose(1, 2)

    def flashinfer(self) -> tuple[Contender, Outputs]:
        flashinfer_contender.require()
        launch = flashinfer_contender.planned(self)
        return self._over_sets(launch), lambda: launch(self.sets[0]).view_as(self.sets[0].q)

    def _over_sets(self, launch: Callable[[Tensors], object]) -> Contender:
        return Contender([lambda tensors=tensors: launch(tensors) for tensors in self.sets])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def checked(outputs: dict[str, Outputs], failures: dict[str, str]) -> None:
    """Notes those that cannot run, or give something else than ours and at least one other do.

    Raises:
        AssertionError: some differ from ours, and none gives the same.
    """
    expected = outputs[OURS]().float()
    agreeing, differences = [], {}
    for name, output in outputs.items():
        try:
            found = output().float()
            torch.testing.assert_close(expected, found, atol=2e-2, rtol=2e-2)
        except AssertionError as error:
            differences[name] = error
        except Exception as error:
            failures[name] = gpu.reason(error)
        else:
            agreeing += [name] if name != OURS else []
    for name, error in differences.items():
        if not agreeing or name == OURS:
            raise AssertionError(f"{name}: {error}")
        failures[name] = f"differs from ours, and {' and '.join(agreeing)} does not"


def one_case(
    case: Case, device: Device, ceilings: limits.Ceilings, l2_bytes: int, has_flex: bool
) -> Measured:
    """No row if there is no memory for it."""
    free = device.free_bytes() * 4 // 5
    num_sets = limits.input_sets(case.work.num_bytes, case.held_bytes, l2_bytes, free)
    if num_sets == 0:
        return None, {OURS: f"needs {case.held_bytes / 1e9:.0f} GB of {free / 1e9:.0f} GB"}
    bench = Bench(case, num_sets, device.place)
    made, outputs, failures = bench.contenders(case.has_flex and has_flex)
    checked(outputs, failures)
    timings = device.measure({name: made[name] for name in made if name not in failures})
    failures |= timings.failures
    return _row(case, num_sets, timings, ceilings), failures


def _row(case: Case, num_sets: int, timings: gpu.Timings, ceilings: limits.Ceilings) -> Row:
    ours = timings.graph[OURS]
    row: Row = {
        "model": case.name,
        "batch": case.batch,
        "prefix": case.prefix,
        "nodes": case.nodes,
        **limits.figures(case.work, ours, ceilings),
        "eager_us": 1e6 * timings.eager[OURS],
        "input_sets": num_sets,
    }
    for name in CONTENDERS[1:]:
        seconds = timings.graph.get(name)
        row[f"{name}_us"] = None if seconds is None else 1e6 * seconds
        row[f"{name}/ours"] = None if seconds is None else seconds / ours
    return row


def run(args: argparse.Namespace, device: Device) -> None:
    """Measure and report what the budget allows."""
    measured = functools.partial(one_case, has_flex=not args.quick)
    chosen = cases(args.quick, device.models)
    run_bench("tree_attention_cuda", chosen, measured, args, device)
