"""How many neurons of the vision towers' MLPs stay, and which; not in EfficientVLA; no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from evla_compile.errors import CalibrationError
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.budgets.budget import Budget, Decision, Measured, MeasuredDecision, Measurement, decision_of
from evla_compile.settings.budgets.plan_values import ascending, from_runs, score, to_runs
from evla_compile.settings.budgets.shares import rounded_width
from evla_compile.settings.setting import number_from, setting
from evla_compile.settings.sizes import ModelSizes

_MAX_BLOCKS = 512  # beyond any pair of towers; a plan may come from anywhere
_KEYS = frozenset({"path", "neurons", "rho", "moved"})


@dataclass(frozen=True, kw_only=True, slots=True)
class CutBlock:
    """A block of a vision tower whose MLP is cut."""

    path: str
    """Module path of the block."""
    neurons: tuple[int, ...]
    """Neurons of its MLP that stay, ascending."""
    rho: float = 0.0
    """Strength of the penalty with which its second linear layer is refit, above 0; 0.0 where it is not."""
    moved: tuple[float, float] = (0.0, 0.0)
    """How far the cut moves what leaves the block on held-out frames, without and with the refit: the root of the
    summed squared differences over that of the dense block's squares. Both hold for the blocks in front as they are in
    the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionDecision(MeasuredDecision):
    """The neurons of the vision towers that stay, and which blocks are refit."""

    keys: ClassVar[Mapping[str, Any]] = {"vision": None}

    blocks: tuple[CutBlock, ...] = ()
    """All blocks in the order of the graph; empty where all neurons stay."""

    def idle(self, sizes: ModelSizes) -> bool:
        """Tell whether all neurons stay."""
        del sizes
        return not self.blocks

    @property
    def refit(self) -> tuple[str, ...]:
        """Module paths of the blocks that are refit; their weights are in the plan's tensors."""
        return tuple(block.path for block in self.blocks if block.rho)

    def to_json(self) -> dict[str, Any]:
        """Return the blocks, neurons as runs of indices; nothing where all stay, so that plans are as before."""
        blocks = [asdict(block) | {"neurons": to_runs(block.neurons)} for block in self.blocks]
        return {"vision": blocks} if blocks else {}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], earlier: Sequence[Decision]) -> Self:
        """Read `to_json`'s form back.

        Raises:
            TypeError: a value is of another type.
            ValueError: a value is malformed.
        """
        del earlier
        found = data["vision"]
        if found is None:
            return cls()
        if not isinstance(found, list | tuple) or not 0 < len(found) <= _MAX_BLOCKS:
            raise ValueError(f"vision {found!s:.60}: expected a list of blocks")
        return cls(blocks=tuple(_block(each) for each in found))


def _block(found: object) -> CutBlock:
    if not isinstance(found, Mapping) or found.keys() != _KEYS:
        raise ValueError(f"vision block {found!s:.60}: expected an object with the keys {sorted(_KEYS)}")
    path, moved = found["path"], found["moved"]
    if not isinstance(path, str) or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*\.\d{1,3}", path, re.ASCII):
        raise ValueError(f"vision block {path!r:.60}: expected the path of a block")
    if not isinstance(moved, list | tuple) or len(moved) != 2:
        raise ValueError(f"vision block {path}: expected two numbers, found {moved!s:.60}")
    before, after = map(score, moved)
    rho = score(found["rho"])
    if rho < 0:
        raise ValueError(f"vision block {path}: rho={rho} is below 0")
    return CutBlock(path=path, neurons=from_runs(found["neurons"]), rho=rho, moved=(before, after))


@dataclass(frozen=True, kw_only=True)
class VisionBudget(Budget):
    """Neurons of the vision towers' MLPs to keep."""

    decision: ClassVar[type[Decision]] = VisionDecision

    vision_mlp_keep: float = setting(
        1.0,
        text="Share of each vision MLP's neurons kept; not in the paper.",
        read=number_from(0.0, 1.0, low_open=True),
        off=1.0,
    )
    """Share of the neurons of every MLP of the vision towers that stays, rounded to a multiple of 64 neurons; 1.0 for
    all. What stays is refit in closed form on the calibration frames, `repair_frames` of each instruction, see
    `evla_compile.calibration.vision_cut`."""

    def kept_vision_neurons(self, sizes: ModelSizes) -> Mapping[str, int]:
        """Return how many neurons of an MLP stay in each tower, by its module path; towers that keep all are left out.

        Each count is the share, rounded to a multiple of 64, at least 64.
        """
        widths = dict(zip(COGACT.vision_towers, (sizes.dino.mlp_width, sizes.siglip.mlp_width), strict=True))
        counts = {tower: rounded_width(self.vision_mlp_keep, width) for tower, width in widths.items()}
        return {tower: count for tower, count in counts.items() if count < widths[tower]}

    def unmeasured(self, sizes: ModelSizes) -> Mapping[str, Any]:
        """Return the share where it is not all of them."""
        return {"vision_mlp_keep": self.vision_mlp_keep} if self.kept_vision_neurons(sizes) else {}

    def measurements(self, sizes: ModelSizes) -> frozenset[Measurement]:
        """Return the cut itself, where it is asked for."""
        return frozenset({"vision"}) if self.kept_vision_neurons(sizes) else frozenset()

    def decide(self, sizes: ModelSizes, measured: Measured | None, earlier: Sequence[Decision]) -> tuple[Decision, ...]:
        """Return the neurons that calibration chose in each block; the first ones where nothing was measured."""
        del earlier
        counts = self.kept_vision_neurons(sizes)
        if not counts:
            return (VisionDecision(),)
        if measured is not None and measured.vision is not None:
            return (measured.vision(counts),)
        blocks = (CutBlock(path=path, neurons=tuple(range(count))) for path, count in _counts(counts, sizes).items())
        return (VisionDecision(blocks=tuple(blocks)),)

    def check_decision(self, decisions: Sequence[Decision], sizes: ModelSizes, *, measured: bool) -> None:
        """Refuse another number of neurons, or neurons that the towers lack; see `Budget.check_decision`."""
        del measured
        blocks = decision_of(VisionDecision, decisions).blocks
        found = {block.path: len(block.neurons) for block in blocks}
        expected = _counts(self.kept_vision_neurons(sizes), sizes)
        if len(found) != len(blocks) or found != expected:
            raise CalibrationError(
                f"the plan keeps {sorted(set(found.values())) or 'all'} neurons in {len(blocks)} vision blocks, the"
                f" settings ask for {sorted(set(expected.values())) or 'all'} in {len(expected)}"
                f" (vision_mlp_keep={self.vision_mlp_keep}): calibrate again with these settings"
            )
        widths = dict(zip(COGACT.vision_towers, (sizes.dino.mlp_width, sizes.siglip.mlp_width), strict=True))
        for block in blocks:
            try:
                ascending(block.neurons)
            except ValueError as error:
                raise CalibrationError(f"the plan's neurons of {block.path}: {error}") from error
            if block.neurons[-1] >= widths[block.path.rpartition(".blocks.")[0]]:
                raise CalibrationError(f"the plan names a neuron beyond those of {block.path}")


def _counts(counts: Mapping[str, int], sizes: ModelSizes) -> dict[str, int]:
    """Return how many neurons stay in each block, by its module path, given those of the towers."""
    depths = dict(zip(COGACT.vision_towers, (sizes.dino.depth, sizes.siglip.depth), strict=True))
    return {f"{tower}.blocks.{block}": count for tower, count in counts.items() for block in range(depths[tower] - 1)}
