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


def problems(shared: bool, n: int, k: int = 5):
    """n random policies side by side with one set of features (None: the table): theta, features, log-probs, reward."""
    features = random(k, 3, seed=2) if shared else None
    theta = random(n, 3 if shared else k, seed=1)
    return theta, features, (theta if features is None else theta @ features.T).log_softmax(-1), random(n, k, seed=6)


def dpo_velocity(ref, pairs, features=None):
    """DPO's gradient flow on pairs: a velocity for `exact.flow`."""

    def velocity(theta):
        logp = (theta if features is None else theta @ features.T).log_softmax(-1)
        return exact.ascent(sum(exact.pair_weights(logp, ref, pairs, BETA)), logp.exp(), features)

    return velocity


@both
@checks("eq-exact-reward")
def test_direction_towards_reward_and_g_of_an_update_along_it(shared):
    """Against autograd, central differences, the language models' code, and both covariances."""
    theta, features, logp = setting(shared)
    pi, reward, q = logp.exp(), random(5, seed=6), random(5, seed=8).softmax(-1)

    def expected(at):
        return (features @ at).softmax(-1) @ reward

    d = exact.reward_direction(pi, reward, features)
    assert close(d, autograd(expected, theta)) and close(d, features.T @ (pi * (reward - pi @ reward)))
    h = 1e-5
    slopes = [(expected(theta + h * e) - expected(theta - h * e)) / (2 * h) for e in torch.eye(len(theta))]
    assert (torch.stack(slopes) - d).abs().max() < 1e-9
    model, every = exact.Enumerated(theta, features), exact.say(range(5))
    measured = alignment.gradient(model, [(every, torch.where(every.response, (pi * reward)[:, None], 0.0))])
    assert (measured["theta"] - d).abs().max() < 1e-6
    w = random(5, seed=9)
    v = exact.ascent(w, pi, features)
    s = exact.scores(v, pi, features)
    _, a = alignment.token_scores(model, every, measured)
    g_reward = float((torch.where(every.response, w[:, None], 0.0) * a).sum())
    assert g_reward == pytest.approx(float(v @ d), abs=1e-6) and abs(g_reward) > 1e-3
    assert close(v @ d, (pi * (reward - pi @ reward) * s).sum())
    assert close(v @ exact.ascent(q, pi, features), (pi * (q / pi - 1) * s).sum())
    assert float(exact.reward_change(h * v, logp, reward, features)) / h == pytest.approx(float(v @ d), abs=1e-4)
    grown = float(exact.reward_change(3.0 * v, logp, reward, features))
    assert grown == pytest.approx(float(expected(theta + 3.0 * v) - expected(theta)))
    e = (3.0 * s).exp()
    assert grown == pytest.approx(float((pi * (reward - pi @ reward) * e).sum() / (pi @ e)))


@both
@checks("eq-exact-gain")
def test_the_integral_of_g_is_the_gain_of_the_final_responses_whatever_moved_the_policy(shared):
    """Labels drawn anew four times, and pure noise: with D' the end, the integral is a KL divergence."""
    start, features, ref, _ = problems(shared, 12)
    count = features.shape[1] if shared else 5
    uniform, times = torch.full_like(ref, 0.2), torch.linspace(0, 40, 5)
    phases = {
        "labels": [
            dpo_velocity(ref, exact.population(uniform, 2 * random(12, 5, seed=20 + i)), features) for i in range(4)
        ],
        "noise": [lambda theta, i=i: 0.05 * random(12, count, seed=30 + i) for i in range(4)],
    }
    for name, velocities in phases.items():

        def travel(final, velocities=velocities):
            theta, gained = start, torch.zeros(12)
            for velocity in velocities:
                path, part = exact.gains(velocity, final, theta, times, 0.5, features)
                theta, gained = path[-1], gained + part[-1]
            return theta, gained

        theta, _ = travel(ref.exp())
        end = (theta if features is None else theta @ features.T).log_softmax(-1)
        for final in (end.exp(), random(12, 5, seed=8).softmax(-1)):
            assert (travel(final)[1] - (final * (end - ref)).sum(-1)).abs().max() < 1e-7, name
        assert (travel(end.exp())[1] - exact.kl(end, ref)).abs().max() < 1e-7
        assert (exact.kl(end, ref) > 1e-3).all()


