"""The enumerated policy: each numbered equation of its chapter against autograd, enumeration or the models' code."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from prefdyn.lab import exact, train
from prefdyn.lens import alignment, controls
from prefdyn.lens.likelihood import token_logps
from prefdyn.methods.dpo import DPO
from prefdyn.methods.ppo import ppo_weights
from prefdyn.methods.sft import SFT, sft_weights

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "06-exact.ipynb"
BETA = 0.3
CHECKS: dict[str, list[str]] = {}  # label of an equation -> tests that check it

pytestmark = pytest.mark.usefixtures("double")


def checks(*labels: str):
    """Say which numbered equations of the chapter a test checks."""

    def register(test):
        for label in labels:
            CHECKS.setdefault(label, []).append(test.__name__)
        return test

    return register


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def setting(shared: bool, k: int = 5):
    """Parameters, features and log-probs of a policy over k responses, features shared by them or the table."""
    theta, features = (random(3, seed=1), random(k, 3, seed=2)) if shared else (random(k, seed=1), torch.eye(k))
    return theta, features, (features @ theta).log_softmax(-1)


def autograd(function, theta: torch.Tensor) -> torch.Tensor:
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def close(a, b, bound: float = 1e-10) -> bool:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return a.shape == b.shape and bool((a - b).abs().max() < bound * max(1.0, float(b.abs().max())))


both = pytest.mark.parametrize("shared", [False, True], ids=["table", "shared"])


def test_every_numbered_equation_has_a_check_and_every_check_an_equation():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    labels = re.findall(r"^:label: (eq-\S+)$", text, re.MULTILINE)
    assert len(labels) == text.count("```{math}") > 0, "an equation without a label"
    assert len(set(labels)) == len(labels)
    assert set(labels) == set(CHECKS)
    names = {name for tests in CHECKS.values() for name in tests}
    assert all(name.startswith("test_") and callable(globals()[name]) for name in names)


@both
@checks("eq-exact-score")
def test_gradient_of_a_log_probability(shared):
    theta, features, logp = setting(shared)
    for i, one in enumerate(torch.eye(5)):
        expected = autograd(lambda at, i=i: (features @ at).log_softmax(-1)[i], theta)
        assert close(exact.ascent(one, logp.exp(), features), expected)
        assert close(features[i] - logp.exp() @ features, expected)


def test_running_example_by_hand():
    """no, no no, yes with 3/10, 2/10, 5/10; counts of no and yes. Mean counts 7/10, 5/10."""
    pi, words = torch.tensor([0.3, 0.2, 0.5]), torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert close(exact.ascent(torch.tensor([1.0, 0.0, 0.0]), pi, words), torch.tensor([0.3, -0.5]))
    # preferring no to no no moves theta along (-1, 0): scores -1 + 7/10, -2 + 7/10, 7/10
    move = exact.ascent(torch.tensor([1.0, -1.0, 0.0]), pi, words)
    assert close(move, torch.tensor([-1.0, 0.0]))
    assert close(exact.scores(move, pi, words), torch.tensor([-0.3, -1.3, 0.7]))
    # in the table: e_c - e_r less its mean 3/10 - 2/10
    assert close(exact.scores(torch.tensor([1.0, -1.0, 0.0]), pi), torch.tensor([0.9, -1.1, -0.1]))


@both
@checks("eq-exact-ascent")
def test_ascent_is_the_negative_gradient_of_every_objective(shared):
    theta, features, logp = setting(shared)
    pi, ref, mu = logp.exp(), random(5, seed=3).log_softmax(-1), random(5, seed=4).softmax(-1)
    pairs = random(5, 5, seed=5).abs() * (1 - torch.eye(5))
    pairs, reward = pairs / pairs.sum(), random(5, seed=6)

    def of(at):
        return (features @ at).log_softmax(-1)

    up, down = exact.pair_weights(logp, ref, pairs, BETA)
    assert (up >= 0).all() and (down <= 0).all() and close((up + down).sum(), 0.0)
    cases = {
        "SFT": (lambda at: -(mu * of(at)).sum(), mu),
        "DPO": (lambda at: exact.pair_loss(of(at), ref, pairs, BETA), up + down),
        "policy gradient": (lambda at: -(of(at).exp() * reward).sum(), pi * reward),
    }
    for name, (loss, w) in cases.items():
        expected = -autograd(loss, theta)
        assert expected.abs().max() > 1e-3
        assert close(exact.ascent(w, pi, features), expected), name


def test_pair_loss_and_weights_by_hand():
    """Log-ratios 1 and -1/2, one pair, beta 2: margin 3/2, loss log(1 + e^-3), weights +-2 / (1 + e^3)."""
    pairs = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    logp, ref = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.5])
    assert close(exact.pair_loss(logp, ref, pairs, 2.0), math.log(1 + math.exp(-3)))
    up, down = exact.pair_weights(logp, ref, pairs, 2.0)
    weight = 2 / (1 + math.exp(3))
    assert close(up, torch.tensor([weight, 0.0])) and close(down, torch.tensor([0.0, -weight]))


def test_population_by_enumeration():
    """Two of three responses, drawn by 1/2, 1/3, 1/6 and different; labels with sigmoid of the gap."""
    drawn, reward = torch.tensor([1 / 2, 1 / 3, 1 / 6]), torch.tensor([0.0, 1.0, -1.0])
    expected, total = torch.zeros(3, 3), 0.0
    for i, j in itertools.permutations(range(3), 2):
        frequency = float(drawn[i] * drawn[j])
        total += frequency
        better = 1 / (1 + math.exp(float(reward[j] - reward[i])))
        expected[i, j] += frequency * better
        expected[j, i] += frequency * (1 - better)
    assert close(exact.population(drawn, reward), expected / total)


@both
@checks("eq-exact-g")
def test_g_equals_the_language_models_code(shared):
    theta, features, logp = setting(shared)
    pi, final = logp.exp(), [0, 0, 3, 4]
    q = torch.tensor([2.0, 0.0, 0.0, 1.0, 1.0]) / 4
    model, every = exact.Enumerated(theta, features), exact.say(range(5))
    direction = alignment.target_direction(model, exact.say(final))
    assert close(direction["theta"], exact.ascent(q, pi, features))
    found, a = alignment.token_scores(model, every, direction)
    assert close(found.sum(-1), logp)
    scores = exact.scores(exact.ascent(q, pi, features), pi, features)
    assert close(a.sum(-1), scores)
    demonstrations = exact.say([1, 1, 2])
    _, a = alignment.token_scores(model, demonstrations, direction)
    g = alignment.by_sequence(sft_weights(demonstrations.response), a, "full").sum()
    mu = torch.tensor([0.0, 2.0, 1.0, 0.0, 0.0]) / 3
    assert close(g, exact.ascent(mu, pi, features) @ exact.ascent(q, pi, features))
    assert close(g, mu @ scores)


@both
@checks("eq-exact-pair")
def test_a_pair_and_its_halves_equal_the_language_models_code(shared):
    theta, features, logp = setting(shared)
    pi, ref, q = logp.exp(), random(5, seed=3).log_softmax(-1), torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    c, r = 1, 3
    model, batch = exact.Enumerated(theta, features), exact.say([c, r])
    direction = alignment.target_direction(model, exact.say([4]))
    objective = DPO(exact.say([c]), exact.say([r]), ref[[c]], ref[[r]], BETA)
    logps, a = alignment.token_scores(model, batch, direction)
    weights = objective.weights(logps, batch, torch.tensor([0]))
    omega = float(torch.sigmoid(-BETA * (logp[c] - ref[c] - logp[r] + ref[r])))
    d, mean = exact.ascent(q, pi, features), pi @ features
    expected = {
        "full": BETA * omega * (features[c] - features[r]) @ d,
        "positive": BETA * omega * (features[c] - mean) @ d,
        "negative": -BETA * omega * (features[r] - mean) @ d,
    }
    pairs = torch.zeros(5, 5)
    pairs[c, r] = 1.0
    up, down = exact.pair_weights(logp, ref, pairs, BETA)
    closed = {"full": up + down, "positive": up, "negative": down}
    for part, value in expected.items():
        assert close(alignment.by_sequence(weights, a, part).sum(), value), part
        assert close(exact.ascent(closed[part], pi, features) @ d, value), part


@both
@checks("eq-exact-baseline")
def test_a_baseline_moves_weight_between_halves_only(shared):
    """PPO's own weights too: each response once under the uniform policy, whose ratio corrects the frequencies."""
    theta, features, logp = setting(shared)
    pi, advantages = logp.exp(), random(5, seed=6)
    assert close(exact.ascent(pi, pi, features), torch.zeros(features.shape[1]))
    model, every = exact.Enumerated(theta, features), exact.say(range(5))
    logps = token_logps(model, every).detach()
    uniform = torch.where(every.response, -math.log(5), 0.0)
    found = {}
    for b in (0.0, 2.5):
        spread = torch.where(every.response, (advantages + b)[:, None], 0.0)
        weights = ppo_weights(logps, uniform, spread, every.response, math.inf)
        for part, kept in (("full", (None, None)), ("positive", (0, None)), ("negative", (None, 0))):
            w = controls.apply(part, weights)
            found[part, b] = alignment.gradient(model, [(every, w)])["theta"]
            kept_advantages = advantages + b if part == "full" else (advantages + b).clamp(*kept)
            assert close(found[part, b], exact.ascent(pi * kept_advantages, pi, features))
    assert close(found["full", 0.0], found["full", 2.5])
    assert (found["positive", 0.0] - found["positive", 2.5]).abs().max() > 0.01


