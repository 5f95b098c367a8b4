"""REINFORCE with a baseline: replies that did better than the mean reply are raised, the others lowered."""

from .base import Method
from .rollout import Rollouts, spread
from .surrogate import Surrogate, surrogate


def objective(rollouts: Rollouts, *, clip: float) -> Surrogate:
    """A = return - mean return of all replies, on every token of a reply; mean over replies of sums over tokens.

    See *Simple Statistical Gradient-Following Algorithms*, Williams 1992, with the mean return as the baseline. Our
    choices: sums are divided by the length that a reply may have, so that step sizes compare with those of other
    methods; several passes over the same replies are held by the clip of PPO.

    Args: clip, on either side of 1.
    """
    advantages = spread(rollouts.grouped() - rollouts.returns.mean(), rollouts.batch.response)
    return surrogate(rollouts, advantages, clip, clip, per="limit")


METHOD = Method(
    name="reinforce",
    title="REINFORCE with a baseline",
    source="Williams 1992, with the mean return as the baseline",
    takes="rollouts",
    formula=r"w = \tfrac{1}{N L}\, (R - \bar R)\, r\, [\text{not clipped}]",
    curves="Reward rises; entropy falls as replies that pay are repeated.",
    rollouts=objective,
    settings={"clip": 0.2},
    meaning={"clip": "how far a ratio of probabilities may leave 1 before a token no longer counts"},
    strength="|A|, the distance of a reply's return from the mean",
)
