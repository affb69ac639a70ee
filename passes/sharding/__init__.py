"""Tensor and sequence parallelism, derived: rules per operator, an exact choice, a rewrite."""

from galvatron_compile.passes.sharding.apply import gather_batch, localise
from galvatron_compile.passes.sharding.assignment import shard_layer
from galvatron_compile.passes.sharding.sharded_layer import Collective, ShardedLayer
from galvatron_compile.passes.sharding.tied import shard_layers

__all__ = [
    "Collective",
    "ShardedLayer",
    "gather_batch",
    "localise",
    "shard_layer",
    "shard_layers",
]
