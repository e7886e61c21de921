"""Which tests speak for which file."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A file that is mutated, and the test files that its mutants have to pass."""

    group: str
    file: str
    """Relative to the checkout, no link."""
    tests: tuple[str, ...]
    """The fastest first: a mutant's tests end with the first that fails."""


PASSES = (
    *("cache_features", "expose_stages", "fold_constants", "lower_precision", "narrow_last_layer", "prune_layers"),
    *("prune_mlp", "prune_vision", "repair_layers", "select_tokens", "specialize_shapes", "unroll_diffusion"),
    "unroll_solver",
)
CALIBRATION = {
    "test_calibration": (
        *("activation_ranges", "calibrate", "dense_measures", "feature_shift", "layer_importance", "progress"),
    ),
    "test_cache_search": ("action_shift", "cache_search"),
    "test_fingerprint": ("fingerprint",),
    "test_forecast": ("forecast",),
    "test_held_out": ("held_out",),
    "test_repair": ("decoder_passes", "kept_layer", "repair", "repair_trials", "resumption"),
    "test_ridge": ("ridge",),
    "test_solver_search": ("solver_search",),
    "test_streams": ("streams",),
    "test_vision_cut": ("vision_cut",),
}
RUNTIME_TESTS = ("tests/runtime/test_runtime.py", "tests/runtime/test_lifetime.py")
ENGINE_TESTS = ("tests/runtime/test_engine_session.py",)


def _suite(group: str, file: str, *tests: str) -> Suite:
    return Suite(group=group, file=file, tests=tests)


SUITES = (
    *(_suite("passes", f"passes/{name}.py", f"tests/passes/test_{name}.py") for name in PASSES),
    *(
        _suite("calibration", f"evla_compile/calibration/{name}.py", f"tests/calibration/{tests}.py")
        for tests, names in CALIBRATION.items()
        for name in names
    ),
    _suite("verification", "evla_compile/verification/verify.py", "tests/verification/test_verification.py"),
    _suite("verification", "evla_compile/verification/fidelity.py", "tests/compiler/test_fidelity.py"),
    _suite("verification", "evla_compile/verification/compile_report.py", "tests/verification/test_compile_report.py"),
    _suite("fidelity", "evla_compile/compiler/fidelity.py", "tests/compiler/test_fidelity.py"),
    *(
        _suite("fidelity", f"evla_compile/fidelity/{name}.py", f"tests/fidelity/test_{name}.py")
        for name in ("chunks", "measure")
    ),
    *(
        _suite("certificate", f"evla_compile/certificate/{name}.py", f"tests/certificate/test_{name}.py")
        for name in ("certify", "episodes", "p_value", "record")
    ),
    _suite("verification", "evla_compile/artifact/cases.py", "tests/artifact/test_recorded.py"),
    _suite("verification", "evla_compile/artifact/replay.py", "tests/artifact/test_replay.py"),
    _suite("verification", "evla_compile/settings/tolerances.py", "tests/settings/test_tolerances.py"),
    _suite("manifest", "evla_compile/artifact/manifest.py", "tests/artifact/test_artifact.py"),
    _suite("manifest", "evla_compile/artifact/records.py", "tests/artifact/test_artifact.py"),
    _suite("manifest", "evla_compile/artifact/fields.py", "tests/artifact/test_artifact.py"),
    _suite("manifest", "evla_compile/artifact/integrity.py", "tests/artifact/test_artifact.py"),
    _suite("manifest", "evla_compile/artifact/files.py", "tests/artifact/test_artifact.py"),
    *(
        _suite("runtime", f"evla_compile/runtime/{name}.py", *RUNTIME_TESTS)
        for name in ("onnx_session", "onnx_versions", "placement", "policy", "providers")
    ),
    *(
        _suite("runtime", f"evla_compile/runtime/{name}.py", *ENGINE_TESTS)
        for name in ("engine_match", "engine_resources", "engine_session", "kernel_cache")
    ),
    _suite("runtime", "evla_compile/runtime/latency.py", "tests/runtime/test_latency_counter.py", *ENGINE_TESTS),
)