@both
@checks("eq-exact-kl")
def test_gradients_of_kl_and_entropy(shared):
    theta, features, logp = setting(shared)
    ref = random(5, seed=3).log_softmax(-1)
    pi = logp.exp()

    def of(at):
        return (features @ at).log_softmax(-1)

    assert close(
        exact.ascent(pi * (logp - ref), pi, features), autograd(lambda at: (of(at).exp() * (of(at) - ref)).sum(), theta)
    )
    gradient = autograd(lambda at: -(of(at).exp() * of(at)).sum(), theta)
    assert close(exact.ascent(-pi * logp, pi, features), gradient)
    assert close(-exact.above_typical(logp) @ features, gradient)
    assert exact.kl(logp, ref).item() == pytest.approx(sum(float(pi[i] * (logp[i] - ref[i])) for i in range(5)))
    half = torch.tensor([0.5, 0.25, 0.25]).log()
    assert exact.entropy(half).item() == pytest.approx(1.5 * math.log(2))


@both
@pytest.mark.parametrize("eta", [1e-3, 1.0, 30.0])
@checks("eq-exact-change")
def test_change_of_log_probabilities_by_a_step_of_any_size(shared, eta):
    theta, features, logp = setting(shared)
    v = random(len(theta), seed=7)
    after = (features @ (theta + eta * v)).log_softmax(-1)
    assert close(exact.change(eta * v, logp, features), after - logp)


