"""Objectives as token weights: the weighted sum of log-prob gradients is the gradient of the published loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from prefdyn.lens.batch import Batch, concatenate, pad
from prefdyn.lens.likelihood import sequence_logps, token_logps
from prefdyn.lens.weights import TokenWeights
from prefdyn.methods.dpo import DPO, dpo_loss, dpo_margin, dpo_omega, dpo_weights
from prefdyn.methods.ppo import PPO, ppo_surrogate, ppo_weights
from prefdyn.methods.sft import SFT, sft_weights
from toys.models import Table, build, lift_float32, random_batch

BETA = 0.3


def random_table() -> Table:
    return Table(torch.randn(23, 23, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(params=["table", "gpt_neox"])
def models(request, double, monkeypatch):
    """A policy and a reference in float64."""
    lift_float32(monkeypatch)
    if request.param == "table":
        return random_table(), Table(torch.zeros(23, 23))
    return build("gpt_neox", seed=0), build("gpt_neox", seed=1)


def pairs_of(rows: int):
    """Chosen and rejected responses to the same prompts."""
    drawn = random_batch(rows, seed=1), random_batch(rows, seed=2)
    prompts = [b.ids[r][b.attention[r] & ~b.response[r]].tolist() for b in drawn[:1] for r in range(rows)]
    answers = [[b.ids[r][b.response[r]].tolist() for r in range(rows)] for b in drawn]
    return pad(prompts, answers[0], 0), pad(prompts, answers[1], 0)


def plain_logp(model, batch) -> torch.Tensor:
    """Log-likelihood of each response, written down anew: sum of log softmax at the response's tokens."""
    rows = []
    for ids, attention, response in zip(batch.ids, batch.attention, batch.response, strict=True):
        ids, response = ids[attention], response[attention]
        table = F.log_softmax(model(ids[None]).logits[0], -1)
        rows.append(sum(table[t - 1, ids[t]] for t in response.nonzero().flatten().tolist()))
    return torch.stack(rows)


def assert_same_gradient(model, loss: torch.Tensor, objective, index: torch.Tensor) -> None:
    """Autograd of `loss` equals autograd of -(w.detach() * logp).sum() to 1e-10 of its largest entry."""
    batch = objective.batch(index)
    logps = token_logps(model, batch, objective.temperature)
    w = objective.weights(logps.detach(), batch, index).w
    parameters = list(model.parameters())
    published = torch.autograd.grad(loss, parameters)
    weighted = torch.autograd.grad(-(w * logps).sum(), parameters)
    largest = max(g.abs().max() for g in published)
    assert largest > 1e-3
    for ours, theirs in zip(weighted, published, strict=True):
        assert (ours - theirs).abs().max() < 1e-10 * largest


def test_sft_weights_give_the_gradient_of_the_mean_negative_log_likelihood(models):
    model, _ = models
    demonstrations, index = random_batch(9), torch.tensor([1, 4, 8, 2])
    loss = -plain_logp(model, demonstrations.rows(index)).mean()
    objective = SFT(demonstrations)
    assert_same_gradient(model, loss, objective, index)
    batch = objective.batch(index)
    assert objective.metrics(token_logps(model, batch).detach(), batch, index) == {"loss": pytest.approx(loss.item())}


