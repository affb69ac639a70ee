"""A whole training step with every kernel, under Triton's interpreter, in real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import galvatron_compile as gc
from galvatron_compile.kernels import base, buckets, peers


def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    made: torch.nn.Module = LlamaForCausalLM(config)
    return made


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 48, (4, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def trained(plan: str) -> tuple[float, dict[str, torch.Tensor], dict[str, int], list[str]]:
    """Loss, whole gradients (on rank 0), how often operators ran as kernels, and the axes."""
    assert base.INTERPRETED
    launched: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        began = peers.Peers.begin

        def begin(self: peers.Peers) -> Any:
            launched["peers"] = launched.get("peers", 0) + 1
            return began(self)

        def counted(name: str) -> Any:
            called = getattr(buckets, name)

            def call(*args: Any) -> None:
                launched[name] = launched.get(name, 0) + 1
                called(*args)

            return call

        def glance(self: peers.Peers) -> None:
            launched["glances"] = launched.get("glances", 0) + 1

        patch.setattr(peers.Peers, "begin", begin)
        patch.setattr(peers.Peers, "glance", glance)
        for name in ("pack", "unpack"):
            patch.setattr(buckets, name, counted(name))
        cluster = gc.ClusterProfile.preset("2xA100-80GB")
        parallel = gc.compile(
            model(), cluster, example_inputs=batch(), plan=plan, fuse="always", measure=False
        )
        loss = float(parallel.step(parallel.local_batch(batch())))
        axes = [axis.peers for axis in parallel._program.mesh.axes.values() if axis.peers]
        return loss, parallel.full_gradients(), launched, axes


@pytest.mark.parametrize("plan", ["tp2.sp", "tp2.sp.recompute; micro=2", "dp2.zero3"])
def test_a_step_of_kernels_equals_one_process(interpreted: Any, plan: str) -> None:
    alone = model()
    expected = alone(**batch()).loss
    expected.backward()
    found = interpreted(2).run(trained, plan, timeout_s=240.0)
    for loss, _, launched, axes in found:
        assert loss == pytest.approx(float(expected), rel=1e-5)
        assert axes == (["tp2 of ranks 0, 1"] if "tp2" in plan else [])
        # Forward and backward of two gathers and two scatters in each of two layers, and the head.
        assert launched.get("peers", 0) >= (2 * 2 * 4 if axes else 0)
        assert launched.get("glances", 0) == len(axes)  # a step looks once at each axis's peers
        # Both blocks are gathered twice; units of one parameter need no copy. All five are packed.
        assert launched.get("unpack", 0) == (4 if "zero3" in plan else 0)
        assert launched["pack"] == 5
    gradients = found[0][1]
    for name, parameter in alone.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=0, atol=2e-5 * scale, msg=name
        )


def plain(plan: str) -> list[str]:
    cluster = gc.ClusterProfile.preset("2xA100-80GB")
    options: dict[str, Any] = {"example_inputs": batch(), "plan": plan, "measure": False}
    parallel = gc.compile(model(), cluster, fuse="always", **options)
    parallel.step(parallel.local_batch(batch()))
    return [axis.peers for axis in parallel._program.mesh.axes.values() if axis.peers]


def test_without_the_interpreter_the_cpu_has_no_symmetric_memory(ranks: Any) -> None:
    assert ranks(2).run(plain, "tp2.sp") == [[], []]
