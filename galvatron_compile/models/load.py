"""From the text that names a model to a model on the meta device: no weights, no GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galvatron_compile.errors import ShapeError
from galvatron_compile.models.families import FAMILIES, family
from galvatron_compile.models.shape import DecoderShape

if TYPE_CHECKING:  # importing torch takes seconds, which a misspelt name should not cost
    import torch
    from torch import nn

EXAMPLE_BATCH = 2  # samples; capture makes the batch size free


@dataclass(frozen=True)
class Workable:
    """A model that can be captured: everything on the meta device.

    example_inputs: keyword arguments (a mapping) or positional ones (a tuple) of one batch.
    seq: tokens in a sample, 1 where a sample is not a sequence of tokens.
    loss_fn: ``loss_fn(outputs, batch)``, None for a model that returns its loss.
    shape: of a built-in model.
    origin: for people, where the model comes from.
    """

    name: str
    module: nn.Module
    example_inputs: Mapping[str, Any] | tuple[Any, ...]
    seq: int
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None
    shape: DecoderShape | None = None
    origin: str = ""
    num_parameters: int = field(init=False)

    def __post_init__(self) -> None:
        count = sum(parameter.numel() for parameter in self.module.parameters())
        object.__setattr__(self, "num_parameters", count)

    def __str__(self) -> str:
        """One line: ``llama3-70b: 70.55 billion parameters, sequence 8192; 80 blocks, …``."""
        details = self.origin if self.shape is None else str(self.shape)
        return (
            f"{self.name}: {parameters_text(self.num_parameters)}, sequence {self.seq}; {details}"
        )


def parameters_text(count: int) -> str:
    """``8.03 billion parameters``."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.2f} {word} parameters"
    return f"{count} parameters"


def load_model(
    spec: str, seq: int | None = None, dtype: torch.dtype | None = None
) -> Workable:
    """The model that ``spec`` names, built on the meta device.

    spec: a built-in name (``llama3-70b``), the path of a Hugging Face ``config.json`` or of the
        folder that holds it, or ``package.module:callable``.
    seq: tokens in a sample; None for the model's own. A callable brings its own and may not be
        given another.
    dtype: of the parameters, bfloat16 if None; a callable brings its own.

    Raises ShapeError, which says what to change, if there is no such model or it cannot be built.
    """
    if seq is not None and seq < 1:
        raise ShapeError(f"a sequence must have at least 1 token, got {seq}")
    if spec.lower() in FAMILIES:
        return load_shape(spec.lower(), family(spec), seq, dtype)
    path = Path(spec).expanduser()
    if path.exists():
        from galvatron_compile.models.huggingface import from_config

        return from_config(path, seq, dtype)
    if ":" in spec:
        from galvatron_compile.models.user import from_callable

        return from_callable(spec, seq)
    if path.suffix == ".json" or len(path.parts) > 1:
        raise ShapeError(
            f"there is no file or folder {spec}; give a config.json or the folder that holds it"
        )
    family(spec)  # raises, with the names that there are
    raise AssertionError(spec)


def load_shape(
    name: str, shape: DecoderShape, seq: int | None = None, dtype: torch.dtype | None = None
) -> Workable:
    """A decoder of any shape on the meta device, as :func:`load_model` gives the built-in ones."""
    import torch

    from galvatron_compile.models.decoder import Decoder

    length = seq or shape.max_positions
    with torch.device("meta"):
        module = Decoder(shape, length, dtype or torch.bfloat16)
    return Workable(name, module, token_batch(length), length, shape=shape)


def token_batch(seq: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels``, both int64 [2, seq] on the meta device."""
    import torch

    def tokens() -> torch.Tensor:
        return torch.zeros(EXAMPLE_BATCH, seq, dtype=torch.int64, device="meta")

    return {"input_ids": tokens(), "labels": tokens()}
