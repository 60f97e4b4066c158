"""Every rule that users choose by name."""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from .calibration import Calibration
from .count_rule import CountRule
from .fixed_rule import FixedRule
from .rule_protocols import Rule
from .sequential_rule import SequentialRule
from .surrogate_rule import SurrogateRule
from .two_stage_rule import TwoStageRule
from .validation import check_radius


class NamedRule(Rule, Protocol):
    """A rule that users choose by name."""

    takes: ClassVar[tuple[str, ...]]
    """Which settings of [`make_rule`] have a meaning for the rule."""

    @classmethod
    def from_settings(cls, *args: Any, **settings: Any) -> Rule:  # with *args, rules may name the settings they take
        """Make the rule from those settings in `takes` that users gave: `alpha` always, `radius` as `radii`, no `None`."""


RULES: dict[str, type[NamedRule]] = {
    rule.method: rule for rule in (TwoStageRule, SequentialRule, FixedRule, SurrogateRule, CountRule)
}


def make_rule(
    method: str | None = None,
    *,
    alpha: float = 0.001,
    radius: float | None = None,
    radii: Sequence[float] | None = None,
    draws: int | None = None,
    max_draws: int | None = None,
    n0: int | None = None,
    n: int | None = None,
    delta: float | None = None,
    false_claims: float | None = None,
    calibration: Calibration | None = None,
) -> Rule:
    """
    Make a rule by name from the settings that users give. Settings left at `None` take the rule's defaults.

    Args:
        method: `"two-stage"` (finds radii), `"sequential"` (decides radii), `"fixed"` (the usual protocol), `"surrogate"`
            (only asks a count head) or `"counts"` (only counts). By default `"sequential"` with radii, else `"two-stage"`.
        alpha: probability of a wrong certificate, in (0, 1); without meaning for `counts`, which claims nothing.
        radius: one radius to decide; for `surrogate` with `delta` or `false_claims` only.
        radii: several radii to decide, instead of `radius`.
        draws: mean number of draws per image to plan for, `two-stage` only.
        max_draws: the most draws per image. `fixed` makes as many, `counts` too, unless `n` is given.
        n0: selection draws, `fixed` only.
        n: draws that bound the probability (`fixed`), are counted (`counts`), or that the head stands for (`surrogate`).
        delta: the share of images about which a calibrated count head may be wrong, `surrogate` only.
        false_claims: the share of wrong claims among those at a radius, `surrogate` only, see [`SurrogateRule`].
        calibration: the count head's; used only with these two, and then `n` is by default the calibration's.

    Raises:
        ValueError: for an unknown method, a setting out of range, or one that the method does not take.
    """
    chosen = ", the default with radii" if method is None else ""
    if method is None:
        method = SequentialRule.method if radius is not None or radii is not None else TwoStageRule.method
    if method not in RULES:
        *names, last = map(repr, RULES)
        raise ValueError(f"method={method!r} is unknown: use {', '.join(names)} or {last}.")
    if radius is not None and radii is not None:
        raise ValueError("Give radius or radii, not both.")
    if radii is not None and not isinstance(radii, Sequence):
        raise ValueError(f"radii={radii!r} must be a list of radii; one alone is `radius`.")
    settings: dict[str, Any] = {
        "alpha": alpha,
        "radius": radius,
        "radii": radii,
        "draws": draws,
        "max_draws": max_draws,
    }
    settings |= {"n0": n0, "n": n, "delta": delta, "false_claims": false_claims}
    settings |= {"calibration": None if delta is None and false_claims is None else calibration}
    settings = {name: value for name, value in settings.items() if value is not None}
    rule = RULES[method]
    for name, value in settings.items():
        if name not in rule.takes:
            raise ValueError(f"{name}={value} has no meaning for method {method!r}{chosen}: leave it out.")
    if "radius" in settings:
        settings["radii"] = (settings.pop("radius"),)
    elif "radii" in settings:
        settings["radii"] = tuple(settings["radii"])
    for value in settings.get("radii", ()):
        check_radius(value)
    return rule.from_settings(**settings)
