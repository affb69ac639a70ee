"""Counted memory against peaks worked out by hand."""

from __future__ import annotations

import gc

import torch

from galvatron_compile.memory_meter import MemoryMeter, metering
from galvatron_compile.torch_private import new_fake_mode

KIB = 1024


def kib(number: int) -> torch.Tensor:
    return torch.zeros(number * KIB // 4)


def test_peak_of_temporaries_by_hand() -> None:
    meter = MemoryMeter()
    x = kib(8)
    meter.register([x])
    with meter:
        assert meter.held_bytes() == 8 * KIB
        y = x + 1  # 16
        z = y * 2  # 24
        del y  # 16
        z = z.exp() * x  # the old z, exp(z) and the product beside x: 32, then 16
        assert meter.held_bytes() == 16 * KIB
        assert meter.take_peak_bytes() == 32 * KIB
        assert meter.take_peak_bytes() == 16 * KIB  # since the last question
        del z
        assert meter.held_bytes() == 8 * KIB
    del x
    assert meter.held_bytes() == 0


def test_views_count_once_and_keep_their_storage() -> None:
    x = kib(4)
    meter = MemoryMeter()
    meter.register([x, x.view(-1, 2), x[3:]])
    with meter:
        part = (x + 1)[:1]
        assert meter.held_bytes() == 8 * KIB  # one element holds all of it
        part.add_(1)
        assert meter.take_peak_bytes() == 8 * KIB
        assert part.numel() == 1


def test_what_is_resized_in_place_counts_with_its_size_of_the_moment() -> None:
    buffer, other = kib(16), kib(2)
    meter = MemoryMeter()
    meter.register([buffer, other])
    with meter:
        buffer.untyped_storage().resize_(0)
        assert meter.held_bytes() == 2 * KIB
        meter.take_peak_bytes()
        buffer.untyped_storage().resize_(16 * KIB)
        buffer.fill_(1)  # touched here, before anyone asks
        buffer.untyped_storage().resize_(0)
        assert meter.take_peak_bytes() == 18 * KIB
        assert meter.held_bytes() == 2 * KIB


def test_backward_is_seen_and_nothing_is_kept_alive() -> None:
    weight = kib(4).requires_grad_()
    meter = MemoryMeter()
    meter.register([weight])
    with meter:
        loss = (weight * 2).exp().sum()
        loss.backward()
        # Three in forward (weight, its double, exp of that), three in backward (weight, the saved
        # exp, its product with the gradient), and two scalars: the loss and its gradient.
        assert meter.take_peak_bytes() == 12 * KIB + 8
        del loss
        assert meter.held_bytes() == 8 * KIB  # the weight and its gradient
    weight.grad = None
    gc.collect()
    assert meter.held_bytes() == 4 * KIB


def test_what_was_there_before_counts_only_if_it_is_registered() -> None:
    mine, foreign = kib(4), kib(8)
    meter = MemoryMeter()
    meter.register([mine])
    with meter:
        mine.copy_(foreign[: mine.numel()])
        foreign.add_(1)
        assert meter.held_bytes() == 4 * KIB
        assert (foreign + 1).numel() == foreign.numel()
        assert meter.take_peak_bytes() == 12 * KIB


def test_only_memory_of_this_device_counts() -> None:
    with metering(torch.device("cpu"), []) as meter:
        on_meta = torch.zeros(100, device="meta") + 1
        with new_fake_mode():
            fake = torch.zeros(100) + 1
        assert meter.held_bytes() == 0
        assert meter.take_peak_bytes() == 0
    assert fake.device.type == "cpu"
    assert on_meta.device.type == "meta"


def test_memory_that_is_given_back_in_place_is_not_held_on() -> None:
    """As gathered parameters are: nothing touches the storage when it is freed."""
    buffer, other = kib(4), kib(1)
    buffer.untyped_storage().resize_(0)
    meter = MemoryMeter()
    meter.register([buffer, other])
    with meter:
        buffer.untyped_storage().resize_(4 * KIB)
        buffer.add_(1)
        assert meter.take_peak_bytes() == 5 * KIB
        buffer.untyped_storage().resize_(0)
        more = other + 1
        assert meter.held_bytes() == 2 * KIB
        buffer.untyped_storage().resize_(4 * KIB)
        again = more + 1
        assert meter.take_peak_bytes() == 7 * KIB
        assert again.numel() == more.numel()
