"""Training on several ranks gives what one process gives, and refuses together."""

from __future__ import annotations

import itertools
import tempfile
from typing import Any

import hand_made as hand
import pytest
import torch

from galvatron_compile.errors import GalvatronError, NonFiniteLossError, PeerError, ShapeError


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def train_and_compare(tp: int, frozen: bool) -> None:
    losses, gradients, final = hand.reference(frozen)
    zeros = (0, 1, 2, 3) if torch.distributed.get_world_size() > tp else (0,)
    for zero, micro_batches, recompute in itertools.product(zeros, (1, 3), (False, True)):
        model = hand.parallel(
            hand.Net(frozen),
            tp=tp,
            zero=zero,
            micro_batches=micro_batches,
            recompute=recompute,
        )
        share = model.local_batch(hand.batch())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for number, wanted in enumerate(losses):
            if number == 1:
                close(model.evaluate(share), torch.tensor(wanted, dtype=torch.float64))
            loss = model.step(share)
            close(loss, torch.tensor(wanted, dtype=torch.float64))
            found = model.full_gradients() if number == 0 else {}
            if found:
                assert found.keys() == gradients.keys()
                for name, gradient in gradients.items():
                    close(found[name], gradient)
            optimizer.step()
            optimizer.zero_grad()
        state = model.full_state_dict()
        assert bool(state) == (torch.distributed.get_rank() == 0)
        for name in final if state else ():
            close(state[name], final[name])
        if state:
            close(state["also"], final["tied"])


@pytest.mark.parametrize(
    ("world", "tp", "frozen"),
    [
        *itertools.product([2], [1, 2], [False, True]),
        (4, 1, False),
        *itertools.product([4], [2], [False, True]),
        pytest.param(4, 1, True, marks=pytest.mark.slow),
    ],
)
def test_losses_gradients_and_steps_equal_one_process(
    ranks: Any, world: int, tp: int, frozen: bool
) -> None:
    ranks(world).run(train_and_compare, tp, frozen)


def test_one_device_needs_no_process_group() -> None:
    losses, gradients, _ = hand.reference(False, steps=1)
    model = hand.parallel(hand.Net(False), micro_batches=3)
    assert model.step(hand.batch()).item() == pytest.approx(losses[0], rel=1e-12)
    for name, gradient in model.full_gradients().items():
        close(gradient, gradients[name])
    assert {n: tuple(v.shape) for n, v in model.state_dict().items()}["also"] == (6, 6)


def accumulate(zero: int) -> None:
    _, gradients, _ = hand.reference(False, steps=1)
    model = hand.parallel(hand.Net(False), tp=2, zero=zero, micro_batches=2)
    share = model.local_batch(hand.batch())
    model.step(share)
    model.step(share)
    for name, gradient in model.full_gradients().items():
        close(gradient, 2 * gradients[name])


def clip(zero: int) -> None:
    _, gradients, _ = hand.reference(False, steps=1)
    wanted = torch.stack([g.norm() for g in gradients.values()]).norm()
    model = hand.parallel(hand.Net(False), tp=2, zero=zero)
    model.step(model.local_batch(hand.batch()))
    close(model.clip_grad_norm_(0.5), wanted)
    for name, gradient in model.full_gradients().items():
        close(gradient, gradients[name] * 0.5 / (wanted + 1e-6))


@pytest.mark.parametrize("case", [accumulate, clip], ids=lambda case: case.__name__)
def test_gradients_add_up_and_clip_by_the_global_norm(ranks: Any, case: Any) -> None:
    for zero in (0, 2, 3):
        ranks(4).run(case, zero)


def bad_batch() -> None:
    model = hand.parallel(hand.Net(False), micro_batches=2)
    share = model.local_batch(hand.batch())
    if torch.distributed.get_rank() == 1:
        share["x"] = share["x"][1:]
    model.step(share)


def test_a_bad_batch_on_one_rank_raises_on_every_rank(ranks: Any) -> None:
    errors = ranks(2).errors(bad_batch)
    assert isinstance(errors[1], ShapeError)
    assert "x: expected shape [12, 6], got [11, 6]" in str(errors[1])
    assert isinstance(errors[0], PeerError)
    assert "rank 1 failed: ShapeError: x: expected shape" in str(errors[0])


