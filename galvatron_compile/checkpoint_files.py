"""A folder of checkpoints: one directory per step, complete as soon as it has its name.

A checkpoint is written under a name that begins with a dot and renamed when it is complete, so a
process that dies leaves either the new checkpoint or, beside the old ones, something that no reader
looks at and the next save removes. Functions here run on one rank while the others wait.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from galvatron_compile.checkpoint_manifest import MANIFEST, SavedFile
from galvatron_compile.errors import CheckpointError

SAVING, REPLACED, REMOVING = ".saving-", ".replaced-", ".removing-"


def step_name(num_steps: int) -> str:
    return f"step-{num_steps:06d}"


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their number of steps, in order.

    One that was about to be replaced counts as long as there is no other of its name.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name.startswith(REPLACED)):
        matched = re.fullmatch(r"(?:\.replaced-)?step-(\d{6,})", path.name)
        if matched and path.is_dir():
            found.setdefault(int(matched[1]), path)
    return dict(sorted(found.items()))


def locate(path: Path) -> Path:
    """The checkpoint at ``path``, or the one with the most steps in the folder ``path``."""
    if (path / MANIFEST).exists() or re.fullmatch(r"step-\d{6,}", path.name):
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint {path}")
        return path
    if path.is_dir() and (found := steps(path)):
        return found[max(found)]
    raise CheckpointError(f"there is no checkpoint in {path}; give the folder passed to save")


def begin(folder: Path, name: str) -> Path:
    """A new directory to write checkpoint ``name`` in; removes what killed saves have left."""
    folder.mkdir(parents=True, exist_ok=True)
    _put_back(folder)
    for path in folder.iterdir():
        if path.name.startswith((SAVING, REPLACED, REMOVING)):
            shutil.rmtree(path)
    directory = folder / f"{SAVING}{name}"
    directory.mkdir()
    return directory


def _put_back(folder: Path) -> None:
    """Undo a replacement that broke off between its two renames."""
    for path in folder.glob(f"{REPLACED}*"):
        final = folder / path.name.removeprefix(REPLACED)
        if not final.exists():
            path.rename(final)


def finish(directory: Path) -> Path:
    """Give a complete checkpoint its name; an older one of that name goes."""
    sync_directory(directory)
    folder = directory.parent
    final = folder / directory.name.removeprefix(SAVING)
    old = folder / f"{REPLACED}{final.name}"
    if final.exists():
        final.rename(old)
    directory.rename(final)
    sync_directory(folder)
    if old.exists():
        shutil.rmtree(old)
    return final


def keep_newest(folder: Path, keep: int, current: Path) -> None:
    """Remove all but the ``keep`` checkpoints with the most steps, and never ``current``."""
    others = [path for path in steps(folder).values() if path != current]
    for path in others[: max(0, len(others) - (keep - 1))]:
        going = path.with_name(f"{REMOVING}{path.name}")
        path.rename(going)  # half a checkpoint must not look like one
        shutil.rmtree(going)


def abandon(directory: Path) -> None:
    """Remove what a failed save has written, as far as it can be."""
    shutil.rmtree(directory, ignore_errors=True)


def write(path: Path, content: bytes) -> None:
    """A file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make new names in a directory last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(path: Path) -> SavedFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SavedFile(path.stat().st_size, digest)


def check_presence(directory: Path, files: dict[str, SavedFile]) -> None:
    """CheckpointError that names the files that lack or have another size."""
    wrong = []
    for name, saved in files.items():
        path = directory / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != saved.num_bytes:
            wrong.append(f"{name} has {path.stat().st_size} bytes of {saved.num_bytes}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{directory} is incomplete: {', '.join(wrong[:5])}{more}")


def check_content(directory: Path, files: Iterable[tuple[str, SavedFile]]) -> None:
    """CheckpointError that names a file whose bytes are not those that were written."""
    for name, saved in files:
        if describe(directory / name) != saved:
            raise CheckpointError(
                f"{directory} is damaged: the checksum of {name} does not fit; use another one"
            )
