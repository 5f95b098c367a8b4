"""Kahneman-Tversky optimisation: each response by itself is a gain or a loss against a reference point."""

import torch

from .base import Method, Pairs


def loss(pairs: Pairs, *, beta: float, desirable: float, undesirable: float) -> torch.Tensor:
    """Mean over the two responses of a pair of lambda * (1 - sigmoid(+-beta * (log-ratio - KL))), [B].

    See *KTO: Model Alignment as Prospect Theoretic Optimization*, Ethayarajh et al. 2024, eq. 8: the chosen response is
    a desirable example (+, lambda_D), the rejected one an undesirable example (-, lambda_U). The paper's loss is the
    mean over examples; a pair is two of them, so half their sum makes the mean over pairs that same mean.

    Args: beta, in 1/nats. desirable, undesirable: lambda_D and lambda_U. The reference point `Pairs.kl` is a scalar,
    nats a response, at least 0 and without gradient, as the paper has it; whoever makes the pairs sees to that.
    Raises ValueError if it is missing.
    """
    if pairs.kl is None:
        raise ValueError("kto: Pairs.kl is None; the reference point is needed")
    chosen, rejected = pairs.ratios()
    # 1 - sigmoid(x) as sigmoid(-x), which keeps its digits where it is small
    chosen_part = desirable * torch.sigmoid(-beta * (chosen - pairs.kl))
    rejected_part = undesirable * torch.sigmoid(beta * (rejected - pairs.kl))
    return (chosen_part + rejected_part) / 2


METHOD = Method(
    name="kto",
    title="Kahneman-Tversky optimisation (KTO)",
    source="Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 8",
    takes="pairs",
    formula=(
        r"w_{\text{chosen}} = \tfrac{\beta \lambda_D}{2B}\, s(r_w - z), \quad "
        r"w_{\text{rejected}} = -\tfrac{\beta \lambda_U}{2B}\, s(r_l - z), \quad "
        r"s(x) = \sigma(\beta x)\, \sigma(-\beta x)"
    ),
    curves=(
        "Log-ratios of chosen responses rise above the divergence from the reference, those of rejected ones fall "
        "below it. Weights are largest near that point and vanish on both sides: examples that are hopelessly wrong "
        "are ignored like those that are clearly right, so margins may stay small where DPO would insist."
    ),
    loss=loss,
    settings={"beta": 0.1, "desirable": 1.0, "undesirable": 1.0},
    meaning={
        "beta": "how soon the value saturates with the log-ratio",
        "desirable": "lambda_D, weight of chosen responses",
        "undesirable": "lambda_U, weight of rejected responses (paper: 1 for both where there are as many)",
        "loss": "mean of lambda minus value over examples: 1/2 at the start with both weights 1, between 0 and 1",
    },
    kl=True,
    compared=True,
)
