"""A recorded step is an ordinary step, and what is recorded is what happened."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import hand_made as hand
import pytest
import torch

from galvatron_compile.actions import COMPUTE
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.compiler import compile
from galvatron_compile.errors import GalvatronError, NonFiniteLossError
from galvatron_compile.memory_meter import metering
from galvatron_compile.recorded import Recording
from galvatron_compile.recorded_causes import causes
from galvatron_compile.recording import profile, record_step
from galvatron_compile.recordings import Recordings


def listed(recording: Recording) -> list[tuple[str, int, int]]:
    return [(event.kind, event.index, event.micro_batch) for event in recording.events]


def record_and_compare(zero: int) -> None:
    plain = hand.parallel(hand.Net(False), zero=zero, micro_batches=3)
    recorded = hand.parallel(hand.Net(False), zero=zero, micro_batches=3)
    share = plain.local_batch(hand.batch())
    plain.step(share)
    with metering(torch.device("cpu"), []) as meter:
        recording = record_step(recorded, share, meter=meter)
    assert recorded.num_steps == 1
    for one, other in zip(plain.parameters(), recorded.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
    actions = recorded._lowered.training
    assert listed(recording) == [(a.kind, a.index, a.micro_batch) for a in actions]
    assert torch.equal(plain.step(share), recorded.step(share))  # nobody watches any more


@pytest.mark.parametrize("zero", [0, 3])
def test_a_recorded_step_does_what_a_step_does(ranks: Any, zero: int) -> None:
    ranks(2).run(record_and_compare, zero)


def test_a_profile_leaves_gradients_and_steps_as_they_were() -> None:
    model = hand.parallel(hand.Net(False), micro_batches=2)
    model.step(hand.batch())
    held = [p.grad for p in model.parameters()]
    values = [None if grad is None else grad.clone() for grad in held]
    recordings = profile(model, hand.batch(), warm_up=1, repetitions=2)
    assert len(recordings.all_step_ms) == 2
    assert recordings.step_ms == pytest.approx(min(recordings.all_step_ms), abs=1e-3)
    assert model.num_steps == 1
    for parameter, grad, value in zip(model.parameters(), held, values, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)


def test_an_optimizer_is_recorded_and_trains() -> None:
    model, other = (hand.parallel(hand.Net(False), micro_batches=2) for _ in range(2))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, other)]
    recordings = profile(model, hand.batch(), optimizer=optimizers[0], warm_up=0, repetitions=1)
    for _ in range(2):  # the one that is timed, and the one whose memory is counted
        other.step(hand.batch())
        optimizers[1].step()
        other.zero_grad()
    assert model.num_steps == 2
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert recordings.ranks[0].events[-1].kind == "optimizer"
    assert causes(recordings, 0).optimizer_ms > 0


def test_memory_before_the_step_by_hand() -> None:
    model = hand.parallel(hand.Net(False), micro_batches=2)
    masters = sum(bucket.master.nbytes for unit in model._program.units for bucket in unit.buckets)
    batch = sum(leaf.nbytes for leaf in hand.batch().values())
    shift = 6 * 8
    (rank,) = profile(model, hand.batch(), warm_up=0, repetitions=1).ranks
    assert rank.start_bytes == masters + batch + shift
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    (rank,) = profile(model, hand.batch(), optimizer=optimizer, warm_up=1, repetitions=1).ranks
    trained = [p for p in model.parameters() if p in optimizer.state]
    states = sum(2 * p.nbytes + 4 for p in trained)  # two moments and a count in float32
    assert rank.start_bytes == masters + batch + shift + states
    gradients = sum(p.nbytes for p in trained)
    assert rank.peak_bytes is not None
    assert rank.peak_bytes > rank.start_bytes + gradients  # activations too
    assert max(e.held_bytes for e in rank.events if e.kind in COMPUTE) > rank.start_bytes


def test_a_profile_that_fails_puts_gradients_and_steps_back() -> None:
    model = hand.parallel(hand.Net(False))
    model.step(hand.batch())
    held = [p.grad for p in model.parameters()]
    bad = hand.batch()
    bad["x"] *= float("nan")
    with pytest.raises(NonFiniteLossError):
        profile(model, bad)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))
    assert model.num_steps == 1


def test_profiles_of_nothing_are_refused() -> None:
    model = hand.parallel(hand.Net(False))
    with pytest.raises(GalvatronError, match="warm_up of at least 0 and repetitions of at least 1"):
        profile(model, hand.batch(), repetitions=0)


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def pipeline(path: str) -> Recordings:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 16)}
    parallel = compile(
        Stack(), ClusterProfile.preset("8xH100"), example_inputs=batch,
        plan="dp1; pp=2; micro=4", measure=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    recordings = parallel.profile(parallel.local_batch(batch), optimizer=optimizer)
    recordings.check_plan(parallel.plan)
    if torch.distributed.get_rank() == 0:
        recordings.save(Path(path) / "recording.json")
    return recordings


def test_a_pipeline_is_recorded_on_all_ranks_and_saved(ranks: Any) -> None:
    with tempfile.TemporaryDirectory() as path:
        one, other = ranks(2).run(pipeline, path)
        assert one == other == Recordings.load(Path(path) / "recording.json")
    assert one.has_one_clock
    assert min(recording.start_ms for recording in one.ranks) == 0
    crossed = [(m.kind, m.micro_batch, m.source) for m in one.messages]
    wanted = [("send_activations", 0), ("send_gradients", 1)]
    assert sorted(crossed) == sorted((k, batch, r) for k, r in wanted for batch in range(4))
    assert all(message.taken_ms > message.sent_ms for message in one.messages)
    for rank in (0, 1):
        found = causes(one, rank)
        parts = (found.computed_ms, found.exposed_ms, found.bubble_ms, found.optimizer_ms)
        assert all(part > 0 for part in parts[:2])
        assert all(part >= 0 for part in (*parts, found.other_ms))
        assert sum(parts) + found.other_ms == pytest.approx(one.step_ms)
        computed = [s for s in one.spans(rank) if s.kind in ("forward", "backward")]
        layers = {span.index for span in computed}
        assert len(computed) == 2 * 4 * len(layers)  # forward and backward of four micro-batches
