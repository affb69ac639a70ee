"""Fixtures of the whole suite."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from hypothesis import settings

# A commit's tests end alike whenever they run. `make test-all` tries new examples, and new seeds.
settings.register_profile("repeatable", derandomize=True)
if os.environ.get("GALVATRON_TEST_SEED") != "fresh":
    settings.load_profile("repeatable")

# Caches, and a helper of multiprocessing that ends with the process that started it.
KEPT = "torchinductor_", "resource_tracker"
END_S = 10.0


def _load_ranks() -> ModuleType:
    """tests/ranks.py, by path: with ``--import-mode=importlib`` tests/ is not on sys.path."""
    if "ranks" not in sys.modules:
        path = Path(__file__).with_name("ranks.py")
        spec = importlib.util.spec_from_file_location("ranks", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["ranks"] = module
        spec.loader.exec_module(module)
    return sys.modules["ranks"]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Any]]:
    """``ranks(4).run(function, *args)``: run on 4 gloo ranks that are kept for the session."""
    yield from _pools({})


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[[int], Any]]:
    """As ``ranks``; Triton kernels run there, on CPU tensors, under Triton's interpreter."""
    yield from _pools({"TRITON_INTERPRET": "1"})


def _pools(environment: dict[str, str]) -> Iterator[Callable[[int], Any]]:
    module = _load_ranks()
    pools: dict[int, Any] = {}

    def pool(world_size: int) -> Any:
        if world_size not in pools:
            pools[world_size] = module.RankPool(world_size, environment=environment)
        return pools[world_size]

    yield pool
    for opened in pools.values():
        opened.close()


@pytest.fixture(scope="session", autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No process, shared memory or temporary file outlives the session; nor do the namespaces of
    emulated nodes, which have no names and end with the last process in them."""
    folder, session = tmp_path_factory.mktemp("temporary"), uuid.uuid4().hex
    shared = set(_shared_memory())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("GALVATRON_TEST_SESSION", session)
        yield

    def left() -> list[str]:
        memory = set(_shared_memory()) - shared
        found = [*_processes(session), *memory, *map(str, folder.iterdir())]
        return [text for text in found if not _kept(text)]

    until = time.monotonic() + END_S
    while left() and time.monotonic() < until:
        time.sleep(0.1)
    assert not left(), left()


def _processes(session: str) -> list[str]:
    """Command lines of the others that were started with this session's environment."""
    found = []
    for process in psutil.process_iter():
        try:
            zombie = process.status() == psutil.STATUS_ZOMBIE
            theirs = process.environ().get("GALVATRON_TEST_SESSION")
            if process.pid != os.getpid() and theirs == session and not zombie:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended, or is another user's
            continue
    return [text for text in found if not _kept(text)]


def _shared_memory() -> list[str]:
    """Ours; other programs have theirs there too."""
    return list(map(str, Path("/dev/shm").glob("*galvatron*")))


def _kept(text: str) -> bool:
    return any(name in text for name in KEPT)
