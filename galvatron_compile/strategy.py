"""How one layer runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from galvatron_compile.errors import PlanError

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True, slots=True, order=True)
class Strategy:
    """The parallel strategy of one layer on ``tp * ulysses * cp * dp`` ranks of its stage.

    tp: tensor-parallel degree.
    dp: data-parallel degree: in how many parts the batch is divided.
    sequence_parallel: keep activations between the tensor-parallel regions sharded along the
        sequence (Megatron-SP, Korthikanti et al. 2022); needs tp > 1.
    zero: ZeRO stage (Rajbhandari et al. 2020): 0 replicates everything over the data ranks; 1
        shards optimizer states; 2 also gradients; 3 also parameters.
    recompute: "none"; "selective" runs the cheap operators again in backward (everything but
        matrix products and attention, Korthikanti et al. 2022); "full" keeps only the layer's
        inputs and runs its forward again.
    ulysses: sequence sharded everywhere but in attention, which is sharded by heads; an all-to-all
        changes between the two (Jacobs et al. 2023).
    cp: context-parallel degree: sequence sharded everywhere, keys and values passed around a ring
        (Liu et al. 2023).
    ep: expert-parallel degree: experts of a mixture divided over ep of the data ranks, tokens sent
        to them by all-to-all (Lepikhin et al. 2020); 1 for layers without experts.
    """

    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    zero: int = 0
    recompute: Recompute = "none"
    ulysses: int = 1
    cp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "ulysses", "cp", "ep"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.zero not in (0, 1, 2, 3):
            raise PlanError(f"ZeRO stage must be 0, 1, 2 or 3, got {self.zero}")
        if self.recompute not in RECOMPUTE:
            raise PlanError(f"recompute must be none, selective or full, got {self.recompute!r}")
        if self.sequence_parallel and self.tp == 1:
            raise PlanError("sequence parallel needs tp of at least 2; drop sp or raise tp")
        if self.zero and self.data_ranks == 1:
            raise PlanError(f"zero{self.zero} needs dp of at least 2; drop zero or raise dp")
        if self.data_ranks % self.ep:
            raise PlanError(
                f"ep{self.ep} does not divide the {self.data_ranks} data ranks (dp × ulysses × "
                "cp); lower ep or raise dp"
            )

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same parameters before ZeRO divides them: dp × ulysses × cp."""
        return self.dp * self.ulysses * self.cp

    @property
    def num_ranks(self) -> int:
        return self.tp * self.data_ranks

    @property
    def form(self) -> tuple[int, bool]:
        """What the tensor-parallel form of a layer depends on: (tp, sequence parallel)."""
        return self.tp, self.sequence_parallel

    def __str__(self) -> str:
        """The compact notation, for example ``tp2.sp.dp4.zero3.recompute``."""
        parts = [f"tp{self.tp}"] if self.tp > 1 else []
        parts += ["sp"] if self.sequence_parallel else []
        parts += [f"ulysses{self.ulysses}"] if self.ulysses > 1 else []
        parts += [f"cp{self.cp}"] if self.cp > 1 else []
        parts += [f"ep{self.ep}"] if self.ep > 1 else []
        parts += [f"dp{self.dp}"] if self.dp > 1 or self.num_ranks == 1 else []
        parts += [f"zero{self.zero}"] if self.zero else []
        parts += {"none": [], "selective": ["selective"], "full": ["recompute"]}[self.recompute]
        return ".".join(parts)
