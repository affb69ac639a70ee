"""The wrong checkpoint is refused by name, on every rank, and nothing has changed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_models import Net, adam, compiled, copied, stepped, two_checkpoints
from torch import nn

from galvatron_compile.checkpoint import load_checkpoint, save_checkpoint
from galvatron_compile.checkpoint_manifest import MANIFEST, Manifest, _sum
from galvatron_compile.errors import CheckpointError, GalvatronError


@pytest.fixture(scope="module")
def template(tmp_path_factory: Any) -> Path:
    return two_checkpoints(tmp_path_factory.mktemp("checkpoints") / "saved")


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return copied(template, tmp_path)


def cut(directory: Path) -> None:
    path = directory / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-9])


def flip(directory: Path) -> None:
    path = directory / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(directory: Path, *, sign: bool, **change: Any) -> None:
    path = directory / MANIFEST
    content = {**json.loads(path.read_text()), **change}
    if sign:
        inner = {k: v for k, v in content.items() if k not in ("format", "format_version")}
        inner.pop("sha256")
        content["sha256"] = _sum(inner)
    path.write_text(json.dumps(content))


DAMAGE = {
    "cut": (cut, r"is incomplete: __0_0\.distcp has \d+ bytes of \d+"),
    "flipped": (flip, r"is damaged: the checksum of __0_0\.distcp does not fit"),
    "lost": (lambda d: (d / ".metadata").unlink(), r"is incomplete: \.metadata is missing"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "it has no manifest.json"),
    "half a manifest": (
        lambda d: (d / MANIFEST).write_bytes((d / MANIFEST).read_bytes()[:100]),
        "manifest.json is damaged",
    ),
    "edited": (lambda d: rewrite(d, sign=False, num_steps=9), "its checksum does not fit"),
    "newer": (
        lambda d: rewrite(d, sign=False, format_version=2, version="9.9"),
        r"has checkpoint format 2, this galvatron_compile reads up to 1: .*wrote it \(9\.9\)",
    ),
    "foreign": (lambda d: rewrite(d, sign=False, format="other"), "is not the manifest of a"),
}


def contents(parallel: Any, optimizer: Any) -> Any:
    state = {name: value.clone() for name, value in parallel.full_state_dict().items()}
    moments = [p.clone() for s in optimizer.state.values() for p in s.values()]
    return state, moments, parallel.num_steps, optimizer.param_groups[0]["lr"]


def same(one: Any, other: Any) -> None:
    assert one[2:] == other[2:]
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_and_nothing_changed(folder: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(folder / "step-000002")
    parallel = compiled()
    optimizer = adam(parallel)
    stepped(parallel, optimizer)
    before = contents(parallel, optimizer)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, parallel, optimizer)
    same(contents(parallel, optimizer), before)
    assert load_checkpoint(folder / "step-000001", parallel, optimizer).num_steps == 1


def with_another(net: nn.Module) -> nn.Module:
    net.more = nn.Linear(2, 2)
    return net


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Net(width=5), r"one\.bias has shape \[6\], the model's is \[5\]"),
        (lambda: Net(extra=False), r"unexpected: idle\.bias, idle\.weight"),
        (lambda: with_another(Net()), r"missing: more\.bias, more\.weight"),
    ],
    ids=["shape", "unexpected", "missing"],
)
def test_another_model_is_refused_by_name(folder: Path, other: Any, message: str) -> None:
    model = other()
    parallel = compiled(model)
    before = parallel.full_state_dict()
    with pytest.raises(CheckpointError, match=f"step-000002 is of another model; .*{message}"):
        load_checkpoint(folder, parallel)
    for name, value in parallel.full_state_dict().items():
        assert torch.equal(value, before[name])


def test_a_read_that_breaks_off_forbids_training(folder: Path, monkeypatch: Any) -> None:
    import torch.distributed.checkpoint as dcp

    def broken(*_: Any, **__: Any) -> None:
        raise dcp.CheckpointException("", {0: (OSError("Input/output error"), None)})

    parallel = compiled()
    with monkeypatch.context() as patched:
        patched.setattr(dcp, "load", broken)
        with pytest.raises(CheckpointError, match=r"cannot read .*Input/output error"):
            load_checkpoint(folder, parallel)
    for attempt in (lambda: stepped(parallel), lambda: save_checkpoint(folder, parallel)):
        with pytest.raises(GalvatronError, match=r"step-000002 broke off.* load again"):
            attempt()
    load_checkpoint(folder, parallel)
    stepped(parallel)


def test_a_model_on_meta_is_filled(folder: Path) -> None:
    parallel = compiled(Net().to("meta"))
    with pytest.raises(GalvatronError, match="no values yet"):
        stepped(parallel)
    with pytest.raises(CheckpointError, match="no values yet"):
        save_checkpoint(folder, parallel)
    load_checkpoint(folder, parallel)
    other = compiled()
    load_checkpoint(folder, other)
    assert stepped(parallel) == stepped(other)


def test_what_extra_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="extra holds something other than numbers"):
        save_checkpoint(tmp_path, compiled(), extra={"path": Path("x")})
    assert list(tmp_path.iterdir()) == []


def refused_together(path: str) -> list[str]:
    """One rank's half of the check fails: every rank hears of it, with the same words."""
    parallel = compiled(plan="dp2.zero3")
    optimizer = adam(parallel)
    stepped(parallel, optimizer)
    save_checkpoint(path, parallel, optimizer)
    before = contents(parallel, optimizer)
    found = []
    directory = Path(path) / "step-000001"
    for name in sorted(Manifest.read(directory).files):
        dist.barrier()
        content = (directory / name).read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            (directory / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        dist.barrier()
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, parallel, optimizer)
        found.append(re.sub(r"^rank \d: ", "", str(caught.value)))
        dist.barrier()
        if dist.get_rank() == 0:
            (directory / name).write_bytes(content)
    same(contents(parallel, optimizer), before)
    dist.barrier()
    load_checkpoint(path, parallel, optimizer)
    same(contents(parallel, optimizer), before)
    return found


def test_every_rank_refuses(ranks: Any, tmp_path: Path) -> None:
    one, other = ranks(2).run(refused_together, str(tmp_path))
    assert one == other
    assert len(one) == 6  # .metadata, extra, two ranks' tensors and random states
    assert all("does not fit; use another one" in text for text in one)
