"""The rewrites, one file each: their contract is in `evla_compile.graph.contract`, their order in the pipeline."""

from evla_compile.passes.cache_features import CacheFeatures
from evla_compile.passes.expose_stages import ExposeStages
from evla_compile.passes.fold_constants import FoldConstants
from evla_compile.passes.lower_precision import LowerPrecision
from evla_compile.passes.narrow_last_layer import NarrowLastLayer
from evla_compile.passes.prune_layers import PruneLayers
from evla_compile.passes.prune_mlp import PruneMLP
from evla_compile.passes.prune_vision import PruneVision
from evla_compile.passes.repair_layers import RepairLayers
from evla_compile.passes.select_tokens import SelectTokens
from evla_compile.passes.specialize_shapes import SpecializeShapes
from evla_compile.passes.unroll_diffusion import UnrollDiffusion
from evla_compile.passes.unroll_solver import UnrollSolver

__all__ = [
    "CacheFeatures",
    "ExposeStages",
    "FoldConstants",
    "LowerPrecision",
    "NarrowLastLayer",
    "PruneLayers",
    "PruneMLP",
    "PruneVision",
    "RepairLayers",
    "SelectTokens",
    "SpecializeShapes",
    "UnrollDiffusion",
    "UnrollSolver",
]