@both
@checks("eq-exact-sum")
def test_steps_promise_at_least_the_gain(shared):
    """Training on one random pair a step: the sum of eta G is the gain and what the forecasts overstate."""
    theta, features, ref, _ = problems(shared, 20)
    steps, eta = 30, 0.5
    generator = torch.Generator().manual_seed(5)
    moves, at = [], theta
    for _ in range(steps):
        logp = (at if features is None else at @ features.T).log_softmax(-1)
        c, r = torch.randperm(5, generator=generator)[:2]
        moves.append(eta * exact.ascent((torch.eye(5)[c] - torch.eye(5)[r]).expand(20, -1), logp.exp(), features))
        at = at + moves[-1]
    end = (at if features is None else at @ features.T).log_softmax(-1)
    promised, over, at = torch.zeros(20), torch.zeros(20), theta
    for move in moves:
        logp = (at if features is None else at @ features.T).log_softmax(-1)
        promised += (move * exact.ascent(end.exp(), logp.exp(), features)).sum(-1)
        over += torch.logsumexp(logp + exact.scores(move, logp.exp(), features), -1)
        at = at + move
    gain = exact.kl(end, ref)
    assert close(promised, gain + over) and (over > 0).all() and (gain > 0).all()


@both
@checks("eq-exact-nearer")
def test_dpo_on_fixed_pairs_comes_nearer_to_every_later_point(shared):
    start, features, ref, reward = problems(shared, 20)
    pairs = exact.population(ref.exp(), reward)
    path = exact.flow(dpo_velocity(ref, pairs, features), start, torch.linspace(0, 200, 60), 2.0)
    logp = (path if features is None else path @ features.T).log_softmax(-1)
    loss = exact.pair_loss(logp, ref, pairs, BETA)
    for last in (-1, 30):
        end = path[last]
        square = (path - end).square().sum(-1)[: last if last > 0 else None] / 2
        assert (square.diff(dim=0) < 0).all()
        for at, theta in enumerate(path[:30:7]):
            slope = (dpo_velocity(ref, pairs, features)(theta) * (theta - end)).sum(-1)
            assert (slope <= -(loss[7 * at] - loss[last]) + 1e-12).all()


@checks("eq-exact-natural")
def test_along_the_natural_gradient_g_is_what_is_left_to_gain():
    _, _, ref, reward = problems(False, 30)

    def aim(logp):
        return (logp.exp() * reward).sum(-1) - BETA * exact.kl(logp, ref)

    def velocity(theta):
        return reward - BETA * (theta.log_softmax(-1) - ref)

    logp = random(30, 5, seed=7).log_softmax(-1)
    plain = exact.ascent(logp.exp() * (reward - BETA * (logp - ref)), logp.exp())
    step = velocity(logp)
    assert close(exact.natural(plain, logp.exp()), step - step.mean(-1, keepdim=True))
    for q in (random(30, 5, seed=8).log_softmax(-1), exact.optimum(ref, reward, BETA)):
        g = (step * exact.ascent(q.exp(), logp.exp())).sum(-1)
        assert close(g, aim(q) - aim(logp) + BETA * exact.kl(q, logp))
    # any objective that is concave in the probabilities: here reward less the sum of squares
    concave, q, pi = lambda pi: (pi * reward - pi.square()).sum(-1), random(30, 5, seed=8).softmax(-1), logp.exp()
    slope = reward - 2 * pi
    assert close(exact.natural(exact.ascent(pi * slope, pi), pi), slope - slope.mean(-1, keepdim=True))
    assert ((slope * exact.ascent(q, pi)).sum(-1) > concave(q) - concave(pi)).all()
    path = exact.flow(velocity, ref, torch.linspace(0, 6, 40), 0.05).log_softmax(-1)
    for end in (path[-1], path[20]):
        steps = path if end is path[-1] else path[:21]
        g = torch.stack([(velocity(at) * exact.ascent(end.exp(), at.exp())).sum(-1) for at in steps])
        assert (g > -1e-12).all() and g[0].min() > 1e-3