def test_dpo_weights_give_the_gradient_of_the_published_loss(models):
    """L = -E log sigmoid(beta log pi(yw)/ref(yw) - beta log pi(yl)/ref(yl)), Rafailov et al. 2023, eq. 7."""
    model, reference = models
    chosen, rejected = pairs_of(9)
    objective = DPO(chosen, rejected, *(sequence_logps(reference, b) for b in (chosen, rejected)), BETA)
    index = torch.tensor([7, 0, 3])
    yw, yl = chosen.rows(index), rejected.rows(index)
    with torch.no_grad():
        ref_yw, ref_yl = plain_logp(reference, yw), plain_logp(reference, yl)
    log_ratios = plain_logp(model, yw) - ref_yw, plain_logp(model, yl) - ref_yl
    loss = -F.logsigmoid(BETA * log_ratios[0] - BETA * log_ratios[1]).mean()
    assert_same_gradient(model, loss, objective, index)
    batch = objective.batch(index)
    metrics = objective.metrics(token_logps(model, batch).detach(), batch, index)
    margins = (log_ratios[0] - log_ratios[1]).detach()
    assert metrics["loss"] == pytest.approx(loss.item())
    assert metrics["margin"] == pytest.approx(margins.mean().item())
    assert metrics["accuracy"] == pytest.approx((margins > 0).double().mean().item())
    assert metrics["logp_chosen"] == pytest.approx(plain_logp(model, yw).mean().item())
    assert metrics["logp_rejected"] == pytest.approx(plain_logp(model, yl).mean().item())


def test_before_the_first_step_dpo_knows_nothing(double):
    """The policy is its own reference: every margin 0, loss log 2, omega 1/2, half of the pairs ordered rightly."""
    model = random_table()
    chosen, rejected = pairs_of(6)
    objective = DPO(chosen, rejected, *(sequence_logps(model, b) for b in (chosen, rejected)), BETA)
    index = torch.arange(6)
    batch = objective.batch(index)
    logps = token_logps(model, batch).detach()
    margin = objective.margin(logps, index)
    assert margin.abs().max() < 1e-12
    assert objective.weights(logps, batch, index).strength.tolist() == pytest.approx([0.5] * 6)
    assert objective.metrics(logps, batch, index)["loss"] == pytest.approx(math.log(2))


def test_dpo_by_hand():
    """Margin (-1 + 2) - (-3 + 2.5) = 1.5; at beta 2: loss = log(1 + e^-3), omega = 1 / (1 + e^3)."""
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([v]) for v in (-1.0, -3.0, -2.0, -2.5))
    margin = dpo_margin(chosen, rejected, ref_chosen, ref_rejected)
    assert margin.item() == 1.5
    assert dpo_loss(margin, 2.0).item() == pytest.approx(math.log(1 + math.exp(-3)))
    assert dpo_omega(margin, 2.0).item() == pytest.approx(1 / (1 + math.exp(3)))
    assert dpo_loss(torch.zeros(1), 0.1).item() == pytest.approx(math.log(2))


def test_ties_count_half_in_the_accuracy():
    """Margins 1, 0, -1 and 0: (1 + 1/2 + 0 + 1/2) / 4."""
    batch = pad([[1]] * 4, [[2]] * 4, 0)
    objective = DPO(batch, batch, torch.zeros(4), torch.zeros(4), beta=1.0)
    logps = torch.zeros(8, 2)
    logps[:, 1] = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    assert objective.metrics(logps, concatenate([batch, batch]), torch.arange(4))["accuracy"] == 0.5


def test_sft_weights_by_hand():
    response = torch.tensor([[0, 1, 1], [0, 0, 1]], dtype=torch.bool)
    weights = sft_weights(response)
    assert weights.w.tolist() == [[0, 0.5, 0.5], [0, 0, 0.5]]
    assert weights.unit.tolist() == [[-1, 0, 0], [-1, -1, 1]]
    assert weights.strength.tolist() == [1, 1]


def test_dpo_weights_by_hand():
    """Two pairs, beta 1/2: chosen tokens weigh 0.5 * omega / 2, rejected ones the opposite."""
    response = torch.tensor([[0, 1], [1, 1], [1, 0], [0, 1]], dtype=torch.bool)
    weights = dpo_weights(response, torch.tensor([0.4, 0.8]), beta=0.5)
    assert torch.allclose(weights.w, torch.tensor([[0, 0.1], [0.2, 0.2], [-0.1, 0], [0, -0.2]]))
    assert weights.unit.tolist() == [[-1, 0], [1, 1], [0, -1], [-1, 1]]


