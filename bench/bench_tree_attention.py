"""Tree attention against torch's SDPA with a mask over gathered keys and values.

Rows with a ``window`` are of a model whose layers have a sliding one (Mistral 7B's heads); the last
has besides it a cap of scores, which the baseline goes without.

``--device cuda`` has more contenders and the shapes of large models: ``tree_attention_cuda.py``.
"""

from __future__ import annotations

import torch

from bench import gpu
from bench.attention_inputs import Heads, Indices, Shape, Tensors, attend
from bench.harness import Row, measure_interleaved, parser, ratio_to, report, start

HEADS = {"bundled": Heads(4, 2, 64), "llama-3-8b": Heads(32, 8, 128)}
WINDOWS = ((1024, None), (1024, 50.0))  # and caps
PAGE_SIZE = 16


def one_shape(
    name: str,
    prefix: int,
    nodes: int,
    dtype: torch.dtype,
    window: int | None = None,
    cap: float | None = None,
) -> Row:
    heads = HEADS[name]
    shape = Shape(heads, 1, prefix, nodes, PAGE_SIZE)
    indices = Indices(shape, "cpu")
    tensors = Tensors(shape, "cpu", torch.float32, dtype)
    scale = heads.head_dim**-0.5

    def ours() -> None:
        attend(tensors, indices, scale, out=tensors.out, sliding_window=window, cap=cap)

    mask = indices.mask
    if window is not None:
        position = torch.cat([torch.arange(prefix), prefix + indices.tree.sum(dim=1) - 1])
        mask = mask & (position[None] > position[prefix:, None] - window)

    # Gathered beforehand, in the cache's type, heads first: the baseline pays for attention alone.
    keys, values = tensors.gathered(shape, indices.table)
    queries = tensors.q.to(dtype).transpose(1, 2).contiguous()

    def sdpa() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )

    ours()
    if cap is None:
        torch.testing.assert_close(
            tensors.out.transpose(1, 2), sdpa().float(), atol=2e-2, rtol=2e-2
        )
    seconds = measure_interleaved({"specrt": ours, "sdpa": sdpa}, min_time=0.05, rounds=10)
    flops = 4 * heads.num_heads * heads.head_dim * int(mask.sum())
    return {
        "heads": name,
        "dtype": str(dtype).removeprefix("torch."),
        "prefix": prefix,
        "nodes": nodes,
        "window": window,
        "cap": cap,
        "specrt_us": seconds["specrt"] * 1e6,
        "sdpa_us": seconds["sdpa"] * 1e6,
        "gflops": flops / seconds["specrt"] / 1e9,
        "ratio": ratio_to(seconds["sdpa"], seconds["specrt"]),
    }


def main() -> None:
    arguments = parser(__doc__)
    gpu.add_arguments(arguments)
    args = start(arguments)
    torch.manual_seed(0)
    if args.device == "cuda":
        device = gpu.chosen_device(args)
        from bench import tree_attention_cuda

        tree_attention_cuda.run(args, device)
        return
    rows = [
        one_shape(name, prefix, nodes, dtype)
        for name in HEADS
        for dtype in (torch.float32, torch.bfloat16)
        for prefix in ((128,) if args.quick else (128, 512, 2048))
        for nodes in ((8,) if args.quick else (1, 8, 60))
    ]
    rows += [
        one_shape("llama-3-8b", 256 if args.quick else 4096, nodes, torch.bfloat16, *options)
        for options in WINDOWS
        for nodes in ((8,) if args.quick else (1, 8, 60))
    ]
    report("tree_attention", rows, save=args.save)


if __name__ == "__main__":
    main()
