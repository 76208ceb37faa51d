"""FlashInfer's paged prefill with a custom mask, a contender of tree attention.

Its kernels are compiled when they are first asked for, which takes a minute or more of a process
that may not have it; so that is done beforehand: ``python -m bench.flashinfer_contender``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.attention_inputs import Tensors

if TYPE_CHECKING:
    from bench.tree_attention_cuda import Bench

_STAMP = Path(__file__).resolve().parents[1] / "build/flashinfer-compiled"
_WORKSPACE = 256 << 20


def require() -> None:
    """Raises unless it is installed and compiled for this GPU."""
    wanted = _wanted()
    if not _STAMP.exists() or _STAMP.read_text() != wanted:
        raise RuntimeError("not compiled: python -m bench.flashinfer_contender does it")


def _wanted() -> str:
    try:
        installed = version("flashinfer-python")
    except PackageNotFoundError:
        raise ImportError("not installed") from None
    return f"{installed} for {torch.cuda.get_device_capability()}"


def planned(bench: Bench) -> Callable[[Tensors], torch.Tensor]:
    """A launch on one set of inputs, ``[B * N, Hq, d]``; the plan, which is the same for all, made.

    Args:
        bench: whose inputs.
    """
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    shape, heads, indices, device = bench.shape, bench.shape.heads, bench.indices, bench.device
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    steps = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
    in_last_page = shape.total - (shape.num_pages - 1) * shape.page_size
    wrapper.plan(
        steps * shape.nodes,
        steps * shape.num_pages,
        indices.table.flatten(),
        torch.full((shape.batch,), in_last_page, dtype=torch.int32, device=device),
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        shape.page_size,
        custom_mask=indices.mask.repeat(shape.batch, 1).flatten(),
        sm_scale=bench.scale,
        q_data_type=bench.dtype,
        kv_data_type=bench.dtype,
    )

    def launch(tensors: Tensors) -> torch.Tensor:
        out: torch.Tensor = wrapper.run(tensors.q.flatten(0, 1), (tensors.k_cache, tensors.v_cache))
        return out

    return launch


def main() -> None:
    """Run it once on a small shape, so that its kernels are compiled."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    from bench import gpu, limits
    from bench.tree_attention_cuda import Bench, Case

    gpu.require_gpu()
    wanted = _wanted()
    bench = Bench(Case("small", limits.MODELS["Llama-3-8B"], 1, 130, 8), 1, gpu.Place())
    planned(bench)(bench.sets[0])
    torch.cuda.synchronize()
    _STAMP.parent.mkdir(exist_ok=True)
    _STAMP.write_text(wanted)
    print(f"FlashInfer {wanted} is compiled")


if __name__ == "__main__":
    main()
