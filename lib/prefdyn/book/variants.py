"""Controlled variants of methods of pairs and of rollouts, by name: which parts of the weights are scaled, and when.

A variant is a `controls.Control`: nothing but factors on parts of the token weights. AdamW hardly notices a factor that
all weights share, so what counts is how the parts compare with each other.
"""

from collections.abc import Callable

from ..lens.controls import Control, Schedule, check_schedule
from ..methods import registry
from .params import ParameterError, Parameters

Build = Callable[[Parameters, int], Control]  # (parameters, updates of training) -> control


def ramp(start: float, end: float, steps: int) -> Schedule:
    """From one factor at the first update to another at the last of `steps`, in a straight line."""
    return ((0, start), (max(1, steps - 1), end))


def jump(before: float, after: float, at: int) -> Schedule:
    """One factor before update number `at`, another from it on."""
    return ((0, before), (at, before), (at, after))


def _switch(p: Parameters, steps: int) -> int:
    """The update at which a hard switch happens. Raises ParameterError if it would be the first or after the last."""
    at = round(p.switch_at * steps)
    if not 0 < at < steps:
        raise ParameterError(
            f"switch_at: given {p.switch_at:g} (float), update {at} of {steps}; allowed: a share of training after the "
            "first update and before the end"
        )
    return at


def _always(factor: float) -> Schedule:
    return ((0, factor),)


def _both(positive: Schedule, negative: Schedule) -> Control:
    return Control(factors={"positive": positive, "negative": negative})


# By what a method takes: (what it does, how it is built). The paper names cDPO, cPPO and hPPO, and its text gives
# no formula.
VARIANTS: dict[str, dict[str, tuple[str, Build]]] = {
    "pairs": {
        "shift": (
            "gradually from positive to negative learning (our reading of cDPO)",
            lambda p, n: _both(ramp(1.0, p.floor, n), ramp(p.floor, 1.0, n)),
        ),
        "switch": (
            "positive learning alone, then at once negative learning alone",
            lambda p, n: _both(jump(1.0, 0.0, _switch(p, n)), jump(0.0, 1.0, _switch(p, n))),
        ),
        "reverse": (
            "gradually from negative to positive learning",
            lambda p, n: _both(ramp(p.floor, 1.0, n), ramp(1.0, p.floor, n)),
        ),
        "scaled": (
            "negative learning scaled by a constant",
            lambda p, n: Control(factors={"negative": _always(p.negative_scale)}),
        ),
    },
    "rollouts": {
        "decay": (
            "negative learning fades out over training (our reading of cPPO)",
            lambda p, n: Control(factors={"negative": ramp(1.0, p.floor, n)}),
        ),
        "early": (
            "negative learning in the first part of training only",
            lambda p, n: Control(factors={"negative": jump(1.0, 0.0, _switch(p, n))}),
        ),
        "late": (
            "negative learning in the last part of training only",
            lambda p, n: Control(factors={"negative": jump(0.0, 1.0, _switch(p, n))}),
        ),
        "scaled": (
            "negative learning scaled by a constant",
            lambda p, n: Control(factors={"negative": _always(p.negative_scale)}),
        ),
        "without-top": (
            "the third of tokens with the largest |advantage| left out (a reading of hPPO)",
            lambda p, n: Control(factors={"top": _always(0.0)}),
        ),
        "without-bottom": (
            "the third of tokens with the smallest |advantage| left out (a reading of hPPO)",
            lambda p, n: Control(factors={"bottom": _always(0.0)}),
        ),
        "heavy-top": (
            "the third of tokens with the largest |advantage| counts twice (a reading of hPPO)",
            lambda p, n: Control(factors={"top": _always(2.0)}),
        ),
    },
}
FREE = "free"  # the name of the variant whose schedules are given as parameters


def _known(method: str) -> dict[str, tuple[str, Build]]:
    return VARIANTS.get(registry.find(method).takes, {})


def free_schedules(p: Parameters, method: str) -> dict[str, list]:
    """The schedules that the parameters give for a method, by part of the weights; {} if none."""
    given = {part: getattr(p, f"{method}_{part}", None) for part in ("positive", "negative")}
    return {part: rows for part, rows in given.items() if rows}


def names(p: Parameters, method: str) -> list[str]:
    """The variants of a method that the parameters ask for, in the order of VARIANTS, a free schedule last."""
    asked = [name for name in _known(method) if name in p.variants]
    return asked + [FREE] * bool(free_schedules(p, method))


def control(p: Parameters, method: str, name: str, steps: int) -> Control:
    """The control of a variant for a training of `steps` updates (pairs) or iterations (rollouts).

    Raises ParameterError for a name that is not known, or a schedule that cannot be followed.
    """
    if name == FREE and (given := free_schedules(p, method)):
        factors = {}
        for part, rows in given.items():
            try:
                factors[part] = check_schedule(tuple((step, factor) for step, factor in rows), steps)
            except ValueError as error:
                raise ParameterError(f"{method}_{part}: {error}") from error
        return Control(factors=factors)
    if name not in (known := _known(method)):
        raise ParameterError(f"variant {name!r} of {method}: there is none; allowed: {', '.join(known)}")
    return known[name][1](p, steps)


def meaning(method: str, name: str) -> str:
    """What a variant does, in words."""
    return "the schedules given as parameters" if name == FREE else _known(method)[name][0]
