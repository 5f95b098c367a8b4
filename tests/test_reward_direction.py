"""Towards reward: against finite differences of an expected reward that is summed over all replies, and in simulation.

The tiny world: a GPT-NeoX of five words in float64, two prompts, replies of at most three tokens of which 1 ends one.
Of the other four words, there are 1 + 4 + 16 replies that end within three tokens and 4^3 that are cut off: 85.
"""

import itertools
import math

import pytest
import torch
from prefdyn.lens import alignment, reward
from prefdyn.lens.batch import pad
from prefdyn.lens.likelihood import token_logps
from toys.models import Table, build, lift_float32

WORDS, LONGEST, END = 5, 3, 1
PROMPTS = [[2, 3], [4]]


def all_replies() -> list[list[int]]:
    """Every reply: words that are not the end, and then the end or the limit."""
    others = [word for word in range(WORDS) if word != END]
    ended = [[*words, END] for n in range(LONGEST) for words in itertools.product(others, repeat=n)]
    return ended + [list(words) for words in itertools.product(others, repeat=LONGEST)]


REPLIES = all_replies()


def listed():
    """All replies to all prompts as a batch, and rewards that no simple rule gives."""
    asked = [prompt for prompt in PROMPTS for _ in REPLIES]
    batch = pad(asked, REPLIES * len(PROMPTS), 0)
    points = 3 * torch.rand(len(batch), generator=torch.Generator().manual_seed(4)) + 10
    return batch, points