def test_omega_never_vanishes():
    """At a margin of 2,000 nats omega underflows float32; what it multiplies must not be lost (see controls)."""
    omega = dpo_omega(torch.tensor([2_000.0, 0.0]), beta=0.1)
    assert 0 < omega[0] < 1e-29 and omega[1] == 0.5


# Clip 1/5. Ratios and advantages of seven tokens, the surrogate min(r A, clip(r) A) and 7 times the weight of each.
PPO_CASES = {
    "inside, raised": (1.0, 2.0, 2.0, 2.0),
    "inside, lowered": (1.1, -1.0, -1.1, -1.1),
    "above, to be raised: held": (1.5, 3.0, 3.6, 0.0),  # 1.2 * 3
    "below, to be raised": (0.5, 3.0, 1.5, 1.5),
    "above, to be lowered": (1.5, -3.0, -4.5, -4.5),
    "below, to be lowered: held": (0.5, -3.0, -2.4, 0.0),  # 0.8 * -3
    "nothing to learn": (1.3, 0.0, 0.0, 0.0),
}


def ppo_cases():
    """Log-probs now and then, advantages and mask: the cases in two rows, numbers that do not count around them."""
    ratio, advantages, surrogate, weights = torch.tensor([*PPO_CASES.values()]).T
    response = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    now, then, scale = torch.zeros(2, 6), torch.zeros(2, 6), torch.full((2, 6), 50.0)
    then[response] = torch.linspace(-3, -1, 7)
    now[response] = then[response] + ratio.log()
    scale[response] = advantages
    return (now, then, scale, response), surrogate, weights


def test_ppo_weights_by_hand(double):
    given, surrogate, expected = ppo_cases()
    response = given[-1]
    assert ppo_surrogate(*given, clip=0.2).item() == pytest.approx(-surrogate.mean().item())
    weights = ppo_weights(*given, clip=0.2)
    assert (7 * weights.w[response]).tolist() == pytest.approx(expected.tolist())
    assert (weights.w[~response] == 0).all()
    assert weights.unit.tolist() == [[-1, 0, 1, 2, 3, -1], [-1, -1, 4, 5, 6, -1]]
    assert weights.strength.tolist() == pytest.approx([2, 1, 3, 3, 3, 3, 0])


def test_ppo_metrics_by_hand(double):
    """Five of seven ratios are more than 1/5 from 1; k3 from the sampling policy is r - 1 - log r."""
    (now, then, advantages, response), surrogate, _ = ppo_cases()
    rollouts = Batch(torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool), response)
    metrics = PPO(rollouts, then, advantages, clip=0.2).metrics(now, rollouts, torch.arange(2))
    ratios = [case[0] for case in PPO_CASES.values()]
    assert metrics == pytest.approx(
        {
            "loss": -surrogate.mean().item(),
            "clip_fraction": 5 / 7,
            "ratio_max": 1.5,
            "moved": sum(r - 1 - math.log(r) for r in ratios) / 7,
        }
    )


