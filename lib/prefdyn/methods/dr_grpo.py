"""GRPO done right: neither a group's spread nor a reply's length changes what a token counts."""

from .base import Method
from .rollout import Rollouts, spread
from .surrogate import Surrogate, surrogate


def objective(rollouts: Rollouts, *, clip: float) -> Surrogate:
    """A = return - mean of its group; mean over replies of sums over tokens, divided by one constant for all.

    See *Understanding R1-Zero-Like Training*, Liu et al. 2025, section 3.2: dividing by the spread favours prompts that
    are too easy or too hard, dividing by the length favours long wrong replies. The constant is the length that a reply
    may have.

    Args: clip, on either side of 1. Raises ValueError for one reply a prompt.
    """
    if rollouts.group < 2:
        raise ValueError(f"dr_grpo: group={rollouts.group}: at least 2 replies to a prompt are needed")
    returns = rollouts.grouped()
    advantages = spread(returns - returns.mean(-1, keepdim=True), rollouts.batch.response)
    return surrogate(rollouts, advantages, clip, clip, per="limit")


METHOD = Method(
    name="dr_grpo",
    title="GRPO done right (Dr. GRPO)",
    source="Liu et al. 2025, section 3.2",
    takes="rollouts",
    formula=r"w = \tfrac{1}{N L}\, (R - \bar R_g)\, r\, [\text{not clipped}]",
    curves="As GRPO, without its pull towards long wrong replies and towards groups with little spread.",
    rollouts=objective,
    settings={"clip": 0.2},
    meaning={"clip": "how far a ratio of probabilities may leave 1 before a token no longer counts"},
    strength="|A|, the distance of a reply's return from the mean of its group",
)