def three(start, asked, reward):
    """DPO on three responses: its velocity, where it starts, and its loss's pairs."""
    ref = torch.tensor(start).log()
    asked, reward = torch.tensor(asked), torch.tensor(reward)
    return dpo_velocity(ref, asked * (reward[:, None] - reward).sigmoid()), ref


def test_g_is_negative_on_the_way_to_a_target_that_never_moves():
    """Asked one to nine, weights are as (1, 8, -9), the end is nearly (1, 0, 0): 1 * 0.8 - 8 * 0.7 + 9 * 0.1 < 0."""
    start = [0.2, 0.7, 0.1]
    velocity, ref = three(start, [[0.0, 0.1, 0.0], [0.1, 0.0, 0.9], [0.0, 0.9, 0.0]], [2.0, 1.0, 0.0])
    w = velocity(ref)
    assert close(w / w[0], torch.tensor([1.0, 8.0, -9.0]))
    assert float(torch.tensor([1.0, 8.0, -9.0]) @ (torch.tensor([1.0, 0, 0]) - ref.exp())) == pytest.approx(-3.9)
    star = exact.optimum(ref, torch.tensor([2.0, 1.0, 0.0]), 0.05).exp()
    assert (w * exact.ascent(star, ref.exp())).sum() < 0


def test_g_is_positive_although_the_labels_turn():
    ref = torch.tensor([0.1, 0.1, 0.8]).log()
    turned = []
    for c, r in ((0, 1), (1, 0)):
        pairs = torch.zeros(3, 3)
        pairs[0, 2] = pairs[1, 2] = pairs[c, r] = 1 / 3
        turned.append(dpo_velocity(ref, pairs))
    path = [ref]
    for turn in range(4):
        path += list(exact.flow(turned[turn % 2], path[-1], torch.linspace(0, 5, 9), 0.25)[1:])
    end = path[-1].softmax(-1)
    g = [turned[i // 8 % 2](at) @ exact.ascent(end, at.softmax(-1)) for i, at in enumerate(path[:-1])]
    assert min(g) > 0 and exact.kl(end.log(), ref) > 0.1


@both
@checks("eq-exact-reach")
def test_how_far_reward_can_move_for_its_kl(shared):
    theta, features, logp, reward = problems(shared, 20)
    pi = logp.exp()
    f = exact.fisher(pi, features)
    phi = torch.eye(5) if features is None else features
    for i in (0, 7):
        g = phi - pi[i] @ phi
        assert close(f[i], sum(pi[i, j] * torch.outer(g[j], g[j]) for j in range(5)))
    d = exact.reward_direction(pi, reward, features)
    best = exact.natural(d, pi, features)
    inverse = torch.linalg.pinv(f, rtol=1e-10, hermitian=True)
    assert close(best, (inverse @ d[..., None])[..., 0], 1e-8) and close((f @ best[..., None])[..., 0], d, 1e-9)
    reach = exact.reach(d, pi, features)
    spread = (pi * (reward - (pi * reward).sum(-1, keepdim=True)) ** 2).sum(-1).sqrt()
    assert (reach <= spread * (1 + 1e-9)).all() and close(reach, spread, 1e-8) == (not shared)
    nats = 1e-8

    def of_length(v):  # v^T F v / 2 = nats
        return v * (2 * nats / (v * (f @ v[..., None])[..., 0]).sum(-1, keepdim=True)).sqrt()

    most = math.sqrt(2 * nats) * reach
    assert close((of_length(best) * d).sum(-1), most, 1e-12)
    steps = [of_length(random(20, theta.shape[1], seed=50 + i)) for i in range(200)]
    assert all(((v * d).sum(-1).abs() <= most * (1 + 1e-9)).all() for v in steps)
    for v in (of_length(best), steps[0]):
        after = logp + exact.change(v, logp, features)
        assert torch.allclose(exact.kl(after, logp), torch.tensor(nats), rtol=1e-3)
        assert torch.allclose(
            exact.reward_change(v, logp, reward, features), (v * d).sum(-1), atol=1e-3 * math.sqrt(nats)
        )


@both
@checks("eq-exact-wedge")
def test_what_g_says_of_the_change_of_reward(shared):
    _, features, logp, reward = problems(shared, 20)
    pi, q = logp.exp(), random(20, 5, seed=8).softmax(-1)
    d, to_reward = exact.ascent(q, pi, features), exact.reward_direction(pi, reward, features)
    angle = exact.fisher_cosine(d, to_reward, pi, features)
    if not shared:
        centred = reward - (pi * reward).sum(-1, keepdim=True), q / pi - 1
        inner = [(pi * a * b).sum(-1) for a, b in ((centred[0], centred[1]), (centred[0],) * 2, (centred[1],) * 2)]
        assert close(angle, inner[0] / (inner[1] * inner[2]).sqrt(), 1e-8)
    f = exact.fisher(pi, features)
    for i in range(200):
        v = random(20, f.shape[-1], seed=100 + i)
        size = (v * (f @ v[..., None])[..., 0]).sum(-1).sqrt()
        x = (v * d).sum(-1) / (size * exact.reach(d, pi, features))
        y = (v * to_reward).sum(-1) / (size * exact.reach(to_reward, pi, features))
        low, high = exact.wedge(x, angle)
        assert ((low - 1e-9 <= y) & (y <= high + 1e-9)).all()
    # both ends are met: steps in the plane of the two natural steps
    one = exact.natural(d, pi, features) / exact.reach(d, pi, features)[..., None]
    two = exact.natural(to_reward, pi, features) / exact.reach(to_reward, pi, features)[..., None]
    side = (two - angle[..., None] * one) / (1 - angle[..., None] ** 2).sqrt()
    for x in (-0.5, 0.3, 0.9):
        for sign, bound in zip((-1, 1), exact.wedge(torch.tensor(x), angle), strict=True):
            v = x * one + sign * math.sqrt(1 - x * x) * side
            assert close((v * d).sum(-1) / exact.reach(d, pi, features), torch.full((20,), x), 1e-8)
            assert close((v * to_reward).sum(-1) / exact.reach(to_reward, pi, features), bound, 1e-8)


def test_share_of_random_steps_whose_signs_differ():
    """The angle over 180 degrees, for steps without a preferred direction in the Fisher metric; 20,000 a policy."""
    _, _, logp, reward = problems(False, 10)
    pi = logp.exp()
    d, to_reward = exact.ascent(random(10, 5, seed=8).softmax(-1), pi), exact.reward_direction(pi, reward)
    v = random(20_000, 10, 5, seed=9) / pi.sqrt()
    share = ((v * d).sum(-1) * (v * to_reward).sum(-1) < 0).double().mean(0)
    expected = exact.fisher_cosine(d, to_reward, pi).arccos() / math.pi
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_exercises_on_the_mean_of_g_and_on_right_or_wrong():
    start, end = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert exact.kl(end, start).item() / 10 == pytest.approx(0.037, abs=5e-4)
    assert math.log(9 / 5) / 10 == pytest.approx(0.059, abs=5e-4) and math.log(5) == pytest.approx(1.61, abs=5e-3)
    ref, right = random(6, seed=1).log_softmax(-1), torch.tensor([1.0, 0, 0, 1, 1, 0])
    for beta in (0.1, 2.0):
        d = exact.ascent(exact.optimum(ref, right, beta).exp(), ref.exp())
        to_reward = exact.reward_direction(ref.exp(), right)
        assert exact.fisher_cosine(d, to_reward, ref.exp()).item() == pytest.approx(1)
        assert close(d / d.norm(), to_reward / to_reward.norm())
    three_values = torch.tensor([1.0, 0, 0.5, 1, 1, 0])
    d = exact.ascent(exact.optimum(ref, three_values, 0.1).exp(), ref.exp())
    assert exact.fisher_cosine(d, exact.reward_direction(ref.exp(), three_values), ref.exp()) < 0.999


def test_wedge_by_hand():
    """cos 60 degrees and a step at 60 degrees from the first: between cos 120 and cos 0."""
    low, high = exact.wedge(torch.tensor(0.5), torch.tensor(0.5))
    assert low.item() == pytest.approx(-0.5) and high.item() == pytest.approx(1.0)


@both
@checks("eq-exact-against")
def test_a_step_that_raises_g_and_lowers_reward(shared):
    _, features, logp, reward = problems(shared, 20)
    pi, q = logp.exp(), random(20, 5, seed=8).softmax(-1)
    d, to_reward = exact.ascent(q, pi, features), exact.reward_direction(pi, reward, features)
    v = d / d.norm(dim=-1, keepdim=True) - to_reward / to_reward.norm(dim=-1, keepdim=True)
    cosine = (d * to_reward).sum(-1) / (d.norm(dim=-1) * to_reward.norm(dim=-1))
    assert close((v * d).sum(-1), d.norm(dim=-1) * (1 - cosine)) and ((v * d).sum(-1) > 0).all()
    assert close((v * to_reward).sum(-1), -to_reward.norm(dim=-1) * (1 - cosine))
    small = 1e-4 * v
    assert (exact.reward_change(small, logp, reward, features) < 0).all()
    assert ((q * exact.change(small, logp, features)).sum(-1) > 0).all()
    # none where D' is the policy, tilted in proportion to the reward
    mean = (pi * reward).sum(-1, keepdim=True)
    parallel = exact.ascent(pi * (1 + 0.01 * (reward - mean)), pi, features)
    assert close(parallel, 0.01 * to_reward)


@checks("eq-exact-tilt", "eq-exact-pinsker")
def test_the_most_reward_for_a_kl():
    _, _, logp, reward = problems(False, 30)
    pi, value = logp.exp(), (logp.exp() * reward).sum(-1)
    limit = -(logp.gather(-1, reward.argmax(-1, keepdim=True)))[:, 0]
    for share in (0.0, 0.01, 0.5, 0.99):
        best, strength = exact.tilt(logp, reward, share * limit)
        assert close(exact.kl(best, logp), share * limit, 1e-9)
        assert close(best, (logp + strength[:, None] * reward).log_softmax(-1))
    spread = reward.amax(-1) - reward.amin(-1)
    for seed in range(200):
        other = (logp + (0.1 + seed / 50) * random(30, 5, seed=300 + seed)).log_softmax(-1)
        nats, gain = exact.kl(other, logp), (other.exp() * reward).sum(-1) - value
        assert (gain.abs() <= spread * (nats / 2).sqrt() + 1e-12).all()
        assert (gain.abs() <= spread * (other.exp() - pi).abs().sum(-1) / 2 + 1e-12).all()
        kept = nats < limit
        best, strength = exact.tilt(logp[kept], reward[kept], nats[kept])
        most = (best.exp() * reward[kept]).sum(-1) - value[kept]
        assert kept.any() and (gain[kept] <= most + 1e-9).all()
        assert close(most - gain[kept], exact.kl(other[kept], best) / strength, 1e-7)
    # to second order in sqrt(KL): the third moment decides whether the tilt beats the first-order bound
    small = torch.full((30,), 1e-6)
    best, _ = exact.tilt(logp, reward, small)
    centred = reward - value[:, None]
    second, third = (pi * centred**2).sum(-1), (pi * centred**3).sum(-1)
    more = ((best.exp() - pi) * reward).sum(-1) - (2 * small * second).sqrt()
    assert torch.allclose(more, third / (3 * second) * small, rtol=1e-2, atol=1e-9) and {True, False} == set(
        (more > 0).tolist()
    )
    # tight: a fair coin that pays 1, and little KL
    coin, pay = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0])
    best, _ = exact.tilt(coin, pay, torch.tensor(1e-6))
    assert float(best.exp()[0]) - 0.5 == pytest.approx(math.sqrt(0.5e-6), rel=1e-4)


