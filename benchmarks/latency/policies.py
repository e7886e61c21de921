"""Policies to time: weights, random or from a checkpoint, and each row's graph, cut into its components."""

import lzma
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from benchmarks.latency.components import ComponentGraphs, Cost, costs_of, cut, upstream_costs
from benchmarks.latency.rows import DtypeName, Row
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.compiler.pipeline import build_passes
from evla_compile.compiler.report import CompileReport
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.families.cogact.model.upstream import UpstreamCogACT
from evla_compile.graph.contract import materialize, measure
from evla_compile.graph.flops import Component
from evla_compile.graph.run_passes import run_passes
from evla_compile.host.processor import PAD_ID, ActionStatistics, Processor
from evla_compile.settings.config import PAPER_TEXT_TOKENS, CompileConfig
from evla_compile.settings.plan import stand_in_plan
from evla_compile.settings.sizes import ACTION_WIDTH, ModelSizes


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRow:
    """A row with its weights on the device."""

    row: Row
    """The row."""
    policy: UpstreamCogACT | CompiledPolicy
    """The policy."""
    components: ComponentGraphs
    """A compiled policy's graph, cut into components; empty for upstream's, which is no graph."""
    costs: Mapping[Component, Cost]
    """Cost of each component."""
    weight_bytes: int
    """Bytes of its weights."""


class PolicyMaker:
    """Makes the rows of one policy on one device, which share every weight that they have in common.

    Attributes:
        sizes: sizes of the policy.
        device: where its weights are.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        *,
        device: torch.device,
        seed: int,
        checkpoint: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Prepare; weights are created when a row needs them.

        Args:
            sizes: sizes of the policy.
            device: where its weights shall be.
            seed: what random weights are drawn from.
            checkpoint: the official tensors by "group.key", instead of random weights.
        """
        self.sizes = sizes
        self.device = device
        self._seed = seed
        self._checkpoint = checkpoint
        self._states: dict[DtypeName, dict[str, Tensor]] = {}
        self._processor = _processor(sizes)
        self._captured: fx.GraphModule | None = None

    def make(self, row: Row) -> PreparedRow:
        """Return a row; its weights are shared with all others of its dtype, except MLPs that are cut.

        A compiled row follows a stand-in plan: which layers and neurons stay does not affect times.

        Raises:
            ValueError: the row's budgets do not fit the policy.
        """
        return self._upstream(row) if row.config is None else self._compiled(row, row.config)

    def _upstream(self, row: Row) -> PreparedRow:
        with torch.device("meta"):
            policy = UpstreamCogACT(self.sizes)
        state = self._state(row.dtype)
        policy.load_state_dict(state, assign=True)
        return PreparedRow(
            row=row,
            policy=policy.eval().requires_grad_(False),
            components=(),
            costs=upstream_costs(self.sizes, row.dtype),
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        )

    def _compiled(self, row: Row, config: CompileConfig) -> PreparedRow:
        plan = stand_in_plan(self.sizes, config)
        graph, reports = run_passes(self._capture(row), build_passes(config, plan, self.sizes))
        materialize(graph)
        policy = CompiledPolicy(
            graph=graph,
            config=config,
            plan=plan,
            sizes=self.sizes,
            processor=self._processor,
            report=CompileReport(config=config, passes=reports, deviations=()),
        )
        components = cut(graph)
        return PreparedRow(
            row=row,
            policy=policy,
            components=components,
            costs=costs_of(components),
            weight_bytes=measure(graph).weight_bytes,
        )

    def _capture(self, row: Row) -> fx.GraphModule:
        """Return the dense policy's graph, which serves every compiled row: they differ in budgets alone."""
        if self._captured is None:
            with torch.device("meta"):
                dense = CogACT(self.sizes, self._processor)
            state = self._state(row.dtype)
            dense.load_state_dict({name: state[name] for name in dense.state_dict()}, assign=True)
            self._captured = capture(
                dense.eval().requires_grad_(False), CompileConfig.dense(text_tokens=PAPER_TEXT_TOKENS)
            )
        return self._captured

    def _state(self, dtype: DtypeName) -> dict[str, Tensor]:
        """Return every tensor of the official files on the device, loaded once for each dtype."""
        if dtype not in self._states:
            with torch.device("meta"):
                shapes = {name: tensor.shape for name, tensor in UpstreamCogACT(self.sizes).state_dict().items()}
            self._states[dtype] = {
                name: self._tensor(name, shape).to(
                    self.device, torch.float32 if name.startswith("action_model.") else getattr(torch, dtype)
                )
                for name, shape in shapes.items()
            }
        return self._states[dtype]

    def _tensor(self, name: str, shape: torch.Size) -> Tensor:
        if self._checkpoint is not None:
            return self._checkpoint[name]
        return random_weight(name, shape, seed=self._seed, device=self.device)


def random_weight(name: str, shape: torch.Size, *, seed: int, device: torch.device) -> Tensor:
    """Return the float32 weights of the tensor "group.key", normal, and scaled so that activations keep their size.

    They depend on the name, the shape, the seed and the kind of device alone, and are drawn where they will be.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) ^ seed)
    normal = torch.randn(shape, generator=generator, device=device)
    leaf = name.rpartition(".")[2]
    if len(shape) == 1 and leaf in ("weight", "gamma"):
        return normal.mul_(0.1).add_(1.0)
    if leaf == "bias":
        return normal.mul_(0.02)
    if leaf != "weight" or "embed" in name:
        return normal.mul_(0.5)  # a learned token, a position, or an embedding
    return normal.div_(math.sqrt(math.prod(shape[1:])))


def _processor(sizes: ModelSizes) -> Processor:
    """Return a processor for exports, which contain one; no timed call uses it."""
    packed = Path(__file__).parents[2] / "tests" / "data" / "tokenizer.json.xz"
    tokenizer = lzma.decompress(packed.read_bytes()).decode("utf-8")
    unscaled = ActionStatistics(low=(-1.0,) * ACTION_WIDTH, high=(1.0,) * ACTION_WIDTH)
    return Processor(
        tokenizer_json=tokenizer, statistics={"none": unscaled}, image_side=sizes.image_side, pad_id=PAD_ID
    )
