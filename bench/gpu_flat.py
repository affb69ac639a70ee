"""What bench/gpu.py measures, the rest: optimizer, ZeRO's buckets, experts, sums over ranks.

Kernels with peers run with peers that are not there: their buffers are at hand and their flags up,
so that is the time of the kernels without any link. Right results between processes are
gpu_peers.py's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import EPS, OPS, STREAMING, Case, Inputs, Sizes, backward, randn
from gpu_peers import alone
from torch import Tensor
from torch.optim.adamw import adamw as adamw_by_torch

from galvatron_compile.kernels import adamw, buckets, experts, scatter_norm, sum_norm
from galvatron_compile.kernels.peers import register

SETTINGS: dict[str, Any] = dict(lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8)
STEP = 3
PARTS = 4  # of a bucket
NUM_EXPERTS = 8
NUM_PEERS = 8
ALONE = "bench, alone"


def _optimizer(sizes: Sizes, device: torch.device) -> Inputs:
    """(master, gradient, moments, copy, 1 / loss scale, what the norm is clipped by)."""
    numel = sizes.rows * sizes.features
    master, first = (randn(device, numel, dtype=torch.float32) for _ in range(2))
    second, gradient = torch.rand(numel, device=device), randn(device, numel)
    factors = torch.full((), 0.5, device=device), torch.full((), 0.75, device=device)
    return master, gradient, first, second, torch.zeros_like(gradient), *factors


def _our_adamw(
    master: Tensor, gradient: Tensor, first: Tensor, second: Tensor, copy: Tensor,
    unscale: Tensor, clip: Tensor,
) -> Inputs:  # fmt: skip
    given = SETTINGS["lr"], SETTINGS["beta1"], SETTINGS["beta2"], SETTINGS["eps"]
    OPS.adamw_(
        master, gradient, first, second, copy, unscale * clip, STEP, *given,
        SETTINGS["weight_decay"],
    )  # fmt: skip
    return master, first, second, copy


def _unfused_adamw(
    master: Tensor, gradient: Tensor, first: Tensor, second: Tensor, copy: Tensor,
    unscale: Tensor, clip: Tensor,
) -> Inputs:  # fmt: skip
    step = torch.full((), STEP - 1.0)
    scaled = gradient.to(master.dtype).mul_(unscale).mul_(clip)
    adamw_by_torch(
        [master], [scaled], [first], [second], [], [step], foreach=True, fused=False,
        amsgrad=False, maximize=False, **SETTINGS,
    )  # fmt: skip
    copy.copy_(master)
    return master, first, second, copy


def _pytorch_fused_adamw(
    master: Tensor, gradient: Tensor, first: Tensor, second: Tensor, copy: Tensor,
    unscale: Tensor, clip: Tensor,
) -> None:  # fmt: skip
    step = torch.full((), STEP - 1.0, device=master.device)
    scaled = gradient.to(master.dtype).mul_(unscale).mul_(clip)
    adamw_by_torch(
        [master], [scaled], [first], [second], [], [step], foreach=False, fused=True,
        amsgrad=False, maximize=False, **SETTINGS,
    )  # fmt: skip
    copy.copy_(master)


def _bucket(sizes: Sizes, device: torch.device) -> Inputs:
    """(gradients, float32 bucket, where chunks begin, their sizes); 7 stands where nothing is."""
    square, row = (sizes.features, sizes.features), (sizes.features,)
    shapes = (square, row, square, (3, *row), square) * max(1, sizes.rows // 16384)
    gradients = [randn(device, *shape) for shape in shapes]
    chunks = [-(-g.numel() // PARTS) for g in gradients]
    offsets = [sum(-(-c // 32) * 32 for c in chunks[:k]) for k in range(len(chunks))]
    out = torch.full((PARTS, offsets[-1] + chunks[-1]), 7.0, device=device)
    return gradients, out, offsets, chunks


def _gathered(sizes: Sizes, device: torch.device) -> Inputs:
    """(bfloat16 bucket, regions to write, where chunks begin, their sizes)."""
    gradients, out, offsets, chunks = _bucket(sizes, device)
    regions = [torch.full((g.numel(),), 7.0, device=device).bfloat16() for g in gradients]
    return randn(device, *out.shape), regions, offsets, chunks


def _pack(gradients: list[Tensor], out: Tensor, offsets: list[int], chunks: list[int]) -> Tensor:
    buckets.pack(gradients, out, offsets, chunks, 0.125)
    return out


def _eager_pack(
    gradients: list[Tensor], out: Tensor, offsets: list[int], chunks: list[int]
) -> Tensor:
    for gradient, offset, chunk in zip(gradients, offsets, chunks, strict=True):
        flat = F.pad(gradient.reshape(-1), (0, PARTS * chunk - gradient.numel()))
        out[:, offset : offset + chunk] = flat.view(PARTS, chunk) * 0.125
    return out


def _unpack(
    gathered: Tensor, regions: list[Tensor], offsets: list[int], chunks: list[int]
) -> list[Tensor]:
    buckets.unpack(gathered, regions, offsets, chunks)
    return regions


def _eager_unpack(
    gathered: Tensor, regions: list[Tensor], offsets: list[int], chunks: list[int]
) -> list[Tensor]:
    for region, offset, chunk in zip(regions, offsets, chunks, strict=True):
        region.copy_(gathered[:, offset : offset + chunk].reshape(-1)[: region.numel()])
    return regions


def _bucket_bytes(tensors: list[Tensor], bucket: Tensor, chunks: list[int]) -> int:
    numel = sum(x.numel() for x in tensors)
    return buckets.moved_bytes(
        numel, tensors[0].element_size(), PARTS * sum(chunks), bucket.element_size()
    )


def _parts(sizes: Sizes, device: torch.device) -> Inputs:
    k = 2 * sizes.features**2
    return randn(device, 8, k), torch.full((k,), 7.0, device=device)


def _sum(parts: Tensor, out: Tensor) -> Tensor:
    buckets.sum_parts(parts, out)
    return out


def _tokens(sizes: Sizes, device: torch.device) -> Inputs:
    chosen = torch.rand(sizes.rows, NUM_EXPERTS, device=device).topk(2).indices
    return randn(device, sizes.rows, sizes.features), chosen


def _eager_permute(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    flat = chosen.flatten()
    source = torch.argsort(flat, stable=True)
    one_hot = flat[:, None] == torch.arange(NUM_EXPERTS, device=x.device)
    return x.index_select(0, source // chosen.shape[1]), source, one_hot.sum(0)


def _permuted(sizes: Sizes, device: torch.device) -> Inputs:
    """(rows of experts, random ones, their sources, gates)."""
    x, chosen = _tokens(sizes, device)
    rows, source, _ = _eager_permute(x, chosen)
    return torch.randn_like(rows), torch.rand(chosen.shape, device=device), source


def _eager_unpermute(rows: Tensor, gates: Tensor, source: Tensor) -> Tensor:
    parts = rows.index_select(0, torch.argsort(source)).view(*gates.shape, -1)
    return (parts * gates.to(rows.dtype)[:, :, None]).sum(1)


def _for_permute(sizes: Sizes, device: torch.device) -> Inputs:
    x, chosen = _tokens(sizes, device)
    rows, source, _ = _eager_permute(x, chosen)
    return torch.randn_like(rows), x, source


def _for_unpermute(sizes: Sizes, device: torch.device) -> Inputs:
    rows, gates, source = _permuted(sizes, device)
    return randn(device, gates.shape[0], rows.shape[1]), rows, gates, source


def _expert_bytes(t: int, rows: Tensor, *, weights_gradient: bool = False) -> int:
    size = rows.element_size()
    return experts.moved_bytes(t, 2, rows.shape[1], size, weights_gradient=weights_gradient)


def _with_peers(numel: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x ``[numel]``, and ``[peers, numel]`` what lies in the peers' buffers."""
    capacity = -(-2 * numel // 4096) * 4096
    peers, data = alone(NUM_PEERS, capacity, device)
    register(ALONE, peers)
    x, theirs = randn(device, numel), randn(device, NUM_PEERS - 1, numel)
    for buffer, values in zip(data[1:], theirs, strict=True):
        buffer.view(torch.bfloat16)[:, :numel] = values
    return x, theirs


def _small(sizes: Sizes, device: torch.device) -> Inputs:
    return _with_peers(32 * sizes.features, device)


def _large(sizes: Sizes, device: torch.device) -> Inputs:
    return _with_peers(max(131072 + 128, sizes.rows * sizes.features // 8), device)


def _eager_two_shot(x: Tensor, theirs: Tensor) -> Tensor:
    """What one rank does: it adds its own shard; the others' sums are what lies there."""
    shards = torch.cat((x[None], theirs)).view(NUM_PEERS, NUM_PEERS, -1)
    return torch.cat([shards[:, 0].sum(0), *(shards[r, r] for r in range(1, NUM_PEERS))])


def _for_sum_norm(sizes: Sizes, device: torch.device) -> Inputs:
    x, theirs = _with_peers(max(6, sizes.rows // 512) * sizes.features, device)
    partial = x.view(-1, sizes.features)
    return partial, torch.randn_like(partial), randn(device, sizes.features), theirs


def _for_scatter_norm(sizes: Sizes, device: torch.device) -> Inputs:
    rows = max(6, sizes.rows // 64)
    x, theirs = _with_peers(NUM_PEERS * rows * sizes.features, device)
    residual, weight = randn(device, rows, sizes.features), randn(device, sizes.features)
    return x.view(-1, sizes.features), residual, weight, theirs


def _eager_sum_norm(x: Tensor, residual: Tensor, weight: Tensor, theirs: Tensor) -> Inputs:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = theirs.reshape(-1, *x.shape).sum(0, dtype=wide)
    total = x.to(wide) + residual.to(wide) + parts
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight
    return normed.to(x.dtype), total.to(x.dtype)


def _eager_scatter_norm(x: Tensor, residual: Tensor, weight: Tensor, theirs: Tensor) -> Inputs:
    own = theirs.view(-1, *x.shape)[:, : residual.shape[0]]
    return _eager_sum_norm(x[: residual.shape[0]], residual, weight, own)


REST = (
    Case("adamw", _optimizer, _our_adamw, _unfused_adamw,
         lambda i: adamw.moved_bytes(i[0].numel(), 2, 2), over_target=1.3, compiles=False,
         eager_is="unscale, clip, foreach AdamW, copy, one after the other (no norm in either)",
         others={"PyTorch's fused AdamW between unscale, clip and copy": _pytorch_fused_adamw}),
    Case("bucket pack", _bucket, _pack, _eager_pack, lambda i: _bucket_bytes(i[0], i[1], i[3])),
    Case("bucket unpack", _gathered, _unpack, _eager_unpack,
         lambda i: _bucket_bytes(i[1], i[0], i[3])),
    Case("sum of parts", _parts, _sum, lambda x, out: out.copy_(x.sum(0, dtype=out.dtype)),
         lambda i: buckets.sum_moved_bytes(i[0].shape[0], i[1].numel(), 2, 4)),
    Case("permute", _tokens, lambda x, chosen: experts.permute(x, chosen, NUM_EXPERTS),
         _eager_permute, lambda i: _expert_bytes(i[0].shape[0], i[0]), None),
    backward("permute backward", _for_permute,
             lambda drows, _, source: OPS.permute_backward(drows, source, 2),
             lambda x, source: x.index_select(0, source // 2), 1,
             lambda i: _expert_bytes(i[1].shape[0], i[0]), None),
    Case("unpermute", _permuted, lambda rows, gates, source: experts.unpermute(rows, source, gates),
         _eager_unpermute, lambda i: _expert_bytes(i[1].shape[0], i[0]), None),
    backward("unpermute backward", _for_unpermute,
             lambda dout, rows, gates, source: OPS.unpermute_backward(dout, rows, source, gates),
             _eager_unpermute, 2,
             lambda i: _expert_bytes(i[2].shape[0], i[1], weights_gradient=True), None),
    Case("all_reduce one-shot, alone", _small,
         lambda x, _: OPS.all_reduce_peers(x, NUM_PEERS, ALONE), lambda x, y: x + y.sum(0),
         None, None, compares=False),
    Case("all_reduce two-shot, alone", _large,
         lambda x, _: OPS.all_reduce_peers(x, NUM_PEERS, ALONE), _eager_two_shot,
         None, None, compares=False),
    Case("reduce_scatter, alone", _large,
         lambda x, _: OPS.reduce_scatter_peers(x, NUM_PEERS, ALONE),
         lambda x, y: torch.cat((x[None], y)).view(NUM_PEERS, NUM_PEERS, -1)[:, 0].sum(0),
         None, None, compares=False),
    Case("all_gather, alone", _small, lambda x, _: OPS.all_gather_peers(x, NUM_PEERS, ALONE),
         lambda x, y: torch.cat((x, y.flatten())), None, None, compares=False),
    Case("sum with norm, alone", _for_sum_norm,
         lambda x, r, w, _: OPS.all_reduce_add_rms_norm(x, r, w, EPS, NUM_PEERS, ALONE),
         _eager_sum_norm,
         lambda i: sum_norm.moved_bytes(i[0].shape[0], i[2].numel(), NUM_PEERS, 2), None,
         eager_is="residual, sum of all parts, norm, all in this GPU's memory"),
    Case("sum of shared-out rows with norm, alone", _for_scatter_norm,
         lambda x, r, w, _: OPS.reduce_scatter_add_rms_norm(x, r, w, EPS, NUM_PEERS, ALONE),
         _eager_scatter_norm,
         lambda i: scatter_norm.moved_bytes(i[1].shape[0], i[2].numel(), NUM_PEERS, 2), None,
         eager_is="as in the line above; it publishes nothing, the kernel all its parts"),
)  # fmt: skip

CASES: tuple[Case, ...] = (*STREAMING, *REST)
