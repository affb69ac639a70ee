"""The pieces of the demo that need no ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from galvatron_compile.demo.data import Text, source_files
from galvatron_compile.demo.memory import peak_bytes
from galvatron_compile.demo.report import Summary, Timed, draw
from galvatron_compile.plans import Plan
from galvatron_compile.strategy import Strategy


@pytest.fixture
def summary() -> Summary:
    alternatives = (Timed("dp4", 90.0, 110.0), Timed("tp4", 200.0, None))
    return Summary([5.5, 4.0, 3.0], 80.0, 100.0, 3 << 20, 4 << 20, 1e-7, 2e-6, alternatives)


def test_text_is_the_standard_librarys_sources_in_a_fixed_order() -> None:
    first = next(source_files()).read_bytes()
    text = Text.read(200_000)
    assert len(text.tokens) == 200_000
    assert bytes(text.tokens[: len(first)].tolist()) == first
    assert torch.equal(text.tokens, Text.read(200_000).tokens)


def test_installed_packages_and_tests_are_left_out(tmp_path: Path) -> None:
    for name in ("b.py", "a/c.py", "site-packages/x.py", "test/t.py", "a/data.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert bytes(Text.read(root=tmp_path).tokens.tolist()) == b"a/c.pyb.py"


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="standard library's sources"):
        Text.read(root=tmp_path)


def test_batches_are_windows_of_the_text_and_depend_on_the_step_alone() -> None:
    text = Text.read(10_000)
    batch = text.batch(3, 4, 32)
    whole = bytes(text.tokens.tolist())
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 32)
    assert all(bytes(row.tolist()) in whole for row in batch["input_ids"])
    assert torch.equal(batch["input_ids"], text.batch(3, 4, 32)["input_ids"])
    assert not torch.equal(batch["input_ids"], text.batch(4, 4, 32)["input_ids"])


def test_peak_counts_what_lives_at_once_and_not_what_was_freed() -> None:
    weight = torch.nn.Parameter(torch.zeros(1000))
    idle = peak_bytes(lambda: None)

    def one_after_the_other() -> None:
        for _ in range(5):
            torch.zeros(1 << 20)

    def at_once() -> None:
        kept = weight.repeat(1000).exp()  # exp keeps its result for backward
        kept.sum().backward()
        weight.grad = None

    assert (1 << 22) <= peak_bytes(one_after_the_other) - idle < 1.5 * (1 << 22)
    assert 2 * 4_000_000 <= peak_bytes(at_once) - idle <= 4 * 4_000_000
    assert peak_bytes(lambda: None, exclude=[weight]) == idle - 4000


def test_summary_holds_what_the_readme_promises(tmp_path: Path, summary: Summary) -> None:
    plan = Plan("", 4, 16, 1, ("embed", "block"), (Strategy(dp=4), Strategy(tp=2, dp=2)))
    summary.save(tmp_path / "runs" / "summary.json", plan)
    document = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert document["losses"] == [5.5, 4.0, 3.0]
    assert Plan.from_json(json.dumps(document["plan"])) == plan
    assert [document["predicted_step_ms"], document["measured_step_ms"]] == [80.0, 100.0]
    assert [document["max_rel_loss_error"], document["max_rel_grad_error"]] == [1e-7, 2e-6]
    assert document["alternatives"][1] == {
        "name": "tp4", "predicted_step_ms": 200.0, "measured_step_ms": None
    }


def test_picture_is_drawn_with_and_without_alternatives(tmp_path: Path, summary: Summary) -> None:
    draw(summary, tmp_path / "with.png")
    draw(dataclasses.replace(summary, alternatives=()), tmp_path / "without.png")
    contents = [(tmp_path / name).read_bytes() for name in ("with.png", "without.png")]
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in contents)
    assert contents[0] != contents[1]


def test_table_shows_the_ratio_of_predicted_to_measured(summary: Summary) -> None:
    assert list(summary.table().columns[3].cells) == ["0.80", "0.75", "0.82"]
