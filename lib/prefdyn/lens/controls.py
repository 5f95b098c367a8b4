"""Controls: maps from an objective's token weights to other token weights, in training possibly depending on the step.

Used twice: to train with parts of an objective, alone or scaled over training, and to split G, which is linear in the
weights, into parts.
"""

import bisect
import math

import torch
from pydantic import BaseModel, ConfigDict, field_validator

from .weights import TokenWeights

CONTROLS = {
    "full": "the objective as it is",
    "positive": "positive learning alone: weights above 0 (raise what is preferred)",
    "negative": "negative learning alone: weights below 0 (lower what is not)",
    "uniform": "no reweighting: every unit's strength is replaced by the mean strength",
    "top": "only the third of units with the largest strength",
    "middle": "only the third of units with middling strength",
    "bottom": "only the third of units with the smallest strength",
}
ROUNDING = 1e-5  # relative differences up to here are float32 noise of a sum over a response
THIRDS = ("bottom", "middle", "top")  # in the order of their group numbers


def thirds(strength: torch.Tensor) -> torch.Tensor:
    """The group of each unit by its strength: 0 bottom, 1 middle, 2 top; int64 [U].

    Sizes are equal, or differ by one. Where all strengths are equal but for rounding (as omega is at the first step)
    there are no groups, and -1 is returned for all rather than an order of ties.
    """
    if strength.ndim != 1 or strength.numel() == 0:
        raise ValueError(f"thirds: strength must be [U] with at least one unit, given {tuple(strength.shape)}")
    if bool(strength.max() - strength.min() <= ROUNDING * strength.abs().max()):
        return torch.full_like(strength, -1, dtype=torch.int64)
    units = strength.numel()
    group = torch.empty(units, dtype=torch.int64, device=strength.device)
    group[strength.argsort(stable=True)] = torch.arange(units, device=strength.device) * 3 // units
    return group


def apply(control: str, weights: TokenWeights) -> torch.Tensor:
    """Token weights [N, T] under `control`, one of CONTROLS.

    Where thirds are undefined (see `thirds`), their weights are NaN: no component is claimed.
    """
    w = weights.w
    inside = weights.unit >= 0
    if control == "full":
        return w
    if control == "positive":
        return w.clamp(min=0)
    if control == "negative":
        return w.clamp(max=0)
    unit = weights.unit.clamp(min=0)
    if control == "uniform":
        factor = weights.strength.mean() / weights.strength
        return torch.where(inside, w * factor[unit], torch.zeros_like(w))
    if control in THIRDS:
        group = thirds(weights.strength)[unit]
        kept = torch.where(group == THIRDS.index(control), w, torch.zeros_like(w))
        kept = torch.where(group == -1, torch.full_like(w, torch.nan), kept)
        return torch.where(inside, kept, torch.zeros_like(w))
    raise ValueError(f"control={control!r}: must be one of {', '.join(CONTROLS)}")


Schedule = tuple[tuple[int, float], ...]  # rows of (step, factor), in order
SCALED = ("positive", "negative", *THIRDS)  # parts of the weights that a schedule can scale


def check_schedule(rows: Schedule, steps: int | None = None) -> Schedule:
    """`rows` if they are a schedule; raises ValueError that says what is wrong and what is allowed.

    Args: rows, (step, factor) in the order of steps. steps, the number of updates of a training run: a row behind them
    would never be reached.
    """
    allowed = "allowed: rows of [step, factor], steps >= 0 in order and at most twice the same, factors >= 0"
    if not rows:
        raise ValueError(f"schedule: given no rows; {allowed}")
    at = [step for step, _ in rows]
    for step, factor in rows:
        if step < 0 or not math.isfinite(factor) or factor < 0:
            raise ValueError(f"schedule: given the row [{step}, {factor:g}]; {allowed}")
    if at != sorted(at) or any(at.count(step) > 2 for step in at):
        raise ValueError(f"schedule: given the steps {at}; {allowed}")
    if steps is not None and at[-1] > steps:
        raise ValueError(f"schedule: given a row at step {at[-1]}, and training ends after {steps}; {allowed}")
    return rows


def factor(rows: Schedule, step: int) -> float:
    """The factor of a schedule at `step` updates done: linear between rows, constant outside of them.

    Of two rows at the same step (a jump) the second counts there.
    """
    after = bisect.bisect_right([at for at, _ in rows], step)
    if after in (0, len(rows)):
        return rows[min(after, len(rows) - 1)][1]
    (left, low), (right, high) = rows[after - 1], rows[after]
    return low + (high - low) * (step - left) / (right - left)


class Control(BaseModel):
    """What training makes of an objective's weights: a part of them, whose own parts are scaled over training.

    part: one of CONTROLS. factors: for some of SCALED a schedule of what its weights are multiplied with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    part: str = "full"
    factors: dict[str, Schedule] = {}

    @field_validator("part")
    @classmethod
    def _part(cls, part: str) -> str:
        if part not in CONTROLS:
            raise ValueError(f"control={part!r}: must be one of {', '.join(CONTROLS)}")
        return part

    @field_validator("factors")
    @classmethod
    def _factors(cls, factors: dict[str, Schedule]) -> dict[str, Schedule]:
        for name, rows in factors.items():
            if name not in SCALED:
                raise ValueError(f"factors of {name!r}: must be of some of {', '.join(SCALED)}")
            check_schedule(rows)
        return factors


FULL = Control()


def apply_in_training(control: Control, weights: TokenWeights, step: int) -> torch.Tensor:
    """Token weights [N, T] under `control` after `step` updates.

    Unlike in `apply`, nothing is done where thirds are undefined (at the first step): there is no group to single out.
    """
    w = apply(control.part, weights)
    w = weights.w if bool(w.isnan().any()) else w
    for name, rows in control.factors.items():
        scale = factor(rows, step)
        part = apply(name, weights)
        if scale != 1.0 and not bool(part.isnan().any()):
            w = torch.where(part != 0, w * scale, w)
    return w
