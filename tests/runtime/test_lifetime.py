"""Policies closed, copied, pickled and sent to other processes."""

import copy
import multiprocessing
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import evla_compile as evla
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.errors import ArtifactError, EvlaError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.inputs import draw_noise
from evla_compile.runtime import RuntimePolicy, load
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import stand_in_plan
from tests.runtime.test_runtime import CHUNK, SIDE, TEXT, WIDTH, export

Inputs = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Path:
    return export(tmp_path_factory.mktemp("shared") / "policy", tokenizer_json)


@pytest.fixture
def inputs() -> Inputs:
    return {
        "image": np.full((1, SIDE, SIDE, 3), 51, dtype=np.uint8),
        "input_ids": np.full((1, TEXT), 50, dtype=np.int64),
        "text_length": np.array([7], dtype=np.int64),
        "noise": draw_noise((1, CHUNK, WIDTH), 1),
    }


class CountingSession:
    """Counts how often it is closed; its first close fails where it is told to."""

    widened = False

    def __init__(self, *, fails: bool = False) -> None:
        self.closed, self._fails = 0, fails

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        pytest.fail("a closed policy must not compute")

    def close(self) -> None:
        self.closed += 1
        if self._fails:
            raise EvlaError("kernels cannot be kept")


def with_session(artifact: Path, session: CountingSession) -> RuntimePolicy:
    policy = load(artifact)
    return RuntimePolicy(session, policy.manifest, policy.processor)


# The runtime's policy


def test_a_with_block_closes_a_policy(artifact: Path, inputs: Inputs, frame: Image.Image) -> None:
    with load(artifact) as policy:
        assert policy.sample(**inputs).shape == (1, CHUNK, WIDTH)
    uses: list[Callable[[], object]] = [
        lambda: policy.sample(**inputs),
        lambda: policy.outputs(**inputs),
        lambda: policy.predict_action(frame, "open drawer"),
        policy.__enter__,
        lambda: pickle.dumps(policy),
        lambda: copy.deepcopy(policy),
    ]
    for use in uses:
        with pytest.raises(EvlaError, match="this policy is closed: load it again"):
            use()
    assert policy.noise_shape == (1, CHUNK, WIDTH)


def test_a_policy_is_closed_once_whoever_asks(artifact: Path) -> None:
    session = CountingSession()
    policy = with_session(artifact, session)
    with policy:
        policy.close()
    policy.close()
    assert session.closed == 1


def test_a_close_that_fails_is_reported_once(artifact: Path) -> None:
    policy = with_session(artifact, CountingSession(fails=True))
    with pytest.raises(EvlaError, match="kernels cannot be kept"):
        policy.close()
    policy.close()


def test_an_error_within_the_block_is_the_one_that_is_seen(artifact: Path) -> None:
    def fail() -> None:
        with load(artifact):
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        fail()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])  # noqa: S301 - its own
def test_a_copy_is_loaded_again_with_the_same_settings(
    artifact: Path, inputs: Inputs, again: Callable[[RuntimePolicy], RuntimePolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artifact.parent)
    policy = load(artifact.name, threads=1, mapped=True)
    monkeypatch.chdir("/")  # a worker's folder is another one
    found = again(policy)
    assert found is not policy
    assert found.manifest == policy.manifest
    policy.close()
    assert found.sample(**inputs).shape == (1, CHUNK, WIDTH)
    assert found.latency.summary()[0].count == 0
    settings = pickle.loads(pickle.dumps(found.__reduce__()[1]))[0]  # noqa: S301 - its own
    assert (settings["threads"], settings["mapped"], settings["provider"]) == (1, True, "cpu")


def test_a_policy_reaches_a_process_of_its_own(artifact: Path, inputs: Inputs) -> None:
    policy = load(artifact)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(policy.sample, **inputs).result(timeout=200)
    assert np.array_equal(found, policy.sample(**inputs))


def test_another_artifact_in_the_place_of_a_pickled_one_is_refused(tmp_path: Path, tokenizer_json: str) -> None:
    pickled = pickle.dumps(load(export(tmp_path / "policy", tokenizer_json)))
    shutil.rmtree(tmp_path / "policy")
    with pytest.raises(ArtifactError, match="no compiled policy"):
        pickle.loads(pickled)  # noqa: S301 - its own
    export(tmp_path / "policy", tokenizer_json, batch=2)
    with pytest.raises(ArtifactError, match=r"manifest\.json is of another artifact than the pickled policy"):
        pickle.loads(pickled)  # noqa: S301 - its own


def test_a_policy_that_load_did_not_make_cannot_be_pickled(artifact: Path) -> None:
    with pytest.raises(EvlaError, match=r"was not loaded by evla_compile\.runtime\.load"):
        pickle.dumps(with_session(artifact, CountingSession()))


# The compiled policy


@pytest.fixture(scope="module")
def compiled(small_policy: CogACT) -> CompiledPolicy:
    config = CompileConfig.dense(text_tokens=9, batch_size=2, ddim_steps=2)
    config = replace(config, keep_layers=(0, 2), mlp_keep=0.5)
    return evla.compile(small_policy, config, plan=stand_in_plan(small_policy.sizes, config))


def test_a_copy_of_a_compiled_policy_runs(compiled: CompiledPolicy, small_inputs: Sequence[Tensor]) -> None:
    arrays = [tensor.numpy() for tensor in small_inputs]
    early = copy.deepcopy(compiled)  # while cut weights are still deferred
    expected = compiled.sample(*arrays)
    assert np.array_equal(early.sample(*arrays), expected)
    shallow, deep = copy.copy(compiled), copy.deepcopy(compiled)
    assert shallow.graph is compiled.graph
    assert deep.graph is not compiled.graph
    for weight in deep.graph.buffers():
        if weight.is_floating_point():
            weight.zero_()
    assert np.array_equal(shallow.sample(*arrays), expected)
    assert np.array_equal(compiled.sample(*arrays), expected)
    assert not np.array_equal(deep.sample(*arrays), expected)
    assert np.array_equal(copy.deepcopy(compiled).sample(*arrays), expected)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_compiled_policy_says_what_to_do_instead_of_pickling_it(compiled: CompiledPolicy, protocol: int) -> None:
    for thing in (compiled, compiled.to_torch("eager")):
        with pytest.raises(EvlaError, match=r"cannot be pickled: export it, policy\.export\(DIR\), and load it"):
            pickle.dumps(thing, protocol)
