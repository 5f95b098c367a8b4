"""Group relative policy optimisation: returns in units of their spread among the replies to a prompt."""

import torch

from .base import Method
from .rollout import Rollouts, spread
from .surrogate import Surrogate, surrogate

EPS = 1e-6  # points: groups whose returns spread less have none to tell replies apart by


def relative(rollouts: Rollouts) -> torch.Tensor:
    """(return - mean of its group) / (standard deviation of its group), [N / group, group]; 0 in a group of equals."""
    returns = rollouts.grouped()
    return (returns - returns.mean(-1, keepdim=True)) / (returns.std(-1, unbiased=False, keepdim=True) + EPS)


def objective(rollouts: Rollouts, *, clip: float) -> Surrogate:
    """A = `relative` return on every token of a reply; the clipped surrogate, mean over replies of means over tokens.

    See *DeepSeekMath*, Shao et al. 2024, eqs. 3 and 4. Our choices: the penalty for divergence is part of the return,
    as for all methods here, and not a term of the loss; the standard deviation is that of the group itself (over k).
    With one step a batch of replies the loss is 0 by construction: what it does is in its weights.

    Args: clip, on either side of 1. Raises ValueError for one reply a prompt.
    """
    if rollouts.group < 2:
        raise ValueError(f"grpo: group={rollouts.group}: at least 2 replies to a prompt are needed")
    advantages = spread(relative(rollouts), rollouts.batch.response)
    return surrogate(rollouts, advantages, clip, clip, per="reply")


METHOD = Method(
    name="grpo",
    title="Group relative policy optimisation (GRPO)",
    source="Shao et al. 2024, eqs. 3 and 4",
    takes="rollouts",
    formula=r"w = \tfrac{1}{N |y|}\, \tfrac{R - \bar R_g}{s_g}\, r\, [\text{not clipped}]",
    curves="Reward rises though the loss stays at 0; groups whose replies all earn the same move nothing.",
    rollouts=objective,
    settings={"clip": 0.2},
    meaning={"clip": "how far a ratio of probabilities may leave 1 before a token no longer counts"},
    strength="|A|, the distance of a reply's return from the mean of its group, in standard deviations",
    compared=True,
)
