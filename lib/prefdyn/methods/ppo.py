"""Proximal policy optimisation: raise tokens that did better than expected and lower the others, within a clip."""

import torch

from ..lens.batch import Batch
from ..lens.weights import TokenWeights
from .base import Method
from .surrogate import Surrogate, clipped_loss, clipped_weights


def ppo_surrogate(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, response: torch.Tensor, clip: float
) -> torch.Tensor:
    """The clipped surrogate loss, a scalar: the mean of `clipped_loss` over response tokens.

    Args: token log-probs now and when sampled, and advantages, [N, T] each.
    See *Proximal Policy Optimization Algorithms*, Schulman et al. 2017, eq. 7.
    """
    return clipped_loss(logps, old_logps, advantages, clip, clip)[response].mean()


def ppo_weights(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, response: torch.Tensor, clip: float
) -> TokenWeights:
    """Weights of `ppo_surrogate`: A * r / (number of tokens), and 0 where the clip holds the token."""
    return clipped_weights(logps, old_logps, advantages, response, clip, clip, response.sum())


class PPO(Surrogate):
    """The clipped surrogate with one clip for both sides, and its mean over all tokens."""

    def __init__(
        self,
        rollouts: Batch,
        old_logps: torch.Tensor,
        advantages: torch.Tensor,
        clip: float,
        temperature: float = 1.0,
    ):
        super().__init__(rollouts, old_logps, advantages, low=clip, high=clip, temperature=temperature)


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