@both
@checks("eq-exact-change")
def test_the_trainers_own_step_changes_log_probabilities_as_the_formula_says(shared):
    theta, features, logp = setting(shared)
    model = exact.Enumerated(theta, features)
    objective = SFT(exact.say([2, 2, 0, 4]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.7)
    train.update(model, objective, optimizer, torch.arange(4), clip=0)
    move = 0.7 * exact.ascent(torch.tensor([0.25, 0.0, 0.5, 0.0, 0.25]), logp.exp(), features)
    assert close(model.theta.detach() - theta, move)
    after = token_logps(model, exact.say(range(5))).sum(-1).detach()
    assert close(after - logp, exact.change(move, logp, features))


@both
@checks("eq-exact-forecast")
def test_the_forecast_is_optimistic_by_half_the_variance(shared):
    theta, features, logp = setting(shared)
    pi, q, w = logp.exp(), random(5, seed=8).softmax(-1), random(5, seed=9)
    v = exact.ascent(w, pi, features)
    s = exact.scores(v, pi, features)
    g = float(v @ exact.ascent(q, pi, features))
    assert float(pi @ s) == pytest.approx(0, abs=1e-12) and float(q @ s) == pytest.approx(g)
    errors = []
    for eta in (0.02, 0.01):
        after = (features @ (theta + eta * v)).log_softmax(-1)
        surplus = float(-(q * (after - logp)).sum()) + eta * g
        assert surplus > 0
        assert surplus == pytest.approx(math.log(float((pi * (eta * s).exp()).sum())), rel=1e-8)
        errors.append(surplus - eta**2 / 2 * float(pi @ s**2))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.05)  # what is left is of third order


