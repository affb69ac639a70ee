"""A parallel model's weights as Hugging Face stores them: safetensors under the model's own names.

``model.safetensors``, or above a size several files and ``model.safetensors.index.json``, as
``transformers``' ``from_pretrained`` reads them beside a ``config.json``. Tied weights are written
once, under the first of their names in the model's state dict, as ``save_pretrained`` does.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from galvatron_compile.checkpoint_files import sync_directory, write
from galvatron_compile.checkpoint_ranks import Ranks
from galvatron_compile.errors import CheckpointError, GalvatronError
from galvatron_compile.states import States

if TYPE_CHECKING:
    from galvatron_compile.parallel_model import ParallelModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
UNFINISHED = ".unfinished-"
MAX_SHARD_BYTES = 5_000_000_000
Rename = Callable[[str], str | None]


def export_safetensors(
    path: str | Path,
    parallel: ParallelModel,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    rename: Rename | None = None,
) -> None:
    """Write the model's state dict to the directory ``path``. Every rank calls it.

    Rank 0 writes, and holds one file's tensors at a time. What an older export left there goes.
    The model's configuration is the caller's: ``model.config.save_pretrained(path)``.

    Args:
        dtype: cast floating-point tensors to it; None: as they are held (fp32 under mixed
            precision).
        max_shard_bytes: a file has at most this many bytes of tensors, or one tensor.
        rename: gives the name in the file, None to leave a tensor out.

    Raises:
        CheckpointError: on every rank; it cannot be written.
        PeerError: another rank has ended or does not answer.
    """
    states, ranks = parallel.states, Ranks.of_job()
    ranks.each(states.check_loaded)
    dtypes = states.dtypes()
    shards = ranks.own(lambda: _shards(states, dtypes, dtype, max_shard_bytes, rename))
    export = Export(Path(path), shards)
    try:
        ranks.first(export.begin)
        for shard, tensors in export.filled(states.wholes(), dtype):
            ranks.first(partial(export.write, shard, tensors))
        ranks.first(export.finish)
    finally:
        if ranks.rank == 0:
            export.remove_unfinished()


@dataclass
class Shard:
    """One file: kept name -> name in the file, in order, and the bytes of the tensors."""

    names: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0


def _shards(
    states: States,
    dtypes: Mapping[str, torch.dtype],
    cast: torch.dtype | None,
    limit: int,
    rename: Rename | None,
) -> list[Shard]:
    """Tensors in the model's order, as many to a file as fit."""
    first: dict[str, str] = {}  # of every tensor's names
    for name in states.names:
        first.setdefault(states.tied.get(name, name), name)
    shards: list[Shard] = [Shard()]
    used: dict[str, str] = {}
    for kept in states.kept:
        own = first[kept]
        new = rename(own) if rename else own
        if new is None:
            continue
        if new in used:
            raise CheckpointError(f"rename gives {used[new]} and {own} one name, {new}")
        used[new] = own
        size = math.prod(states.shape(kept)) * _cast(dtypes[kept], cast).itemsize
        if shards[-1].names and shards[-1].num_bytes + size > limit:
            shards.append(Shard())
        shards[-1].names[kept] = new
        shards[-1].num_bytes += size
    return shards


