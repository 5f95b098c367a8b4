"""The clipped surrogate: advantages on tokens, a clip on either side, and what a token counts in the mean."""

import torch

from ..lens.batch import Batch
from ..lens.weights import TokenWeights
from .rollout import Rollouts, kl_estimate, token_count


def clipped_loss(
    logps: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Minus min(r A, clip(r, 1 - low, 1 + high) A) of each token, [N, T]; r: the ratio of probabilities, now over then.

    See *Proximal Policy Optimization Algorithms*, Schulman et al. 2017, eq. 7, there with one clip for both sides.
    """
    ratio = (logps - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_weights(
    logps: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    response: torch.Tensor,
    low: float,
    high: float,
    count: torch.Tensor,
) -> TokenWeights:
    """Weights of `clipped_loss` divided by `count`: A r / count, and 0 where the clip holds the token.

    The clip holds a token whose ratio has left [1 - low, 1 + high] in the direction of its advantage. Every token of
    `response`, bool [N, T], is a unit of its own, with strength |A|.
    """
    ratio = (logps - old).exp()
    held = torch.where(advantages > 0, ratio > 1 + high, ratio < 1 - low)
    w = torch.where(response & ~held, advantages * ratio, torch.zeros_like(ratio)) / count
    unit = torch.full(response.shape, -1, dtype=torch.int64, device=response.device)
    unit[response] = torch.arange(int(response.sum()), device=response.device)
    return TokenWeights(w=w, strength=advantages[response].abs().clamp(min=1e-30), unit=unit)


class Surrogate:
    """The clipped surrogate on replies that were just sampled. An example is a reply; rows keep all their columns.

    Args: rollouts, old_logps and advantages [N, T]. low, high: how far a ratio may be from 1. temperature: of the
    policy that sampled, the one whose log-probs are meant. per, longest: what a token counts, as for
    `rollout.token_count`. counted, bool [N]: replies that count in the mean at all, by default all.
    """

    def __init__(
        self,
        rollouts: Batch,
        old_logps: torch.Tensor,
        advantages: torch.Tensor,
        *,
        low: float,
        high: float,
        temperature: float = 1.0,
        per: str = "token",
        longest: int = 0,
        counted: torch.Tensor | None = None,
    ):
        if not rollouts.ids.shape == old_logps.shape == advantages.shape:
            shapes = [tuple(t.shape) for t in (rollouts.ids, old_logps, advantages)]
            raise ValueError(f"rollouts, log-probs and advantages must share one shape [N, T], given {shapes}")
        self.rollouts, self.old_logps, self.advantages = rollouts, old_logps, advantages
        self.low, self.high, self.per, self.longest, self.counted = low, high, per, longest, counted
        self.size, self.temperature = len(rollouts), temperature

    def batch(self, index: torch.Tensor) -> Batch:
        """The replies `index`, with all their columns."""
        return self.rollouts.take(index)

    def _count(self, response: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        inside = response if self.counted is None else response & self.counted[index][:, None]
        return token_count(inside, self.per, self.longest)

    def loss(self, logps: torch.Tensor, response: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The loss of a minibatch, a scalar, from the policy's token log-probs [n, T]."""
        each = clipped_loss(logps, self.old_logps[index], self.advantages[index], self.low, self.high)
        return (each / self._count(response, index))[response].sum()

    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights:
        """`clipped_weights` of a minibatch."""
        given = (logps, self.old_logps[index], self.advantages[index], batch.response)
        return clipped_weights(*given, self.low, self.high, self._count(batch.response, index))

    def metrics(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> dict[str, float]:
        """loss: the surrogate. clip_fraction: share of ratios outside the clip, their largest in ratio_max.

        moved: estimate (k3) of the KL from the policy that sampled, nats a token.
        """
        old = self.old_logps[index]
        ratio = (logps - old).exp()[batch.response]
        outside = (ratio > 1 + self.high) | (ratio < 1 - self.low)
        return {
            "loss": self.loss(logps, batch.response, index).item(),
            "clip_fraction": outside.float().mean().item(),
            "ratio_max": ratio.max().item(),
            "moved": kl_estimate(old, logps, "k3")[batch.response].mean().item(),
        }


def surrogate(
    rollouts: Rollouts,
    advantages: torch.Tensor,
    low: float,
    high: float,
    per: str,
    counted: torch.Tensor | None = None,
) -> Surrogate:
    """The clipped surrogate on `rollouts` with these advantages [N, T]; the other arguments as for `Surrogate`."""
    return Surrogate(
        rollouts.batch,
        rollouts.old,
        advantages,
        low=low,
        high=high,
        temperature=rollouts.temperature,
        per=per,
        longest=rollouts.longest,
        counted=counted,
    )