def tiny(architecture: str = "gpt_neox"):
    sizes = {"vocab_size": WORDS, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return build(architecture, **sizes, bos_token_id=END, eos_token_id=END, pad_token_id=None)


@pytest.fixture
def exact(double, monkeypatch):
    """Float64 from end to end."""
    lift_float32(monkeypatch)


def expected_reward(model, batch, points) -> torch.Tensor:
    """J by its definition: the mean over prompts of sum_y pi(y|x) R(x, y)."""
    return (token_logps(model, batch).sum(-1).exp() * points).sum() / len(PROMPTS)


@pytest.fixture
def world(exact):
    """A policy, all replies, their rewards, log-probs, and the exact J and d_R."""
    model, (batch, points) = tiny(), listed()
    j, d = reward.expected_direction(model, batch, points, len(PROMPTS))
    with torch.no_grad():
        pi = token_logps(model, batch).sum(-1).exp().reshape(len(PROMPTS), -1)
    return model, batch, points, pi, j, d


def test_there_are_85_replies_whose_probabilities_add_up_to_one(world):
    assert len(REPLIES) == 1 + 4 + 16 + 64
    assert world[3].sum(-1).tolist() == pytest.approx([1, 1])


@torch.no_grad()
def test_the_exact_direction_is_the_slope_of_the_expected_reward(world):
    """Parameter by parameter, by central differences of J, to 1e-6 of it; 1e-8 of the largest, where it is nearly 0."""
    model, batch, points, _, j, d = world
    assert j.item() == pytest.approx(expected_reward(model, batch, points).item(), rel=1e-12)
    largest = max(t.abs().max() for t in d.values())
    h, count = 1e-5, 0
    for name, p in model.named_parameters():
        flat, slopes = p.view(-1), d[name].reshape(-1)
        for i in range(len(flat)):
            start, ends = flat[i].item(), []
            for moved in (start + h, start - h):
                flat[i] = moved
                ends.append(expected_reward(model, batch, points - 11.5).item())
            flat[i] = start
            slope = (ends[0] - ends[1]) / (2 * h)
            assert slopes[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-8 * largest.item()), (name, i)
            count += 1
    assert count == sum(p.numel() for p in model.parameters()) > 300


def test_a_constant_baseline_changes_nothing_in_the_exact_direction(world):
    model, batch, points, _, _, d = world
    _, moved = reward.expected_direction(model, batch, points - 1_000.0, len(PROMPTS))
    assert all(torch.allclose(moved[name], t, atol=1e-9) for name, t in d.items())
    with pytest.raises(ValueError, match="add up to"):
        reward.expected_direction(model, batch.rows(slice(0, 100)), points[:100], 2)


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_the_exact_direction_at_a_temperature(world, temperature):
    """By autograd of J under softmax(logits / temperature)."""
    model, batch, points, *_ = world
    j, d = reward.expected_direction(model, batch, points, len(PROMPTS), temperature)
    value = (token_logps(model, batch, temperature).sum(-1).exp() * points).sum() / len(PROMPTS)
    assert j.item() == pytest.approx(value.item())
    for (name, _), grad in zip(
        model.named_parameters(), torch.autograd.grad(value, list(model.parameters())), strict=True
    ):
        assert torch.allclose(d[name], grad, atol=1e-9), name


def test_weights_by_hand():
    """Three replies to each of two prompts: 1 2 6 less the means of the others, 4 3.5 1.5, over 6; 5 5 5 gives 0."""
    points = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert reward.reward_weights(points, 3).tolist() == pytest.approx([-3 / 6, -1.5 / 6, 4.5 / 6, 0, 0, 0])


@pytest.mark.parametrize(
    ("points", "group", "message"),
    [
        (torch.ones(4), 1, "group=1: at least 2"),
        (torch.ones(5), 2, "multiple of group=2"),
        (torch.ones(0), 2, "multiple of group=2"),
        (torch.ones(2, 2), 2, "must be"),
        (torch.tensor([1.0, math.nan, 2.0, 3.0]), 2, "1 of 4 rewards are not finite"),
    ],
)
def test_what_are_no_rewards_of_groups(points, group, message):
    with pytest.raises(ValueError, match=message):
        reward.reward_weights(points, group)


def drawn(pi: torch.Tensor, group: int, times: int, seed: int) -> torch.Tensor:
    """Rows of sampled replies, [times, P, group]: to every prompt `group` replies by their probabilities."""
    rng = torch.Generator().manual_seed(seed)
    parts = [
        torch.multinomial(own, times * group, replacement=True, generator=rng).reshape(times, 1, group) + at * len(own)
        for at, own in enumerate(pi)
    ]
    return torch.cat(parts, 1)


def test_the_estimate_is_the_weighted_sum_of_gradients(world):
    """With some replies drawn twice, and one prompt whose replies all earn the same."""
    model, batch, points, pi, *_ = world
    rows = drawn(pi, 4, 1, seed=0)[0].flatten()
    rows[1] = rows[0]
    own = points[rows].clone()
    own[4:] = 2.0
    d = reward.reward_direction(model, batch.take(rows), own, 4)
    weights = torch.zeros(8)
    for i in range(4):
        others = [own[j] for j in range(4) if j != i]
        weights[i] = (own[i] - sum(others) / 3) / 8
    value = (weights * token_logps(model, batch.take(rows)).sum(-1)).sum()
    for (name, _), grad in zip(
        model.named_parameters(), torch.autograd.grad(value, list(model.parameters())), strict=True
    ):
        assert torch.allclose(d[name], grad, atol=1e-12), name
    nothing = reward.reward_direction(model, batch.take(rows), torch.full((8,), 3.0), 4)
    assert all((t == 0).all() for t in nothing.values())
    with pytest.raises(ValueError, match="8 rewards for 7 replies"):
        reward.reward_direction(model, batch.take(rows[:7]), own, 4)


def projections(world, seed: int, count: int = 4) -> tuple[torch.Tensor, list[float]]:
    """Scores of all replies along random directions, [count, rows], and the exact <d_R, v> with each."""
    model, batch, _, _, _, d = world
    rng = torch.Generator().manual_seed(seed)
    vectors = [{name: torch.randn(t.shape, generator=rng) for name, t in d.items()} for _ in range(count)]
    scores = torch.stack([alignment.token_scores(model, batch, v)[1].sum(-1) for v in vectors])
    return scores, [alignment.inner(d, v).item() for v in vectors]


def z_of(estimates: torch.Tensor, truth: float) -> float:
    return ((estimates.mean() - truth) / (estimates.std() / math.sqrt(len(estimates)))).item()


@pytest.mark.parametrize("group", [2, 3, 5])
def test_the_estimate_is_unbiased_and_one_with_its_own_reward_in_the_baseline_is_not(world, group):
    """40,000 estimates, along 4 directions: |z| < 4 for ours, beyond it for the other, which is (K - 1) / K as long."""
    _, _, points, pi, *_ = world
    scores, truths = projections(world, seed=1)
    rows = drawn(pi, group, 40_000, seed=group)
    own = points[rows]
    ours = torch.stack([reward.reward_weights(p.flatten(), group) for p in own]).reshape(own.shape)
    biased = (own - own.mean(-1, keepdim=True)) / own[0].numel()
    zs = []
    for along, truth in zip(scores, truths, strict=True):
        estimates, others = ((w * along[rows]).sum((1, 2)) for w in (ours, biased))
        assert abs(z_of(estimates, truth)) < 4
        assert abs(z_of(others, truth * (group - 1) / group)) < 4
        zs.append(abs(z_of(others, truth)))
    assert max(zs) > 8


def as_directions(world) -> torch.Tensor:
    """The gradient of the log-probability of every reply, [rows, parameters]."""
    model, batch, *_ = world
    logps = token_logps(model, batch).sum(-1)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(logp, parameters, retain_graph=True) for logp in logps]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])


@pytest.fixture
def many(world):
    """Four prompts (both of the world twice, the second time with other rewards), and gradients of all replies."""
    _, _, points, pi, *_ = world
    return torch.cat([pi, pi]), torch.cat([points, 25 - points]), as_directions(world).repeat(2, 1)


