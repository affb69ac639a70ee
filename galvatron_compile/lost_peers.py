"""A rank that died, as the others see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from galvatron_compile.errors import PeerError

# What gloo, NCCL and torch's store say when a connection ends or an answer never comes.
_SIGNS = (
    "connection closed", "connection reset", "broken pipe", "socket closed", "remote end",
    "timed out", "timeout", "gloo", "nccl", "peer",
)  # fmt: skip


@contextmanager
def lost_peers(what: str) -> Iterator[None]:
    """Turn the failure of a collective into a PeerError that says what to do.

    what: what was being done, for the message. Other errors pass unchanged.
    """
    try:
        yield
    except PeerError:
        raise
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PeerError(
            f"lost contact with another rank in {what}: {first}. That rank has died or hangs; see "
            "its own output. This rank's parameters and optimizer state are those of the last "
            "step, but its peers are gone: end all ranks and start again from the last checkpoint"
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    kinds = tuple(
        kind
        for name in ("DistError", "DistNetworkError", "DistBackendError")
        if isinstance(kind := getattr(dist, name, None), type)
    )
    text = str(error).lower()
    return dist.is_initialized() and (
        isinstance(error, kinds) or any(sign in text for sign in _SIGNS)
    )
