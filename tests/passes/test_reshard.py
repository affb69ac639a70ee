"""Changing layout between layers, played on all ranks in one process."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_compile.mesh import data_ranks, merge_ranks, tensor_ranks
from galvatron_compile.passes.reshard import Layout, Step, steps
from galvatron_compile.placement import R, S, V

WORLD = 12
WHOLE = np.arange(24 * 24).reshape(24, 24)  # batch × sequence

Values = dict[int, np.ndarray]


def local(rank: int, layout: Layout) -> np.ndarray:
    """What the rank holds of WHOLE: data and tensor shards by their definition."""
    value = WHOLE
    data_index, tensor_index = divmod(rank, layout.tp)
    if layout.data.is_shard:
        value = np.split(value, WORLD // layout.tp, axis=layout.data.dim)[data_index]
    if layout.tensor.is_shard:
        value = np.split(value, layout.tp, axis=layout.tensor.dim)[tensor_index]
    return value


def play(values: Values, step: Step) -> Values:
    small, large = step.axis
    groups = tensor_ranks(WORLD, small) if small == large else merge_ranks(WORLD, small, large)
    result: Values = {}
    for group in groups:
        for index, rank in enumerate(group):
            if step.source.is_shard and step.target == R:
                result[rank] = np.concatenate([values[r] for r in group], axis=step.source.dim)
            elif step.source == R and step.target.is_shard:
                result[rank] = np.split(values[rank], len(group), axis=step.target.dim)[index]
            else:
                result[rank] = values[rank]
    return result


layouts = st.builds(
    Layout,
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.sampled_from([R, S(1)]),
    st.just(S(0)),
)


@given(layouts, layouts)
def test_steps_lead_from_any_layout_to_any_other(source: Layout, target: Layout) -> None:
    values = {rank: local(rank, source) for rank in range(WORLD)}
    for step in steps(source, target):
        values = play(values, step)
    for rank in range(WORLD):
        np.testing.assert_array_equal(values[rank], local(rank, target))


def test_equal_layouts_need_nothing() -> None:
    assert steps(Layout(4, S(1), S(0)), Layout(4, S(1), S(0))) == []


def test_parameter_like_values_keep_their_gradient_type() -> None:
    """A value that is the same for all samples has partial gradients over data ranks only."""
    assert steps(Layout(1, R, V), Layout(4, R, V)) == [Step((1, 4), V, R)]
    assert steps(Layout(4, R, V), Layout(2, R, V)) == [Step((2, 4), R, V)]


@pytest.mark.parametrize("make", [tensor_ranks, data_ranks])
def test_axes_cover_every_rank_once(make: object) -> None:
    for tp in (1, 2, 3, 4, 6, 12):
        groups = make(WORLD, tp)  # type: ignore[operator]
        assert sorted(rank for group in groups for rank in group) == list(range(WORLD))
