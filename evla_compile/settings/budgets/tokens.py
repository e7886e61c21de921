"""How many visual tokens stay (EfficientVLA section 3.3); which ones, the compiled graph decides itself; no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, TypeAlias, get_args

from evla_compile.arguments import true_or_false
from evla_compile.settings.budgets.budget import Budget, Decision, Measured
from evla_compile.settings.budgets.shares import (
    Share,
    count_of,
    fitting,
    parse_count_or_share,
    parse_count_share_or_all,
    read_count_or_share,
    read_count_share_or_all,
)
from evla_compile.settings.setting import number_from, one_of, setting, whole_from
from evla_compile.settings.sizes import ModelSizes

TokenRule: TypeAlias = Literal["relevance", "coverage", "uniform", "random", "fastv"]
"""How the compiled graph chooses the visual tokens that stay."""

TOKEN_RULES: tuple[TokenRule, ...] = get_args(TokenRule)
"""All values of `TokenRule`."""

_PAPER_SHARE = 56 / 256

_FEWEST_LAYERS = 3
"""Layers that a selection of visual tokens needs at least: two in front of it for the scores, and one behind it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDecision(Decision):
    """The numbers of the selection; nothing is measured for them."""

    visual_tokens: int
    """Patches kept, key tokens included; all of them where nothing is selected."""
    key_tokens: int
    """Patches always kept for their relevance."""
    task_share: float
    """Share of the remaining budget chosen by relevance."""
    token_rule: TokenRule
    """Which patches are kept; key tokens and the share belong to "relevance" alone."""
    token_seed: int
    """Seed of the rule "random"."""
    merge_tokens: bool
    """Whether dropped patches are merged into kept ones."""

    def idle(self, sizes: ModelSizes) -> bool:
        """Tell whether all visual tokens stay."""
        return self.visual_tokens >= sizes.patches


