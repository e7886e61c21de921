"""From a camera frame to an action chunk: the host work that all backends share; no torch.

Shape legend: B batch, S image side in pixels, T text budget, A action steps, F action dimensions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from evla_compile.host.camera_frame import CameraFrame, Framing
from evla_compile.host.inputs import GraphInputs, InputSignature, is_batch
from evla_compile.host.processor import Processor
from evla_compile.settings.config import CompileConfig

GraphCall: TypeAlias = Callable[[GraphInputs], NDArray[np.float32]]
"""What runs a policy's graph: its inputs -> raw samples float32 [B,A,F]."""


def predict_action(
    call: GraphCall,
    processor: Processor,
    image: CameraFrame | Sequence[CameraFrame],
    instruction: str | Sequence[str],
    signature: InputSignature,
    *,
    unnorm_key: str | None,
    noise: NDArray[np.floating] | None,
    seed: int | None,
    framing: Framing = "whole",
) -> NDArray[np.float64]:
    """Run a backend from frames and instructions to actions in the units of a dataset.

    Args:
        call: runs the graph.
        processor: the policy's host side.
        image: see `GraphInputs.prepare`.
        instruction: see `GraphInputs.prepare`.
        signature: sizes of the graph's inputs.
        unnorm_key: name of the dataset whose statistics scale the actions; None where only one is known.
        noise: see `action_noise`.
        seed: see `action_noise`.
        framing: see `GraphInputs.prepare`.

    Returns:
        Actions [A,F] for a single frame, [B,A,F] for a sequence of frames.

    Raises:
        ValueError: an argument is refused, or the backend's samples are not finite.
    """
    processor.statistics_for(unnorm_key)  # refuse a wrong name before the policy runs
    inputs = GraphInputs.prepare(processor, image, instruction, signature, noise=noise, seed=seed, framing=framing)
    actions = processor.actions(call(inputs), unnorm_key)
    return actions if is_batch(image) else actions[0]


class Predictor(ABC):
    """A policy with a static batch, on any backend: frames and instructions in, action chunks out."""

    processor: Processor
    """Host-side tokenizer, image preparation and action statistics."""
    config: CompileConfig
    """Settings of the compilation."""

    @property
    @abstractmethod
    def signature(self) -> InputSignature:
        """Sizes of what the graph takes."""

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Shape of the noise that the graph takes, (B, A, F)."""
        return self.signature.noise_shape

    @abstractmethod
    def sample(
        self,
        image: NDArray[np.uint8],
        input_ids: NDArray[np.int64],
        text_length: NDArray[np.int64],
        noise: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Return raw samples float32 [B,A,F]."""

    def predict_action(
        self,
        image: CameraFrame | Sequence[CameraFrame],
        instruction: str | Sequence[str],
        unnorm_key: str | None = None,
        noise: NDArray[np.floating] | None = None,
        seed: int | None = None,
        *,
        framing: Framing = "whole",
    ) -> NDArray[np.float64]:
        """Return the action chunk for a camera frame and an instruction.

        Args:
            image: a PIL image of mode RGB or uint8 [H,W,3]; for a batch, a sequence of B of them or uint8 [B,H,W,3].
            instruction: the task in words; for a batch, a sequence of B of them.
            unnorm_key: name of the dataset whose statistics scale the actions; None where only one is known.
            noise: float array [A,F] or [B,A,F] from which the sampler starts; None draws it from `seed`.
            seed: whole number from 0 up; None without `noise` means 0, the same noise in every call.
            framing: "whole" squashes the whole frame to the policy's square; "deploy" cuts it first as CogACT's server
                for real robots does; see `evla_compile.host.camera_frame.Framing` for when.

        Returns:
            Actions float64 [A,F] for a single frame, [B,A,F] for a batch.

        Raises:
            ValueError: an argument is refused, or the samples are not finite.
        """
        return predict_action(
            lambda inputs: self.sample(*inputs.arrays),
            self.processor,
            image,
            instruction,
            self.signature,
            unnorm_key=unnorm_key,
            noise=noise,
            seed=seed,
            framing=framing,
        )
