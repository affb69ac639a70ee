"""Stand-ins replace what is alike, and nothing that reads its index or has side effects."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from galvatron_compile.passes.capture_once import understand_once
from galvatron_compile.printer import fingerprint

sys.path.insert(0, str(Path(__file__).parent))
import impure_blocks
from once_cases import (
    Block,
    Chain,
    Doubling,
    LastIsOther,
    Listed,
    Named,
    Scaled,
    Windowed,
    check,
    computing,
    example,
    understand,
)

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("block", [Doubling, Listed, Scaled, LastIsOther])
def test_blocks_that_read_their_index_all_run(block: type[Block], ran: list[int]) -> None:
    check(Chain(block), example())
    assert ran == [0]


def test_numbers_that_are_read_divide_blocks_into_classes(ran: list[int]) -> None:
    layered = check(Chain(Windowed, 12), example())
    assert len({layer.class_index for layer in layered.layers[1:-2]}) == 2
    assert ran == [6]  # the first shows that the number matters; then two of each, and the last


def test_alternating_layers_are_two_classes(ran: list[int]) -> None:
    layered = check(Chain(Named, 12), example())
    assert [layer.class_index for layer in layered.layers[:5]] == [0, 1, 2, 1, 2]
    assert ran == [6]


@pytest.mark.parametrize("kept_in", impure_blocks.MODELS)
def test_blocks_with_side_effects_run(kept_in: str) -> None:
    model = impure_blocks.MODELS[kept_in]()
    found = []
    for way in (understand_once, understand):
        impure_blocks.reset()
        found.append(way(model, example()))
    assert fingerprint(found[0]) == fingerprint(found[1])
    assert computing(found[0]) == computing(found[1])


def test_a_hook_inside_a_block_runs_for_all(ran: list[int]) -> None:
    model = Chain(Block)
    for block in model.blocks:
        block.one.register_forward_hook(lambda module, given, result: result * 2)
    check(model, example())
    assert ran == []


def test_a_hook_on_blocks_runs_for_all(ran: list[int]) -> None:
    model = Chain(Block)
    for block in model.blocks[::3]:
        block.register_forward_hook(lambda module, given, result: result * 2)
    check(model, example())
    assert ran == [5]
