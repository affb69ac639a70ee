"""Checkpoints that any plan can load: model, optimizer, step count and random states.

A folder of checkpoints holds one directory per saved step (``step-000020``). Each is complete as
soon as it has its name, and lists its files with their checksums in ``manifest.json``; see
:mod:`galvatron_compile.checkpoint_files` and :mod:`galvatron_compile.checkpoint_manifest`.
"""

from __future__ import annotations

import io
import pickle
import random
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp

import galvatron_compile
from galvatron_compile import checkpoint_files as files
from galvatron_compile import checkpoint_optimizer, notation
from galvatron_compile.checkpoint_manifest import Manifest, SavedTensor
from galvatron_compile.checkpoint_optimizer import OptimizerLoad
from galvatron_compile.checkpoint_ranks import Ranks, peers_alive
from galvatron_compile.checkpoint_saving import SaveHandle, Saver, Snapshot, first_failure, write
from galvatron_compile.errors import CheckpointError
from galvatron_compile.states import States

if TYPE_CHECKING:
    from galvatron_compile.parallel_model import ParallelModel

EXTRA = "extra.pt"


@dataclass(frozen=True)
class Loaded:
    """What was loaded. num_steps: done when it was saved. extra: as it was given to the save."""

    path: Path
    num_steps: int
    extra: Any
    manifest: Manifest


def save_checkpoint(
    path: str | Path,
    parallel: ParallelModel,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    asynchronous: bool = False,
    extra: Any = None,
    keep: int | None = None,
) -> SaveHandle | None:
    """Save the state of training as ``path/step-NNNNNN``. Every rank calls it, between steps.

    Until the new checkpoint is complete, and if the job dies before, the older ones are as they
    were. A checkpoint of the same step is replaced.

    Args:
        path: a folder that all ranks share.
        optimizer: any whose state per parameter is of the parameter's shape, or numbers.
        asynchronous: copy to memory and return; write while training goes on. The handle's
            ``wait()`` gives the directory. A next save waits for it.
        extra: what else the program needs to go on, of rank 0: numbers, texts, tensors, and lists
            and dicts of them (a scheduler's ``state_dict()``).
        keep: remove all but this many checkpoints with the most steps.

    Raises:
        CheckpointError: on every rank; it cannot be saved.
        PeerError: another rank has ended or does not answer.
    """
    states, ranks = parallel.states, Ranks.of_job()
    saver = states.saver = states.saver or Saver()
    saver.settle()
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep must be at least 1, got {keep}")
    manifest, tensors = _contents(parallel, optimizer, states, ranks)
    blobs = ranks.own(lambda: _blobs(extra, ranks.rank))
    if asynchronous:
        tensors = {name: states.parts.staged(tensor) for name, tensor in tensors.items()}
    snapshot = Snapshot(Path(path), manifest, tensors, blobs, keep)
    if asynchronous:
        return saver.start(snapshot)
    write(snapshot, ranks)
    return None


def _contents(
    parallel: ParallelModel,
    optimizer: torch.optim.Optimizer | None,
    states: States,
    ranks: Ranks,
) -> tuple[Manifest, dict[str, torch.Tensor]]:
    ranks.each(states.check_loaded)
    saved = checkpoint_optimizer.describe(optimizer, states, ranks) if optimizer else None
    dtypes = states.dtypes()
    manifest = Manifest(
        num_steps=parallel.num_steps,
        seed=parallel.seed,
        model=parallel.plan.model,
        plan=notation.format(parallel.plan),
        world_size=ranks.world_size,
        tensors={
            name: SavedTensor(tuple(states.shape(name)), str(dtypes[name]).removeprefix("torch."))
            for name in states.kept
        },
        tied={name: states.tied[name] for name in states.names if name in states.tied},
        optimizer=saved,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        torch=torch.__version__,
        version=galvatron_compile.__version__,
    )
    model = states.tensors_by_kept(every=False)
    tensors = {f"model.{name}": tensor for name, tensor in model.items()}
    if optimizer is not None and saved is not None:
        tensors |= checkpoint_optimizer.tensors_to_save(optimizer, states, saved)
    return manifest, tensors


