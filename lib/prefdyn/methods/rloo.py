"""REINFORCE leave-one-out: each reply is compared with the other replies to its prompt."""

from .base import Method
from .rollout import Rollouts, spread
from .surrogate import Surrogate, surrogate


def objective(rollouts: Rollouts, *, clip: float) -> Surrogate:
    """A = return - mean return of the other replies to the prompt; mean over replies of sums over tokens.

    See *Buy 4 REINFORCE Samples, Get a Baseline for Free!*, Kool et al. 2019, eq. 8, and *Back to Basics*, Ahmadian et
    al. 2024, eq. 9. Our choices as for REINFORCE: sums divided by the length that a reply may have, and PPO's clip.

    Args: clip, on either side of 1. Raises ValueError for one reply a prompt: there are no others to compare with.
    """
    k = rollouts.group
    if k < 2:
        raise ValueError(f"rloo: group={k}: at least 2 replies to a prompt are needed")
    returns = rollouts.grouped()
    advantages = spread(k / (k - 1) * (returns - returns.mean(-1, keepdim=True)), rollouts.batch.response)
    return surrogate(rollouts, advantages, clip, clip, per="limit")


METHOD = Method(
    name="rloo",
    title="REINFORCE leave-one-out (RLOO)",
    source="Kool et al. 2019, eq. 8; Ahmadian et al. 2024, eq. 9",
    takes="rollouts",
    formula=r"w = \tfrac{1}{N L}\, (R - \bar R_{\text{others of its prompt}})\, r\, [\text{not clipped}]",
    curves="As REINFORCE, with less noise: what a prompt is worth no longer moves the policy.",
    rollouts=objective,
    settings={"clip": 0.2},
    meaning={"clip": "how far a ratio of probabilities may leave 1 before a token no longer counts"},
    strength="|A|, the distance of a reply's return from those of its prompt",
)
