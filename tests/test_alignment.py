"""Gradient alignment: forward mode against per-token backward in true float64, by hand, and against real steps."""

import numpy as np
import pytest
import torch
from prefdyn import alignment, controls, objectives
from prefdyn.data import Batch, pad
from prefdyn.policy import sequence_logps, token_logps
from toys.models import ARCHITECTURES, Table, build, lift_float32, random_batch


@pytest.fixture
def exact(double, monkeypatch):
    """Float64 from end to end: transformers' own classes would pass through float32 on the way."""
    lift_float32(monkeypatch)


def test_by_hand(double):
    """Two tokens, all logits equal: the gradient of log pi(y | x) is e_y - (1/2, 1/2) in row x.

    D' is one response, prompt 0, answer 1: d = (-1/2, 1/2) in row 0. So the score of token 1 after 0 is
    1/4 + 1/4 = 1/2, that of token 0 after 0 is -1/2, and whatever follows 1 lies in another row: 0.
    """
    model = Table([[1.0, 1.0], [1.0, 1.0]])
    direction = alignment.target_direction(model, pad([[0]], [[1]], 0))
    assert direction["table"].flatten().tolist() == pytest.approx([-0.5, 0.5, 0, 0])
    batch = pad([[0], [0], [1]], [[1, 1], [0], [0]], 0)
    for method in alignment.METHODS:
        logps, scores = alignment.token_scores(model, batch, direction, method)
        expected = torch.tensor([[0, 0.5, 0], [0, -0.5, 0], [0, 0, 0]])
        assert torch.allclose(scores, expected, atol=1e-8), method
        assert torch.allclose(logps, token_logps(model, batch))
    # SFT on these three demonstrations, 1/3 a token: G = (1/2 - 1/2 + 0) / 3 = 0, and row by row
    weights = objectives.sft_weights(batch.response)
    assert alignment.by_sequence(weights, scores, "full").tolist() == pytest.approx([1 / 6, -1 / 6, 0])


def test_reductions_by_hand(double):
    """D': 0 -> 1 1 and 0 -> 0. In units of u = (-1/2, 1/2) of a row, the gradients are (u, u) and (-u, 0) in rows 0, 1.

    sum:  row 0 gets (u - u) / 2 = 0,         row 1 gets u / 2.
    mean: row 0 gets (u / 2 - u) / 2 = -u / 4, row 1 gets u / 4.
    """
    model, targets = Table([[0.0, 0.0], [0.0, 0.0]]), pad([[0], [0]], [[1, 1], [0]], 0)
    summed = alignment.target_direction(model, targets, "sum", size=1)
    meant = alignment.target_direction(model, targets, "mean", size=1)
    assert summed["table"].flatten().tolist() == pytest.approx([0, 0, -0.25, 0.25])
    assert meant["table"].flatten().tolist() == pytest.approx([0.125, -0.125, -0.125, 0.125])
    with pytest.raises(ValueError, match="reduction='max'"):
        alignment.target_direction(model, targets, "max")


