"""DPO with log-ratios a token, so that long responses do not dominate by their length."""

import torch
import torch.nn.functional as F

from .base import Method, Pairs


def loss(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """-log sigmoid(beta * (log-ratio chosen / its length - log-ratio rejected / its length)), [B].

    The length-normalised DPO of *Tulu 3: Pushing Frontiers in Open Language Model Post-Training*, Lambert et al. 2024,
    section 5. Each log-ratio is divided by the tokens of its own response, its end included.

    Args: beta, in tokens/nat, and so much larger than in DPO.
    """
    chosen, rejected = (ratio / length for ratio, length in zip(pairs.ratios(), pairs.lengths(), strict=True))
    return -F.logsigmoid(beta * (chosen - rejected))


METHOD = Method(
    name="normalised_dpo",
    title="Length-normalised DPO",
    source="Lambert et al. 2024, Tulu 3 (arXiv 2411.15124), section 5",
    takes="pairs",
    formula=(
        r"w = \pm \tfrac{\beta}{B |y|}\, \sigma\!\left( -\beta \left( \tfrac{r_w}{|y_w|} - \tfrac{r_l}{|y_l|} \right) "
        r"\right)"
    ),
    curves=(
        "Margins a token grow; a token of a short response weighs more than one of a long response. Both log-probs may "
        "fall, as in DPO, and the margin of whole responses may have another sign than the one that is trained."
    ),
    loss=loss,
    settings={"beta": 5.0},
    meaning={
        "beta": "strength of the tie to the reference, in tokens a nat (Tulu 3: 5)",
        "margin": "of whole responses, not the one a token that the loss reads",
        "loss": "log 2 at the start",
    },
    strength="sigmoid(-beta * margin a token), near 1 where the pair is ordered wrongly",
)