def non_finite(zero: int) -> None:
    model = hand.parallel(hand.Net(False), zero=zero, micro_batches=2)
    share = model.local_batch(hand.batch())
    model.step(share)
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    bad = dict(share)
    if torch.distributed.get_rank() == 1:
        bad["x"] = bad["x"] * float("nan")
    with pytest.raises(NonFiniteLossError, match="is nan"):
        model.step(bad)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    model.zero_grad()
    close(model.step(share), model.evaluate(share))


@pytest.mark.parametrize("zero", [0, 3])
def test_a_loss_that_is_not_finite_is_reported_and_its_gradients_dropped(
    ranks: Any, zero: int
) -> None:
    ranks(2).run(non_finite, zero)


def checkpoint_round_trip(path: str) -> None:
    import torch.distributed.checkpoint as dcp

    saved = hand.parallel(hand.Net(False), tp=2, zero=3)
    saved.step(saved.local_batch(hand.batch()))
    torch.optim.SGD(saved.parameters(), lr=0.1).step()
    dcp.save(saved.state_dict(), checkpoint_id=path)
    wanted = saved.full_state_dict()
    for tp, zero in ((1, 0), (1, 3), (2, 3), (4, 0), (2, 1)):
        loaded = _meta(tp, zero)
        with pytest.raises(GalvatronError, match="10 parameters have no values yet"):
            loaded.step(loaded.local_batch(hand.batch()))
        state = loaded.state_dict()
        dcp.load(state, checkpoint_id=path)
        loaded.load_state_dict(state)
        for name, value in loaded.full_state_dict().items():
            assert torch.equal(value, wanted[name]), (tp, zero, name)
        close(
            loaded.step(loaded.local_batch(hand.batch())),
            saved.evaluate(saved.local_batch(hand.batch())),
        )


def _meta(tp: int, zero: int) -> Any:
    net = hand.Net(False)
    net.to("meta")
    net.shift = torch.zeros(6, dtype=torch.float64)
    return hand.parallel(net, tp=tp, zero=zero)


def test_checkpoints_go_from_any_plan_to_any_other(ranks: Any) -> None:
    with tempfile.TemporaryDirectory() as path:
        ranks(4).run(checkpoint_round_trip, path)


def load_full() -> None:
    first = torch.distributed.get_rank() == 0
    model = _meta(2, 3)
    source = hand.Net(False)
    names = [n.removeprefix("block.") for n in hand.PLACEMENTS]
    state = {n: source.get_parameter(p) for n, p in zip(hand.PLACEMENTS, names, strict=True)}
    state["shift"] = source.shift
    for change, message in (
        ({"bias": None}, "missing: bias"),
        ({"odd": source.bias}, "unexpected: odd"),
        ({"bias": torch.zeros(7)}, r"bias has shape \[7\], the model's is \[6\]"),
        ({"also": source.tied + 1}, "also and tied are tied but differ"),
    ):
        wrong = {n: v for n, v in (state | change).items() if v is not None}
        with pytest.raises(GalvatronError, match=message):
            model.load_full_state_dict(wrong if first else None)
    state["also"] = state.pop("tied")  # either name will do
    model.load_full_state_dict(state if first else {})
    for name, value in model.full_state_dict().items():
        assert torch.equal(value, source.tied if name == "tied" else state[name])


def test_whole_states_load_from_rank_0_or_are_refused_by_name(ranks: Any) -> None:
    ranks(4).run(load_full)


def train_bf16(zero: int) -> list[float]:
    model = hand.parallel(hand.Net(False), zero=zero, micro_batches=2, precision="bf16")
    share = model.local_batch(hand.batch())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        losses.append(model.step(share).item())
        assert all(p.dtype == torch.float32 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_bf16_has_fp32_masters_and_every_zero_stage_gives_the_same(ranks: Any) -> None:
    exact = hand.reference(False, steps=1)[0][0]
    results = [ranks(2).run(train_bf16, zero) for zero in range(4)]
    for result in results:
        assert result[0] == result[1]
        assert result[0] == pytest.approx(results[0][0], rel=1e-2)
        assert result[0][0] == pytest.approx(exact, rel=0.05)
        assert result[0][-1] < result[0][0]
