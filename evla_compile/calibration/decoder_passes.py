"""The lossy rewrites of the decoder that decisions ask for: what calibration repairs, and what `compile` runs."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from evla_compile.graph.contract import GraphPass
from evla_compile.passes import PruneLayers, PruneMLP, RepairLayers, SelectTokens
from evla_compile.settings.budgets.budget import D, Decision, decision_of
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.budgets.mlp import MLPDecision
from evla_compile.settings.budgets.repair import RepairDecision
from evla_compile.settings.budgets.tokens import TokenDecision
from evla_compile.settings.sizes import ModelSizes


def decoder_passes(
    decisions: Sequence[Decision], sizes: ModelSizes, tensors: Mapping[str, Tensor]
) -> tuple[GraphPass | None, ...]:
    """Return the lossy rewrites of the decoder, None for one without work.

    Args:
        decisions: one of each technique.
        sizes: sizes of the dense model.
        tensors: refit weights of the layers that are repaired, by module path.
    """

    def lossy(kind: type[D], build: Callable[[D], GraphPass]) -> GraphPass | None:
        return lossy_pass(decisions, sizes, kind, build)

    return (
        lossy(LayerDecision, lambda layers: PruneLayers(keep=layers.keep)),
        lossy(MLPDecision, lambda mlp: PruneMLP(neurons=mlp.neurons)),  # after the layers: none that goes is sliced
        lossy(  # after the neurons: the refit weights have the width that is left
            RepairDecision, lambda repair: RepairLayers(layers=repair.layers, tensors=tensors)
        ),
        lossy(  # behind the second layer of those that stay
            TokenDecision,
            lambda tokens: SelectTokens(
                visual_tokens=tokens.visual_tokens,
                key_tokens=tokens.key_tokens,
                task_share=tokens.task_share,
                token_rule=tokens.token_rule,
                token_seed=tokens.token_seed,
                merge_tokens=tokens.merge_tokens,
            ),
        ),
    )


def lossy_pass(
    decisions: Sequence[Decision], sizes: ModelSizes, kind: type[D], build: Callable[[D], GraphPass]
) -> GraphPass | None:
    """Return the pass of a technique by its decision, none where that is idle."""
    decision = decision_of(kind, decisions)
    return None if decision.idle(sizes) else build(decision)
