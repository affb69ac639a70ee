"""Checkpoints on disk: whole or not there, and the right one is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_models import adam, compiled, copied, stepped, two_checkpoints

from galvatron_compile import checkpoint_files as files
from galvatron_compile.checkpoint import load_checkpoint, save_checkpoint
from galvatron_compile.checkpoint_manifest import MANIFEST, Manifest
from galvatron_compile.errors import CheckpointError


@pytest.fixture(scope="module")
def template(tmp_path_factory: Any) -> Path:
    return two_checkpoints(tmp_path_factory.mktemp("checkpoints") / "saved")


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return copied(template, tmp_path)


def test_the_manifest_says_what_there_is(folder: Path) -> None:
    assert list(files.steps(folder)) == [1, 2]
    manifest = Manifest.read(files.locate(folder))
    assert (manifest.num_steps, manifest.world_size, manifest.plan) == (2, 1, "dp1")
    assert manifest.tensors["one.weight"].shape == (6, 4)
    assert manifest.tensors["idle.bias"].dtype == "float64"
    assert manifest.tensors["count"].dtype == "int64"
    assert manifest.tied == {"also.weight": "one.weight", "also.bias": "one.bias"}
    assert manifest.optimizer is not None
    assert manifest.optimizer.states["two.bias"]["step"].value == 2
    assert {*manifest.files, MANIFEST} == {p.name for p in files.locate(folder).iterdir()}
    assert Manifest.read(folder / "step-000001").num_steps == 1


def test_the_last_or_a_given_one_is_loaded(folder: Path) -> None:
    for path, wanted in ((folder, 2), (folder / "step-000001", 1), (str(folder), 2)):
        parallel = compiled()
        assert load_checkpoint(path, parallel, adam(parallel)).num_steps == wanted
        assert parallel.num_steps == wanted


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    (tmp_path / "step-000003").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "there is no checkpoint in .*nowhere"),
        (tmp_path / "step-000009", "there is no checkpoint .*step-000009"),
        (tmp_path, "step-000003 is no checkpoint, or an incomplete one"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, compiled())


# --- what a save leaves -------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_are_kept_and_never_less_than_the_new_one(folder: Path) -> None:
    parallel = compiled()
    for step in (3, 4):
        parallel.num_steps = step
        save_checkpoint(folder, parallel, keep=3)
    assert list(files.steps(folder)) == [2, 3, 4]
    parallel.num_steps = 1  # the user went back
    save_checkpoint(folder, parallel, keep=2)
    assert list(files.steps(folder)) == [1, 4]
    with pytest.raises(CheckpointError, match="keep must be at least 1, got 0"):
        save_checkpoint(folder, parallel, keep=0)


def test_the_next_save_removes_what_a_killed_one_left(folder: Path) -> None:
    for name in (f"{files.SAVING}step-000003", f"{files.REMOVING}step-000000"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_bytes(b"half")
    parallel = compiled()
    load_checkpoint(folder, parallel)
    stepped(parallel)
    save_checkpoint(folder, parallel)
    assert names(folder) == ["step-000001", "step-000002", "step-000003"]


def test_a_step_saved_again_is_replaced(folder: Path) -> None:
    parallel = compiled()
    load_checkpoint(folder, parallel)
    save_checkpoint(folder, parallel, extra="again")
    assert names(folder) == ["step-000001", "step-000002"]
    assert load_checkpoint(folder, parallel).extra == "again"


def test_a_replacement_that_broke_off_loses_nothing(folder: Path) -> None:
    """Killed between its two renames: the old one is read, and put back by the next save."""
    (folder / "step-000002").rename(folder / f"{files.REPLACED}step-000002")
    parallel = compiled()
    assert load_checkpoint(folder, parallel).num_steps == 2
    stepped(parallel)
    save_checkpoint(folder, parallel)
    assert names(folder) == ["step-000001", "step-000002", "step-000003"]


def test_a_save_that_fails_leaves_nothing_and_training_goes_on(
    folder: Path, monkeypatch: Any
) -> None:
    parallel = compiled()
    load_checkpoint(folder, parallel)
    stepped(parallel)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save_checkpoint(folder, parallel)
    assert names(folder) == ["step-000001", "step-000002"]
    stepped(parallel)
    save_checkpoint(folder, parallel)
    assert load_checkpoint(folder, parallel).num_steps == 4


@pytest.mark.filterwarnings("ignore:a checkpoint was not saved")
def test_a_failure_beside_training_is_raised_once(folder: Path, monkeypatch: Any) -> None:
    parallel = compiled()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for waits in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr(files, "write", full)
            handle = save_checkpoint(folder, parallel, asynchronous=True)
            assert handle is not None
            handle._thread.join()
        assert handle.done()
        with pytest.raises(CheckpointError, match="No space left on device"):
            if waits:
                handle.wait()
            else:
                save_checkpoint(folder, parallel)
        save_checkpoint(folder, parallel)
