"""Tree attention against torch's SDPA with a mask over gathered keys and values."""

from __future__ import annotations

import torch

from bench.harness import Row, measure_interleaved, parser, ratio_to, report, start
from specrt.ops import tree_attention

HEADS = {"bundled": (4, 2, 64), "llama-3-8b": (32, 8, 128)}
PAGE_SIZE = 16


def one_shape(name: str, prefix: int, nodes: int, dtype: torch.dtype) -> Row:
    heads, kv_heads, dim = HEADS[name]
    total = prefix + nodes
    pages = -(-total // PAGE_SIZE)
    q = torch.randn(1, nodes, heads, dim)
    k_cache = torch.randn(pages, PAGE_SIZE, kv_heads, dim).to(dtype)
    v_cache = torch.randn(pages, PAGE_SIZE, kv_heads, dim).to(dtype)
    table = torch.randperm(pages).int()[None]
    parents = [(i - 1) // 2 for i in range(nodes)]  # a binary tree; the root's is -1
    mask = torch.zeros(nodes, total, dtype=torch.bool)
    mask[:, :prefix] = True
    ancestors = torch.zeros(1, nodes, 1, dtype=torch.int64)
    for i in range(nodes):
        if i:
            mask[i] = mask[parents[i]]
            ancestors[0, i] = ancestors[0, parents[i]]
        mask[i, prefix + i] = True
        ancestors[0, i, 0] |= 1 << i
    kv_len = torch.tensor([prefix], dtype=torch.int32)
    first_node = torch.zeros(1, dtype=torch.int32)
    num_nodes = torch.tensor([nodes], dtype=torch.int32)
    out, scale = torch.empty_like(q), dim**-0.5

    def ours() -> None:
        tree_attention(
            q, k_cache, v_cache, table, kv_len, first_node, num_nodes, ancestors, scale, out
        )

    # Gathered beforehand, in the cache's type, heads first: the baseline pays for attention alone.
    keys, values = (
        c[table[0].long()].flatten(0, 1)[:total].transpose(0, 1)[None].contiguous()
        for c in (k_cache, v_cache)
    )
    queries = q.to(dtype).transpose(1, 2).contiguous()

    def sdpa() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )

    ours()
    torch.testing.assert_close(out.transpose(1, 2), sdpa().float(), atol=2e-2, rtol=2e-2)
    seconds = measure_interleaved({"specrt": ours, "sdpa": sdpa}, min_time=0.05, rounds=10)
    flops = 4 * heads * dim * int(mask.sum())
    return {
        "heads": name,
        "dtype": str(dtype).removeprefix("torch."),
        "prefix": prefix,
        "nodes": nodes,
        "specrt_us": seconds["specrt"] * 1e6,
        "sdpa_us": seconds["sdpa"] * 1e6,
        "gflops": flops / seconds["specrt"] / 1e9,
        "ratio": ratio_to(seconds["sdpa"], seconds["specrt"]),
    }


def main() -> None:
    args = start(parser(__doc__))
    torch.manual_seed(0)
    rows = [
        one_shape(name, prefix, nodes, dtype)
        for name in HEADS
        for dtype in (torch.float32, torch.bfloat16)
        for prefix in ((128,) if args.quick else (128, 512, 2048))
        for nodes in ((8,) if args.quick else (1, 8, 60))
    ]
    report("tree_attention", rows, save=args.save)


if __name__ == "__main__":
    main()
