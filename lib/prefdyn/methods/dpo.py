"""Direct preference optimisation: raise chosen and lower rejected responses, as much as they are ordered wrongly."""

import torch
import torch.nn.functional as F

from ..lens.batch import Batch
from ..lens.weights import TokenWeights
from .base import Method, PairObjective, Pairs


def dpo_margin(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor
) -> torch.Tensor:
    """Log-ratio of the chosen minus log-ratio of the rejected response, [B].

    Args: log-probs of whole responses under the policy and under the reference policy, [B] each.
    See *Direct Preference Optimization*, Rafailov et al. 2023, eq. 7 (there multiplied by beta).
    """
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def dpo_loss(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta * margin), [B]; log 2 at margin 0. See Rafailov et al. 2023, eq. 7."""
    return -F.logsigmoid(beta * margin)


def dpo_omega(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """The loss reweighting sigmoid(-beta * margin), [B]: near 1 where the pair is ordered wrongly.

    At least 1e-30, since weights are divided by it where a control takes it out.
    See Rafailov et al. 2023, the gradient in section 4, and arXiv 2512.00778.
    """
    return torch.sigmoid(-beta * margin).clamp(min=1e-30)


def dpo_weights(response: torch.Tensor, omega: torch.Tensor, beta: float) -> TokenWeights:
    """Weights of the mean DPO loss: +beta*omega/B on chosen tokens, -beta*omega/B on rejected ones.

    Args: response, bool [2B, T], chosen rows first. omega, float [B].
    Raises ValueError if the number of rows is not twice the number of pairs.
    """
    pairs = omega.shape[0]
    if response.shape[0] != 2 * pairs:
        raise ValueError(f"dpo_weights: {response.shape[0]} rows for {pairs} pairs; 2 rows a pair are needed")
    signed = torch.cat([omega, -omega]) * beta / pairs
    unit = torch.arange(pairs, device=omega.device).repeat(2)[:, None].expand_as(response)
    return TokenWeights(
        w=torch.where(response, signed[:, None], torch.zeros_like(signed)[:, None]),
        strength=omega,
        unit=unit.masked_fill(~response, -1),
    )


def loss(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """`dpo_loss` of pairs, [B]."""
    return dpo_loss(pairs.margin(), beta)


class DPO(PairObjective):
    """The same with its weights as they are written down, and omega as the strength of a pair."""

    def __init__(
        self, chosen: Batch, rejected: Batch, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, beta: float
    ):
        super().__init__(METHOD, chosen, rejected, ref_chosen, ref_rejected, beta=beta)
        self.beta = beta

    def margin(self, logps: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Margins of the pairs `index` from the policy's token log-probs of their batch, [B]."""
        chosen, rejected = logps.sum(-1).chunk(2)
        return dpo_margin(chosen, rejected, self.reference[0][index], self.reference[1][index])

    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights:
        """`dpo_weights` of the pairs `index`."""
        return dpo_weights(batch.response, dpo_omega(self.margin(logps, index), self.beta), self.beta)


METHOD = Method(
    name="dpo",
    title="Direct preference optimisation (DPO)",
    source="Rafailov et al. 2023, eq. 7",
    takes="pairs",
    formula=r"w = \pm \tfrac{\beta}{B}\, \sigma(-\beta \cdot \text{margin})",
    curves="Margins grow; the log-probs of both sides may fall, those of rejected responses faster.",
    loss=loss,
    settings={"beta": 0.1},
    meaning={"beta": "strength of the tie to the reference"},
    strength="omega = sigmoid(-beta * margin), near 1 where the pair is ordered wrongly",
    objective=DPO,
    compared=True,
)
