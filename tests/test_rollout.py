"""Rollouts: rewards by token, advantages and KL estimates, by hand and against their definitions."""

import math

import pytest
import torch
from prefdyn.lens.batch import Batch
from prefdyn.methods import registry, rollout


def mask(*rows: str) -> torch.Tensor:
    """Rows of "." (not of a response) and "x"."""
    return torch.tensor([[c == "x" for c in row] for row in rows])


def random_mask(rng: torch.Generator, rows: int = 12, columns: int = 11) -> torch.Tensor:
    """Responses of every length from 1, prompts of 1 to 3 columns before them and padding after them."""
    response = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        start = int(torch.randint(1, 4, (1,), generator=rng))
        length = int(torch.randint(1, columns - start + 1, (1,), generator=rng))
        response[row, start : start + length] = True
    assert len(set(response.sum(-1).tolist())) > 3
    return response


def test_gae_by_hand():
    """Rewards 1, 0, 2, values 1/2, 1, 3/2, gamma = lambda = 1/2.

    delta: 2 - 3/2 = 1/2;  0 + 3/4 - 1 = -1/4;  1 + 1/2 - 1/2 = 1 (last to first).
    A:     1/2;            -1/4 + 1/8 = -1/8;   1 - 1/32 = 31/32.  Returns: A + value.
    The prompt before and the padding after hold numbers that must not be read.
    """
    rewards = torch.tensor([[9.0, 1.0, 0.0, 2.0, 9.0]])
    values = torch.tensor([[7.0, 0.5, 1.0, 1.5, 7.0]])
    advantages, returns = rollout.gae(rewards, values, mask(".xxx."), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0, 31 / 32, -1 / 8, 1 / 2, 0]]
    assert returns.tolist() == [[0, 47 / 32, 7 / 8, 2, 0]]


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_is_its_definition(double, gamma, lam):
    """A_t = sum over l >= 0 of (gamma lambda)^l delta_{t+l}, over the response alone (Schulman et al. 2016, eq. 16)."""
    rng = torch.Generator().manual_seed(0)
    response = random_mask(rng)
    rewards, values = (torch.randn(response.shape, generator=rng) for _ in range(2))
    advantages, returns = rollout.gae(rewards, values, response, gamma, lam)
    for row in range(len(response)):
        r, v = rewards[row][response[row]].tolist(), [*values[row][response[row]].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]
        assert advantages[row][response[row]].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[row][response[row]].tolist() == pytest.approx(
            [a + b for a, b in zip(expected, v[:-1], strict=True)], abs=1e-12
        )
    assert (advantages[~response] == 0).all() and (returns[~response] == 0).all()


def test_without_discount_the_return_is_the_sum_of_later_rewards(double):
    """At gamma = lambda = 1 the values cancel: whatever they are."""
    rng = torch.Generator().manual_seed(1)
    response = random_mask(rng)
    rewards, values = (torch.randn(response.shape, generator=rng) for _ in range(2))
    _, returns = rollout.gae(rewards, values, response, gamma=1.0, lam=1.0)
    inside = rewards.masked_fill(~response, 0.0)
    later = inside.flip(-1).cumsum(-1).flip(-1)
    assert (returns - later)[response].abs().max() < 1e-12


def test_gae_needs_one_shape():
    with pytest.raises(ValueError, match=r"gae: .* one shape \[N, T\], given .*\(1, 2\)"):
        rollout.gae(torch.zeros(1, 3), torch.zeros(1, 2), mask("xxx"), 1.0, 1.0)


@pytest.fixture
def two_distributions(double):
    """log p and log q over nine tokens, for five states."""
    rng = torch.Generator().manual_seed(2)
    return tuple((1.5 * torch.randn(5, 9, generator=rng)).log_softmax(-1) for _ in range(2))


@pytest.mark.parametrize("kind", rollout.KL_ESTIMATORS)
def test_kl_estimates_in_expectation(two_distributions, kind):
    """The expectation under p is a sum over all tokens: k1 and k3 are unbiased, k2 is not; k2 and k3 are >= 0."""
    logp, logq = two_distributions
    kl = (logp.exp() * (logp - logq)).sum(-1)
    estimate = rollout.kl_estimate(logp, logq, kind)
    bias = ((logp.exp() * estimate).sum(-1) - kl).abs()
    assert bias.max() < 1e-12 if kind in ("k1", "k3") else bias.min() > 1e-2
    assert bool((estimate < 0).any()) == (kind == "k1")
    assert (rollout.kl_estimate(logp, logp, kind) == 0).all()


def test_kl_estimates_by_hand(double):
    """p = 1/2, q = 1/4: log 2, (log 2)^2 / 2 and 1/2 - 1 + log 2."""
    p, q = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": math.log(2) - 0.5}
    assert {kind: rollout.kl_estimate(p, q, kind).item() for kind in rollout.KL_ESTIMATORS} == pytest.approx(expected)


