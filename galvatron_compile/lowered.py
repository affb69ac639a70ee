"""What a rank obeys: its program, how its layers run, and its lists of actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from galvatron_compile.actions import Action, Outline, format_actions
from galvatron_compile.pieces import Piece
from galvatron_compile.program import StageProgram


@dataclass(frozen=True)
class LoweredProgram:
    """A program ready to run.

    pieces: forward and backward of every layer of this rank, by layer number.
    training, evaluation: what the rank does in a step, in order.
    """

    program: StageProgram
    pieces: Mapping[int, Piece]
    outline: Outline
    training: tuple[Action, ...]
    evaluation: tuple[Action, ...]
    loss_dtype: torch.dtype
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        actions = format_actions(self.outline, self.training)
        return f"{self.program}\n// actions of one step\n{actions}"