@checks("eq-exact-optimum")
def test_population_dpo_and_policy_gradient_share_their_optimum():
    ref, reward = random(4, seed=1).log_softmax(-1), random(4, seed=2)
    star = exact.optimum(ref, reward, BETA)
    weights = [float(ref[i].exp()) * math.exp(float(reward[i]) / BETA) for i in range(4)]
    assert close(star.exp(), torch.tensor(weights) / sum(weights))
    for drawn in (torch.full((4,), 0.25), ref.exp()):
        pairs = exact.population(drawn, reward)
        slope = autograd(lambda at, pairs=pairs: exact.pair_loss(at.log_softmax(-1), ref, pairs, BETA), star)
        assert slope.abs().max() < 1e-14
        start = autograd(lambda at, pairs=pairs: exact.pair_loss(at.log_softmax(-1), ref, pairs, BETA), ref)
        assert start.abs().max() > 1e-3
        # plain gradient descent arrives there
        theta = ref
        for _ in range(6000):
            logp = theta.log_softmax(-1)
            theta = theta + 40 * exact.ascent(sum(exact.pair_weights(logp, ref, pairs, BETA)), logp.exp())
        assert close(theta.softmax(-1), star.exp(), 1e-6)

    def aim(at):
        logp = at.log_softmax(-1)
        return (logp.exp() * reward).sum() - BETA * (logp.exp() * (logp - ref)).sum()

    assert autograd(aim, star).abs().max() < 1e-13
    assert all(aim(star) > aim(star + 0.1 * random(4, seed=seed)) for seed in range(3, 20))


@checks("eq-exact-never")
def test_dpo_on_all_pairs_alike_never_points_away_from_its_end():
    """The order of weights is that of rewards all the way, and G >= 0; with sampled pairs both fail somewhere."""
    noise, reward = exact.draw([0, 1], 40, 5)
    ref = (2 * noise).log_softmax(-1)
    star = exact.optimum(ref, reward, BETA)
    times = torch.cat([torch.zeros(1), torch.logspace(0, 4, 40)])
    sorted_by_reward = reward.argsort(-1)
    least = {}
    for name, drawn in (("alike", torch.full_like(ref, 0.2)), ("sampled", ref.exp())):
        pairs = exact.population(drawn, reward)

        def weights(theta, pairs=pairs):
            return sum(exact.pair_weights(theta.log_softmax(-1), ref, pairs, BETA))

        path = exact.flow(lambda theta, w=weights: exact.ascent(w(theta), theta.softmax(-1)), ref, times, 20.0)
        w = torch.stack([weights(theta) for theta in path])
        g = (w * (star.exp() - path.softmax(-1))).sum(-1)
        rises = w.gather(-1, sorted_by_reward.expand_as(w)).diff(dim=-1)
        least[name] = (float((g / g.abs().amax(0)).min()), float((rises / w.abs().amax((0, 2))[..., None]).min()))
        if name == "alike":
            assert close(path[-1].softmax(-1), star.exp(), 1e-4)
    assert all(value > -1e-9 for value in least["alike"])
    assert all(value < -0.01 for value in least["sampled"])


@both
@checks("eq-exact-towards", "eq-exact-square")
def test_raising_goes_towards_lowering_away_and_g_of_raising_is_a_falling_square(shared):
    theta, features, _ = setting(shared)
    nu, scale = random(5, seed=8).softmax(-1), 1.7

    def gap(at):
        return (nu - (features @ at).softmax(-1)) @ features

    for sign in (1, -1):
        w = sign * scale * nu
        assert close(exact.ascent(w, (features @ theta).softmax(-1), features), sign * scale * gap(theta))
    path = exact.flow(
        lambda at: exact.ascent(scale * nu, (features @ at).softmax(-1), features),
        theta,
        torch.linspace(0, 300, 60),
        0.5,
    )
    end = (features @ path[-1]).softmax(-1)
    assert gap(path[-1]).norm() < 1e-4  # with shared features: equal means of features, not equal policies
    assert ((end - nu).abs().max() < 1e-4) == (not shared)
    squares = []
    for at in path[:-1]:
        pi = (features @ at).softmax(-1)
        g = exact.ascent(scale * nu, pi, features) @ exact.ascent(end, pi, features)
        squares.append(scale * gap(at).square().sum())
        assert (g - squares[-1]).abs() < 1e-3 * squares[-1] ** 0.5
    assert (torch.stack(squares).diff() <= 1e-15).all() and squares[0] > 0.01