def parts_of(rows: torch.Tensor, points: torch.Tensor, grads: torch.Tensor, parts: int):
    """What `reward_parts` yields by prompts, from known gradients of replies."""
    weights = reward.reward_weights(points[rows].flatten(), rows.shape[1])
    for own in torch.arange(rows.numel()).reshape(rows.shape).tensor_split(parts):
        index = own.flatten()
        yield len(index) / rows.numel(), {"p": weights[index] @ grads[rows.flatten()[index]]}


def test_norm_and_errors_are_right_on_average(many):
    """Over 4,000 samples of 8 prompts, drawn from 4, with 3 replies each, in 4 parts and in 3 unequal ones.

    Of the noise-free squared norm the mean is |d|^2, of the naive one it is more. Of the squared standard errors of
    <d, v>, by parts and by prompt, the mean is the variance that <d, v> really has.
    """
    pi, points, grads = many
    rng = torch.Generator().manual_seed(0)
    weights = (pi * (points.reshape(4, -1) - (pi * points.reshape(4, -1)).sum(-1, keepdim=True))).flatten() / 4
    d = weights @ grads
    v = torch.randn(len(d), generator=rng)
    found: dict[str, list[float]] = {name: [] for name in ("value", "by prompt", "naive", "4", "3", "norm 4", "norm 3")}
    for _ in range(4_000):
        asked = torch.randint(4, (8,), generator=rng)
        said = torch.multinomial(pi[asked], 3, replacement=True, generator=rng)
        rows = said + asked[:, None] * pi.shape[1]
        for parts in (4, 3):
            known = reward.estimated(parts_of(rows, points, grads, parts), {"v": {"p": v}})
            value, error = known.inner("v")
            found[str(parts)].append(error**2)
            found[f"norm {parts}"].append(known.squared_norm())
        found["value"].append(value)
        found["naive"].append(known.whole["p"].square().sum().item())
        along = (grads[rows.flatten()] @ v)[:, None]
        value_again, error = reward.error_by_prompt(points[rows.flatten()], along, 3)
        assert value_again == pytest.approx(value)
        found["by prompt"].append(error**2)
    values = {name: torch.tensor(x, dtype=torch.float64) for name, x in found.items()}
    assert abs(z_of(values["value"], (d @ v).item())) < 4
    true = values["value"].var().item()
    for name in ("by prompt", "4", "3"):
        assert values[name].mean().item() == pytest.approx(true, rel=0.1), name
    for name in ("norm 4", "norm 3"):
        assert abs(z_of(values[name], (d @ d).item())) < 4, name
    assert z_of(values["naive"], (d @ d).item()) > 20


@pytest.mark.parametrize(("by", "parts"), [("prompts", 3), ("prompts", 8), ("replies", 2), ("replies", 8)])
def test_parts_are_estimates_of_their_own(world, by, parts):
    """Each is its share of `reward_direction` of its own prompts, or of its own replies to all of them.

    Five prompts, four replies: three parts have 2, 2 and 1 prompts; of replies there are two parts of two at most.
    """
    model, batch, points, pi, *_ = world
    rows = drawn(pi[[0, 1, 0, 1, 1]], 4, 1, seed=3)[0]
    rows = rows - torch.arange(5)[:, None] * pi.shape[1] + torch.tensor([0, 1, 0, 1, 1])[:, None] * pi.shape[1]
    replies, own = batch.take(rows.flatten()), points[rows.flatten()]
    found = list(reward.reward_parts(model, replies, own, 4, parts, by))
    places = torch.arange(20).reshape(5, 4)
    if by == "prompts":
        expected = list(places.split([2, 2, 1] if parts == 3 else [1] * 5))
    else:
        expected = [places[:, :2], places[:, 2:]]
    assert [share for share, _ in found] == pytest.approx([index.numel() / 20 for index in expected])
    for (share, part), index in zip(found, expected, strict=True):
        flat = index.flatten()
        alone = reward.reward_direction(model, replies.take(flat), own[flat], index.shape[1])
        assert all(torch.allclose(part[name], share * t, atol=1e-12) for name, t in alone.items())
    if by == "prompts":
        whole = reward.reward_direction(model, replies, own, 4)
        known = reward.estimated(found, {"v": whole})
        assert all(torch.allclose(known.whole[name], t, atol=1e-12) for name, t in whole.items())
        assert known.inner("v")[0] == pytest.approx(alignment.inner(whole, whole).item())