def test_small_kl_estimates_are_not_lost_in_float32():
    """At q / p = e^-d with d = 2^-10, k3 is d^2 / 2 - d^3 / 6 + ...; as q/p - 1 + d it would keep but two digits."""
    d = 2.0**-10
    k3 = rollout.kl_estimate(torch.tensor([d]), torch.zeros(1), "k3").item()
    assert k3 == pytest.approx(math.expm1(-d) + d, rel=1e-3)


def test_unknown_kl_estimators_list_the_known_ones():
    with pytest.raises(ValueError, match="kl_estimator='k4': must be one of k1, k2, k3"):
        rollout.kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_the_last_token_of_a_response():
    assert rollout.last_token(mask(".xx..", "...xx", "x....", ".x...")).tolist() == [2, 4, 0, 1]
    with pytest.raises(ValueError, match=r"empty response in row 1"):
        rollout.last_token(mask(".x", "..", ".."))


def test_token_rewards_by_hand():
    """Penalty 1/2 a nat on every token, the score on top of it at the last; outside nothing, whatever is there."""
    kl = torch.tensor([[9.0, 1.0, -2.0, 9.0], [9.0, 4.0, 9.0, 9.0]])
    rewards = rollout.token_rewards(torch.tensor([3.0, -1.0]), kl, mask(".xx.", ".x.."), 0.5)
    assert rewards.tolist() == [[0, -0.5, 4, 0], [0, -3, 0, 0]]
    free = rollout.token_rewards(torch.tensor([3.0, -1.0]), kl, mask(".xx.", ".x.."), 0.0)
    assert free.tolist() == [[0, 0, 3, 0], [0, -1, 0, 0]]


@pytest.mark.parametrize(
    ("scores", "response", "said"),
    [
        ([1.0, math.nan], (".x", ".x"), r"reward: not finite \(nan\) for response 1"),
        ([-math.inf, 1.0], (".x", ".x"), r"reward: not finite \(-inf\) for response 0"),
        ([1.0], (".x", ".x"), r"one number a response is needed, \[2\], given \[1\]"),
        ([[1.0], [2.0]], (".x", ".x"), r"\[2\], given \[2, 1\]"),
        ([1.0, 2.0], (".x", ".."), "empty response in row 1"),
    ],
)
def test_scores_that_cannot_be_used(scores, response, said):
    response = mask(*response)
    with pytest.raises(ValueError, match=said):
        rollout.token_rewards(torch.tensor(scores), torch.zeros(response.shape), response, 0.1)


def test_whitening_by_hand():
    """1, 2, 3 have mean 2 and variance 2/3; what is outside does not count."""
    white = rollout.whiten(torch.tensor([[50.0, 1.0, 2.0], [3.0, 50.0, 50.0]]), mask(".xx", "x.."))
    edge = math.sqrt(3 / 2)
    assert white.flatten().tolist() == pytest.approx([0, -edge, 0, edge, 0, 0], abs=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, -100.1])
@pytest.mark.parametrize("tokens", [1, 3, 777])
def test_a_constant_has_nothing_to_whiten(constant, tokens):
    """Also where the mean of equal numbers is not, in float32, that number."""
    white = rollout.whiten(torch.full((1, tokens), constant), torch.ones(1, tokens, dtype=torch.bool))
    assert (white == 0).all()


def test_small_advantages_are_whitened_too():
    white = rollout.whiten(torch.tensor([[1e-3, 3e-3]]), mask("xx"))
    assert white.flatten().tolist() == pytest.approx([-1, 1], abs=1e-4)


def test_explained_variance_by_hand():
    """Returns 0, 2, 4 (variance 8/3); errors 0, 0, 3 (variance 2): 1 - 3/4."""
    returns = torch.tensor([0.0, 2.0, 4.0])
    assert rollout.explained_variance(torch.tensor([0.0, 2.0, 1.0]), returns) == pytest.approx(0.25)
    assert rollout.explained_variance(returns, returns) == 1
    assert rollout.explained_variance(torch.full((3,), 5.0), returns) == pytest.approx(0, abs=1e-6)
    assert math.isnan(rollout.explained_variance(returns, torch.ones(3)))
    assert math.isnan(rollout.explained_variance(torch.arange(777.0), torch.full((777,), 0.1)))


# values and returns at three tokens, old values 0, and one column that is not of a response
VALUES, RETURNS = torch.tensor([[1.0, 1.0, 0.25, 9.0]]), torch.tensor([[2.0, 0.0, 0.75, -9.0]])


