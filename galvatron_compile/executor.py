"""Runs a rank's list of actions: the only place where a training step happens."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from galvatron_compile.actions import Action
from galvatron_compile.flat import InFlight
from galvatron_compile.links import Links
from galvatron_compile.pieces import Piece, apart
from galvatron_compile.program import Crossing, StageGraph, StageProgram
from galvatron_compile.seeds import layer_seed
from galvatron_compile.tied import sum_tied

Values = dict[str, Tensor]
Recorder = Callable[[Action, Callable[[], None]], None]


def run_plainly(action: Action, run: Callable[[], None]) -> None:
    run()


@dataclass
class _Step:
    """What is alive during one step. Keys are (stage, micro-batch) or (layer, micro-batch)."""

    inputs: Sequence[Values]
    seeds: Sequence[int]
    values: dict[tuple[int, int], Values] = field(default_factory=dict)
    gradients: dict[tuple[int, int], Values] = field(default_factory=lambda: defaultdict(dict))
    kept: dict[tuple[int, int], Any] = field(default_factory=dict)
    reducing: dict[int, deque[list[InFlight]]] = field(default_factory=lambda: defaultdict(deque))
    losses: list[Tensor] = field(default_factory=list)


class Executor:
    """Obeys lists of actions over one rank's program; decides nothing.

    pieces: how each of the rank's layers runs, by layer number.
    """

    def __init__(self, program: StageProgram, pieces: Mapping[int, Piece]) -> None:
        self.program, self.pieces, self.units = program, pieces, program.units
        self.links = Links(program.mesh, program.plan.num_stages)
        self.stages = {stage.index: stage for stage in program.stages}
        self.cuts = {stage.index: _Cut.of(stage) for stage in program.stages}
        self.stage_of = {layer: s.index for s in program.stages for layer in s.layers}
        self.last_stage = program.plan.num_stages - 1

    def train(
        self,
        actions: Sequence[Action],
        inputs: Sequence[Values],
        seeds: Sequence[int],
        recorder: Recorder = run_plainly,
        on_last_loss: Callable[[list[Tensor]], None] = lambda losses: None,
    ) -> list[Tensor]:
        """Forward, backward and sums of one step; the local losses of the micro-batches.

        inputs: batch leaves and denominators of every micro-batch by name.
        seeds: of every micro-batch.
        on_last_loss: called once all losses are known, before the last backward (never on ranks
            without the last stage).
        """
        self._step = step = _Step(inputs, seeds)
        told = False
        for action in actions:
            recorder(action, lambda action=action: self._run(action))  # type: ignore[misc]
            if not told and len(step.losses) == len(inputs):
                told = True
                on_last_loss(step.losses)
        self.links.finish()
        assert not step.kept, f"layers whose backward never came: {sorted(step.kept)}"
        del self._step  # the batch and the losses need not live on
        return step.losses

    @torch.no_grad()
    def evaluate(self, actions: Sequence[Action], inputs: Sequence[Values]) -> list[Tensor]:
        """Forward without dropout; ``actions`` hold no backward."""
        self._step = step = _Step(inputs, [0] * len(inputs))
        for action in actions:
            if action.kind == "forward":
                self._evaluate(action.index, action.micro_batch)
            else:
                self._run(action)
        self.links.finish()
        del self._step
        return step.losses

    def _run(self, action: Action) -> None:
        getattr(self, f"_{action.kind}")(action.index, action.micro_batch)

    # Parameters.

    def _gather(self, unit: int, _: int) -> None:
        self.units[unit].gather()

    def _wait_gather(self, unit: int, _: int) -> None:
        self.units[unit].wait_gather()

    def _free(self, unit: int, _: int) -> None:
        self.units[unit].free()

    def _reduce(self, unit: int, _: int) -> None:
        self._step.reducing[unit].append(self.units[unit].reduce())

    def _wait_reduce(self, unit: int, _: int) -> None:
        for launched in self._step.reducing[unit].popleft():
            launched.wait()

    def _reduce_tensor(self, unit: int, _: int) -> None:
        for launched in self.units[unit].reduce_tensor():
            launched.wait()

    def _reduce_tied(self, unit: int, _: int) -> None:
        sum_tied(self.units[unit])

    # Messages.

    def _receive_activations(self, stage: int, batch: int) -> None:
        cut = self.cuts[stage]
        self.links.receive("activations", stage - 1, batch, cut.received, self.program.device)

    def _wait_activations(self, stage: int, batch: int) -> None:
        found = self.links.wait("activations", stage - 1, batch)
        self._values(stage, batch).update(zip(self.cuts[stage].received_as, found, strict=True))

    def _send_activations(self, stage: int, batch: int) -> None:
        values = self._step.values.pop((stage, batch))
        self.links.send("activations", stage, [values[name] for name in self.cuts[stage].sent_as])

    def _receive_gradients(self, stage: int, batch: int) -> None:
        crossings = [crossing for crossing, _ in self.cuts[stage].behind]
        self.links.receive("gradients", stage, batch, crossings, self.program.device)

    def _wait_gradients(self, stage: int, batch: int) -> None:
        found = self.links.wait("gradients", stage, batch)
        for (_, name), gradient in zip(self.cuts[stage].behind, found, strict=True):
            self._add_gradient(stage, batch, name, gradient)

    def _send_gradients(self, stage: int, batch: int) -> None:
        gradients = self._step.gradients.pop((stage, batch), {})
        sent = []
        for crossing, name in self.cuts[stage].before:
            gradient = gradients.get(name)
            sent.append(self._zeros(crossing) if gradient is None else gradient)
        self.links.send("gradients", stage - 1, sent)

    def _zeros(self, crossing: Crossing) -> Tensor:
        return torch.zeros(crossing.shape, dtype=crossing.dtype, device=self.program.device)

    # Layers.

    def _values(self, stage: int, batch: int) -> Values:
        """What the stage's layers may read; at first the batch itself."""
        found = self._step.values.get((stage, batch))
        if found is None:
            found = self._step.values[stage, batch] = dict(self._step.inputs[batch])
        return found

    def _arguments(self, layer: int, batch: int) -> tuple[Values, list[Tensor], list[Tensor], int]:
        graph = self.pieces[layer].graph
        values = self._values(self.stage_of[layer], batch)
        given = [values[name] for name in graph.values]
        seed = layer_seed(self._step.seeds[batch], *graph.seed)
        return values, given, self._parameters(layer), seed

    def _parameters(self, layer: int) -> list[Tensor]:
        return [self.units[u].working[k] for u, k in self.pieces[layer].graph.parameters]

    def _forward(self, layer: int, batch: int) -> None:
        values, given, parameters, seed = self._arguments(layer, batch)
        outputs, kept = self.pieces[layer].forward(given, parameters, seed)
        if self.pieces[layer].graph.trains:
            self._step.kept[layer, batch] = kept
        self._take_outputs(layer, batch, values, outputs)

    def _evaluate(self, layer: int, batch: int) -> None:
        values, given, parameters, seed = self._arguments(layer, batch)
        graph = self.pieces[layer].graph
        outputs = graph.evaluation(*given, *parameters, *graph.buffers, seed)
        self._take_outputs(layer, batch, values, apart(outputs, parameters))

    def _take_outputs(
        self, layer: int, batch: int, values: Values, outputs: Sequence[Tensor]
    ) -> None:
        graph, stage = self.pieces[layer].graph, self.stage_of[layer]
        values.update(zip(graph.outputs, outputs, strict=True))
        for name in graph.drops:
            del values[name]
        if stage == self.last_stage and layer == self.stages[stage].layers[-1]:
            self._step.losses.append(outputs[0].detach())
            del self._step.values[stage, batch]

    def _recompute(self, layer: int, batch: int) -> None:
        piece, key = self.pieces[layer], (layer, batch)
        seed = layer_seed(self._step.seeds[batch], *piece.graph.seed)
        kept = self._step.kept[key]
        self._step.kept[key] = piece.recompute(kept, self._parameters(layer), seed)

    def _backward(self, layer: int, batch: int) -> None:
        kept = self._step.kept.pop((layer, batch))
        gradients = self._output_gradients(layer, batch)
        inputs, parameters = self.pieces[layer].backward(kept, self._parameters(layer), gradients)
        self._take_gradients(layer, batch, inputs)
        self._take_weight_gradients(layer, parameters)

    def _backward_input(self, layer: int, batch: int) -> None:
        kept = self._step.kept.pop((layer, batch))
        gradients = self._output_gradients(layer, batch)
        inputs, rest = self.pieces[layer].backward_input(kept, self._parameters(layer), gradients)
        self._take_gradients(layer, batch, inputs)
        self._step.kept[layer, batch] = rest

    def _backward_weight(self, layer: int, batch: int) -> None:
        kept = self._step.kept.pop((layer, batch))
        found = self.pieces[layer].backward_weight(kept, self._parameters(layer))
        self._take_weight_gradients(layer, found)

    def _output_gradients(self, layer: int, batch: int) -> list[Tensor | None]:
        graph, stage = self.pieces[layer].graph, self.stage_of[layer]
        if stage == self.last_stage and layer == self.stages[stage].layers[-1]:
            return [torch.ones_like(self._step.losses[batch])]
        gradients = self._step.gradients[stage, batch]
        return [gradients.pop(name, None) for name in graph.outputs]

    def _take_gradients(self, layer: int, batch: int, found: Sequence[Tensor | None]) -> None:
        stage = self.stage_of[layer]
        for name, gradient in zip(self.pieces[layer].graph.values, found, strict=True):
            if gradient is not None:
                self._add_gradient(stage, batch, name, gradient)

    def _add_gradient(self, stage: int, batch: int, name: str, gradient: Tensor) -> None:
        """Not in place: a gradient may be a view, or be used by another layer too."""
        held = self._step.gradients[stage, batch]
        held[name] = held[name] + gradient if name in held else gradient

    def _take_weight_gradients(self, layer: int, found: Sequence[Tensor | None]) -> None:
        places = self.pieces[layer].graph.parameters
        for (unit, place), gradient in zip(places, found, strict=True):
            if gradient is not None:
                self.units[unit].add_gradient(place, gradient)
        for unit in {unit for unit, _ in places}:
            # Under ZeRO-2 and 3 a sum follows, which packs when gathered weights are freed: packing
            # needs the memory of the gradients twice.
            if self.units[unit].zero < 2:
                self.units[unit].pack()


@dataclass(frozen=True)
class _Cut:
    """What crosses the cuts of a stage, and the names of these values in its graph.

    before, behind: what has a gradient that travels back over the cut before and behind.
    """

    received: tuple[Crossing, ...]
    received_as: tuple[str, ...]
    sent_as: tuple[str, ...]
    before: tuple[tuple[Crossing, str], ...]
    behind: tuple[tuple[Crossing, str], ...]

    @staticmethod
    def of(stage: StageGraph) -> _Cut:
        before = zip(stage.received, stage.received_as, strict=True)
        behind = zip(stage.sent, stage.sent_as, strict=False)  # the last stage returns the loss
        return _Cut(
            received=stage.received,
            received_as=stage.received_as,
            sent_as=stage.sent_as,
            before=tuple(pair for pair in before if pair[0].differentiable),
            behind=tuple(pair for pair in behind if pair[0].differentiable),
        )