def test_tilt_by_hand():
    """From (1/2, 1/2) to (3/4, 1/4): KL = log 2 - H(3/4, 1/4), strength log 3 for rewards 1 and 0."""
    nats = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    best, strength = exact.tilt(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]), torch.tensor(nats))
    assert close(best.exp(), torch.tensor([0.75, 0.25]), 1e-9) and strength.item() == pytest.approx(math.log(3))


@both
@checks("eq-exact-line")
def test_the_road_of_one_pair_in_closed_form(shared):
    theta, features, logp = setting(shared)
    c, r = 1, 3
    tau = exact.taught(c, r, features)
    gap = float((features[c] - features[r]).square().sum())
    assert gap == pytest.approx(float(tau[c] - tau[r]))
    way = torch.linspace(0, 4, 9)
    pairs = torch.zeros(5, 5)
    pairs[c, r] = 1.0
    times = exact.pair_time(way, gap, BETA)
    path = exact.flow(dpo_velocity(logp, pairs, features), theta, times, 0.05)
    assert close(path, theta + way[:, None] * (features[c] - features[r]), 1e-6)
    assert close(exact.pair_path(logp, tau, way), (path @ features.T).log_softmax(-1), 1e-6)


@checks("eq-exact-fate")
def test_the_three_fates_of_a_chosen_response():
    seen = set()
    way = torch.cat([torch.linspace(0, 0.99, 200), torch.logspace(0, 4, 200)])
    for seed in range(60):
        features, logp = random(5, 3, seed=seed), random(5, seed=100 + seed).log_softmax(-1)
        c, r = 0, 1
        tau = exact.taught(c, r, features)
        path = exact.pair_path(logp, tau, way)
        rate = tau - (path.exp() * tau).sum(-1, keepdim=True)
        assert (path[:, c] - path[:, r]).diff().min() > 0  # the margin
        assert rate[:, c].diff().max() < 1e-12  # log pi_c is concave
        assert path[-1, r] < -5
        for i in (c, r):
            fate = exact.fate(i, tau, logp.exp())
            moves = path[:, i].diff()
            moves = moves[moves.abs() > 1e-12]
            rises, falls = bool((moves > 0).any()), bool((moves < 0).any())
            assert (rises, falls) == {
                "rises for ever": (True, False),
                "rises, then falls": (True, True),
                "falls at once": (False, True),
            }[fate]
            seen.add((i, fate))
        assert path[-1].argmax() == tau.argmax()
    assert seen == {(c, fate) for fate in exact.FATES} | {(r, fate) for fate in exact.FATES[1:]}