def setting(architecture: str, side: str = "right"):
    """A model, pairs as a batch of chosen and then rejected rows, their weights, and D'."""
    model = build(architecture)
    batch, targets = random_batch(8, seed=1, side=side), random_batch(3, seed=2, side=side)
    omega = torch.linspace(0.2, 0.7, 4)
    return model, batch, objectives.dpo_weights(batch.response, omega, beta=0.3), targets


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_mode_equals_per_token_backward_in_float64(exact, architecture):
    model, batch, _, targets = setting(architecture)
    direction = alignment.target_direction(model, targets)
    logps, scores = alignment.token_scores(model, batch, direction)
    _, expected = alignment.token_scores(model, batch, direction, "backward")
    assert scores.dtype == torch.float64
    inside = batch.response
    assert expected[inside].abs().min() > 1e-6  # so that a relative comparison means something
    assert ((scores - expected)[inside].abs() < 1e-8 * expected[inside].abs()).all()
    assert (scores[~inside] == 0).all()
    assert torch.allclose(logps, token_logps(model, batch), atol=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3, tied"])
def test_scores_at_a_temperature(exact, architecture, temperature):
    """All methods agree on <grad log softmax(logits / T), d>, and the weighted sum is the gradient's inner product."""
    model, batch, weights, targets = setting(architecture)
    direction = alignment.target_direction(model, targets)
    logps, expected = alignment.token_scores(model, batch, direction, "backward", temperature=temperature)
    assert torch.allclose(logps, token_logps(model, batch, temperature).detach(), atol=1e-12)
    size = expected.abs().max()
    for method, bound in (("forward", 1e-11), ("central", 1e-6)):
        values, scores = alignment.token_scores(model, batch, direction, method, size=3, temperature=temperature)
        assert (values - logps).abs().max() < 1e-11 and (scores - expected).abs().max() < bound * size, method
    ascent = alignment.gradient(model, [(batch, weights.w)], temperature)
    assert alignment.inner(ascent, direction).item() == pytest.approx((weights.w * expected).sum().item(), rel=1e-9)
    _, plain = alignment.token_scores(model, batch, direction)
    assert (plain - expected).abs().max() > 0.05 * size


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("method", "bound"), [("forward", 1e-5), ("central", 1e-3)])
def test_float32_is_close_to_the_largest_score(architecture, method, bound):
    model, batch, _, targets = setting(architecture)
    direction = alignment.target_direction(model, targets)
    _, scores = alignment.token_scores(model, batch, direction, method)
    _, expected = alignment.token_scores(model, batch, direction, "backward")
    assert scores.dtype == torch.float32
    assert (scores - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_attention_gives_the_same_scores(policy_and_tokenizer, attention):
    model, _ = policy_and_tokenizer
    batch, targets = random_batch(6, seed=1), random_batch(3, seed=2)
    direction = alignment.target_direction(model, targets)
    _, expected = alignment.token_scores(model, batch, direction, "backward")
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        _, scores = alignment.token_scores(model, batch, direction)
    finally:
        model.set_attn_implementation(before)
    assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weighted_scores_are_the_inner_product_of_the_definition(exact, architecture):
    """G = < grad of the mean NLL of D', grad L >, with both gradients from autograd of whole losses."""
    model, batch, weights, targets = setting(architecture)
    parameters = list(model.parameters())
    nll = -token_logps(model, targets).sum(-1).mean()
    grad_targets = torch.autograd.grad(nll, parameters)
    loss = -(weights.w * token_logps(model, batch)).sum()
    grad_loss = torch.autograd.grad(loss, parameters)
    by_definition = sum((a * b).sum() for a, b in zip(grad_targets, grad_loss, strict=True)).item()
    direction = alignment.target_direction(model, targets)
    _, scores = alignment.token_scores(model, batch, direction)
    g = alignment.by_sequence(weights, scores, "full").sum().item()
    assert g == pytest.approx(by_definition, rel=1e-9)
    ascent = alignment.gradient(model, [(batch, weights.w)])
    assert alignment.inner(ascent, direction).item() == pytest.approx(g, rel=1e-9)
    lengths = [np.sqrt(sum(x.pow(2).sum().item() for x in grads)) for grads in (grad_loss, grad_targets)]
    assert alignment.norm(ascent).item() == pytest.approx(lengths[0])
    assert alignment.norm(direction).item() == pytest.approx(lengths[1])


def test_components_sum_to_g():
    model, batch, weights, targets = setting("gpt_neox")
    _, scores = alignment.token_scores(model, batch, alignment.target_direction(model, targets))
    part = {name: alignment.by_sequence(weights, scores, name) for name in controls.CONTROLS}
    size = part["full"].abs().max().item()
    assert torch.allclose(part["positive"] + part["negative"], part["full"], atol=1e-6 * size)
    assert torch.allclose(part["top"] + part["middle"] + part["bottom"], part["full"], atol=1e-6 * size)
    assert all(part[name].abs().max() > 0 for name in part)
    assert part["full"].sum().item() == pytest.approx((weights.w * scores).sum().item(), rel=1e-4, abs=1e-6 * size)


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3, tied"])
def test_a_small_step_changes_the_likelihood_as_g_says(exact, architecture):
    """theta - lr * grad L changes the NLL of D' by -lr * G + O(lr^2): halving lr quarters the error."""
    model, batch, weights, targets = setting(architecture)
    direction = alignment.target_direction(model, targets)
    _, scores = alignment.token_scores(model, batch, direction)
    g = alignment.by_sequence(weights, scores, "full").sum().item()
    ascent = alignment.gradient(model, [(batch, weights.w)])  # minus the gradient of L
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = -sequence_logps(model, targets).mean().item()
    rates = np.array([2.0**-k for k in range(5)]) * 1e-3 / alignment.norm(ascent).item()
    errors = []
    for lr in rates:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name] + lr * ascent[name])
        after = -sequence_logps(model, targets).mean().item()
        errors.append(abs(after - before + lr * g))
    slope = np.polyfit(np.log(rates), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.1)
    assert errors[-1] < 0.1 * abs(rates[-1] * g)


