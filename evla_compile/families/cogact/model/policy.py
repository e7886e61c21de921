"""CogACT as one torch module: camera frame and instruction in, noise prediction or action chunk out.

Shape legend: B batch, S image side in pixels, P patches, T text budget, D decoder width, A action steps, F action
dimensions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evla_compile.families.cogact.model.action import ActionModel
from evla_compile.families.cogact.model.language import LanguageBackbone, cognition_token
from evla_compile.families.cogact.model.vision import VisionBackbone
from evla_compile.graph.inputs import to_tensors
from evla_compile.graph.policy_call import enter_policy, leave_policy
from evla_compile.graph.torch_state import own_torch_state, traceable_torch_state
from evla_compile.host.camera_frame import CameraFrame, Framing
from evla_compile.host.inputs import GraphInputs, InputSignature, is_batch
from evla_compile.host.predictor import predict_action
from evla_compile.host.processor import Processor
from evla_compile.settings.config import CFG_SCALE, TEXT_TOKENS, check_cfg_scale, check_text_tokens
from evla_compile.settings.schedule import DDIM_STEPS, check_ddim_steps, ddim_schedule
from evla_compile.settings.sizes import ModelSizes


class Projector(nn.Module):
    """Visual features of both towers to decoder inputs through a GELU MLP: [B,P,D_vision] -> [B,P,D]."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), nn.GELU()]
        self.projector = nn.Sequential(*layers[:-1])

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.projector(patches)
        return out


class _Modules(nn.Module):
    """The modules of a CogACT policy, under the key names of its checkpoints."""

    def __init__(
        self,
        vision_backbone: VisionBackbone,
        projector: Projector,
        llm_backbone: LanguageBackbone,
        action_model: ActionModel,
    ) -> None:
        super().__init__()
        self.vision_backbone = vision_backbone
        self.projector = projector
        self.llm_backbone = llm_backbone
        self.action_model = action_model

    def cognition(self, image: Tensor, input_ids: Tensor, text_length: Tensor) -> Tensor:
        """Return the cognition feature [B,1,D]: the final hidden state, after the norm, of each row's EOS.

        Args:
            image: uint8 [B,S,S,3].
            input_ids: int64 [B,T], right-padded.
            text_length: int64 [B], real tokens of each row.
        """
        patches = self.projector(self.vision_backbone(image))  # [B,P,D]
        hidden = self.llm_backbone(patches, input_ids)  # [B,P+T,D]
        return cognition_token(hidden, text_length, input_ids.shape[1])


class NoisePrediction(_Modules):
    """One noise prediction of a policy, whose modules it shares: what `capture` records."""

    def __init__(self, policy: "CogACT") -> None:
        super().__init__(policy.vision_backbone, policy.projector, policy.llm_backbone, policy.action_model)

    def forward(
        self, image: Tensor, input_ids: Tensor, text_length: Tensor, noise: Tensor, timestep: Tensor, cfg_scale: float
    ) -> Tensor:
        """Return the noise predicted at one denoising step, [B,A,F].

        Args:
            image: uint8 [B,S,S,3].
            input_ids: int64 [B,T], right-padded.
            text_length: int64 [B].
            noise: float32 [B,A,F], the noisy actions.
            timestep: float32 [1], index on the training schedule.
            cfg_scale: guidance scale; 1.0 for none.
        """
        condition = self.cognition(image, input_ids, text_length)
        predicted: Tensor = self.action_model(noise, timestep, condition, cfg_scale)
        return predicted


