"""An objective as token weights: grad L = - sum over response tokens of w * grad log pi(token)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenWeights:
    """The weights of an objective and what its reweighting acts on.

    w: float [N, T], zero outside responses. strength: float [U], the factor that the objective gives to each of
    its units (omega of a pair). unit: int64 [N, T], the unit that a token belongs to, -1 outside responses.
    """

    w: torch.Tensor
    strength: torch.Tensor
    unit: torch.Tensor

    def __post_init__(self):
        if self.w.shape != self.unit.shape or self.w.ndim != 2 or self.strength.ndim != 1:
            raise ValueError(
                f"TokenWeights: w {tuple(self.w.shape)} and unit {tuple(self.unit.shape)} must share one shape [N, T] "
                f"and strength {tuple(self.strength.shape)} must be [U]"
            )
