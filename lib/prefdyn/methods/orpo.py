"""Odds ratio preference optimisation: fine-tuning on chosen responses with a penalty on the odds of rejected ones."""

import torch
import torch.nn.functional as F

from .base import Method, Pairs


def log_odds(logp: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of p = exp(logp), same shape.

    1 - p comes from expm1, which keeps its digits where p is near 1. A p nearer to 1 than one rounding step of the
    number format counts as one step away, and has no gradient there: at p = 1 the odds are infinite.
    """
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def loss(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """-mean log-prob chosen - beta * log sigmoid(log-odds chosen - log-odds rejected), [B]; means over tokens.

    See *ORPO: Monolithic Preference Optimization without Reference Model*, Hong et al. 2024, eqs. 3, 4, 6 and 7. The
    odds are those of exp(mean log-prob of a token), the paper's likelihood of a response. Our choice: the likelihood
    term counts the tokens of the response; some trainers count those of the prompt too.

    Args: beta, called lambda in the paper: the weight of the odds ratio term, without unit.
    """
    chosen, rejected = (total / length for total, length in zip(pairs.sums(), pairs.lengths(), strict=True))
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


METHOD = Method(
    name="orpo",
    title="Odds ratio preference optimisation (ORPO)",
    source="Hong et al. 2024 (arXiv 2403.07691), eqs. 6 and 7",
    takes="pairs",
    formula=(
        r"w_{\text{chosen}} = \tfrac{1}{B |y_w|} \left( 1 + \tfrac{\beta\, \sigma(-o)}{1 - p_w} \right), \quad "
        r"w_{\text{rejected}} = -\tfrac{\beta\, \sigma(-o)}{B |y_l| (1 - p_l)}, \quad "
        r"o = \log \tfrac{p_w / (1 - p_w)}{p_l / (1 - p_l)}, \quad p = \pi(y)^{1/|y|}"
    ),
    curves=(
        "The log-prob of chosen responses rises as in supervised fine-tuning; that of rejected ones usually rises with "
        "it at first and then falls behind. At beta 0.1 the likelihood term does most of the work."
    ),
    loss=loss,
    settings={"beta": 0.1},
    meaning={
        "beta": "lambda of the paper: weight of the odds ratio term (paper: 0.1 for Mistral 7B, 0.2 for Llama-2 7B)",
        "loss": "nats a token of the chosen response plus beta times the odds ratio term",
    },
    reference=False,
    compared=True,
)
