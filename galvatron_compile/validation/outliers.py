"""Rows of a table that contradict physics or their neighbours. Predictions play no part in it.

Leaving out what a model predicts badly would make any model good. So a run is an outlier only by
what was measured:

1. it does more model FLOPs a second than the GPUs' data sheet allows, or
2. it stands off the law that its like obey. Runs of one *form* (source, GPU, width, tp,
   micro-batch, recompute, ZeRO, …) spend the same time t on a layer and micro-batch and the same
   time h on the head, so a step of m micro-batches over pp stages of 1F1B takes
   (m + pp - 1) · layers / pp · t + m · h + layers / pp · s + c. The four numbers are fitted by
   least absolute deviations, which a few bad rows do not bend, and a run is off if its relative
   residual exceeds 5 times their spread (1.4826 · median absolute) and 5 %.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from galvatron_compile.models.shape import DecoderShape
from galvatron_compile.presets import GPUS
from galvatron_compile.validation.metrics import Floats
from galvatron_compile.validation.run import Run

SPREADS, LEAST_SHARE = 5.0, 0.05
TERMS = 4
LEAST_RUNS = 2 * TERMS  # of a form, for its law to mean anything
_ROUNDS = 60


@dataclass(frozen=True)
class Outlier:
    """A row of the table, and why it is not believed."""

    row: int
    why: str


def outliers(runs: Sequence[Run]) -> tuple[Outlier, ...]:
    """In the order of the rows; see the module's docstring for the rule."""
    shares = {run.row: peak_share(run) for run in runs}
    found = {row: f"{share:.2f} of the GPUs' peak" for row, share in shares.items() if share > 1}
    forms: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in runs:
        if run.row not in found and run.schedule == "1f1b" and run.micro_batch is not None:
            forms[_form(run)].append(run)
    for form in forms.values():
        if len(form) >= LEAST_RUNS:
            found |= _off_the_law(form)
    return tuple(Outlier(row, found[row]) for row in sorted(found))


def peak_share(run: Run) -> float:
    """Model FLOPs a second over the data sheet's; what is recomputed does not count."""
    flops = model_flops_per_token(run.shape, run.seq) * run.seq * run.global_batch
    peak = GPUS[run.preset].half_flops_per_s * run.num_gpus
    return flops / (run.step_ms * 1e-3 * peak)


def model_flops_per_token(shape: DecoderShape, seq: int) -> float:
    """6 for every parameter of a product, and causal attention (PaLM, appendix B), half of it."""
    width = shape.heads * shape.head_size
    attention = shape.hidden * (shape.qkv_width + width)
    mlp = shape.hidden * shape.ffn * (3 if shape.mlp == "swiglu" else 2)
    mlp *= max(1, shape.experts_per_token)
    products = shape.layers * (attention + mlp) + shape.vocab * shape.hidden
    return 6.0 * products + 6.0 * shape.layers * width * seq


def _form(run: Run) -> tuple[object, ...]:
    return (
        run.source, run.gpu, run.gpus_per_node, run.hidden, run.heads, run.kv_heads, run.ffn,
        run.vocab, run.seq, run.micro_batch, run.tp, run.cp, run.zero, run.recompute, run.dtype,
        run.notes, run.sequence_parallel,
    )  # fmt: skip


def _off_the_law(form: Sequence[Run]) -> dict[int, str]:
    measured = np.array([run.step_ms for run in form])
    residuals = fit(np.array([_terms(run) for run in form]), measured)
    spread = 1.4826 * float(np.median(np.abs(residuals)))
    return {
        run.row: f"{residual:+.1%} off the law of {len(form)} runs like it (spread {spread:.1%})"
        for run, residual in zip(form, residuals, strict=True)
        if abs(residual) > max(SPREADS * spread, LEAST_SHARE)
    }


def _terms(run: Run) -> list[float]:
    number = run.plan().num_micro_batches
    own = run.layers / run.pp
    return [(number + run.pp - 1) * own, float(number), own, 1.0]


def fit(terms: Floats, measured: Floats) -> Floats:
    """Relative residuals, measured / law - 1, of the least absolute relative deviations.

    By iteratively reweighted least squares.
    """
    scaled = terms / measured[:, None]
    ones = np.ones_like(measured)
    weights = ones
    for _ in range(_ROUNDS):
        law, *_rest = np.linalg.lstsq(
            scaled * weights[:, None], ones * weights, rcond=None
        )
        misses = np.abs(1 - scaled @ law)
        weights = 1 / np.sqrt(np.maximum(misses, 1e-4))
    found: Floats = measured / (terms @ law) - 1
    return found
