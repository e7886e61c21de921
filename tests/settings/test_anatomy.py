"""Which stages there are, and which tolerance holds at each."""

import pytest

from evla_compile.settings.anatomy import COGACT, ToleranceClass


def test_module_paths_are_those_of_the_checkpoints() -> None:
    assert COGACT.roots == ("vision_backbone", "projector", "llm_backbone", "action_model")
    assert COGACT.lowered == ("vision_backbone", "projector", "llm_backbone")
    assert COGACT.decoder_layers == "llm_backbone.llm.model.layers"


@pytest.mark.parametrize(
    ("stage", "verified", "tolerance"),
    [
        ("patches", True, "features"),
        ("projected", True, "features"),
        ("layers.31", True, "features"),
        ("cognition", True, "features"),
        ("denoising.0", True, "actions"),
        ("samples", True, "actions"),
        ("kept_patches", False, "features"),
        ("relevance", False, "features"),
        ("layers_of_another_kind", False, "features"),
    ],
)
def test_every_stage_has_one_class_of_tolerance(stage: str, verified: bool, tolerance: ToleranceClass) -> None:
    assert COGACT.is_verified(stage) == verified
    assert COGACT.tolerance_of(stage) == tolerance
