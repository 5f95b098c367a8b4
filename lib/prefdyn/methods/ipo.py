"""Identity preference optimisation: draw the margin to a finite target instead of letting it grow."""

import torch

from .base import Method, Pairs


def loss(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """(margin - 1 / (2 beta))^2, [B], in squared nats.

    See *A General Theoretical Paradigm to Understand Learning from Human Preferences*, Azar et al. 2023, eq. 17, where
    beta is called tau. Our choice, with the paper: log-ratios of whole responses, sums over tokens; some trainers take
    means over tokens, which makes the target one per token.

    Args: beta, in 1/nats: the margin aimed at is 1 / (2 beta) nats.
    """
    return (pairs.margin() - 1 / (2 * beta)).square()


METHOD = Method(
    name="ipo",
    title="Identity preference optimisation (IPO)",
    source="Azar et al. 2023 (arXiv 2310.12036), eq. 17",
    takes="pairs",
    formula=r"w = \pm \tfrac{2}{B} \left( \tfrac{1}{2\beta} - \text{margin} \right)",
    curves=(
        "Margins of training pairs settle near 1/(2 beta) nats; beyond it the weights change sign and pull back. "
        "Nothing holds the log-prob of the chosen response itself: it may fall while the margin is right."
    ),
    loss=loss,
    settings={"beta": 0.1},
    meaning={
        "beta": "tau of the paper: the margin aimed at is 1/(2 beta) nats, 5 at 0.1 (the paper sets no value for text)",
        "loss": "squared distance of the margin from its target, (1/(2 beta))^2 at the start",
    },
    strength="|1/(2 beta) - margin|, the distance from the margin aimed at",
)
