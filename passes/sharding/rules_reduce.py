"""Operators along dims: reductions, normalisations, scans, losses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from galvatron_compile import operators
from galvatron_compile.passes.sharding.rules_base import (
    Emitter,
    Rule,
    RuleFunction,
    Site,
    aligned,
    normal_dims,
)
from galvatron_compile.passes.sharding.rules_pieces import others
from galvatron_compile.passes.sharding.views import shape_of
from galvatron_compile.placement import P, Placement, R, S

NONE, MEAN, SUM = 0, 1, 2  # torch's codes of a loss's reduction


def reduced_dims(site: Site) -> list[int]:
    rank = len(site.input_shape("self"))
    return normal_dims(site.arguments.get("dim"), rank)


def kept_dim(site: Site, dim: int, reduced: list[int]) -> int:
    if site.arguments.get("keepdim"):
        return dim
    return dim - sum(other < dim for other in reduced)


def reduction(site: Site) -> Iterator[Rule]:
    """Dims that stay may be sharded (amax, argmax, any, all, var, max, median, …)."""
    reduced = reduced_dims(site)
    for dim, size in enumerate(site.input_shape("self")):
        if dim not in reduced:
            for outer in site.shards(size):
                out = S(kept_dim(site, dim, reduced), outer)
                yield site.rule(f"shard {dim}", {"self": S(dim, outer)}, out)


def sum_(site: Site) -> Iterator[Rule]:
    """Also linear, and a sum over a sharded dim is a partial sum."""
    yield from reduction(site)
    reduced = reduced_dims(site)
    for dim, size in enumerate(site.input_shape("self")):
        if dim in reduced:
            for outer in site.shards(size):
                yield site.rule(f"sum {dim}", {"self": S(dim, outer)}, P)
    yield site.rule("partial", {"self": P}, P)


def mean(site: Site) -> Iterator[Rule]:
    """As a sum; a mean over a shard is divided by the ranks to be a part of the mean.

    On the data axis shards may differ in size: the batch pass makes such a mean a sum first.
    """
    yield from reduction(site)
    reduced = reduced_dims(site)
    if not site.data:
        for dim, size in enumerate(site.input_shape("self")):
            if dim in reduced:
                for outer in site.shards(size):
                    yield site.rule(f"mean {dim}", {"self": S(dim, outer)}, P, _mean_part)
    yield site.rule("partial", {"self": P}, P)


def _mean_part(e: Emitter) -> fx.Node:
    return e.graph.call_function(torch.ops.aten.div.Tensor, (e.call(), e.size))


def along(site: Site) -> Iterator[Rule]:
    """softmax, log_softmax, cumsum, diff, sort, topk, glu: every dim but theirs."""
    key = "self" if site.has("self") else "input"
    shape = site.input_shape(key)
    dim = site.arguments.get("dim")
    taken = set(normal_dims(dim, len(shape)))
    for rule in others(site, taken, key):
        where = rule.outputs[0]
        extra = {
            name: aligned(shape_of(value.meta["val"]), shape, where.dim, where.outer)
            for name, _, value in site.slots
        }
        yield site.rule(rule.name, extra, where)
    if site.name in ("cumsum", "diff"):
        names = {name: P for name, _, _ in site.slots}
        yield site.rule("partial", names, P)


def normalisation(site: Site) -> Iterator[Rule]:
    """layer_norm, rms_norm and their native forms: the dims before the normalised ones."""
    shape = site.input_shape("input")
    first = len(shape) - len(site.arguments["normalized_shape"])
    yield from others(site, set(range(first, len(shape))), "input")


def group_norm(site: Site) -> Iterator[Rule]:
    """Over samples; over channels too where the groups divide (weight and bias with them)."""
    yield from others(site, set(range(1, len(site.input_shape("input")))), "input")


def pooling(site: Site) -> Iterator[Rule]:
    """Over samples and channels, never over the dims that windows slide along."""
    rank, spatial = len(site.input_shape("self")), int(site.name[-2])
    yield from others(site, set(range(rank - spatial, rank)))


def elementwise_loss(site: Site) -> Iterator[Rule]:
    """mse, l1, smooth l1, huber, bce (with logits), kl_div: inputs of one (broadcast) shape."""
    shapes = [shape_of(value.meta["val"]) for _, _, value in site.slots]
    full = max(shapes, key=len)
    reduction = site.arguments["reduction"]
    if reduction == MEAN:
        return
    for dim, size in enumerate(full):
        for outer in site.shards(size):
            where: dict[str, Placement] = {
                name: aligned(shape, full, dim, outer)
                for (name, _, _), shape in zip(site.slots, shapes, strict=True)
            }
            yield site.rule(f"shard {dim}", where, P if reduction == SUM else S(dim, outer))


def cross_entropy(site: Site) -> Iterator[Rule]:
    """Rows in front of the classes (or behind, for images): summed, or each for itself.

    A mean over sharded rows has no rule: its denominator depends on all labels (batch pass).
    """
    logits, target = site.input_shape("self"), site.input_shape("target")
    reduction = site.arguments["reduction"]
    if len(logits) < 2 or reduction == MEAN:
        return
    classes_given = len(target) == len(logits)
    for dim, size in enumerate(logits):
        if dim == 1:
            continue
        for outer in site.shards(size):
            row = dim if dim == 0 or classes_given else dim - 1
            place = S(row, outer)
            out = P if reduction == SUM else S(0 if dim == 0 else dim - 1, outer)
            yield site.rule(f"rows {dim}", {"self": S(dim, outer), "target": place}, out)


def cross_entropy_sum(site: Site) -> Iterator[Rule]:
    """``operators.cross_entropy_sum``: rows give a partial sum, the vocabulary a finished one.

    Over the vocabulary every rank ends with the whole sum, so the output is R.
    """
    logits, target = site.input_shape("logits"), site.input_shape("target")
    if len(logits) < 2 or len(target) == len(logits):
        return
    for dim, size in enumerate(logits):
        if dim != 1:
            for outer in site.shards(size):
                where = {"logits": S(dim, outer), "target": S(max(dim - 1, 0), outer)}
                yield site.rule(f"rows {dim}", where, P)
    if len(logits) == 2 and 1 in site.shards(logits[1]):
        where = {"logits": S(1)}
        yield site.rule("vocabulary", where, R, _cross_entropy_shard, default=R)


def _cross_entropy_shard(e: Emitter) -> fx.Node:
    names = ("logits", "target", "weight", "ignore_index", "label_smoothing")
    arguments = dict(zip(names, e.args, strict=False)) | dict(e.kwargs)
    arguments["axis"] = e.axis
    return e.graph.call_function(operators.cross_entropy_sum_shard, (), arguments)


def nll_loss(site: Site) -> Iterator[Rule]:
    yield from cross_entropy(site)


REDUCE: dict[str, RuleFunction] = {
    **dict.fromkeys(
        [
            "amax",
            "amin",
            "argmax",
            "argmin",
            "any",
            "all",
            "var",
            "std",
            "prod",
            "logsumexp",
            "max",
            "min",
            "norm",
            "linalg_vector_norm",
            "var_mean",
            "std_mean",
            "median",
            "nanmedian",
            "count_nonzero",
        ],
        reduction,
    ),
    "sum": sum_,
    "mean": mean,
    **dict.fromkeys(
        [
            "softmax",
            "log_softmax",
            "_softmax",
            "_log_softmax",
            "cumsum",
            "cumprod",
            "diff",
            "sort",
            "argsort",
            "topk",
            "glu",
            "logcumsumexp",
            "cummax",
            "cummin",
        ],
        along,
    ),
    **dict.fromkeys(
        ["layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"], normalisation
    ),
    "group_norm": group_norm,
    **{
        f"{kind}_pool{n}d": pooling
        for kind in ("max", "avg", "adaptive_avg")
        for n in (1, 2, 3)
    },
    **dict.fromkeys(
        [
            "mse_loss",
            "l1_loss",
            "smooth_l1_loss",
            "huber_loss",
            "binary_cross_entropy",
            "binary_cross_entropy_with_logits",
            "kl_div",
            "soft_margin_loss",
        ],
        elementwise_loss,
    ),
    "cross_entropy_loss": cross_entropy,
    "nll_loss": nll_loss,
    "nll_loss_nd": nll_loss,
    "cross_entropy_sum": cross_entropy_sum,
}
