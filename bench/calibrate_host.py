"""Reproduce the constants of galvatron_compile.validation.software that are fitted, from 58 rows.

    .venv/bin/python bench/calibrate_host.py ../shared/data/published/measured_runs.csv

Fits host time of an operator, its share in backward and the slowdown of an undivided head to
vTrain's rows of two GPUs, which ``validate`` reports apart, by the mean of
abs(log(predicted / measured)). Rows that are reported are not read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scipy.optimize import minimize

from galvatron_compile.validation import read_table
from galvatron_compile.validation.predict import Predictor
from galvatron_compile.validation.software import (
    EARLY_BACKWARD,
    EARLY_HOST_MS,
    EARLY_WHOLE_HEAD,
    Software,
    calibrated_on,
)

SCALE = (0.01, 0.1, 1.0)  # of the constants, so that one step suits both


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/calibrate_host.py TABLE.csv (measured_runs.csv)")
    table = Path(sys.argv[1])
    runs = [run for run in read_table(table) if calibrated_on(run)]
    predictor = Predictor(table)

    def error(constants: Sequence[float]) -> float:
        host_ms, backward, whole_head = constants
        sizes = []
        for run in runs:
            software = Software.of(run)
            head = whole_head if software.whole_head != 1.0 else 1.0
            software = replace(
                software, host_ms=host_ms, backward_dispatch=backward, whole_head=head
            )
            step_ms = predictor.predict_with(run, software).step_ms
            sizes.append(abs(math.log(step_ms / run.step_ms)))
        return sum(sizes) / len(sizes)

    def scaled(x: Sequence[float]) -> list[float]:
        return [value * scale for value, scale in zip(x, SCALE, strict=True)]

    found = minimize(
        lambda x: error(scaled(x)),
        [6.0, 5.0, 2.0],
        method="Nelder-Mead",
        options={"xatol": 0.02, "fatol": 1e-4, "maxfev": 120},
    )
    host_ms, backward, whole_head = scaled(found.x)
    in_use = (EARLY_HOST_MS, EARLY_BACKWARD, EARLY_WHOLE_HEAD)
    print(f"{len(runs)} rows, {found.nfev} evaluations, mean abs(log) {found.fun:.4f}")
    print(f"host time of an operator: {1e3 * host_ms:.1f} us (in use {1e3 * EARLY_HOST_MS:.1f})")
    print(f"its share in backward: {backward:.2f} (in use {EARLY_BACKWARD:.2f})")
    print(f"undivided head: x {whole_head:.2f} (in use {EARLY_WHOLE_HEAD:.2f})")
    print(f"with the constants in use: {error(in_use):.4f}")


if __name__ == "__main__":
    main()
