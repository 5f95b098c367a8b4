"""Anchored preference optimisation, zero: raise chosen and lower rejected responses, each from the reference."""

import torch

from .base import Method, Pairs


def loss(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """1 - sigmoid(beta * log-ratio chosen) + sigmoid(beta * log-ratio rejected), [B].

    See *Anchored Preference Optimization and Contrastive Revisions*, D'Oosterlinck et al. 2024, eq. 7 (APO-zero). The
    constant 1, which has no gradient, keeps the loss between 0 and 2.

    Args: beta, in 1/nats.
    """
    chosen, rejected = pairs.ratios()
    # 1 - sigmoid(x) as sigmoid(-x), which keeps its digits where it is small
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


METHOD = Method(
    name="apo_zero",
    title="Anchored preference optimisation, zero (APO-zero)",
    source="D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7",
    takes="pairs",
    formula=(
        r"w_{\text{chosen}} = \tfrac{\beta}{B}\, s(r_w), \quad w_{\text{rejected}} = -\tfrac{\beta}{B}\, s(r_l), "
        r"\quad s(x) = \sigma(\beta x)\, \sigma(-\beta x)"
    ),
    curves=(
        "Log-probs of chosen responses rise above the reference and those of rejected ones fall below it, each by "
        "itself. Weights are largest at the reference and vanish on both sides, so a response that has drifted far the "
        "wrong way is hardly pulled back."
    ),
    loss=loss,
    settings={"beta": 0.1},
    meaning={
        "beta": "how soon a response stops counting as its log-ratio grows",
        "loss": "1 at the start, between 0 and 2",
    },
)
