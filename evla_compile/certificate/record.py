"""The record of a certificate: what was tested, what it says and what it does not, and its JSON; no torch."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from evla_compile.arguments import lone_surrogate, number, true_or_false, whole_number
from evla_compile.certificate.episodes import LARGEST_SEED, threshold
from evla_compile.certificate.p_value import hoeffding_bentkus, share
from evla_compile.errors import CalibrationError
from evla_compile.settings.plan import DIGEST_DIGITS

CERTIFICATE_FORMAT = 1
"""Version of a certificate's JSON form; another one is refused."""

METHOD = "learn-then-test, fixed sequence, hoeffding-bentkus"
"""How certificates of this format are made."""

MAX_COUNT = 1_000_000
"""Episodes, and frames of each on average, that a certificate may count, so that reading one is soon done."""

MAX_SETTINGS = 1_000
"""Settings that a certificate may name."""

_LONGEST_TEXT = 400
_SAME_P_VALUE = 1e-6  # relative; other machines' logarithms differ by far less


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingTest:
    """The test of one setting."""

    name: str
    """Name of the setting."""
    mean_loss: float
    """Mean of its losses over the certifying episodes, 0 to 1."""
    p_value: float
    """P-value of "its expected loss exceeds alpha"; see `hoeffding_bentkus`."""
    certified: bool
    """Whether that was rejected: the p-value is at most delta."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _text("name", self.name))
        object.__setattr__(self, "mean_loss", number("mean_loss", self.mean_loss, low=0, high=1))
        object.__setattr__(self, "p_value", number("p_value", self.p_value, low=0, high=1))
        object.__setattr__(self, "certified", true_or_false("certified", self.certified))


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What was certified about the settings of a frontier, and all that it rests on; see `statement`.

    It proves that the numbers in it follow from each other. That they were measured, on episodes that nothing was
    chosen with, is the word of whoever made it.

    Raises:
        ValueError: a field is out of its range, or the fields contradict each other.
    """

    alpha: float
    """Bound on the expected fraction of an episode's control steps that deviate by more than `tau`."""
    tau: float
    """The largest deviation that does not count, in `tau_unit`."""
    tau_unit: str
    """What `tau` measures and its unit, in words that follow the number."""
    delta: float
    """Probability, at most, that any setting is certified wrongly."""
    episodes: int
    """Certifying episodes."""
    frames: int
    """Their control steps."""
    tested: tuple[SettingTest, ...]
    """Settings in the order in which they were tested, from the safest; the last one alone may have failed."""
    not_reached: tuple[str, ...]
    """Settings behind one that failed, which were not tested, in the order of the sequence."""
    frames_digest: str
    """Digest of the certifying frames, 16 hexadecimal digits."""
    split_seed: int
    """Seed of the split of the episodes into choosing and certifying ones."""
    certifying_share: float
    """Share of that split."""
    method: str = METHOD
    """How it was made: `METHOD`."""

    def __post_init__(self) -> None:
        for name, value in {
            "alpha": share("alpha", self.alpha),
            "tau": threshold(self.tau),
            "tau_unit": _text("tau_unit", self.tau_unit),
            "delta": share("delta", self.delta),
            "episodes": whole_number("episodes", self.episodes, low=1, high=MAX_COUNT),
            "frames": whole_number("frames", self.frames, low=1, high=MAX_COUNT**2),
            "split_seed": whole_number("split_seed", self.split_seed, low=0, high=LARGEST_SEED),
            "certifying_share": share("certifying_share", self.certifying_share),
        }.items():
            object.__setattr__(self, name, value)
        if self.method != METHOD:
            raise ValueError(f"method={self.method!r:.80}: expected {METHOD!r}")
        if not isinstance(self.frames_digest, str) or not re.fullmatch(
            f"[0-9a-f]{{{DIGEST_DIGITS}}}", self.frames_digest
        ):
            raise ValueError(f"frames_digest={self.frames_digest!r:.40}: expected {DIGEST_DIGITS} hexadecimal digits")
        if self.frames < self.episodes:
            raise ValueError(f"frames={self.frames} of episodes={self.episodes}: expected one of each at least")
        _check_names([setting.name for setting in self.tested], self.not_reached)
        self._check_sequence()

    @property
    def certified(self) -> str | None:
        """The cheapest setting that is certified; None if none is."""
        return next((setting.name for setting in reversed(self.tested) if setting.certified), None)

    def statement(self) -> str:
        """Return one paragraph that says what is certified, on what evidence, and what it does not say."""
        found = (
            f"It rests on {self.episodes} episodes with {self.frames} frames (digest {self.frames_digest}), which the"
            f" split with seed {self.split_seed} kept from choosing; {len(self.tested)} of"
            f" {len(self.tested) + len(self.not_reached)} settings were tested, safest first ({self.method})."
            " It says nothing about other scenes, tasks or cameras, and nothing about success. It says nothing at all"
            " if any of these frames were used for choosing the settings or their order, or if the bound or the split"
            " was chosen by its result. The frames are of recorded behaviour, not of the compiled policy's own, whose"
            " actions may lead to states that were not recorded."
        )
        deviating = (
            "the expected fraction of control steps of an episode at which the action deviates from the dense policy's"
            f" by more than {self.tau!r} {self.tau_unit}"
        )
        if self.certified is None:
            (first,) = self.tested
            return (
                f"No setting is certified: of the safest, {first.name!r}, it could not be shown with probability at"
                f" least {1 - self.delta:.12g} that {deviating} is at most {self.alpha!r}; its mean over the episodes"
                f" is {first.mean_loss:.4g}, its p-value {first.p_value:.3g} where at most {self.delta!r} was needed."
                f" {found}"
            )
        return (
            f"The setting {self.certified!r} is certified: with probability at least {1 - self.delta:.12g} over the"
            f" draw of the certifying episodes, {deviating} is at most {self.alpha!r}, for episodes drawn independently"
            f" like these, with the same share of each instruction. {found}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the certificate as JSON-ready values."""
        values = asdict(self) | {"not_reached": list(self.not_reached)}
        tested = [asdict(setting) for setting in self.tested]
        return {"format": CERTIFICATE_FORMAT, "certified": self.certified} | values | {"tested": tested}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Read `to_json`'s form back; nothing in it is believed, and p-values are computed again.

        Raises:
            CalibrationError: the data is no certificate, one of another format, or one that contradicts itself.
        """
        try:
            values = _exactly(data, {"format", "certified", *(each.name for each in fields(cls))}, "a certificate")
            version, certified = values.pop("format"), values.pop("certified")
            whole_number("format", version, low=CERTIFICATE_FORMAT, high=CERTIFICATE_FORMAT)
            tested = [_tested(entry) for entry in _listed("tested", values.pop("tested"))]
            not_reached = _listed("not_reached", values.pop("not_reached"))
            found = cls(tested=tuple(tested), not_reached=tuple(not_reached), **values)
            if certified != found.certified:
                raise ValueError(f"certified is {certified!r:.80}, and by its tests {found.certified!r:.80}")
        except ValueError as error:
            raise CalibrationError(f"malformed certificate: {error!s:.400}") from error
        return found

    def _check_sequence(self) -> None:
        """Refuse tests that do not follow from the mean losses, or that go on behind one that failed."""
        for place, setting in enumerate(self.tested):
            p_value = hoeffding_bentkus(setting.mean_loss, self.episodes, self.alpha)
            if not math.isclose(setting.p_value, p_value, rel_tol=_SAME_P_VALUE, abs_tol=1e-300):
                raise ValueError(
                    f"p-value {setting.p_value} of {setting.name!r:.80}: expected {p_value}, by its mean loss"
                    f" {setting.mean_loss} over {self.episodes} episodes"
                )
            if setting.certified != (setting.p_value <= self.delta):
                raise ValueError(
                    f"{setting.name!r:.80} has certified={setting.certified}, p-value {setting.p_value} and"
                    f" delta={self.delta}: expected certified where the p-value is at most delta"
                )
            if not setting.certified and place < len(self.tested) - 1:
                raise ValueError(f"a setting was tested behind {setting.name!r:.80}, which failed")
        if self.tested[-1].certified and self.not_reached:
            raise ValueError(f"{self.not_reached[0]!r:.80} was not reached, and no setting before it failed")


def _check_names(tested: list[str], not_reached: tuple[str, ...]) -> None:
    for name in not_reached:
        _text("not_reached", name)
    names = [*tested, *not_reached]
    if not tested or len(names) > MAX_SETTINGS or len(set(names)) < len(names):
        raise ValueError(
            f"{len(tested)} tested settings and {len(not_reached)} others, {len(set(names))} different names: expected"
            f" at least one tested, {MAX_SETTINGS} at most, and each once"
        )


def _tested(entry: object) -> SettingTest:
    return SettingTest(**_exactly(entry, {each.name for each in fields(SettingTest)}, "a tested setting"))


def _exactly(data: object, keys: set[str], what: str) -> dict[str, Any]:
    """Return a JSON object that has these keys and no others."""
    if not isinstance(data, Mapping) or set(data) != keys:
        raise ValueError(f"expected {what}, a JSON object with the keys {sorted(keys)}")
    return dict(data)


def _listed(name: str, value: object) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_SETTINGS:
        raise ValueError(f"{name!r} is {value!r:.80}: expected a list of at most {MAX_SETTINGS}")
    return value


def _text(name: str, value: object) -> str:
    """Return a text of one line that can be printed and encoded."""
    if isinstance(value, str) and 0 < len(value) <= _LONGEST_TEXT and value.isprintable() and not lone_surrogate(value):
        return value
    raise ValueError(f"{name} is {value!r:.80}: expected a text of one line, at most {_LONGEST_TEXT} characters")