def test_halves_by_hand():
    """Parts (1, 0), (0, 1), (1, 1), (2, 0) of a quarter each: halves (2, 2) and (6, 2), a sum of (4, 2).

    Products of different parts: 0 1 2 1 0 2, twice, 12 in all, over 1 - 4/16: 16; and (2, 2) (6, 2) would be 16 too.
    Along (1, 0): 1 0 1 2, four times their share 4 0 4 8 around 4: squares 0 16 0 16 by 1/4 over 3, so 8/3.
    """
    parts = [(0.25, {"p": torch.tensor(x)}) for x in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0])]
    known = reward.estimated(parts, {"v": {"p": torch.tensor([1.0, 0.0])}})
    assert [h["p"].tolist() for h in known.halves()] == [[2, 2], [6, 2]]
    assert known.agreement() == pytest.approx(16 / math.sqrt(8 * 40))
    assert known.squared_norm() == pytest.approx(16)
    assert known.reliability() == pytest.approx(16 / 20)
    value, error = known.inner("v")
    assert value == 4 and error == pytest.approx(math.sqrt(8 / 3))
    two = reward.estimated([(0.5, {"p": torch.tensor([1.0, 1.0])}), (0.5, {"p": torch.tensor([3.0, 1.0])})])
    assert two.squared_norm() == pytest.approx(16)  # with two parts, the product of the halves
    assert reward.cosine_of(known, known) == (pytest.approx(1), pytest.approx(1))
    assert reward.cosine_of(known, two) == (pytest.approx(1), pytest.approx(1))
    opposite = reward.estimated([(0.5, {"p": torch.tensor([1.0, 0.0])}), (0.5, {"p": torch.tensor([-1.0, 0.1])})])
    assert opposite.squared_norm() < 0 and opposite.reliability() == 0
    assert math.isnan(reward.cosine_of(known, opposite)[1])
    with pytest.raises(ValueError, match="1 parts"):
        reward.estimated(parts[:1])


def test_the_angle_of_two_rewards_is_free_of_the_noise_that_both_share(world):
    """Of the same replies, two rewards: as they are they have the noise of the same replies, which turns them.

    60 samples of 96 prompts, drawn from the two of the world. The cosine of what is estimated is -0.75.
    """
    _, batch, points, pi, *_ = world
    grads = as_directions(world)
    other = batch.response.sum(-1) - 0.3 * points
    exact = []
    for own in (points, other):
        table = own.reshape(2, -1)
        exact.append((pi * (table - (pi * table).sum(-1, keepdim=True))).flatten() @ grads)
    true = (exact[0] @ exact[1] / (exact[0].norm() * exact[1].norm())).item()
    rng = torch.Generator().manual_seed(1)
    cosines = []
    for _ in range(60):
        asked = torch.randint(2, (96,), generator=rng)
        rows = torch.multinomial(pi[asked], 8, replacement=True, generator=rng) + asked[:, None] * pi.shape[1]
        one, two = (reward.estimated(parts_of(rows, own, grads, 8)) for own in (points, other))
        cosines.append(reward.cosine_of(one, two))
    raw, clean = torch.tensor(cosines).T
    assert true == pytest.approx(-0.75, abs=0.01)
    assert abs(z_of(clean, true)) < 3 < abs(z_of(raw, true))


def test_by_hand_on_a_table(double):
    """Two words with equal logits: the gradient of log pi(y) is e_y - 1/2 in the prompt's row.

    Replies 0, 1 with rewards 0, 1: weights -1/2, 1/2, so d = -1/2 (1/2, -1/2) + 1/2 (-1/2, 1/2) = (-1/2, 1/2). The
    exact one is pi(1 - pi) = 1/4 a reward of 1: (-1/4, 1/4). 1 1 teaches nothing, and so the mean over draws is right.
    """
    model = Table([[1.0, 1.0], [1.0, 1.0]])
    points = torch.tensor([0.0, 1.0])
    d = reward.reward_direction(model, pad([[0], [0]], [[0], [1]], 0), points, 2)
    assert d["table"].flatten().tolist() == pytest.approx([-0.5, 0.5, 0, 0])
    j, whole = reward.expected_direction(model, pad([[0], [0]], [[0], [1]], 0), points, 1)
    assert j.item() == 0.5 and whole["table"].flatten().tolist() == pytest.approx([-0.25, 0.25, 0, 0])


def test_what_cannot_be_split():
    model, replies = Table(torch.zeros(2, 2)), pad([[0]] * 4, [[0]] * 4, 0)
    with pytest.raises(ValueError, match="by='rows'"):
        list(reward.reward_parts(model, replies, torch.ones(4), 2, by="rows"))
    with pytest.raises(ValueError, match="2 are needed"):
        list(reward.reward_parts(model, replies, torch.ones(4), 4))
    with pytest.raises(ValueError, match="2 are needed"):
        list(reward.reward_parts(model, replies, torch.ones(4), 2, by="replies"))
    with pytest.raises(ValueError, match="one prompt"):
        reward.error_by_prompt(torch.ones(4), torch.ones(4, 1), 4)