def _cast(held: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and held.is_floating_point else held


class Export:
    """The files of one export, under temporary names until all are written."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder, self.shards = folder, shards
        count = len(shards)
        self.files = [SINGLE] if count == 1 else [
            f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
        ]  # fmt: skip

    def begin(self) -> None:
        _safetensors()  # or it is missed after the gathering
        self.folder.mkdir(parents=True, exist_ok=True)
        self.remove_unfinished()

    def filled(
        self, wholes: Iterable[tuple[str, torch.Tensor | None]], cast: torch.dtype | None
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Every shard's number with its tensors, on rank 0; elsewhere without."""
        number = 0
        tensors: dict[str, torch.Tensor] = {}
        for kept, whole in wholes:
            if number + 1 < len(self.shards) and kept in self.shards[number + 1].names:
                yield number, tensors
                number, tensors = number + 1, {}
            name = self.shards[number].names.get(kept)
            if whole is not None and name is not None:
                tensors[name] = whole.to(_cast(whole.dtype, cast)).contiguous()
        yield number, tensors

    def write(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        path = self.folder / f"{UNFINISHED}{self.files[number]}"
        _safetensors().torch.save_file(tensors, path, metadata={"format": "pt"})
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Give the files their names, and remove those of an older export."""
        for name in self.files:
            (self.folder / f"{UNFINISHED}{name}").replace(self.folder / name)
        mine = set(self.files)
        if len(self.files) > 1:
            mine.add(INDEX)
            unfinished = self.folder / f"{UNFINISHED}{INDEX}"
            write(unfinished, self._index().encode())
            unfinished.replace(self.folder / INDEX)
        for path in self.folder.iterdir():
            if re.fullmatch(FILES, path.name) and path.name not in mine:
                path.unlink()
        sync_directory(self.folder)

    def _index(self) -> str:
        total = sum(shard.num_bytes for shard in self.shards)
        weight_map = {
            name: file
            for file, shard in zip(self.files, self.shards, strict=True)
            for name in shard.names.values()
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def remove_unfinished(self) -> None:
        if self.folder.is_dir():
            for path in self.folder.glob(f"{UNFINISHED}*"):
                path.unlink()


def load_safetensors(
    path: str | Path, parallel: ParallelModel, *, rename: Rename | None = None
) -> None:
    """Take the weights in a ``.safetensors`` file, or a directory as Hugging Face lays it out.

    Every rank calls it; rank 0 reads, one tensor at a time. Of tied weights any name will do.

    Args:
        rename: gives the model's name of a name in the file, None to leave it out.

    Raises:
        CheckpointError: on every rank, before anything is changed: there is no such file, one is
            damaged or lacks, or names or shapes are not the model's (they are listed).
    """
    states, ranks = parallel.states, Ranks.of_job()
    with ExitStack() as stack:
        source = Source(stack)
        ranks.first(lambda: source.open(Path(path), rename))
        try:
            states.load_one_by_one(source.described, source.fetch)
        except GalvatronError as error:
            raise CheckpointError(f"{path}: {error}") from error


class Source:
    """Open safetensors files; their tensors under the model's names."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.described: dict[str, torch.Tensor] = {}
        self._places: dict[str, tuple[Any, str]] = {}

    def open(self, path: Path, rename: Rename | None) -> None:
        for file in _files(path):
            try:
                opened = self._stack.enter_context(_safetensors().safe_open(file, "pt"))
            except FileNotFoundError:
                raise CheckpointError(f"there is no file {file}") from None
            except _safetensors().SafetensorError as error:
                raise CheckpointError(f"{file} is damaged: {error}") from error
            for stored in opened.keys():  # noqa: SIM118 - not a dict
                name = rename(stored) if rename else stored
                if name is None:
                    continue
                if name in self._places:
                    raise CheckpointError(f"{path} has {name} twice, once as {stored} in {file}")
                piece = opened.get_slice(stored)
                self._places[name] = (opened, stored)
                self.described[name] = torch.empty(
                    piece.get_shape(), dtype=_dtype(piece.get_dtype(), name), device="meta"
                )

    def fetch(self, name: str) -> torch.Tensor:
        opened, stored = self._places[name]
        tensor: torch.Tensor = opened.get_tensor(stored)
        return tensor


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    try:
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        return [path / name for name in dict.fromkeys(weight_map.values())]
    except FileNotFoundError:
        raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / INDEX} is damaged: {error}") from error


def _dtype(name: str, tensor: str) -> torch.dtype:
    """Of a name as safetensors uses: F32, BF16, I64, U8, BOOL."""
    kinds = {"F": "float", "I": "int", "U": "uint"}
    known = {"BOOL": "bool", "BF16": "bfloat16"}
    known |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    found = known.get(name) or f"{kinds.get(name[0], name[0])}{name[1:]}"
    dtype = getattr(torch, found, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{tensor} has dtype {name}, which torch does not know")
    return dtype


def _safetensors() -> Any:
    try:
        import_module("safetensors.torch")
        return import_module("safetensors")
    except ImportError as error:
        raise CheckpointError("safetensors is not installed: pip install safetensors") from error
