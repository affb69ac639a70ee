"""lower: StageProgram → LoweredProgram, graphs that run by themselves and a list of actions."""

from __future__ import annotations

from collections.abc import Callable

from galvatron_compile.lowered import LoweredProgram
from galvatron_compile.passes.order import order, order_evaluation
from galvatron_compile.passes.pieces import outline, pieces
from galvatron_compile.pieces import EagerPiece, Piece, PieceGraph
from galvatron_compile.program import StageProgram


def lower(
    program: StageProgram, make: Callable[[PieceGraph], Piece] = EagerPiece
) -> LoweredProgram:
    """See the module's docstring. ``make`` says how a layer runs."""
    graphs = {piece.layer: piece for stage in program.stages for piece in pieces(program, stage)}
    found = outline(program, graphs)
    return LoweredProgram(
        program=program,
        pieces={layer: make(graph) for layer, graph in graphs.items()},
        outline=found,
        training=order(found),
        evaluation=order_evaluation(found),
        loss_dtype=program.loss_dtype,
    )