@both
@checks("eq-exact-distance")
def test_raising_contracts_and_lowering_expands(shared):
    _, features, _ = setting(shared)
    nu, width = random(5, seed=8).softmax(-1), features.shape[1]
    for seed in range(10):
        pair = random(2, width, seed=seed)
        difference = pair[0] - pair[1]
        pi = (pair @ features.T).softmax(-1)
        convex = (pi[0] - pi[1]) @ features @ difference
        assert convex > 0
        for sign in (1, -1):

            def velocity(at, sign=sign):
                return exact.ascent(sign * 2 * nu.expand(2, -1), (at @ features.T).softmax(-1), features)

            h = 1e-4
            near = exact.flow(velocity, pair, torch.tensor([0.0, h]), h)[-1]
            half_square = [(at[0] - at[1]).square().sum() / 2 for at in (pair, near)]
            slope = (half_square[1] - half_square[0]) / h
            assert float(slope) == pytest.approx(float(-sign * 2 * convex), rel=1e-2)


@checks("eq-exact-push")
def test_bounds_of_the_push():
    """K / (K - 1) where the others are alike, 2 where there is one other."""
    for seed in range(20):
        pi = (3 * random(4, seed=seed)).softmax(-1)
        for c, one in enumerate(torch.eye(4)):
            size = exact.ascent(one, pi).square().sum()
            rest = (1 - pi[c]) ** 2
            assert close(size, rest + (pi.square().sum() - pi[c] ** 2))
            assert 4 / 3 * rest * (1 - 1e-9) <= size <= 2 * rest * (1 + 1e-9)
    alike, single = torch.tensor([0.4, 0.2, 0.2, 0.2]), torch.tensor([0.4, 0.6, 0.0, 0.0])
    one = torch.eye(4)[0]
    assert close(exact.ascent(one, alike).square().sum(), 4 / 3 * 0.36)
    assert close(exact.ascent(one, single).square().sum(), 2 * 0.36)


@checks("eq-exact-squeeze", "eq-exact-richer")
def test_lowering_feeds_the_strong():
    """pi = (0.35, 0.25, 0.18, 0.12, 0.07, 0.03), lowering the fifth: |pi|^2 = 0.2376, so those below 0.1676 fall."""
    pi, r, w = torch.tensor([0.35, 0.25, 0.18, 0.12, 0.07, 0.03]), 4, 0.6
    assert float(pi.square().sum()) == pytest.approx(0.2376)
    move = exact.ascent(-w * torch.eye(6)[r], pi)
    eta = 1e-6
    changed = ((pi.log() + eta * move).log_softmax(-1) - pi.log()) / eta
    others = [0, 1, 2, 3, 5]
    formula = w * (pi + pi[r] - pi.square().sum())
    assert (changed - formula)[others].abs().max() < 1e-6
    assert (formula[others] > 0).tolist() == [True, True, True, False, False]
    assert changed[r] < -0.5
    moved = (pi.log() + 5.0 * move).log_softmax(-1)  # a large step
    for j, k in itertools.combinations(others, 2):
        assert close((moved[j] - moved[k]) - (pi[j] / pi[k]).log(), 5.0 * w * (pi[j] - pi[k]))


def test_lowering_ends_on_the_likeliest_other():
    start = random(12, 5, seed=3)
    start = start - start.mean(-1, keepdim=True)
    w = -torch.eye(5)[2].expand(12, 5)
    end = exact.flow(lambda at: exact.ascent(w, at.softmax(-1)), start, torch.tensor([0.0, 2000.0]), 1.0)[-1]
    without = start.clone()
    without[:, 2] = -torch.inf
    assert (end.softmax(-1).max(-1).values > 0.95).all()
    assert torch.equal(end.argmax(-1), without.argmax(-1))
    assert len(set(end.argmax(-1).tolist())) > 1  # the end depends on the start


