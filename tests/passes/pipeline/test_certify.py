"""The search and an independent mixed-integer program agree on medium instances."""

from __future__ import annotations

import dataclasses

import pytest
from pipeline_instances import medium_problem, small_problem

from galvatron_compile.passes.pipeline.certify import certify
from galvatron_compile.passes.pipeline.family import Solution
from galvatron_compile.passes.pipeline.problem import Family, PipelineProblem
from galvatron_compile.passes.pipeline.searcher import search

INTERLEAVED = Family(4, 8, "interleaved", 2)
CASES = [
    (1, INTERLEAVED, "dense", 1.3),
    (2, INTERLEAVED, "alternating", 1.5),
    (4, Family(2, 8, "1f1b"), "dense", 1.0),
    (5, Family(2, 4, "zero-bubble"), "alternating", 1.2),
    (7, Family(4, 8, "1f1b"), "dense", 1.6),
]


def solved(problem: PipelineProblem) -> Solution:
    best = search([problem]).best
    assert best is not None, "the instance does not fit; give it more capacity"
    return best


@pytest.mark.parametrize(("seed", "family", "style", "share"), CASES)
def test_medium_instances_are_proven(seed: int, family: Family, style: str, share: float) -> None:
    problem = medium_problem(seed, family, style, share)
    solution = solved(problem)
    certificate = certify(problem, solution, time_limit_s=3600)
    assert certificate.status == "proven", str(certificate)
    assert certificate.found_ns == solution.total_ns


def test_small_instances_of_every_schedule_are_proven() -> None:
    seen = set()
    for seed in range(40):
        problem = small_problem(seed)
        best = search([problem]).best
        if best is not None and best.total_ns > 0:
            certificate = certify(problem, best)
            assert certificate.status == "proven", (seed, str(certificate))
            seen.add(problem.family.schedule)
    assert len(seen) == 4


def test_a_plan_that_is_not_the_best_is_refuted() -> None:
    problem = medium_problem(1, INTERLEAVED, "dense", 1.3)
    solution = solved(problem)
    worse = dataclasses.replace(solution, total_ns=solution.total_ns * 101 // 100)
    certificate = certify(problem, worse, time_limit_s=3600)
    assert certificate.status == "refuted" and certificate.found_ns == solution.total_ns
    assert 0.009 < certificate.gap < 0.011


def test_a_time_limit_is_reported() -> None:
    problem = medium_problem(3, Family(4, 8, "1f1b"), "dense", 1.6)
    certificate = certify(problem, solved(problem), time_limit_s=1e-3)
    assert certificate.status == "time limit"
    assert certificate.gap > 0 and "time limit" in str(certificate)
