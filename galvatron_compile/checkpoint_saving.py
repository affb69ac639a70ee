"""Writing what is to be saved, in the caller's thread or beside training."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from galvatron_compile import checkpoint_files as files
from galvatron_compile.checkpoint_manifest import MANIFEST, Manifest, SavedFile
from galvatron_compile.checkpoint_ranks import Ranks, peers_alive
from galvatron_compile.errors import CheckpointError


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes of a checkpoint.

    tensors: for torch.distributed.checkpoint; nothing may change them until they are written.
    blobs: other files of this rank, by name. keep: how many checkpoints stay; None: all.
    """

    folder: Path
    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]
    blobs: Mapping[str, bytes]
    keep: int | None


def write(snapshot: Snapshot, ranks: Ranks) -> Path:
    """All ranks write; the checkpoint gets its name when the last has finished.

    Raises CheckpointError on every rank if one could not write, PeerError if one is gone. Then
    rank 0 removes what was written; it alone, because another might remove what it has just
    named. If rank 0 is the one that is gone, the next save does it.
    """
    name = files.step_name(snapshot.manifest.num_steps)
    directory = ranks.first(lambda: files.begin(snapshot.folder, name))
    try:
        _write_tensors(snapshot.tensors, directory, ranks)
        written = ranks.each(lambda: _write_own(snapshot, directory, ranks.rank))
        found = {name: saved for each in written for name, saved in each.items()}
        return ranks.first(lambda: _complete(snapshot, directory, found))
    except BaseException:
        if ranks.rank == 0:
            files.abandon(directory)
        raise


def _write_tensors(tensors: Mapping[str, torch.Tensor], directory: Path, ranks: Ranks) -> None:
    with peers_alive(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of one process
        try:
            dcp.save(
                dict(tensors),
                storage_writer=dcp.FileSystemWriter(directory),
                process_group=ranks.group,
                no_dist=ranks.world_size == 1,
            )
        except dcp.CheckpointException as error:
            raise CheckpointError(f"cannot write {directory}: {first_failure(error)}") from error


def first_failure(error: dcp.CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _write_own(snapshot: Snapshot, directory: Path, rank: int) -> dict[str, SavedFile]:
    """This rank's other files; describes all files that it wrote."""
    for name, content in snapshot.blobs.items():
        files.write(directory / name, content)
    names = [*snapshot.blobs, *(path.name for path in directory.glob(f"__{rank}_*"))]
    if rank == 0:
        names.append(".metadata")
    return {name: files.describe(directory / name) for name in names}


def _complete(snapshot: Snapshot, directory: Path, found: dict[str, SavedFile]) -> Path:
    try:
        files.check_presence(directory, found)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; every rank must see the same folder") from None
    manifest = dataclasses.replace(snapshot.manifest, files=found)
    files.write(directory / MANIFEST, manifest.to_json().encode())
    final = files.finish(directory)
    if snapshot.keep is not None:
        files.keep_newest(snapshot.folder, snapshot.keep, final)
    return final


class SaveHandle:
    """A save that runs beside training.

    Training may go on, and change what is being saved: that was copied. A failure is raised by
    :meth:`wait`, and by the next save if nobody waited.
    """

    def __init__(self, work: Callable[[], Path]) -> None:
        self._work = work
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._told = False
        # Not a daemon: a program that ends still finishes its last checkpoint.
        self._thread = threading.Thread(target=self._run, name="galvatron-save")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._path = self._work()
        except BaseException as error:  # raised by wait, in the thread that asked for the save
            self._error = error
            warnings.warn(f"a checkpoint was not saved: {error}", stacklevel=1)
        finally:
            del self._work  # and with it the copies

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> Path:
        """The checkpoint's directory. Raises TimeoutError, or what went wrong."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the checkpoint was not written within {timeout_s} s")
        self._told = True
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path

    def settle(self) -> None:
        """Wait for the end; raise what went wrong unless :meth:`wait` has."""
        self._thread.join()
        if not self._told:
            self.wait()


class Saver:
    """The saves of one parallel model: at most one at a time."""

    def __init__(self) -> None:
        self._running: SaveHandle | None = None
        self._ranks: Ranks | None = None

    def settle(self) -> None:
        """Wait for the save that runs, if one does; raise its error unless it was raised."""
        running, self._running = self._running, None
        if running is not None:
            running.settle()

    def start(self, snapshot: Snapshot) -> SaveHandle:
        """Write ``snapshot``, of copies, in a thread. Collective."""
        if self._ranks is None:
            self._ranks = Ranks.of_job().with_own_group()
        ranks = self._ranks
        self._running = SaveHandle(lambda: write(snapshot, ranks))
        return self._running