def test_central_differences_leave_the_parameters_as_they_were():
    model, batch, _, targets = setting("gpt_neox")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    direction = alignment.target_direction(model, targets)
    alignment.token_scores(model, batch, direction, "central")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    broken = Batch(torch.full_like(batch.ids, 10**6), batch.attention, batch.response)  # no such token
    with pytest.raises(IndexError):
        alignment.token_scores(model, broken, direction, "central")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_measuring_leaves_no_gradients_behind():
    model, batch, weights, targets = setting("gpt_neox")
    direction = alignment.target_direction(model, targets)
    logps, scores = alignment.token_scores(model, batch, direction)
    alignment.gradient(model, [(batch, weights.w)])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not logps.requires_grad and not scores.requires_grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_chunks_change_nothing(architecture):
    model, batch, _, targets = setting(architecture)
    direction = alignment.target_direction(model, targets)
    _, scores = alignment.token_scores(model, batch, direction)
    bound = 1e-5 * scores.abs().max()
    _, in_chunks = alignment.token_scores(model, batch, direction, size=3)
    assert (in_chunks - scores).abs().max() < bound
    _, left_batch, _, left_targets = setting(architecture, side="left")
    left_direction = alignment.target_direction(model, left_targets, size=2)
    _, left = alignment.token_scores(model, left_batch, left_direction)
    assert left.isfinite().all()
    assert (left[left_batch.response] - scores[batch.response]).abs().max() < bound
    difference = {name: direction[name] - left_direction[name] for name in direction}
    assert alignment.norm(difference) < 1e-5 * alignment.norm(direction)


def test_a_direction_may_cover_a_part_of_the_parameters(exact):
    """Frozen parameters do not enter G."""
    model, batch, _, targets = setting("gpt_neox")
    whole = alignment.target_direction(model, targets)
    frozen = next(iter(whole))
    model.get_parameter(frozen).requires_grad_(False)
    direction = alignment.target_direction(model, targets)
    assert direction.keys() == whole.keys() - {frozen}
    _, scores = alignment.token_scores(model, batch, direction)
    for method in ("backward", "central"):
        _, expected = alignment.token_scores(model, batch, direction, method)
        assert torch.allclose(scores, expected, atol=1e-6 * scores.abs().max())


def test_what_cannot_be_measured():
    model, batch, _, targets = setting("gpt_neox")
    direction = alignment.target_direction(model, targets)
    with pytest.raises(ValueError, match="method='guess': must be one of forward, central, backward"):
        alignment.token_scores(model, batch, direction, "guess")
    with pytest.raises(ValueError, match=r"no counterpart.*elsewhere"):
        alignment.token_scores(model, batch, direction | {"elsewhere": torch.zeros(1)})
