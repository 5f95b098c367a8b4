"""Objectives as token weights: grad L = - sum over response tokens of w * grad log pi(token).

Every function here is pure. Rows of tensors are sequences, [N, T]; for DPO the B chosen responses come first,
then the B rejected ones, so N = 2 B.
"""

import torch
import torch.nn.functional as F

from ..lens.batch import Batch, concatenate
from ..lens.weights import TokenWeights
from .rollout import kl_estimate

ROUNDING = 1e-4  # nats: margins up to here are float32 noise of sums over responses


def sft_weights(response: torch.Tensor) -> TokenWeights:
    """Weights of maximum likelihood: 1/B on every token of every demonstration.

    Args: response, bool [B, T]. The loss is the mean over demonstrations of their negative log-likelihood.
    """
    rows = response.shape[0]
    unit = torch.arange(rows, device=response.device)[:, None].expand_as(response)
    return TokenWeights(
        w=response.to(torch.get_default_dtype()) / rows,
        strength=torch.ones(rows, device=response.device),
        unit=unit.masked_fill(~response, -1),
    )


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


def ppo_surrogate(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, response: torch.Tensor, clip: float
) -> torch.Tensor:
    """The clipped surrogate loss, a scalar: minus the mean over response tokens of min(r A, clip(r, 1-eps, 1+eps) A).

    Args: token log-probs now and when sampled, and advantages, [N, T] each. r is the ratio of probabilities.
    See *Proximal Policy Optimization Algorithms*, Schulman et al. 2017, eq. 7.
    """
    ratio = (logps - old_logps).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -surrogate[response].mean()


def ppo_weights(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, response: torch.Tensor, clip: float
) -> TokenWeights:
    """Weights of the clipped surrogate: A * r / (number of tokens), and 0 where the clip holds the token.

    The clip holds a token whose ratio has left [1-eps, 1+eps] in the direction of its advantage. Every token is a unit
    of its own, with strength |A|. Arguments as for `ppo_surrogate`.
    """
    ratio = (logps - old_logps).exp()
    held = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    w = torch.where(response & ~held, advantages * ratio, torch.zeros_like(ratio)) / response.sum()
    unit = torch.full(response.shape, -1, dtype=torch.int64, device=response.device)
    unit[response] = torch.arange(int(response.sum()), device=response.device)
    return TokenWeights(w=w, strength=advantages[response].abs().clamp(min=1e-30), unit=unit)


class SFT:
    """Maximum likelihood on demonstrations. An example is a demonstration."""

    temperature = 1.0

    def __init__(self, demonstrations: Batch):
        self.demonstrations = demonstrations
        self.size = len(demonstrations)

    def batch(self, index: torch.Tensor) -> Batch:
        return self.demonstrations.rows(index)

    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights:
        return sft_weights(batch.response)

    def metrics(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> dict[str, float]:
        """loss: negative log-likelihood of a demonstration, nats."""
        return {"loss": -logps.sum(-1).mean().item()}


class DPO:
    """Direct preference optimisation. An example is a pair; its batch holds chosen rows, then rejected rows."""

    temperature = 1.0

    def __init__(
        self,
        chosen: Batch,
        rejected: Batch,
        ref_chosen: torch.Tensor,
        ref_rejected: torch.Tensor,
        beta: float,
    ):
        sizes = {len(chosen), len(rejected), len(ref_chosen), len(ref_rejected)}
        if len(sizes) != 1:
            raise ValueError(f"DPO: chosen, rejected and their reference log-probs differ in number: {sorted(sizes)}")
        self.rows = concatenate([chosen, rejected])
        self.reference = (ref_chosen, ref_rejected)
        self.beta = beta
        self.size = len(chosen)

    def batch(self, index: torch.Tensor) -> Batch:
        return self.rows.rows(torch.cat([index, index + self.size]))

    def margin(self, logps: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Margins of the pairs `index` from the policy's token log-probs of their batch, [B]."""
        chosen, rejected = logps.sum(-1).chunk(2)
        return dpo_margin(chosen, rejected, self.reference[0][index], self.reference[1][index])

    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights:
        return dpo_weights(batch.response, dpo_omega(self.margin(logps, index), self.beta), self.beta)

    def metrics(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> dict[str, float]:
        """loss, margin, logp_chosen, logp_rejected: means, nats. accuracy: share of margins above 0, ties half."""
        margin = self.margin(logps, index)
        chosen, rejected = logps.sum(-1).chunk(2)
        return {
            "loss": dpo_loss(margin, self.beta).mean().item(),
            "margin": margin.mean().item(),
            "accuracy": (0.5 + 0.5 * margin.sign() * (margin.abs() > ROUNDING)).mean().item(),
            "logp_chosen": chosen.mean().item(),
            "logp_rejected": rejected.mean().item(),
        }


class PPO:
    """The clipped surrogate on a batch of rollouts. An example is a rollout; rows keep all their columns.

    All log-probs are those of the policy at `temperature`, the one that sampled the rollouts.
    """

    def __init__(
        self,
        rollouts: Batch,
        old_logps: torch.Tensor,
        advantages: torch.Tensor,
        clip: float,
        temperature: float = 1.0,
    ):
        if not rollouts.ids.shape == old_logps.shape == advantages.shape:
            shapes = [tuple(t.shape) for t in (rollouts.ids, old_logps, advantages)]
            raise ValueError(f"PPO: rollouts, log-probs and advantages must share one shape [N, T], given {shapes}")
        self.rollouts, self.old_logps, self.advantages, self.clip = rollouts, old_logps, advantages, clip
        self.size, self.temperature = len(rollouts), temperature

    def batch(self, index: torch.Tensor) -> Batch:
        return self.rollouts.take(index)

    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights:
        return ppo_weights(logps, self.old_logps[index], self.advantages[index], batch.response, self.clip)

    def metrics(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> dict[str, float]:
        """loss: the surrogate. clip_fraction: share of ratios outside the clip, their largest in ratio_max.

        moved: estimate (k3) of the KL from the policy that sampled, nats a token.
        """
        old, advantages = self.old_logps[index], self.advantages[index]
        ratio = (logps - old).exp()[batch.response]
        return {
            "loss": ppo_surrogate(logps, old, advantages, batch.response, self.clip).item(),
            "clip_fraction": ((ratio - 1).abs() > self.clip).float().mean().item(),
            "ratio_max": ratio.max().item(),
            "moved": kl_estimate(old, logps, "k3")[batch.response].mean().item(),
        }
