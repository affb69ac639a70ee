"""Weights go to transformers and come back, under the model's own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_models import Net, compiled

import galvatron_compile as gc
from galvatron_compile import checkpoint_files
from galvatron_compile.errors import CheckpointError
from galvatron_compile.hugging_face import INDEX, SINGLE, export_safetensors, load_safetensors

safetensors = pytest.importorskip("safetensors.torch")


def gpt2(seed: int) -> Any:
    """A tiny GPT-2: its embedding is the weight of its head."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=24, n_positions=8, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def configure(model: Any, path: str) -> None:
    # Not where ``dist`` is used: cloudpickle would take ``torch.distributed.config`` along.
    model.config.save_pretrained(path)


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.arange(16).view(2, 8) % 24
    return {"input_ids": ids, "labels": ids}


def parallel_gpt2(seed: int, plan: str) -> Any:
    world = dist.get_world_size() if dist.is_initialized() else 1
    profile = gc.ClusterProfile.preset(f"{world}xH100")
    return gc.compile(gpt2(seed), profile, example_inputs=tokens(), plan=plan, measure=False)


def there_and_back(path: str, plan: str, limit: int) -> None:
    first = not dist.is_initialized() or dist.get_rank() == 0
    parallel = parallel_gpt2(1, plan)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.5)
    parallel.step(parallel.local_batch(tokens()))
    optimizer.step()
    wanted = parallel.evaluate(parallel.local_batch(tokens())).item()
    export_safetensors(path, parallel, max_shard_bytes=limit)
    if first:
        model = gpt2(2)
        configure(model, path)
        loaded, info = type(model).from_pretrained(path, output_loading_info=True)
        assert not any(info.values()), info
        assert loaded(**tokens()).loss.item() == pytest.approx(wanted, rel=1e-6)
    if dist.is_initialized():
        dist.barrier()
    other = parallel_gpt2(3, plan)
    load_safetensors(path, other)
    state, again = parallel.full_state_dict(), other.full_state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(value, again[name]) for name, value in state.items())


@pytest.mark.parametrize("limit", [10**9, 8000], ids=["one file", "several files"])
def test_transformers_reads_an_export(tmp_path: Path, limit: int) -> None:
    there_and_back(str(tmp_path), "dp1", limit)
    found = {path.name for path in tmp_path.glob("*.safetensors*")}
    if limit > 8000:
        assert found == {SINGLE}
        assert "lm_head.weight" not in safetensors.load_file(tmp_path / SINGLE)
        return
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert found == {*files, INDEX}
    sizes = [
        [value.nbytes for value in safetensors.load_file(tmp_path / file).values()]
        for file in files
    ]
    assert all(sum(each) <= limit or len(each) == 1 for each in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))


@pytest.mark.parametrize("plan", ["tp2", "dp2.zero3"])
def test_shards_go_out_whole_and_come_in(ranks: Any, tmp_path: Path, plan: str) -> None:
    ranks(2).run(there_and_back, str(tmp_path), plan, 8000, timeout_s=300.0)


def test_what_transformers_saved_is_read(tmp_path: Path) -> None:
    source = gpt2(1)
    for shard in ("1GB", "10KB"):
        source.save_pretrained(tmp_path / shard, max_shard_size=shard)
        parallel = parallel_gpt2(2, "dp1")
        load_safetensors(tmp_path / shard, parallel)
        found = parallel.full_state_dict()
        for name, value in source.state_dict().items():
            assert torch.equal(found[name], value)


def test_names_and_dtypes_may_change_on_the_way(tmp_path: Path) -> None:
    """As of a file that holds a part of the model: without a prefix, in half precision."""
    parallel = parallel_gpt2(1, "dp1")
    prefix = "transformer."

    def shorter(name: str) -> str | None:
        return name.removeprefix(prefix) if name.startswith(prefix) else None

    export_safetensors(tmp_path, parallel, rename=shorter, dtype=torch.bfloat16)
    stored = safetensors.load_file(tmp_path / SINGLE)
    assert stored["wte.weight"].dtype == torch.bfloat16
    other = parallel_gpt2(2, "dp1")
    load_safetensors(tmp_path / SINGLE, other, rename=lambda name: f"{prefix}{name}")
    for name, value in parallel.full_state_dict().items():
        rounded = value.bfloat16().float()
        assert torch.equal(other.full_state_dict()[name], rounded)
    with pytest.raises(CheckpointError, match=r"rename gives .* and .* one name, x"):
        export_safetensors(tmp_path, parallel, rename=lambda name: "x")
    with pytest.raises(CheckpointError, match=r"has x twice, once as h\.0\.attn"):
        load_safetensors(tmp_path, other, rename=lambda name: "x")


def test_an_export_replaces_the_one_before(tmp_path: Path) -> None:
    one, other = compiled(Net()), compiled(Net())
    (tmp_path / ".unfinished-model.safetensors").write_bytes(b"half")
    (tmp_path / "config.json").write_text("{}")
    export_safetensors(tmp_path, one, max_shard_bytes=200)
    assert (tmp_path / INDEX).exists()
    for limit in (10**9, 200, 400):
        export_safetensors(tmp_path, other, max_shard_bytes=limit)
        load_safetensors(tmp_path, one)
        names = sorted(path.name for path in tmp_path.iterdir() if path.name != "config.json")
        assert (names == [SINGLE]) == (limit == 10**9)
        assert (INDEX in names) == (limit != 10**9)
        for name, value in other.full_state_dict().items():
            assert torch.equal(one.full_state_dict()[name], value)


def test_a_failed_export_leaves_the_one_before(tmp_path: Path, monkeypatch: Any) -> None:
    export_safetensors(tmp_path, compiled(Net()))
    before = (tmp_path / SINGLE).read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export_safetensors(tmp_path, compiled(Net(width=9)))
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert (tmp_path / SINGLE).read_bytes() == before


def cut(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:-5])


def without(folder: Path) -> None:
    state = safetensors.load_file(folder / SINGLE)
    del state["two.bias"]
    state["odd"] = state.pop("idle.bias")
    state["one.bias"] = torch.zeros(3)
    safetensors.save_file(state, folder / SINGLE)


def lost(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text('{"weight_map": {"one.bias": "model-00001-of-00002.safetensors"}}')


WRONG = {
    "cut": (cut, "model.safetensors is damaged"),
    "names": (
        without,
        r"missing: idle\.bias, two\.bias; unexpected: odd; one\.bias has shape \[3\], .* is \[6\]",
    ),
    "lost": (lost, r"there is no file .*model-00001-of-00002"),
    "empty": (lambda f: (f / SINGLE).unlink(), f"has neither {SINGLE} nor {INDEX}"),
    "index": (
        lambda f: ((f / SINGLE).unlink(), (f / INDEX).write_text("{}")),
        f"{INDEX} is damaged",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    spoil, message = WRONG[kind]
    export_safetensors(tmp_path, compiled(Net()))
    spoil(tmp_path)
    parallel = compiled(Net())
    before = parallel.full_state_dict()
    with pytest.raises(CheckpointError, match=message):
        load_safetensors(tmp_path, parallel)
    for name, value in parallel.full_state_dict().items():
        assert torch.equal(value, before[name])


def refused_together(path: str) -> None:
    load_safetensors(path, compiled(plan="dp2"))


def test_every_rank_refuses(ranks: Any, tmp_path: Path) -> None:
    checkpoint_files.write(tmp_path / SINGLE, b"nothing of the kind")
    errors = ranks(2).errors(refused_together, str(tmp_path))
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert all("model.safetensors is damaged" in str(error) for error in errors)