@checks("eq-exact-entropy", "eq-exact-threshold")
def test_when_lowering_raises_entropy():
    seen = set()
    for seed in range(30):
        logits = 1.5 * random(5, seed=seed)
        logp = logits.log_softmax(-1)
        pi, psi, h = logp.exp(), exact.above_typical(logp), float(exact.entropy(logp))
        slope = autograd(lambda at: -(at.softmax(-1) * at.log_softmax(-1)).sum(), logits)
        common = float(pi @ psi)
        assert common == pytest.approx(float(pi @ (pi * logp) - (pi @ pi) * (pi @ logp))) and common > 0
        threshold = float(exact.entropy_threshold(logp))
        assert threshold * (math.log(threshold) + h) == pytest.approx(common) and threshold >= math.exp(-h)
        for r, one in enumerate(torch.eye(5)):
            change = slope @ exact.ascent(-0.8 * one, pi)
            assert close(change, 0.8 * (psi[r] - pi @ psi))
            assert bool(change > 0) == bool(pi[r] > threshold)
            seen.add(bool(change > 0))
    assert seen == {True, False}


def test_threshold_of_the_uniform_policy():
    """psi is 0 everywhere, so p (log p + log 4) = 0 and p = 1/4."""
    assert exact.entropy_threshold(torch.full((4,), 0.25).log()).item() == pytest.approx(0.25)
    many = torch.stack([random(4, seed=s).log_softmax(-1) for s in range(3)])
    assert close(exact.entropy_threshold(many), torch.stack([exact.entropy_threshold(one) for one in many]))


@checks("eq-exact-covariance")
def test_entropy_under_a_policy_gradient_is_a_covariance():
    logits, advantages = random(5, seed=1), random(5, seed=6)
    logp = logits.log_softmax(-1)
    pi, psi = logp.exp(), exact.above_typical(logp)
    slope = autograd(lambda at: -(at.softmax(-1) * at.log_softmax(-1)).sum(), logits)
    halves = advantages, advantages.clamp(min=0), advantages.clamp(max=0)
    for A in halves:
        covariance = sum(pi[i] * (A[i] - pi @ A) * (psi[i] - pi @ psi) for i in range(5))
        assert close(slope @ exact.ascent(pi * A, pi), -covariance) and covariance.abs() > 1e-4
    assert close(slope @ exact.ascent(-3.0 * pi, pi), 0.0)
    bonus = -logp - exact.entropy(logp)  # the exercise: an entropy bonus is the gradient of the entropy
    rise = slope @ exact.ascent(pi * bonus, pi)
    assert close(rise, slope.square().sum()) and close(rise, (pi * bonus * pi * bonus).sum()) and rise > 1e-3


@checks("eq-exact-table")
def test_in_the_table_one_pair_raises_its_chosen_response():
    for seed in range(20):
        logp = (2 * random(4, seed=seed)).log_softmax(-1)
        pi = logp.exp()
        move = torch.tensor([1.0, 0.0, -1.0, 0.0])  # chosen 0, rejected 2
        a = exact.scores(move, pi)
        assert close(a[0], 1 - pi[0] + pi[2]) and a[0] > 0
        assert all(exact.change(eta * move, logp)[0] > 0 for eta in (0.01, 1.0, 100.0))
        # a pair without it: rejected 2, chosen 1
        other = exact.scores(torch.tensor([0.0, 1.0, -1.0, 0.0]), pi)[0]
        assert close(other, pi[2] - pi[1])


@checks("eq-exact-below")
def test_the_chosen_response_falls_if_it_has_less_than_average():
    fell = set()
    for seed in range(40):
        theta, features = random(3, seed=seed), random(5, 3, seed=100 + seed)
        logp = (features @ theta).log_softmax(-1)
        pi, c, r = logp.exp(), 0, 1
        taught, mean = features[c] - features[r], pi @ features
        eta = 1e-7
        after = (features @ (theta + eta * taught)).log_softmax(-1)
        assert close((after - logp) / eta, features @ taught - mean @ taught, 1e-5)
        falls = bool(features[c] @ taught < mean @ taught)
        g = features - mean
        assert falls == bool(g[r] @ g[c] > g[c] @ g[c]) == bool(after[c] < logp[c])
        fell.add(falls)
    assert fell == {True, False}


def test_exercises_of_the_chapter_by_hand():
    length, quarter = torch.tensor([[2.0], [3.0], [4.0], [9.0]]), torch.full((4,), 0.25)
    move = exact.ascent(torch.tensor([-1.0, 1.0, 0.0, 0.0]), quarter, length)
    assert close(exact.scores(move, quarter, length), torch.tensor([-2.5, -1.5, -0.5, 4.5]))
    words, pi = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.tensor([0.3, 0.2, 0.5])
    for square in (0.0, 1 / 3, 1.0):
        features = torch.cat([words, math.sqrt(square) * torch.eye(3)], 1)
        move = exact.ascent(torch.tensor([1.0, -1.0, 0.0]), pi, features)
        assert exact.scores(move, pi, features)[0].item() == pytest.approx(-0.3 + 0.9 * square)


