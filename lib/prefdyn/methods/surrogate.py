"""The clipped surrogate: advantages on tokens, a clip on either side, and what a token counts in the mean."""

from collections.abc import Callable

import torch

from ..lens.batch import Batch
from ..lens.weights import TokenWeights
from .rollout import Rollouts, kl_estimate

Shares = Callable[[torch.Tensor], torch.Tensor]  # bool [n, T] of a minibatch -> [n, T]


class Surrogate:
    """Minus the sum over tokens of share * min(r A, clip(r, 1 - low, 1 + high) A). An example is a reply.

    r is the ratio of probabilities now and when sampled. The weights are w = share * A * r, and 0 where the clip holds
    the token: where r has left the interval in the direction of its advantage. A unit is a token, its strength |A|.

    Args: rollouts, advantages [N, T]. shares, of the tokens of a minibatch. low, high: how far r may be from 1.
    counted, bool [N], replies that count in the mean at all; by default all.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        advantages: torch.Tensor,
        shares: Shares,
        low: float,
        high: float,
        counted: torch.Tensor | None = None,
    ):
        if advantages.shape != rollouts.old.shape:
            raise ValueError(
                f"Surrogate: advantages {tuple(advantages.shape)} and log-probs {tuple(rollouts.old.shape)} must share "
                "one shape [N, T]"
            )
        self.rollouts, self.old, self.advantages = rollouts.batch, rollouts.old, advantages
        self.shares, self.low, self.high = shares, low, high
        self.counted = torch.ones_like(rollouts.returns, dtype=torch.bool) if counted is None else counted
        self.size, self.temperature = len(rollouts.batch), rollouts.temperature

    def batch(self, index: torch.Tensor) -> Batch:
        """The replies `index`, with all their columns."""
        return self.rollouts.take(index)

    def _shares(self, response: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What each token counts in a minibatch: nothing in replies that do not count."""
        return self.shares(response & self.counted[index][:, None])

    def loss(self, logps: torch.Tensor, response: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The loss of a minibatch, a scalar, from the policy's token log-probs [n, T]."""
        ratio, advantages = (logps - self.old[index]).exp(), self.advantages[index]
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        return -(self._shares(response, index) * torch.minimum(ratio * advantages, clipped * advantages)).sum()

    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights:
        """The weights of a minibatch."""
        ratio, advantages, response = (logps - self.old[index]).exp(), self.advantages[index], batch.response
        held = torch.where(advantages > 0, ratio > 1 + self.high, ratio < 1 - self.low)
        w = torch.where(response & ~held, self._shares(response, index) * advantages * ratio, torch.zeros_like(ratio))
        unit = torch.full(response.shape, -1, dtype=torch.int64, device=response.device)
        unit[response] = torch.arange(int(response.sum()), device=response.device)
        return TokenWeights(w=w, strength=advantages[response].abs().clamp(min=1e-30), unit=unit)

    def metrics(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> dict[str, float]:
        """loss: the surrogate. clip_fraction: share of ratios outside the clip, their largest in ratio_max.

        moved: estimate (k3) of the KL from the policy that sampled, nats a token.
        """
        ratio = (logps - self.old[index]).exp()[batch.response]
        outside = (ratio > 1 + self.high) | (ratio < 1 - self.low)
        return {
            "loss": self.loss(logps, batch.response, index).item(),
            "clip_fraction": outside.float().mean().item(),
            "ratio_max": ratio.max().item(),
            "moved": kl_estimate(self.old[index], logps, "k3")[batch.response].mean().item(),
        }