@pytest.mark.parametrize(
    ("clip", "errors"),
    [
        (0.0, [1, 1, 0.25]),  # plain squares: (1 - 2)^2, (1 - 0)^2, (1/4 - 3/4)^2
        (0.5, [2.25, 1, 0.25]),  # at most 1/2 from 0: (1/2 - 2)^2 is larger, (1/2 - 0)^2 is not, the third is inside
    ],
)
def test_value_loss_by_hand(clip, errors):
    loss = rollout.value_loss(VALUES, torch.zeros(1, 4), RETURNS, mask("xxx."), clip)
    assert loss.item() == pytest.approx(sum(errors) / 3 / 2)


def test_clipped_values_do_not_learn():
    """Where the clipped error is the larger one it does not depend on the value: no gradient there."""
    values = VALUES.clone().requires_grad_()
    rollout.value_loss(values, torch.zeros(1, 4), RETURNS, mask("xxx."), 0.5).backward()
    assert values.grad[0].tolist() == pytest.approx([0, 1 / 3, -0.5 / 3, 0])  # (value - return) / 3


@pytest.mark.parametrize(
    ("returns", "rewards", "expected"),
    [
        # Distances 1 and 1, 0 and 0, 0.1 and 0.1; in spreads (1, 0 and 0.1) all but the equals are 1 away. The third
        # group is tied in reward alone: 0.2 / 2.2 of distances, 2 / 4 of those in spreads.
        ([[3, 1], [5, 5], [2.1, 1.9]], [[3, 1], [5, 5], [2, 2]], (1.1 / 3, 1 / 3, 2 / 3, 1 / 11, 1 / 2)),
        # Distances 1, 1, 2 (spread sqrt 2) and, tied, 1, 0, 1 (spread sqrt 2/3): in spreads 2 sqrt 2 and sqrt 6.
        (
            [[0, 0, 3], [1, 2, 3]],
            [[0, 0, 3], [7, 7, 7]],
            ((2**0.5 + (2 / 3) ** 0.5) / 2, 0, 1 / 2, 2 / 6, 3**0.5 / (2 + 3**0.5)),
        ),
        ([[3, 1], [5, 4]], [[3, 1], [5, 4]], (0.75, 0, 0, 0, 0)),  # nothing is tied
        ([[3.5, 3], [5, 4]], [[3, 3], [4, 4]], (0.375, 0, 1, 1, 1)),  # everything is
        ([[2, 2], [5, 5]], [[2, 2], [5, 5]], (0, 1, 1, 0, 0)),  # no return differs: nothing to have a share in
        ([[2, 2], [5, 5]], [[2, 1], [5, 6]], (0, 1, 0, 0, 0)),  # though rewards do, and the penalty makes up for it
    ],
)
def test_ties_by_hand(double, returns, rewards, expected):
    found = rollout.ties(torch.tensor(returns, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64))
    assert list(found) == ["spread", "equals", "tied", "tied_distance", "tied_relative"]
    assert tuple(found.values()) == pytest.approx(expected)


def test_returns_that_differ_by_rounding_are_equal():
    """In float32 5 and its next number; and 777 equal numbers, whose mean need not be that number."""
    near = torch.tensor([[5.0, 5.0], [3.0, 1.0]])
    near[0, 1] = torch.nextafter(near[0, 1], torch.tensor(9.0))
    found = rollout.ties(near, torch.tensor([[5.0, 5.0], [3.0, 1.0]]))
    assert near[0, 0] != near[0, 1] and (found["equals"], found["tied"], found["tied_relative"]) == (0.5, 0.5, 0)
    assert found["tied_distance"] == 0
    many = torch.full((2, 777), 0.1)
    found = rollout.ties(many, many)
    assert (found["equals"], found["tied"], found["tied_relative"], found["tied_distance"]) == (1, 1, 0, 0)


ADVANTAGES = {"rloo": "tied_distance", "dr_grpo": "tied_distance", "grpo": "tied_relative"}


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name in registry.names()])
def test_ties_are_those_of_the_advantages_of_methods(double, name):
    """One token a reply, so that its advantage is the token's; the first two of four groups are tied in reward."""
    returns = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    rewards = torch.cat([torch.ones(2, 3), returns[2:]])
    ids, response = torch.tensor([[1, 2]] * 12), mask(*[".x"] * 12)
    old = -response.double()
    whole = rollout.Rollouts(
        Batch(ids, torch.ones_like(response), response), old, old, returns.flatten(), 3, 1.0, longest=1
    )
    method = registry.find(name)
    sizes = method.rollouts(whole, **method.settings).advantages[:, 1].abs().reshape(4, 3)
    share = (sizes[:2].sum() / sizes.sum()).item()
    assert rollout.ties(returns, rewards)[ADVANTAGES[name]] == pytest.approx(
        share, rel=1e-5
    )  # GRPO's spread is 1e-6 more