def load_checkpoint(
    path: str | Path,
    parallel: ParallelModel,
    optimizer: torch.optim.Optimizer | None = None,
) -> Loaded:
    """Go on from a checkpoint made under any plan and number of ranks. Every rank calls it.

    Parameters, buffers, the optimizer's state and options, ``parallel.num_steps`` and the seed of
    dropout are taken over; the random states of Python, NumPy and torch only in a job of as many
    ranks. What the optimizer's groups say about how it runs (``foreach``, ``fused``, …) stays.

    Args:
        path: a checkpoint, or a folder of them: the one with the most steps is taken.
        optimizer: of the class that was saved, over ``parallel.parameters()``. None: whatever the
            checkpoint holds of one is left out.

    Raises:
        CheckpointError: on every rank, before anything is changed: there is no checkpoint, it is
            damaged or incomplete, of a newer format, of another model or another optimizer.
        PeerError: another rank has ended or does not answer.
    """
    states, ranks = parallel.states, Ranks.of_job()
    if states.saver is not None:
        states.saver.settle()
    directory, manifest = ranks.first(lambda: _find(Path(path)))
    names = {name: manifest.stored(name) for name in states.kept if name in manifest.shapes}
    takes = None
    if optimizer is not None and manifest.optimizer is not None:
        takes = OptimizerLoad(optimizer, states, manifest.optimizer, names)
    ranks.each(lambda: _check(directory, manifest, states, takes, optimizer, ranks))
    blobs = ranks.own(lambda: _read_blobs(directory, ranks, manifest))
    model = states.tensors_by_kept(every=True, empty=True)
    tensors = {f"model.{names[name]}": tensor for name, tensor in model.items()}
    tensors |= takes.targets() if takes else {}
    states.broken = (
        f"loading {directory} broke off, so parameters are a mix of two states: load again"
    )
    _read_tensors(tensors, directory, ranks)
    for name, tensor in model.items():
        states.take(name, tensor)
    if takes is not None:
        takes.apply(tensors)
    parallel.num_steps, parallel.seed = manifest.num_steps, manifest.seed
    states.broken = ""
    if "random" in blobs:
        _set_random_states(blobs["random"])
    return Loaded(directory, manifest.num_steps, blobs["extra"], manifest)


def _find(path: Path) -> tuple[Path, Manifest]:
    directory = files.locate(path)
    manifest = Manifest.read(directory)
    files.check_presence(directory, dict(manifest.files))
    return directory, manifest


def _check(
    directory: Path,
    manifest: Manifest,
    states: States,
    takes: OptimizerLoad | None,
    optimizer: torch.optim.Optimizer | None,
    ranks: Ranks,
) -> None:
    if problems := states.problems(manifest.shapes):
        raise CheckpointError(f"{directory} is of another model; {'; '.join(problems)}")
    if optimizer is not None and takes is None:
        raise CheckpointError(f"{directory} was saved without an optimizer; load it without one")
    if takes is not None:
        takes.check()
    mine = sorted(manifest.files.items())[ranks.rank :: ranks.world_size]
    files.check_content(directory, mine)


def _read_tensors(tensors: dict[str, torch.Tensor], directory: Path, ranks: Ranks) -> None:
    with peers_alive(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of one process
        try:
            dcp.load(
                tensors,
                storage_reader=dcp.FileSystemReader(directory),
                no_dist=ranks.world_size == 1,
            )
        except dcp.CheckpointException as error:
            raise CheckpointError(f"cannot read {directory}: {first_failure(error)}") from error


# Files beside the tensors.


def _random_name(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def _blobs(extra: Any, rank: int) -> dict[str, bytes]:
    blobs = {_random_name(rank): _packed(_random_states())}
    if rank == 0:
        blobs[EXTRA] = _packed(extra)
        try:
            _unpacked(io.BytesIO(blobs[EXTRA]))
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                "extra holds something other than numbers, texts, tensors, lists and dicts: "
                f"{str(error).splitlines()[0]}"
            ) from error
    return blobs


def _packed(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(file: io.BytesIO | Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _read_blobs(directory: Path, ranks: Ranks, manifest: Manifest) -> dict[str, Any]:
    blobs = {"extra": _unpacked(directory / EXTRA)}
    if manifest.world_size == ranks.world_size:
        blobs["random"] = _unpacked(directory / _random_name(ranks.rank))
    return blobs


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = (name, [int(key) for key in keys], *rest)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