class CogACT(_Modules):
    """The dense policy; its submodules have the key names of CogACT's checkpoints.

    After `policy.compile(backend="evla", options={"config": ..., "plan": ...})` every call runs compiled, also those by
    `predict_action`. `torch.compile(policy, backend="evla", ...)` returns a module whose `forward` alone is compiled:
    its `predict_action` is this policy's and stays eager.

    Attributes:
        sizes: sizes of every module.
        processor: host-side tokenizer, image preparation and action statistics.
    """

    def __init__(self, sizes: ModelSizes, processor: Processor) -> None:
        super().__init__(
            VisionBackbone(sizes.dino, sizes.siglip),
            Projector(sizes.projector),
            LanguageBackbone(sizes.language),
            ActionModel(sizes.action),
        )
        self.sizes = sizes
        self.processor = processor

    def forward(
        self,
        image: Tensor,
        input_ids: Tensor,
        text_length: Tensor,
        noise: Tensor,
        *,
        ddim_steps: int = DDIM_STEPS,
        cfg_scale: float = CFG_SCALE,
    ) -> Tensor:
        """Return raw samples float32 [B,A,F] of the whole policy; see `sample`. This is what torch.compile compiles.

        Raises:
            ValueError: `ddim_steps` has no integer stride.
        """
        if torch.compiler.is_dynamo_compiling():
            _mark_sizes(image, input_ids, text_length, noise)
        return self.sample(image, input_ids, text_length, noise, ddim_steps=ddim_steps, cfg_scale=cfg_scale)

    @torch.no_grad()
    def sample(
        self,
        image: Tensor,
        input_ids: Tensor,
        text_length: Tensor,
        noise: Tensor,
        *,
        ddim_steps: int = DDIM_STEPS,
        cfg_scale: float = CFG_SCALE,
    ) -> Tensor:
        """Return raw samples float32 [B,A,F] of the whole policy, run eagerly: the reference of every lowering.

        Args:
            image: uint8 [B,S,S,3].
            input_ids: int64 [B,T], right-padded.
            text_length: int64 [B].
            noise: float32 [B,A,F].
            ddim_steps: denoising steps.
            cfg_scale: guidance scale; 1.0 for none.

        Raises:
            ValueError: `ddim_steps` has no integer stride.
        """
        traced = torch.compiler.is_dynamo_compiling()
        with traceable_torch_state(image.device):
            if traced:  # mark the beginning and end of the policy for the backend `evla`
                modes = torch._C._len_torch_function_stack()
                image, input_ids, text_length, noise = enter_policy(image, input_ids, text_length, noise, modes)
            condition = self.cognition(image, input_ids, text_length)
            samples = self.denoise(condition, noise, ddim_steps=ddim_steps, cfg_scale=cfg_scale)
            if traced:
                samples = leave_policy(samples)
        return samples

    @torch.no_grad()
    def denoise(
        self, condition: Tensor, noise: Tensor, *, ddim_steps: int = DDIM_STEPS, cfg_scale: float = CFG_SCALE
    ) -> Tensor:
        """Return raw samples float32 [B,A,F] for a cognition feature [B,1,D]: the sampler's half of `sample`.

        Raises:
            ValueError: `ddim_steps` has no integer stride.
        """
        x = noise
        with traceable_torch_state(noise.device):
            for step in ddim_schedule(ddim_steps):
                timestep = torch.tensor([float(step.timestep)], dtype=torch.float32, device=x.device)
                x = step.sample * x + step.noise * self.action_model(x, timestep, condition, cfg_scale)
        return x

    def predict_action(
        self,
        image: CameraFrame | Sequence[CameraFrame],
        instruction: str | Sequence[str],
        unnorm_key: str | None = None,
        noise: NDArray[np.floating] | None = None,
        seed: int | None = None,
        *,
        ddim_steps: int = DDIM_STEPS,
        cfg_scale: float = CFG_SCALE,
        text_tokens: int = TEXT_TOKENS,
        framing: Framing = "whole",
    ) -> NDArray[np.float64]:
        """Return the dense policy's action chunk, run eagerly; see `CompiledPolicy.predict_action`.

        Args:
            image: a PIL image of mode RGB or uint8 [H,W,3]; for a batch, a sequence of B of them or uint8 [B,H,W,3].
            instruction: the task in words; for a batch, a sequence of B of them.
            unnorm_key: name of the dataset whose statistics scale the actions; None where only one is known.
            noise: float array [A,F] or [B,A,F] from which the sampler starts; None draws it from `seed`.
            seed: whole number from 0 up; None without `noise` means 0, the same noise in every call.
            ddim_steps: denoising steps.
            cfg_scale: guidance scale; 1.0 for none.
            text_tokens: text budget; any that fits the prompt gives the same actions.
            framing: "whole" squashes the whole frame to the policy's square; "deploy" cuts it first as CogACT's server
                for real robots does; see `evla_compile.host.camera_frame.Framing` for when.

        Returns:
            Actions float64 [A,F] for a single frame, [B,A,F] for a batch.

        Raises:
            ValueError: an argument is refused, or the samples are not finite.
        """
        steps, scale = check_ddim_steps(ddim_steps), check_cfg_scale(cfg_scale)
        signature = InputSignature.of(
            self.sizes,
            batch_size=max(1, len(image)) if is_batch(image) else 1,
            text_tokens=check_text_tokens(text_tokens),
        )
        return predict_action(
            partial(self._sample_inputs, ddim_steps=steps, cfg_scale=scale),
            self.processor,
            image,
            instruction,
            signature,
            unnorm_key=unnorm_key,
            noise=noise,
            seed=seed,
            framing=framing,
        )

    @own_torch_state()
    def _sample_inputs(self, inputs: GraphInputs, *, ddim_steps: int, cfg_scale: float) -> NDArray[np.float32]:
        tensors = to_tensors(inputs, next(self.parameters()).device)
        samples = self(*tensors, ddim_steps=ddim_steps, cfg_scale=cfg_scale)
        array: NDArray[np.float32] = samples.cpu().numpy()
        return array


def _mark(image: Tensor, input_ids: Tensor, text_length: Tensor, noise: Tensor) -> None:
    for tensor in (image, text_length, noise):
        torch._dynamo.mark_static(tensor)
    torch._dynamo.mark_static(input_ids, 0)
    torch._dynamo.maybe_mark_dynamic(input_ids, 1)  # not "must": the tensor keeps its mark, and other graphs may differ


_mark_sizes: Callable[[Tensor, Tensor, Tensor, Tensor], None] = torch.compiler.disable(  # type: ignore[no-untyped-call]  # torch left it so
    _mark, reason="CogACT marks the text length dynamic here: leave out fullgraph=True"
)
"""Makes Dynamo keep the text length symbolic, which the rewrites of the sequence need, and every other size static.

Only the inputs of a graph can be marked, so this function breaks the graph: everything behind it is one graph.
"""
