"""Controls: maps from an objective's token weights to other token weights.

Used twice: to train with a part of an objective alone, and to split G, which is linear in the weights, into parts.
"""

import torch

from .objectives import TokenWeights

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


def apply_in_training(control: str, weights: TokenWeights) -> torch.Tensor:
    """As `apply`, but while thirds are undefined (at the first step) the full weights are used."""
    w = apply(control, weights)
    return weights.w if bool(w.isnan().any()) else w
