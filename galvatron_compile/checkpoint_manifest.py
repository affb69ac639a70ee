"""What a checkpoint says about itself: written last, read first.

Tensors lie in the files of torch.distributed.checkpoint under ``model.NAME`` and
``optimizer.NAME.KEY``; the rest, down to the optimizer's step counts, is here, so that a checkpoint
is judged without a tensor being read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galvatron_compile.errors import CheckpointError

FORMAT, FORMAT_VERSION = "galvatron-checkpoint", 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SavedTensor:
    """Shape and dtype (``float32``) of a whole tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class SavedFile:
    """Size and SHA-256 of a file of the checkpoint."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SavedState:
    """One entry of an optimizer's state of one parameter.

    dtype: of a tensor; ``int`` or ``float`` for a Python number. value: of a number or a tensor
        with no dims; None for a tensor of the parameter's shape, which lies in the files.
    """

    dtype: str
    value: float | int | None = None


@dataclass(frozen=True)
class SavedGroup:
    """A parameter group: names in the model's order, and options as JSON knows them."""

    names: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class SavedOptimizer:
    """kind: module and name of the optimizer's class. states: parameter -> key -> entry."""

    kind: str
    groups: tuple[SavedGroup, ...]
    states: Mapping[str, Mapping[str, SavedState]]


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but its tensors.

    num_steps, seed: of the parallel model. model: the plan's fingerprint of it; for people.
    plan: in the compact notation. tensors: by kept name; tied: second name -> kept name.
    files: every file but this one. date: UTC, ISO 8601. torch, version: what wrote it.
    """

    num_steps: int
    seed: int
    model: str
    plan: str
    world_size: int
    tensors: Mapping[str, SavedTensor]
    tied: Mapping[str, str]
    optimizer: SavedOptimizer | None
    date: str
    torch: str
    version: str
    files: Mapping[str, SavedFile] = field(default_factory=dict)

    def stored(self, name: str) -> str:
        """The name that the tensor the model calls ``name`` is stored under."""
        return name if name in self.tensors else self.tied[name]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of everything in the model's state dict, under all its names."""
        kept = {name: tensor.shape for name, tensor in self.tensors.items()}
        return kept | {name: kept[first] for name, first in self.tied.items() if first in kept}

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "sha256": _sum(content)}
        return json.dumps(head | content, indent=1)

    @staticmethod
    def read(directory: Path) -> Manifest:
        """CheckpointError if there is none, or it is damaged, foreign or of a newer format."""
        path = directory / MANIFEST
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} is no checkpoint, or an incomplete one: it has no {MANIFEST}"
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}; use another checkpoint") from error
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise CheckpointError(f"{path} is not the manifest of a galvatron_compile checkpoint")
        version, wanted = found.pop("format_version", None), found.pop("sha256", None)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointError(
                f"{directory} has checkpoint format {version}, this galvatron_compile reads up to "
                f"{FORMAT_VERSION}: install the version that wrote it ({found.get('version')})"
            )
        if wanted != _sum(found):
            raise CheckpointError(
                f"{path} is damaged: its checksum does not fit; use another checkpoint"
            )
        return _manifest(found)


def _sum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest(found: Mapping[str, Any]) -> Manifest:
    tensors = {
        name: SavedTensor(tuple(value["shape"]), value["dtype"])
        for name, value in found["tensors"].items()
    }
    files = {name: SavedFile(**value) for name, value in found["files"].items()}
    optimizer = found["optimizer"] and SavedOptimizer(
        found["optimizer"]["kind"],
        tuple(SavedGroup(tuple(g["names"]), g["options"]) for g in found["optimizer"]["groups"]),
        {
            name: {key: SavedState(**state) for key, state in states.items()}
            for name, states in found["optimizer"]["states"].items()
        },
    )
    return Manifest(**{**found, "tensors": tensors, "files": files, "optimizer": optimizer})
