"""Blocks that do more than compute a result from their arguments: stand-ins would be wrong."""

from __future__ import annotations

import itertools
import queue
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from once_cases import Block, Chain

CALLS: list[int] = [0]
COUNT = 0
UNSEEN: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()  # keeps its contents in C
CYCLE = itertools.cycle((1, 2, 1))


def reset() -> None:
    """Every counter back to where it began."""
    global COUNT, CYCLE
    COUNT, CALLS[0], CountsInItsClass.count, Store.steps = 0, 0, 0, 0
    CYCLE = itertools.cycle((1, 2, 1))
    random.seed(2)


class CountsInAGlobal(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global COUNT
        COUNT += 1
        return super().forward(x) * (1 + COUNT % 2)


class CountsInAList(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS[0] += 1
        return super().forward(x) * (1 + CALLS[0] % 2)


class CountsInItsClass(Block):
    count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).count += 1
        return super().forward(x) * (1 + self.count % 2)


def counting_in_a_closure() -> type[Block]:
    count = 0

    class CountsInAClosure(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return super().forward(x) * (1 + count % 2)

    return CountsInAClosure


class WritesToItsInput(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return super().forward(x)


class ReturnsALambda(Block):
    """Makes more of its result than tensors."""

    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return lambda: y


class CallsLambdas(Chain):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)()
        return x


class Keeps(Block):
    """Leaves a value in an attribute, which the model adds to its loss."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.change(x)
        return x + self.kept


class AddsKept(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = super().forward(x)
        return loss + sum(block.kept.square().mean() for block in self.blocks)


class Shared:
    def __init__(self) -> None:
        self.skips: list[torch.Tensor] = []
        self.doubling = False


class Skipping(Block):
    """Pushes its input to a stack that all blocks share, or adds what is on it: a U-Net."""

    def __init__(self, index: int, shared: Shared) -> None:
        super().__init__(index)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.shared.skips) < 3:
            self.shared.skips.append(x)
        return super().forward(x)


class SkippingChain(Chain):
    def __init__(self) -> None:
        self.shared = Shared()
        super().__init__(lambda index: Skipping(index, self.shared))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.shared.skips.clear()
        return super().body(x) + sum(self.shared.skips)


class Reads(Block):
    """Takes a value that is not an argument."""

    def __init__(self, index: int, shared: Shared) -> None:
        super().__init__(index)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.shared.skips[0]


class ReadingChain(Chain):
    def __init__(self) -> None:
        self.shared = Shared()
        super().__init__(lambda index: Reads(index, self.shared))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.shared.skips[:] = [torch.tanh(x)]
        return super().body(x)


class TakesAList(Block):
    """Appends to a list that it is given."""

    def forward(self, x: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
        kept.append(x)
        return super().forward(x)


class GivesAList(Chain):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        for block in self.blocks:
            x = block(x, kept)
        return x + sum(kept)


class PutsItsInside(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = self.change(x)
        UNSEEN.put(change)
        return x + change


class PutsItsResult(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        UNSEEN.put(y)
        return y


class AddsUnseen(Chain):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        while not UNSEEN.empty():  # of an earlier capture
            UNSEEN.get()
        x = super().body(x)
        while not UNSEEN.empty():
            x = x + UNSEEN.get()
        return x


class Cycling(Block):
    """Differs from call to call; three calls are a whole cycle, as many as run for real."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * next(CYCLE)


class Store:
    """A class as a place for values."""

    steps = 0


class CountsInAnotherClass(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Store.steps += 1
        return super().forward(x) * (1 + Store.steps % 2)


class ToldBetweenCalls(Chain):
    """Sets what blocks read, late: the blocks in front of that are alike, as are the last two."""

    def __init__(self) -> None:
        self.shared = Shared()
        super().__init__(lambda index: Obeys(index, self.shared))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            self.shared.doubling = index == 4
            x = block(x)
        return x


class Obeys(Block):
    def __init__(self, index: int, shared: Shared) -> None:
        super().__init__(index)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2 if self.shared.doubling else super().forward(x)


class TellsOne(Chain):
    """Sets an attribute of one block after the model was looked at."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.blocks[4].doubling = True
        result = super().body(x)
        self.blocks[4].doubling = False
        return result


class IsTold(Block):
    doubling = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2 if self.doubling else super().forward(x)


class DropsAtRandom(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if random.random() < 0.2 else super().forward(x)


# A model of each; what could tell that its blocks are not alike lies where its name says.
MODELS: dict[str, Callable[[], Chain]] = {
    "a global": lambda: Chain(CountsInAGlobal),
    "a global list": lambda: Chain(CountsInAList),
    "a class": lambda: Chain(CountsInItsClass),
    "another class": lambda: Chain(CountsInAnotherClass),
    "a closure": lambda: Chain(counting_in_a_closure()),
    "random numbers": lambda: Chain(DropsAtRandom),
    "an object, set between calls": ToldBetweenCalls,
    "an attribute, set in time": lambda: TellsOne(IsTold),
    "an attribute of each": lambda: AddsKept(Keeps),
    "an object of all, written": SkippingChain,
    "an object of all, read": ReadingChain,
    "an argument, written": lambda: Chain(WritesToItsInput),
    "a list given": lambda: GivesAList(TakesAList),
    "a result that is no tensor": lambda: CallsLambdas(ReturnsALambda),
    "unseen, the inside": lambda: AddsUnseen(PutsItsInside),
    "unseen, the result": lambda: AddsUnseen(PutsItsResult),
    "unseen, from call to call": lambda: Chain(Cycling),
}