@checks("eq-exact-break-even")
def test_who_is_less_likely_at_the_optimum():
    """Two responses alike, rewards 0 and log 3, beta 1: the bar is log((1 + 3) / 2) = log 2, and pi* = 1/4, 3/4."""
    ref, reward = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, math.log(3)])
    assert exact.break_even(ref, reward, 1.0).item() == pytest.approx(math.log(2))
    assert close(exact.optimum(ref, reward, 1.0).exp(), torch.tensor([0.25, 0.75]))
    ref, reward = random(6, seed=1).log_softmax(-1), random(6, seed=2)
    bars = []
    for beta in (1e-3, 0.1, 1.0, 1e3):
        bar = exact.break_even(ref, reward, beta)
        rise = exact.optimum(ref, reward, beta) - ref
        assert close(rise, (reward - bar) / beta)
        assert ref.exp() @ reward <= bar <= reward.max()
        bars.append(bar)
    assert close(bars[0], reward.max(), 1e-2) and close(bars[-1], ref.exp() @ reward, 1e-2)


def test_flow_by_hand_and_its_order():
    """d theta / dt = -theta from 2: 2 e^-t; halving the step divides the error by 2^4."""
    times = torch.tensor([0.0, 1.0, 3.0])
    errors = []
    for longest in (0.5, 0.25):
        path = exact.flow(lambda theta: -theta, torch.tensor([2.0]), times, longest)
        assert path.shape == (3, 1) and path[0].item() == 2
        errors.append(float((path[:, 0] - 2 * (-times).exp()).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.25) and errors[1] < 1e-3


def test_problems_are_a_seeds_own():
    logits, reward = exact.draw([3, 4], 2, 5)
    again, _ = exact.draw([4], 2, 5)
    assert logits.shape == reward.shape == (4, 5)
    assert torch.equal(logits[2:], again) and not torch.equal(logits[:2], again)
    assert not torch.equal(logits, reward)


def test_leading_dimensions_are_problems_side_by_side():
    features = random(4, 3, seed=2)
    w, v = random(2, 6, 4, seed=3), random(2, 6, 3, seed=4)
    logp = random(2, 6, 4, seed=5).log_softmax(-1)
    moved, a = exact.ascent(w, logp.exp(), features), exact.scores(v, logp.exp(), features)
    changed = exact.change(v, logp, features)
    for at in itertools.product(range(2), range(6)):
        assert close(moved[at], exact.ascent(w[at], logp[at].exp(), features))
        assert close(a[at], exact.scores(v[at], logp[at].exp(), features))
        assert close(changed[at], exact.change(v[at], logp[at], features))


def test_what_cannot_be():
    pi = torch.full((3,), 1 / 3)
    with pytest.raises(ValueError, match=r"theta \(2,\) and features \(3, 3\) must be \[F\] and \[K, F\]"):
        exact.Enumerated(torch.zeros(2), torch.eye(3))
    with pytest.raises(ValueError, match="ascent: given 2 numbers for 3 responses"):
        exact.ascent(torch.ones(2), pi)
    with pytest.raises(ValueError, match="scores: given 4 numbers for 3 responses"):
        exact.scores(torch.ones(4), pi)
    with pytest.raises(ValueError, match=r"features: given \(2, 5\), must be \[K, F\] with K = 3"):
        exact.ascent(torch.ones(3), pi, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"beta=0.*above 0"):
        exact.optimum(pi.log(), pi, 0)
    with pytest.raises(ValueError, match="drawn: at least two"):
        exact.population(torch.tensor([1.0, 0.0]), torch.zeros(2))
    with pytest.raises(ValueError, match="responses=1: at least 2"):
        exact.draw([0], 1, 1)
    with pytest.raises(ValueError, match=r"times: must be .* increasing"):
        exact.flow(lambda x: x, pi, torch.tensor([1.0, 0.0]), 1.0)
    with pytest.raises(ValueError, match=r"longest=0\.0: must be above 0"):
        exact.flow(lambda x: x, pi, torch.tensor([0.0, 1.0]), 0.0)
