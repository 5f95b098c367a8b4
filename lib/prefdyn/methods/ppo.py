"""Proximal policy optimisation: raise tokens that did better than expected and lower the others, within a clip."""

import torch

from ..lens.batch import Batch
from ..lens.weights import TokenWeights
from .base import Method
from .rollout import kl_estimate


def ppo_surrogate(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, response: torch.Tensor, clip: float
) -> torch.Tensor:
    """The clipped surrogate loss, a scalar: minus the mean over response tokens of min(r A, clip(r, 1-eps, 1+eps) A).

    Args: token log-probs now and when sampled, and advantages, [N, T] each. r is the ratio of probabilities.
    See *Proximal Policy Optimization Algorithms*, Schulman et al. 2017, eq. 7.
    """
    ratio = (logps - old_logps).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -surrogate[response].mean()


def ppo_weights(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, response: torch.Tensor, clip: float
) -> TokenWeights:
    """Weights of the clipped surrogate: A * r / (number of tokens), and 0 where the clip holds the token.

    The clip holds a token whose ratio has left [1-eps, 1+eps] in the direction of its advantage. Every token is a unit
    of its own, with strength |A|. Arguments as for `ppo_surrogate`.
    """
    ratio = (logps - old_logps).exp()
    held = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    w = torch.where(response & ~held, advantages * ratio, torch.zeros_like(ratio)) / response.sum()
    unit = torch.full(response.shape, -1, dtype=torch.int64, device=response.device)
    unit[response] = torch.arange(int(response.sum()), device=response.device)
    return TokenWeights(w=w, strength=advantages[response].abs().clamp(min=1e-30), unit=unit)


class PPO:
    """The clipped surrogate on a batch of rollouts. An example is a rollout; rows keep all their columns.

    All log-probs are those of the policy at `temperature`, the one that sampled the rollouts.
    """

    def __init__(
        self,
        rollouts: Batch,
        old_logps: torch.Tensor,
        advantages: torch.Tensor,
        clip: float,
        temperature: float = 1.0,
    ):
        if not rollouts.ids.shape == old_logps.shape == advantages.shape:
            shapes = [tuple(t.shape) for t in (rollouts.ids, old_logps, advantages)]
            raise ValueError(f"PPO: rollouts, log-probs and advantages must share one shape [N, T], given {shapes}")
        self.rollouts, self.old_logps, self.advantages, self.clip = rollouts, old_logps, advantages, clip
        self.size, self.temperature = len(rollouts), temperature

    def batch(self, index: torch.Tensor) -> Batch:
        return self.rollouts.take(index)

    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights:
        return ppo_weights(logps, self.old_logps[index], self.advantages[index], batch.response, self.clip)

    def metrics(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> dict[str, float]:
        """loss: the surrogate. clip_fraction: share of ratios outside the clip, their largest in ratio_max.

        moved: estimate (k3) of the KL from the policy that sampled, nats a token.
        """
        old, advantages = self.old_logps[index], self.advantages[index]
        ratio = (logps - old).exp()[batch.response]
        return {
            "loss": ppo_surrogate(logps, old, advantages, batch.response, self.clip).item(),
            "clip_fraction": ((ratio - 1).abs() > self.clip).float().mean().item(),
            "ratio_max": ratio.max().item(),
            "moved": kl_estimate(old, logps, "k3")[batch.response].mean().item(),
        }


METHOD = Method(
    name="ppo",
    title="Proximal policy optimisation (PPO)",
    source="Schulman et al. 2017, eq. 7",
    takes="rollouts",
    formula=r"w = \tfrac{1}{N}\, A \, r \, [\text{not clipped}]",
    curves="Reward and divergence from the reference rise together; entropy falls as exploration ends.",
    settings={"clip": 0.2},
    meaning={"clip": "how far a ratio of probabilities may leave 1 before a token no longer counts"},
    strength="|A|, the size of a token's advantage",
    objective=PPO,
)