def test_ppo_weights_are_the_gradient_by_log_probs(double):
    (now, then, advantages, response), _, _ = ppo_cases()
    rng = torch.Generator().manual_seed(0)
    now, then, advantages = (torch.cat([t, torch.randn(40, 6, generator=rng)]) for t in (now, then, advantages))
    response = torch.cat([response, torch.rand(40, 6, generator=rng) < 0.7])
    now.requires_grad_()
    (gradient,) = torch.autograd.grad(ppo_surrogate(now, then, advantages, response, 0.2), now)
    w = ppo_weights(now.detach(), then, advantages, response, 0.2).w
    assert (w + gradient).abs().max() < 1e-10 < w.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppo_weights_give_the_gradient_of_the_published_surrogate(models, temperature):
    """-mean of min(r A, clip(r, 1 - eps, 1 + eps) A) over tokens, Schulman et al. 2017, eq. 7, token by token.

    r is the ratio of the policies that sample at the temperature: of softmaxes of logits / T.
    """
    model, _ = models
    rollouts, rng = random_batch(16), torch.Generator().manual_seed(1)
    shift = torch.tensor([0.1, 0.4, -0.4])[torch.randint(3, rollouts.ids.shape, generator=rng)]
    then = token_logps(model, rollouts, temperature).detach() + shift
    advantages = torch.randn(rollouts.ids.shape, generator=rng)
    advantages[:, 4] = 0.0
    index = torch.tensor([8, 1, 4, 2, 0, 15, 11, 9, 13])
    terms, cases = [], set()
    for row in index.tolist():
        length = int(rollouts.attention[row].sum())  # padded on the right
        table = F.log_softmax(model(rollouts.ids[row : row + 1, :length]).logits[0] / temperature, -1)
        for t in rollouts.response[row].nonzero().flatten().tolist():
            ratio = (table[t - 1, rollouts.ids[row, t]] - then[row, t]).exp()
            terms.append(torch.minimum(ratio * advantages[row, t], ratio.clamp(0.8, 1.2) * advantages[row, t]))
            side = "below" if ratio < 0.8 else "above" if ratio > 1.2 else "inside"
            cases.add((side, advantages[row, t].sign().item()))
    assert cases >= {(side, sign) for side in ("below", "inside", "above") for sign in (-1.0, 1.0)}
    assert any(sign == 0 for _, sign in cases)
    objective = PPO(rollouts, then, advantages, 0.2, temperature)
    loss = -torch.stack(terms).mean()
    assert_same_gradient(model, loss, objective, index)
    batch = objective.batch(index)
    logps = token_logps(model, batch, temperature).detach()
    assert objective.metrics(logps, batch, index)["loss"] == pytest.approx(loss.item())


def test_before_its_first_step_ppo_follows_its_advantages(double):
    """Now and then are the same policy: every ratio 1, nothing clipped, nothing moved, w = A / number of tokens."""
    model, rollouts = random_table(), random_batch(6)
    advantages = torch.randn(rollouts.ids.shape, generator=torch.Generator().manual_seed(0))
    then = token_logps(model, rollouts).detach()
    objective, index = PPO(rollouts, then, advantages, clip=0.2), torch.arange(6)
    batch = objective.batch(index)
    weights = objective.weights(then, batch, index)
    assert torch.allclose(weights.w, advantages.masked_fill(~batch.response, 0.0) / batch.response.sum())
    metrics = objective.metrics(then, batch, index)
    assert (metrics["ratio_max"], metrics["clip_fraction"], metrics["moved"]) == (1.0, 0.0, 0.0)
    assert metrics["loss"] == pytest.approx(-advantages[batch.response].mean().item())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: TokenWeights(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 4)), r"\(2, 3\) and unit \(2, 4\)"),
        (lambda: TokenWeights(torch.zeros(3), torch.zeros(2), torch.zeros(3)), "must share one shape"),
        (lambda: TokenWeights(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2, 3)), r"must be \[U\]"),
        (lambda: dpo_weights(torch.ones(3, 2, dtype=torch.bool), torch.ones(2), 0.1), "3 rows for 2 pairs"),
        (
            lambda: DPO(random_batch(3), random_batch(2), torch.zeros(3), torch.zeros(3), 0.1),
            r"differ in number: \[2, 3\]",
        ),
        (
            lambda: DPO(random_batch(3), random_batch(3), torch.zeros(1), torch.zeros(3), 0.1),
            r"differ in number: \[1, 3\]",
        ),
        (
            lambda: PPO(random_batch(3), torch.zeros(3, 1), torch.zeros(3, 1), 0.2),
            r"rollouts, log-probs and advantages must share one shape \[N, T\], given .*\(3, 1\)",
        ),
    ],
)
def test_shapes_that_do_not_fit(call, said):
    with pytest.raises(ValueError, match=said):
        call()
