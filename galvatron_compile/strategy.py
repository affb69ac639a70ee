"""How one layer runs."""

from __future__ import annotations

from dataclasses import dataclass

from galvatron_compile.errors import PlanError


@dataclass(frozen=True, slots=True, order=True)
class Strategy:
    """The parallel strategy of one layer on ``tp * dp`` ranks.

    tp: tensor-parallel degree.
    dp: data-parallel degree.
    sequence_parallel: keep activations between the tensor-parallel regions sharded along the
        sequence (Megatron-SP, Korthikanti et al. 2022); needs tp > 1.
    zero: ZeRO stage (Rajbhandari et al. 2020): 0 replicates everything over dp; 1 shards optimizer
        states; 2 also gradients; 3 also parameters.
    recompute: keep only the layer's inputs and run its forward again in backward.
    """

    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    zero: int = 0
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "dp"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.zero not in (0, 1, 2, 3):
            raise PlanError(f"ZeRO stage must be 0, 1, 2 or 3, got {self.zero}")
        if self.sequence_parallel and self.tp == 1:
            raise PlanError("sequence parallel needs tp of at least 2; drop sp or raise tp")
        if self.zero and self.dp == 1:
            raise PlanError(f"zero{self.zero} needs dp of at least 2; drop zero or raise dp")

    @property
    def num_ranks(self) -> int:
        return self.tp * self.dp

    def __str__(self) -> str:
        """The compact notation, for example ``tp2.sp.dp4.zero3.recompute``."""
        parts = [f"tp{self.tp}"] if self.tp > 1 else []
        parts += ["sp"] if self.sequence_parallel else []
        parts += [f"dp{self.dp}"] if self.dp > 1 or self.tp == 1 else []
        parts += [f"zero{self.zero}"] if self.zero else []
        parts += ["recompute"] if self.recompute else []
        return ".".join(parts)