@checks("eq-exact-bystanders")
def test_in_the_table_bystanders_change_alike():
    for seed in range(20):
        logp = (2 * random(5, seed=seed)).log_softmax(-1)
        pi, c, r = logp.exp(), 0, 2
        tau = exact.taught(c, r, torch.eye(5))
        assert torch.equal(tau, torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0]))
        way = torch.linspace(0, 6, 50)
        path = exact.pair_path(logp, tau, way)
        z = 1 + (way.exp() - 1) * (pi[c] - pi[r] * (-way).exp())
        for j in (1, 3, 4):
            assert close(path[:, j] - logp[j], -z.log())
        assert close(path[:, c] - logp[c], way - z.log()) and (path[:, c].diff() > 0).all()
        assert exact.fate(c, tau, pi) == "rises for ever"
        back = max(0.0, float(logp[r] - logp[c]))  # up to here bystanders have more than at the start
        for at in (0.5 * back, 2 * back + 0.1):
            bystander = exact.pair_path(logp, tau, torch.tensor([at]))[0, 1] - logp[1]
            assert at == 0 or bool(bystander > 0) == (at < back)
        # what squeezes in the negative half is undone in the positive one
        halves = [exact.scores(exact.ascent(w, pi), pi) for w in (torch.eye(5)[c], -torch.eye(5)[r])]
        square = pi.square().sum()
        for j in (1, 3, 4):
            assert close(halves[0][j], square - pi[j] - pi[c]) and close(halves[1][j], pi[j] + pi[r] - square)


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
    with pytest.raises(ValueError, match="nats: must be at least 0, and below"):
        exact.tilt(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]), torch.tensor(0.7))
    with pytest.raises(ValueError, match="responses 0 and 1 have the same features"):
        exact.taught(0, 1, torch.ones(3, 2))
    with pytest.raises(ValueError, match="gap=0"):
        exact.pair_time(pi, 0.0, 1.0)
