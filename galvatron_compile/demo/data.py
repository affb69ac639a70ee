"""Real text without a download: the Python standard library's own sources, byte by byte."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"})


def source_files(root: Path | None = None) -> Iterator[Path]:
    """The ``.py`` files under ``root`` (the running interpreter's library), in sorted order."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if EXCLUDED.isdisjoint(path.relative_to(root).parts[:-1]):
            yield path


@dataclass(frozen=True)
class Text:
    """Bytes to learn from. tokens: [length] uint8."""

    tokens: Tensor

    @staticmethod
    def read(max_bytes: int = 4_000_000, root: Path | None = None) -> Text:
        """The first ``max_bytes`` of the sources, one file after the other."""
        content = bytearray()
        for path in source_files(root):
            content += path.read_bytes()
            if len(content) >= max_bytes:
                break
        if not content:
            raise FileNotFoundError(
                f"no .py files under {root or sysconfig.get_paths()['stdlib']}; the demo reads the "
                "standard library's sources, which this Python comes without"
            )
        return Text(torch.frombuffer(content[:max_bytes], dtype=torch.uint8).clone())

    def batch(self, step: int, batch_size: int, length: int) -> dict[str, Tensor]:
        """Windows at random places that depend on ``step`` alone, so that all ranks agree.

        Returns ``input_ids`` and ``labels``, [batch_size, length] int64; the model shifts labels.
        """
        generator = torch.Generator().manual_seed(step)
        last = len(self.tokens) - length
        starts = torch.randint(0, last + 1, (batch_size,), generator=generator)
        windows = self.tokens[starts[:, None] + torch.arange(length)].long()
        return {"input_ids": windows, "labels": windows.clone()}