@dataclass(frozen=True, kw_only=True)
class TokenBudget(Budget):
    """Visual tokens to keep."""

    decision: ClassVar[type[Decision]] = TokenDecision

    visual_tokens: int | Share | None = setting(
        _PAPER_SHARE,
        text="Visual tokens kept.",
        read=read_count_share_or_all,
        off=None,
        parse=parse_count_share_or_all,
        metavar="N|SHARE|all",
        forms="a count as in 56, a share as in 0.22, or all",
    )
    """Visual tokens kept after the second kept decoder layer (the paper's T), key tokens included: a count or a share
    of the patches; None for all."""
    token_rule: TokenRule = setting(
        "coverage",
        text="Which visual tokens stay: relevance is the paper's rule.",
        read=one_of(TOKEN_RULES),
    )
    """Which visual tokens stay: "coverage", those that leave no token far from a kept one; "relevance", EfficientVLA's
    rule; or, to compare with, "uniform": a fixed grid; "random": drawn once, at compile time; "fastv": those of most
    attention, as FastV does. See `evla_compile.passes.SelectTokens`."""
    key_tokens: int | Share = setting(
        4 / 256,
        text="Of these, always kept, by the rule relevance.",
        read=read_count_or_share,
        parse=parse_count_or_share,
        metavar="N|SHARE",
        forms="a count as in 4, or a share as in 0.016",
    )
    """Visual tokens always kept for their relevance to the instruction (the paper's K_key): a count or a share of the
    patches."""
    task_share: float = setting(
        0.5, text="Share of the others kept by relevance, not diversity.", read=number_from(0.0, 1.0)
    )
    """Share of the remaining visual budget given by relevance rather than by diversity (the paper's alpha)."""
    token_seed: int = setting(0, text="Seed of --token-rule random.", read=whole_from(0, 2**32 - 1))
    """Seed from which the rule "random" draws the visual tokens, once, when the policy is compiled."""
    merge_tokens: bool = setting(
        True,
        text="Merge each dropped visual token into the kept one most like it.",
        read=true_or_false,
    )
    """Whether the hidden state of each kept visual token becomes the mean of its own and of those dropped ones that are
    most like it; not in the paper, and possible with every rule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens, keys = self.visual_tokens, self.key_tokens
        if tokens is not None and type(tokens) is type(keys):  # else the model decides
            self._check_key_tokens(tokens, keys)

    def kept_tokens(self, patches: int) -> tuple[int, int]:
        """Return how many of a frame's `patches` stay as visual tokens, all for None, and how many are key tokens.

        Raises:
            ValueError: there are fewer patches, or more key tokens than tokens; the message names values that fit.
        """
        key_tokens = count_of(self.key_tokens, patches)
        if self.visual_tokens is None:
            return patches, key_tokens  # nothing is selected, so key tokens have no effect
        if self.visual_tokens > patches:
            raise ValueError(
                f"visual_tokens={self.visual_tokens}: the policy sees {patches} patches;"
                f" {fitting('visual_tokens', _PAPER_SHARE, patches)}"
            )
        visual_tokens = count_of(self.visual_tokens, patches)
        self._check_key_tokens(visual_tokens, key_tokens)
        return visual_tokens, key_tokens

    def resolve(self, sizes: ModelSizes) -> Self:
        """Return the budget with shares of the patches as counts; see `Budget.resolve`."""
        visual_tokens, key_tokens = self.kept_tokens(sizes.patches)
        return replace(self, visual_tokens=None if self.visual_tokens is None else visual_tokens, key_tokens=key_tokens)

    def check(self, sizes: ModelSizes, left: ModelSizes) -> None:
        """Refuse a selection where too few of the decoder's layers stay; see `Budget.check`."""
        visual_tokens, _ = self.kept_tokens(sizes.patches)
        if visual_tokens == sizes.patches or left.language.layers >= _FEWEST_LAYERS:
            return
        more = f"keep_layers={_FEWEST_LAYERS} or more, or " if sizes.language.layers >= _FEWEST_LAYERS else ""
        raise ValueError(
            f"visual_tokens={visual_tokens} with {left.language.layers} decoder layers: selecting visual tokens needs"
            f" two layers below it and one above; use {more}visual_tokens=None (--visual-tokens all)"
        )

    def idle_settings(self) -> Mapping[str, str]:
        """Return what decides between tokens where all stay, and what belongs to another rule."""
        if self.visual_tokens is None:
            names = ("token_rule", "key_tokens", "task_share", "token_seed", "merge_tokens")
            return dict.fromkeys(names, "every visual token is kept; give --visual-tokens N")
        found: dict[str, str] = {}
        if self.token_rule != "relevance":
            reason = f"the rule {self.token_rule} keeps no tokens by it; give --token-rule relevance"
            found |= dict.fromkeys(("key_tokens", "task_share"), reason)
        if self.token_rule != "random":
            found["token_seed"] = f"the rule {self.token_rule} draws nothing; give --token-rule random"
        return found

    def decide(self, sizes: ModelSizes, measured: Measured | None, earlier: Sequence[Decision]) -> tuple[Decision, ...]:
        """Return the numbers of the selection; nothing is measured for them."""
        del measured, earlier
        visual_tokens, key_tokens = self.kept_tokens(sizes.patches)
        return (
            TokenDecision(
                visual_tokens=visual_tokens,
                key_tokens=key_tokens,
                task_share=self.task_share,
                token_rule=self.token_rule,
                token_seed=self.token_seed,
                merge_tokens=self.merge_tokens,
            ),
        )

    def _check_key_tokens(self, visual_tokens: int | Share, key_tokens: int | Share) -> None:
        """Refuse a budget of visual tokens that its key tokens alone exceed, both counts or both shares."""
        if self.token_rule == "relevance" and visual_tokens < key_tokens:
            raise ValueError(
                f"visual_tokens={visual_tokens} is below key_tokens={key_tokens}: the key tokens count towards the"
                f" budget; use visual_tokens={key_tokens} or more, or key_tokens={visual_tokens} or less"
            )
