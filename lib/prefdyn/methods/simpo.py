"""Simple preference optimisation: log-probs a token as rewards, a margin to exceed, and no reference policy."""

import torch
import torch.nn.functional as F

from .base import Method, Pairs


def loss(pairs: Pairs, *, beta: float, gamma: float) -> torch.Tensor:
    """-log sigmoid(beta * (mean log-prob chosen - mean log-prob rejected) - gamma), [B]; means over tokens.

    See *SimPO: Simple Preference Optimization with a Reference-Free Reward*, Meng et al. 2024, eq. 6. gamma is outside
    the bracket that beta multiplies and absolute, as in the paper; its code has the ratio gamma / beta as its setting.

    Args: beta, in tokens/nat. gamma, without unit, what beta times the difference has to exceed.
    """
    chosen, rejected = (total / length for total, length in zip(pairs.sums(), pairs.lengths(), strict=True))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


METHOD = Method(
    name="simpo",
    title="Simple preference optimisation (SimPO)",
    source="Meng et al. 2024 (arXiv 2405.14734), eq. 6",
    takes="pairs",
    formula=(
        r"w = \pm \tfrac{\beta}{B |y|}\, \sigma\!\left( \gamma - \beta \left( \tfrac{\log \pi(y_w)}{|y_w|} - "
        r"\tfrac{\log \pi(y_l)}{|y_l|} \right) \right)"
    ),
    curves=(
        "The log-prob a token of rejected responses falls below that of chosen ones by gamma / beta and more; that of "
        "chosen ones often falls too. With no reference, nothing but the learning rate limits how far the policy moves."
    ),
    loss=loss,
    settings={"beta": 2.0, "gamma": 1.0},
    meaning={
        "beta": "scale of the reward, beta times the mean log-prob of a token (paper: 2 to 2.5)",
        "gamma": "margin of rewards aimed at; absolute, not divided by beta (paper: 0.3 to 1.6 by model)",
        "loss": "log 2 where the difference a token is gamma / beta; the start depends on the data",
    },
    strength="sigmoid(gamma - beta * difference a token), near 1 where the pair is ordered wrongly",
    reference=False,
    compared=True,
)
