"""Any loss as weights: published formulas by autograd at the log-probs, losses on whole distributions at the logits."""

import pytest
import torch
import torch.nn.functional as F
from prefdyn.lens import alignment, losses
from prefdyn.lens.likelihood import response_columns, response_logits, token_logps
from prefdyn.methods.dpo import dpo_loss, dpo_margin, dpo_omega, dpo_weights
from prefdyn.methods.ppo import ppo_surrogate, ppo_weights
from prefdyn.methods.sft import sft_weights
from toys.models import ARCHITECTURES, build, lift_float32, random_batch


def direction_of(model, seed: int = 7):
    return alignment.target_direction(model, random_batch(3, seed))


def test_weights_of_a_loss_by_hand():
    """L = -l0 + l1^2 over the responses: w = 1 on the first token and -2 l1 on the second."""
    logps = torch.tensor([[0.0, -1.0, -3.0]])
    response = torch.tensor([[False, True, True]])
    found = losses.from_loss(lambda x: -x[0, 1] + x[0, 2] ** 2, logps, response)
    assert found.w.tolist() == [[0.0, 1.0, 6.0]]
    assert found.unit.tolist() == [[-1, 0, 1]] and found.strength.tolist() == [1.0, 6.0]


def test_units_and_strengths_may_be_declared():
    logps, response = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    unit = torch.tensor([[0, 0, 0], [1, 1, 1]])
    found = losses.from_loss(lambda x: -(x[0].sum() + 4 * x[1, 0]), logps, response, unit)
    assert found.strength.tolist() == pytest.approx([1.0, 4 / 3])
    declared = losses.from_loss(lambda x: -x.sum(), logps, response, unit, strength=lambda w: w.sum(-1))
    assert declared.strength.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda x: x, "must be a scalar"),
        (lambda x: x.sum() / 0, "the loss is"),
        (lambda x: x.sum(), "outside of the responses"),
    ],
)
def test_what_is_no_loss_of_responses_is_refused(loss, said):
    with pytest.raises(ValueError, match=said):
        losses.from_loss(loss, -torch.ones(1, 3), torch.tensor([[False, True, True]]))


def test_published_losses_give_the_analytic_weights(double):
    """SFT, DPO and PPO by autograd of their formulas, against the weights that are written down."""
    batch = random_batch(6, 3)
    rng = torch.Generator().manual_seed(0)
    logps = -torch.rand(batch.ids.shape, generator=rng) * batch.response
    sft = losses.from_loss(lambda x: -x[batch.response].sum() / len(batch), logps, batch.response)
    assert torch.allclose(sft.w, sft_weights(batch.response).w, atol=1e-15)

    ref_chosen, ref_rejected = -torch.rand(2, 3, generator=rng) * 9

    def margin(x):
        chosen, rejected = (x * batch.response).sum(-1).chunk(2)
        return dpo_margin(chosen, rejected, ref_chosen, ref_rejected)

    dpo = losses.from_loss(lambda x: dpo_loss(margin(x), 0.3).mean(), logps, batch.response)
    omega = dpo_omega(margin(logps), 0.3)
    assert torch.allclose(dpo.w, dpo_weights(batch.response, omega, 0.3).w, atol=1e-15)

    old = logps + 0.3 * torch.randn(logps.shape, generator=rng) * batch.response
    advantages = torch.randn(logps.shape, generator=rng)
    ppo = losses.from_loss(lambda x: ppo_surrogate(x, old, advantages, batch.response, 0.2), logps, batch.response)
    expected = ppo_weights(logps, old, advantages, batch.response, 0.2)
    assert torch.allclose(ppo.w, expected.w, atol=1e-15) and (expected.w[batch.response] == 0).any()


def entropy_bonus(logits, rows, columns):
    """Minus the mean over rows of the entropy summed over the response."""
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return -(entropy * rows.response[:, columns]).sum() / 5


def exact_kl(reference):
    """The exact KL divergence from another model, summed over responses."""

    def loss(logits, rows, columns):
        logq = response_logits(reference, rows)[0].detach().log_softmax(-1)
        logp = logits.log_softmax(-1)
        return ((logp.exp() * (logp - logq)).sum(-1) * rows.response[:, columns]).sum()

    return loss


def distillation(teacher):
    """Cross-entropy with a teacher's distribution."""

    def loss(logits, rows, columns):
        p = response_logits(teacher, rows)[0].detach().softmax(-1)
        return -((p * logits.log_softmax(-1)).sum(-1) * rows.response[:, columns]).sum()

    return loss


def likelihood_of_tokens(logits, rows, columns):
    """A loss that reads log-probs of tokens alone, as one of the logits."""
    picked = logits.log_softmax(-1).gather(-1, rows.ids[:, columns, None]).squeeze(-1)
    return -(picked * rows.response[:, columns]).sum()


LOSSES = {
    "entropy bonus": lambda other: entropy_bonus,
    "exact KL": exact_kl,
    "distillation": distillation,
    "log-probs": lambda other: likelihood_of_tokens,
}


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3, tied"])
@pytest.mark.parametrize("name", LOSSES)
def test_contributions_of_logits_add_up_to_the_inner_product(name, architecture, double, monkeypatch):
    """sum of contributions = - <grad L, d>, with grad L by a plain backward pass of the whole loss."""
    lift_float32(monkeypatch)
    assert architecture in ARCHITECTURES
    model, other = build(architecture), build(architecture, seed=1)
    batch, loss = random_batch(5, 2), LOSSES[name](other)
    direction = direction_of(model)
    logits, columns = response_logits(model, batch)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss(logits, batch, columns), list(named.values()), allow_unused=True)
    expected = -sum((g * direction[n]).sum() for n, g in zip(named, grads, strict=True) if g is not None)
    found = losses.logit_contributions(model, batch, direction, loss, size=2)
    assert (found[~batch.response] == 0).all()
    assert found.sum().item() == pytest.approx(expected.item(), rel=1e-8)
    if name == "log-probs":  # then a contribution is the token's score
        assert torch.allclose(found, alignment.token_scores(model, batch, direction)[1], atol=1e-9)


def test_logits_outside_of_responses_are_no_ones_business():
    model, batch = build("gpt_neox"), random_batch(4, 2)
    assert not batch.response[:, response_columns(batch)].all()
    with pytest.raises(ValueError, match="outside of the responses"):
        losses.logit_contributions(model, batch, direction_of(model), lambda z, rows, columns: z.square().sum())
    with pytest.raises(ValueError, match="must be a scalar"):
        losses.logit_contributions(model, batch, direction_of(model), lambda z, rows, columns: z)


def test_an_impossible_token_contributes_nothing():
    """With a bias of minus infinity on an unused id the entropy bonus is a number."""
    model, batch = build("phi"), random_batch(3, 2, vocab=20)
    with torch.no_grad():
        model.lm_head.bias[-1] = -torch.inf

    def safe_entropy(logits, rows, columns):
        logp = logits.log_softmax(-1)
        known = logp.masked_fill(logp == -torch.inf, 0.0)  # p log p is 0 there
        return ((logp.exp() * known).sum(-1) * rows.response[:, columns]).sum()

    found = losses.logit_contributions(model, batch, direction_of(model), safe_entropy)
    assert bool(found.isfinite().all())
    finite = F.softmax(response_logits(model, batch)[0], -1)
    assert (finite[..., -1] == 0).all() and token_logps(model, batch).isfinite().all()
