"""What a rank does in a step, one explicit action after another.

The runtime executes the list, the simulator walks it; nobody else decides when something is
gathered, freed, summed or sent. See ``passes/order.py`` for how a list is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from galvatron_compile.errors import PlanError

Kind = Literal[
    "gather", "wait_gather", "free",
    "receive_activations", "wait_activations", "send_activations",
    "receive_gradients", "wait_gradients", "send_gradients",
    "forward", "recompute", "backward", "backward_input", "backward_weight",
    "reduce", "wait_reduce", "reduce_tensor", "reduce_tied",
]  # fmt: skip

COMPUTE = frozenset({"forward", "recompute", "backward", "backward_input", "backward_weight"})
UNIT = frozenset(
    {"gather", "wait_gather", "free", "reduce", "wait_reduce", "reduce_tensor", "reduce_tied"}
)
STAGE = frozenset(
    {
        "receive_activations", "wait_activations", "send_activations",
        "receive_gradients", "wait_gradients", "send_gradients",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a rank's list.

    kind: in words,

    - ``gather`` starts to bring a unit's working parameters up to date, ``wait_gather`` waits for
      it, ``free`` gives their memory back (ZeRO-3);
    - ``receive_…`` makes room and starts to receive what crosses the cut before (activations) or
      behind (gradients) a stage, ``wait_…`` waits for it, ``send_…`` starts to send;
    - ``forward``, ``recompute`` (forward again, for a layer that kept only its inputs),
      ``backward``, or its halves ``backward_input`` and ``backward_weight``, run a layer;
    - ``reduce`` starts to sum a unit's gradients over its data axis, ``wait_reduce`` waits for
      that; ``reduce_tensor`` sums over the tensor axis what must be summed there, ``reduce_tied``
      sums the gradients of parameters that other stages hold too. The last two start and wait.

    index: of the layer (compute), the unit (gather, free, reduce) or the rank's own stage (send,
        receive, wait).
    micro_batch: -1 for what happens once a step.
    """

    kind: Kind
    index: int
    micro_batch: int = -1


@dataclass(frozen=True)
class UnitOutline:
    """Parameters that are gathered and reduced together, as far as the order depends on them.

    zero: ZeRO stage. trainable: some of them get a gradient. shared: several layers use them.
    gathers: whether working parameters are brought up to date at all (not where the optimizer
        updates them in place).
    varying: some are summed over the tensor axis. tied: some are held by other stages too.
    """

    name: str
    zero: int = 0
    trainable: bool = True
    shared: bool = False
    gathers: bool = True
    varying: bool = False
    tied: bool = False


@dataclass(frozen=True)
class LayerOutline:
    """units: numbers of the units whose parameters the layer takes, in order of use.

    differentiable: whether it has a backward at all.
    weights_for_weights: its weight gradients are computed from weights (a split backward then
        needs them gathered twice).
    """

    name: str
    units: tuple[int, ...] = ()
    recompute: bool = False
    differentiable: bool = True
    weights_for_weights: bool = False


@dataclass(frozen=True)
class Outline:
    """What one group of ranks holds of a pipeline, enough to order its actions.

    chunks: layer numbers of every stage that the group runs; chunk c is stage ``c * pp + group``.
    layers: by layer number. units: those of the group, in order of first use.
    """

    chunks: tuple[tuple[int, ...], ...]
    layers: Mapping[int, LayerOutline]
    units: tuple[UnitOutline, ...]
    num_micro_batches: int
    schedule: str = "1f1b"
    pp: int = 1
    group: int = 0

    def __post_init__(self) -> None:
        if self.num_micro_batches < 1 or not 0 <= self.group < self.pp:
            raise PlanError(
                f"an outline needs micro-batches and a group below pp={self.pp}, got "
                f"{self.num_micro_batches} and {self.group}"
            )
        for layer in self.layers.values():
            if any(not 0 <= unit < len(self.units) for unit in layer.units):
                raise PlanError(f"layer {layer.name!r} uses a unit that is not in the outline")

    @property
    def num_stages(self) -> int:
        return self.pp * len(self.chunks)

    def stage_of(self, chunk: int) -> int:
        return chunk * self.pp + self.group


def format_actions(outline: Outline, actions: Sequence[Action]) -> str:
    """One line an action, for people and golden files."""
    lines = []
    for number, action in enumerate(actions):
        text = f"{number:4}  {action.kind:19} "
        if action.kind in COMPUTE:
            text += outline.layers[action.index].name
        elif action.kind in UNIT:
            text += f"parameters of {outline.units[action.index].name}"
        else:
            text += f"stage {action.index}"
        lines.append(text + (f" @{action.micro_batch}" if action.micro_batch >= 0 else ""))
    return "\n".join(lines) + "\n"
