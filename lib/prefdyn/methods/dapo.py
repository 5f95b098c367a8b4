"""DAPO: group-relative advantages with a wider clip upwards, a mean over tokens, and no groups of equals."""

import torch

from .base import Method
from .rollout import Rollouts, spread
from .surrogate import Surrogate, surrogate

EPS = 1e-6  # points: groups whose returns spread less are groups of equals


def objective(rollouts: Rollouts, *, low: float, high: float) -> Surrogate:
    """A = (return - mean) / spread of its group; the mean over the tokens of all groups that have a spread.

    See *DAPO*, Yu et al. 2025, eqs. 8 to 12: clip-higher, token-level loss, dynamic sampling. Our choice: groups of
    equals are left out of the mean, and not replaced by sampling more prompts: all methods see as many replies.

    Args: low, high: the clip below and above 1. Raises ValueError for one reply a prompt.
    """
    if rollouts.group < 2:
        raise ValueError(f"dapo: group={rollouts.group}: at least 2 replies to a prompt are needed")
    returns = rollouts.grouped()
    deviation = returns.std(-1, unbiased=False, keepdim=True)
    counted = (deviation > EPS).expand_as(returns)
    relative = torch.where(counted, (returns - returns.mean(-1, keepdim=True)) / (deviation + EPS), 0.0)
    advantages = spread(relative, rollouts.batch.response)
    return surrogate(rollouts, advantages, low, high, per="token", counted=counted.flatten())


METHOD = Method(
    name="dapo",
    title="Decoupled clip and dynamic sampling policy optimisation (DAPO)",
    source="Yu et al. 2025, eqs. 8 to 12",
    takes="rollouts",
    formula=r"w = \tfrac{1}{\#\text{tokens}}\, \tfrac{R - \bar R_g}{s_g}\, r\, [\text{not clipped}]",
    curves="As GRPO; rare tokens that pay may grow further in a step, so entropy falls later.",
    rollouts=objective,
    settings={"low": 0.2, "high": 0.28},
    meaning={
        "low": "how far a ratio of probabilities may fall below 1 before a token no longer counts",
        "high": "how far it may rise above 1",
    },
    strength="|A|, the distance of a reply's return from the mean of its group, in standard deviations",
)
