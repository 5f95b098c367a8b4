"""Methods on preference pairs: each loss by hand, against its paper written another way, and as token weights."""

import ast
import inspect
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prefdyn import methods
from prefdyn.lens import alignment
from prefdyn.lens.batch import Batch, concatenate, pad
from prefdyn.lens.likelihood import sequence_logps, token_logps
from prefdyn.lens.losses import from_loss
from prefdyn.lens.weights import TokenWeights
from prefdyn.methods import registry
from prefdyn.methods.base import Method, Pairs
from toys.models import build, lift_float32, random_batch

EXPECTED = {
    "apo_zero",
    "cpo",
    "dpo",
    "ipo",
    "kto",
    "normalised_dpo",
    "orpo",
    "robust_dpo",
    "rpo",
    "simpo",
    "slic",
    "smoothed_dpo",
}
NAMES = tuple(name for name in registry.names() if registry.find(name).takes == "pairs")
KL = 0.7


def some(cases: dict) -> list[str]:
    """The names of `cases` that are there, so that a method taken out leaves the others tested."""
    return sorted(set(cases) & set(NAMES))


def one_pair(chosen: list[float], rejected: list[float], ref_chosen: float, ref_rejected: float, kl=None) -> Pairs:
    """A pair in float64 from the log-probs of its tokens, padded on the right to one width."""

    def exact(numbers) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float64)

    width = max(len(chosen), len(rejected))
    padded = [exact([side + [0.0] * (width - len(side))]) for side in (chosen, rejected)]
    masks = [torch.arange(width)[None] < len(side) for side in (chosen, rejected)]
    return Pairs(*padded, *masks, exact([ref_chosen]), exact([ref_rejected]), None if kl is None else exact(kl))


def random_pairs(rows: int = 7, width: int = 6, seed: int = 0) -> Pairs:
    """Pairs of different lengths that start in different columns, with margins of either sign."""
    rng = torch.Generator().manual_seed(seed)
    sides, masks = [], []
    for _ in range(2):
        first = torch.randint(0, 3, (rows, 1), generator=rng)
        last = first + torch.randint(1, width - 2, (rows, 1), generator=rng)
        columns = torch.arange(width)[None]
        masks.append((columns >= first) & (columns < last))
        sides.append(-2 * torch.rand(rows, width, generator=rng) * masks[-1])
    refs = [side.sum(-1) + 3 * torch.randn(rows, generator=rng) for side in sides]
    return Pairs(*sides, *masks, *refs, torch.tensor(KL))


def weights_of(method: Method, pairs: Pairs, **settings: float) -> TokenWeights:
    """Token weights of the mean loss over pairs; chosen rows first. What is no response is masked before the loss."""

    def loss(leaf: torch.Tensor) -> torch.Tensor:
        chosen, rejected = leaf.masked_fill(~response, 0.0).chunk(2)
        return method.loss(replace(pairs, chosen=chosen, rejected=rejected), **method.settings | settings).mean()

    logps, response = torch.cat([pairs.chosen, pairs.rejected]), torch.cat([pairs.chosen_mask, pairs.rejected_mask])
    return from_loss(loss, logps, response)


# Chosen tokens -1, -2 (sum -3, mean -3/2), rejected -1, -1, -4 (sum -6, mean -2), reference -4 and -5:
# log-ratios 1 and -1, margin 2; a token, log-ratios 1/2 and -1/3.
HAND = one_pair([-1.0, -2.0], [-1.0, -1.0, -4.0], -4.0, -5.0, kl=1.0)
# Chosen tokens of probability 1/2 each, rejected ones 1/2, 1/4, 1/8 with geometric mean 1/4: odds 1 and 1/3.
ODDS = one_pair([-math.log(2)] * 2, [-math.log(2), -math.log(4), -math.log(8)], math.nan, math.nan)
BY_HAND = {
    # beta * margin = 1
    "dpo": (HAND, {"beta": 0.5}, math.log(1 + math.exp(-1))),
    # target 1/(2 beta) = 1: (2 - 1)^2; means over tokens would give (5/6 - 1)^2
    "ipo": (HAND, {"beta": 0.5}, 1.0),
    # 1 - 2/4
    "slic": (HAND, {"beta": 0.25, "delta": 1.0}, 0.5),
    "smoothed_dpo": (
        HAND,
        {"beta": 0.5, "epsilon": 0.25},
        0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.e),
    ),
    "robust_dpo": (
        HAND,
        {"beta": 0.5, "epsilon": 0.25},
        (0.75 * math.log(1 + math.exp(-1)) - 0.25 * math.log(1 + math.e)) / 0.5,
    ),
    # likelihood a token: 3/2 nats, twice
    "rpo": (HAND, {"beta": 0.5, "alpha": 2.0}, math.log(1 + math.exp(-1)) + 3.0),
    # 2 * (-3/2 + 2) - 1/2 = 1/2; with gamma inside of the bracket it would be 0
    "simpo": (HAND, {"beta": 2.0, "gamma": 0.5}, math.log(1 + math.exp(-0.5))),
    # (-3 + 6) / 2 = 3/2, and the whole response's 3 nats twice
    "cpo": (HAND, {"beta": 0.5, "alpha": 2.0}, math.log(1 + math.exp(-1.5)) + 6.0),
    # odds ratio 3, sigmoid(log 3) = 3/4
    "orpo": (ODDS, {"beta": 0.5}, math.log(2) + 0.5 * math.log(4 / 3)),
    # chosen at the reference point: 2 * 1/2; rejected 2 nats below it: 3 * (1 - sigmoid(1)); half of both
    "kto": (HAND, {"beta": 0.5, "desirable": 2.0, "undesirable": 3.0}, (1 + 3 / (1 + math.e)) / 2),
    # 1 - sigmoid(1) + sigmoid(-1)
    "apo_zero": (HAND, {"beta": 1.0}, 2 / (1 + math.e)),
    # 6 * (1/2 + 1/3) = 5
    "normalised_dpo": (HAND, {"beta": 6.0}, math.log(1 + math.exp(-5))),
}


def test_every_method_is_in_every_table():
    """One that is gone from the library may stay in the tables: a file less leaves the others as they are."""
    for table in (EXPECTED, BY_HAND, ANOTHER_WAY, ANALYTIC, AT_THE_START):
        assert set(NAMES) <= set(table)


@pytest.mark.parametrize("name", some(BY_HAND))
def test_losses_by_hand(name):
    pairs, settings, expected = BY_HAND[name]
    found = registry.find(name).loss(pairs, **settings)
    assert found.shape == (1,)
    assert found.item() == pytest.approx(expected, rel=0, abs=1e-12)


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


# The losses once more, from probabilities and hyperbolic functions of one pair: p and q of policy and reference, n the
# length, w the chosen and l the rejected response, s the settings.
ANOTHER_WAY = {
    "dpo": lambda pw, pl, qw, ql, nw, nl, s: (
        -math.log((pw / qw) ** s["beta"] / ((pw / qw) ** s["beta"] + (pl / ql) ** s["beta"]))
    ),
    "ipo": lambda pw, pl, qw, ql, nw, nl, s: (
        math.log(pw * ql / (pl * qw)) ** 2 - math.log(pw * ql / (pl * qw)) / s["beta"] + 1 / (4 * s["beta"] ** 2)
    ),
    "slic": lambda pw, pl, qw, ql, nw, nl, s: (
        0.0
        if (pw * ql / (pl * qw)) ** s["beta"] > math.exp(s["delta"])
        else math.log(math.exp(s["delta"]) * (pl * qw / (pw * ql)) ** s["beta"])
    ),
    # log sigmoid(-x) = log sigmoid(x) - x
    "smoothed_dpo": lambda pw, pl, qw, ql, nw, nl, s: (
        softplus(-s["beta"] * math.log(pw * ql / (pl * qw))) + s["epsilon"] * s["beta"] * math.log(pw * ql / (pl * qw))
    ),
    "robust_dpo": lambda pw, pl, qw, ql, nw, nl, s: (
        softplus(-s["beta"] * math.log(pw * ql / (pl * qw)))
        - s["epsilon"] / (1 - 2 * s["epsilon"]) * s["beta"] * math.log(pw * ql / (pl * qw))
    ),
    "rpo": lambda pw, pl, qw, ql, nw, nl, s: (
        math.log(1 + (pl * qw / (pw * ql)) ** s["beta"]) - s["alpha"] * math.log(pw ** (1 / nw))
    ),
    "simpo": lambda pw, pl, qw, ql, nw, nl, s: (
        -math.log(pw ** (s["beta"] / nw) / (pw ** (s["beta"] / nw) + math.exp(s["gamma"]) * pl ** (s["beta"] / nl)))
    ),
    "cpo": lambda pw, pl, qw, ql, nw, nl, s: (
        -math.log(pw ** s["beta"] / (pw ** s["beta"] + pl ** s["beta"]) * pw ** s["alpha"])
    ),
    "orpo": lambda pw, pl, qw, ql, nw, nl, s: (
        -math.log(pw) / nw + s["beta"] * math.log(1 + (pw ** (-1 / nw) - 1) / (pl ** (-1 / nl) - 1))  # 1/odds = 1/p - 1
    ),
    "kto": lambda pw, pl, qw, ql, nw, nl, s: (
        (
            s["desirable"] * (1 - math.tanh(s["beta"] * (math.log(pw / qw) - KL) / 2))
            + s["undesirable"] * (1 - math.tanh(s["beta"] * (KL - math.log(pl / ql)) / 2))
        )
        / 4
    ),
    "apo_zero": lambda pw, pl, qw, ql, nw, nl, s: (
        1 - (math.tanh(s["beta"] * math.log(pw / qw) / 2) - math.tanh(s["beta"] * math.log(pl / ql) / 2)) / 2
    ),
    "normalised_dpo": lambda pw, pl, qw, ql, nw, nl, s: math.log(
        1 + (pl / ql) ** (s["beta"] / nl) / (pw / qw) ** (s["beta"] / nw)
    ),
}
OTHER_SETTINGS = {"beta": 0.4, "delta": 0.8, "epsilon": 0.2, "alpha": 0.6, "gamma": 0.3}
OTHER_SETTINGS |= {"desirable": 1.2, "undesirable": 0.7}


def others(method: Method) -> dict[str, float]:
    """Settings that differ from the defaults and from each other, those that the method has."""
    return {name: OTHER_SETTINGS[name] for name in method.settings}


@pytest.mark.parametrize("name", some(ANOTHER_WAY))
@pytest.mark.parametrize("changed", [False, True])
def test_losses_written_another_way(name, changed, double):
    method, pairs = registry.find(name), random_pairs()
    settings = others(method) if changed else dict(method.settings)
    sums = [t.exp().tolist() for t in (*pairs.sums(), pairs.ref_chosen, pairs.ref_rejected)]
    rows = zip(*sums, *(t.tolist() for t in pairs.lengths()), strict=True)
    expected = [ANOTHER_WAY[name](*row, settings) for row in rows]
    assert method.loss(pairs, **settings).tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def logistic(x):
    return 1 / (1 + (-x).exp())


def slope(x):
    """The derivative of the logistic function."""
    return 1 / (2 + x.exp() + (-x).exp())


def of_margin(factor):
    """Weights that are opposite on both sides: factor(margin, settings)."""
    return lambda pairs, s: (factor(pairs.margin(), s), -factor(pairs.margin(), s))


def means(pairs: Pairs):
    return (total / length for total, length in zip(pairs.sums(), pairs.lengths(), strict=True))


def simpo_weights(pairs, s):
    chosen, rejected = means(pairs)
    size = s["beta"] * logistic(s["gamma"] - s["beta"] * (chosen - rejected))
    return size / pairs.lengths()[0], -size / pairs.lengths()[1]


def cpo_weights(pairs, s):
    chosen, rejected = pairs.sums()
    size = s["beta"] * logistic(s["beta"] * (rejected - chosen))
    return size + s["alpha"], -size


def orpo_weights(pairs, s):
    p, q = (mean.exp() for mean in means(pairs))
    wrong = s["beta"] / (1 + p * (1 - q) / (q * (1 - p)))
    return (1 + wrong / (1 - p)) / pairs.lengths()[0], -wrong / (1 - q) / pairs.lengths()[1]


def rpo_weights(pairs, s):
    size = s["beta"] * logistic(-s["beta"] * pairs.margin())
    return size + s["alpha"] / pairs.lengths()[0], -size


def kto_weights(pairs, s):
    chosen, rejected = (s["beta"] * (ratio - KL) for ratio in pairs.ratios())
    return s["beta"] * s["desirable"] * slope(chosen) / 2, -s["beta"] * s["undesirable"] * slope(rejected) / 2


def apo_weights(pairs, s):
    chosen, rejected = (s["beta"] * ratio for ratio in pairs.ratios())
    return s["beta"] * slope(chosen), -s["beta"] * slope(rejected)


def normalised_weights(pairs, s):
    chosen, rejected = (ratio / length for ratio, length in zip(pairs.ratios(), pairs.lengths(), strict=True))
    size = s["beta"] * logistic(s["beta"] * (rejected - chosen))
    return size / pairs.lengths()[0], -size / pairs.lengths()[1]


# B times the weight of a token of the chosen and of the rejected response, [B] each.
ANALYTIC = {
    "dpo": of_margin(lambda m, s: s["beta"] * logistic(-s["beta"] * m)),
    "ipo": of_margin(lambda m, s: 2 * (1 / (2 * s["beta"]) - m)),
    "slic": of_margin(lambda m, s: s["beta"] * (s["beta"] * m < s["delta"])),
    "smoothed_dpo": of_margin(lambda m, s: s["beta"] * (logistic(-s["beta"] * m) - s["epsilon"])),
    "robust_dpo": of_margin(
        lambda m, s: s["beta"] * (logistic(-s["beta"] * m) + s["epsilon"] / (1 - 2 * s["epsilon"]))
    ),
    "rpo": rpo_weights,
    "simpo": simpo_weights,
    "cpo": cpo_weights,
    "orpo": orpo_weights,
    "kto": kto_weights,
    "apo_zero": apo_weights,
    "normalised_dpo": normalised_weights,
}


@pytest.mark.parametrize("name", some(ANALYTIC))
@pytest.mark.parametrize("changed", [False, True])
def test_weights_are_those_of_the_formula(name, changed, double):
    """The formula that METHOD states, written out, against autograd of the loss."""
    method, pairs = registry.find(name), random_pairs(rows=9, seed=1)
    settings = others(method) if changed else dict(method.settings)
    found = weights_of(method, pairs, **settings).w
    sides = (each[:, None] / 9 for each in ANALYTIC[name](pairs, settings))
    masks = (pairs.chosen_mask, pairs.rejected_mask)
    expected = torch.cat([torch.where(mask, side, 0.0) for side, mask in zip(sides, masks, strict=True)])
    assert (found - expected).abs().max() < 1e-12 < expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_minus_the_slope_of_the_loss(name, double):
    """Each weight by a central difference of the scalar loss."""
    method, pairs = registry.find(name), random_pairs(rows=3, seed=4)
    w = weights_of(method, pairs).w.chunk(2)
    for side, mask, found in zip(("chosen", "rejected"), (pairs.chosen_mask, pairs.rejected_mask), w, strict=True):
        for row, column in mask.nonzero().tolist():
            moved = []
            for step in (1e-5, -1e-5):
                logps = getattr(pairs, side).clone()
                logps[row, column] += step
                moved.append(method.loss(replace(pairs, **{side: logps}), **method.settings).mean().item())
            assert found[row, column].item() == pytest.approx(-(moved[0] - moved[1]) / 2e-5, rel=1e-5, abs=1e-8)


def answers(rows: int) -> tuple[Batch, Batch]:
    """Chosen and rejected responses to the same prompts."""
    drawn = random_batch(rows, 1), random_batch(rows, 2)
    prompts = [drawn[0].ids[r][drawn[0].attention[r] & ~drawn[0].response[r]].tolist() for r in range(rows)]
    return tuple(pad(prompts, [b.ids[r][b.response[r]].tolist() for r in range(rows)], 0) for b in drawn)


@pytest.mark.parametrize("name", NAMES)
def test_weighted_scores_are_the_inner_product_with_the_gradient(name, double, monkeypatch):
    """sum w a = - <grad L, d>, with grad L by a plain backward pass of the loss through a real architecture."""
    lift_float32(monkeypatch)
    method, model, reference = registry.find(name), build("gpt_neox"), build("gpt_neox", seed=1)
    chosen, rejected = answers(5)
    batch, refs = concatenate([chosen, rejected]), [sequence_logps(reference, b) for b in (chosen, rejected)]
    direction = alignment.target_direction(model, random_batch(3, 7))

    def pairs_of(logps: torch.Tensor) -> Pairs:
        return Pairs(*logps.chunk(2), *batch.response.chunk(2), *refs, torch.tensor(KL))

    named = dict(model.named_parameters())
    value = method.loss(pairs_of(token_logps(model, batch)), **method.settings).mean()
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    expected = -sum((g * direction[n]).sum() for n, g in zip(named, grads, strict=True) if g is not None).item()
    logps, scores = alignment.token_scores(model, batch, direction)
    w = weights_of(method, pairs_of(logps)).w
    assert (w * scores).sum().item() == pytest.approx(expected, rel=1e-8)
    assert abs(expected) > 1e-6


# Both responses are the same three tokens of 2 nats on average and the policy is its reference: what the loss is then.
AT_THE_START = {
    "dpo": lambda s: math.log(2),
    "ipo": lambda s: (1 / (2 * s["beta"])) ** 2,
    "slic": lambda s: s["delta"],
    "smoothed_dpo": lambda s: math.log(2),
    "robust_dpo": lambda s: math.log(2),
    "rpo": lambda s: math.log(2) + 2 * s["alpha"],
    "simpo": lambda s: math.log(1 + math.exp(s["gamma"])),
    "cpo": lambda s: math.log(2) + 6 * s["alpha"],
    "orpo": lambda s: 2 + s["beta"] * math.log(2),
    "kto": lambda s: (s["desirable"] + s["undesirable"]) / 4,
    "apo_zero": lambda s: 1.0,
    "normalised_dpo": lambda s: math.log(2),
}


@pytest.mark.parametrize("name", some(AT_THE_START))
def test_losses_at_the_start(name, double):
    method, tokens = registry.find(name), [-1.0, -2.0, -3.0]
    pairs = one_pair(tokens, tokens, -6.0, -6.0, kl=0.0)
    for settings in (dict(method.settings), others(method)):
        assert method.loss(pairs, **settings).item() == pytest.approx(AT_THE_START[name](settings), abs=1e-12)


# What a loss differs by from that of the swapped pair, and the settings that make the method symmetric.
SWAPPED = {
    "dpo": ({}, lambda p, s: -s["beta"] * p.margin()),
    "ipo": ({}, lambda p, s: -2 * p.margin() / s["beta"]),
    "smoothed_dpo": ({}, lambda p, s: -(1 - 2 * s["epsilon"]) * s["beta"] * p.margin()),
    "robust_dpo": ({}, lambda p, s: -s["beta"] * p.margin() / (1 - 2 * s["epsilon"])),
    "rpo": ({"alpha": 0.0}, lambda p, s: -s["beta"] * p.margin()),
    "simpo": ({"gamma": 0.0}, lambda p, s: -s["beta"] * (p.sums()[0] / p.lengths()[0] - p.sums()[1] / p.lengths()[1])),
    "cpo": ({"alpha": 0.0}, lambda p, s: -s["beta"] * (p.sums()[0] - p.sums()[1])),
    "normalised_dpo": (
        {},
        lambda p, s: -s["beta"] * (p.ratios()[0] / p.lengths()[0] - p.ratios()[1] / p.lengths()[1]),
    ),
}


def swap(pairs: Pairs) -> Pairs:
    return Pairs(
        pairs.rejected,
        pairs.chosen,
        pairs.rejected_mask,
        pairs.chosen_mask,
        pairs.ref_rejected,
        pairs.ref_chosen,
        pairs.kl,
    )


@pytest.mark.parametrize("name", some(SWAPPED))
def test_swapping_chosen_and_rejected(name, double):
    method, pairs = registry.find(name), random_pairs(seed=2)
    settings, difference = method.settings | SWAPPED[name][0], SWAPPED[name][1]
    found = method.loss(pairs, **settings) - method.loss(swap(pairs), **settings)
    assert torch.allclose(found, difference(pairs, settings), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "total"), [("apo_zero", 2.0), ("kto", 1.0)])
def test_bounded_losses_of_a_pair_and_its_swap_add_up(name, total, double):
    """sigmoid(x) + sigmoid(-x) = 1; for KTO with the reference point at 0 and equal weights."""
    if name not in NAMES:
        pytest.skip("not there")
    method, pairs = registry.find(name), replace(random_pairs(seed=2), kl=torch.tensor(0.0))
    found = method.loss(pairs, **method.settings) + method.loss(swap(pairs), **method.settings)
    assert found.tolist() == pytest.approx([total] * 7, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_counts_for_itself_and_padding_for_nothing(name, double):
    method, pairs = registry.find(name), random_pairs(seed=3)
    whole, w = method.loss(pairs, **method.settings), weights_of(method, pairs).w
    assert whole.shape == (7,)
    for row in range(7):
        fields = {k: v if k == "kl" else v[row : row + 1] for k, v in vars(pairs).items()}
        assert method.loss(Pairs(**fields), **method.settings).item() == pytest.approx(whole[row].item(), abs=1e-14)
    sides = ("chosen", "rejected", "chosen_mask", "rejected_mask")
    padded = replace(pairs, **{k: torch.nn.functional.pad(getattr(pairs, k), (2, 3)) for k in sides})
    assert torch.allclose(method.loss(padded, **method.settings), whole, rtol=0, atol=1e-14)
    assert torch.allclose(weights_of(method, padded).w, torch.nn.functional.pad(w, (2, 3)), rtol=0, atol=1e-14)


# Log-probs of all tokens of both responses, and the log-prob of a response under the reference.
EXTREMES = {
    "certain, both": (0.0, 0.0, 0.0),
    "certain, chosen": (0.0, -30.0, -50.0),
    "certain, rejected": (-30.0, 0.0, -50.0),
    "nearly certain, both": (-1e-20, -1e-9, 0.0),
    "nearly certain, rejected": (-5.0, -1e-7, 0.0),
    "far apart, rightly": (-0.1, -90.0, -2_000.0),
    "far apart, wrongly": (-90.0, -0.1, -2_000.0),
    "impossible, both": (-100.0, -100.0, 0.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_weights_are_finite_at_the_extremes(name, dtype):
    """300 tokens a response: margins of up to 27,000 nats, odds of certain responses."""
    method, response = registry.find(name), torch.ones(1, 300, dtype=torch.bool)
    for case, (chosen, rejected, ref) in EXTREMES.items():
        logps = [torch.full((1, 300), value, dtype=dtype) for value in (chosen, rejected)]
        refs = [torch.tensor([ref], dtype=dtype)] * 2
        pairs = Pairs(*logps, response, response, *refs, torch.tensor(0.0, dtype=dtype))
        assert weights_of(method, pairs).w.isfinite().all(), case  # and `from_loss` refuses a loss that is not
        assert weights_of(method, pairs).w.dtype == dtype


def test_certain_responses_still_have_odds():
    """p_w -> 1: sigmoid(-o) / (1 - p_w) -> odds_l / p_w, so that the weight keeps its digits: 1 + beta / 3, by hand.

    With one token a response and p_l = 1/4, odds_l = 1/3.
    """
    method = registry.find("orpo") if "orpo" in NAMES else pytest.skip("not there")
    for logp in (-1e-3, -1e-6, -1e-9, -1e-12):
        pairs = one_pair([logp], [math.log(1 / 4)], 0.0, 0.0)
        odds = math.exp(logp) - math.expm1(logp) / 3  # p_w + (1 - p_w) odds_l
        found = weights_of(method, pairs, beta=0.6).w[0, 0].item()
        assert found == pytest.approx(1 + 0.6 / 3 / odds, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_says_that_it_reads(name):
    """NaN in a reference that is not read does no harm, and one that is read shows; so it is with the divergence."""
    method, pairs = registry.find(name), random_pairs()
    nothing = torch.full((7,), math.nan)
    without = method.loss(replace(pairs, ref_chosen=nothing, ref_rejected=nothing), **method.settings)
    assert without.isfinite().all() if not method.reference else without.isnan().all()
    if method.kl:
        with pytest.raises(ValueError, match=r"Pairs\.kl is None"):
            method.loss(replace(pairs, kl=None), **method.settings)
    else:
        assert method.loss(replace(pairs, kl=None), **method.settings).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_what_it_is(name):
    method = registry.find(name)
    asked = inspect.signature(method.loss).parameters
    assert set(asked) - {"pairs"} == set(method.settings) <= set(method.meaning)
    assert all(asked[setting].kind is inspect.Parameter.KEYWORD_ONLY for setting in method.settings)
    assert "beta" in method.settings and all(isinstance(value, float) for value in method.settings.values())
    assert method.formula.startswith("w") and method.formula.count("{") == method.formula.count("}")
    assert method.formula.count(r"\left") == method.formula.count(r"\right")
    assert method.title and method.source and method.curves.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_a_method_stands_alone(name):
    """Its file has its name and imports nothing of this package but `base`, so that any other may go."""
    path = Path(methods.__file__).with_name(f"{name}.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 2 or node.module == "base", ast.unparse(node)


@pytest.mark.parametrize(
    ("name", "epsilon"), [("smoothed_dpo", -0.1), ("smoothed_dpo", 0.6), ("robust_dpo", -0.1), ("robust_dpo", 0.5)]
)
def test_rates_that_are_none(name, epsilon):
    if name not in NAMES:
        pytest.skip("not there")
    with pytest.raises(ValueError, match=f"{name}: epsilon={epsilon}; allowed: from 0"):
        registry.find(name).loss(random_pairs(), beta=0.1, epsilon=epsilon)


def test_smoothing_and_robustness_at_rate_nought_are_dpo(double):
    pairs = random_pairs()
    for name in {"smoothed_dpo", "robust_dpo"} & set(NAMES):
        found = registry.find(name).loss(pairs, beta=0.3, epsilon=0.0)
        assert torch.allclose(found, torch.log1p((-0.3 * pairs.margin()).exp()), rtol=0, atol=1e-12)


def test_the_robust_loss_is_unbiased(double):
    """Over labels that are flipped with probability epsilon its mean is the DPO loss of the right label."""
    method = registry.find("robust_dpo") if "robust_dpo" in NAMES else pytest.skip("not there")
    pairs, settings = random_pairs(), {"beta": 0.3, "epsilon": 0.2}
    mean = 0.8 * method.loss(pairs, **settings) + 0.2 * method.loss(swap(pairs), **settings)
    assert torch.allclose(mean, torch.log1p((-0.3 * pairs.margin()).exp()), rtol=0, atol=1e-12)


def test_names_and_what_is_found():
    assert registry.names() == tuple(sorted(registry.names()))
    assert all(registry.find(name).name == name for name in registry.names())
    own = replace(registry.find(NAMES[0]), name="my own")
    assert registry.find(own) is own
    with pytest.raises(
        ValueError, match=f"method={NAMES[0] + 'x'!r}: no such .*Did you mean {NAMES[0]!r}.*{NAMES[-1]}"
    ):
        registry.find(NAMES[0] + "x")
    with pytest.raises(ValueError, match=r"method='\?': no such method\. There are: "):
        registry.find("?")


def test_a_file_is_all_that_a_method_needs(tmp_path, monkeypatch):
    """A module beside the others is found; a second one of the same name is refused."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    text = 'from prefdyn.methods.base import Method\n\nMETHOD = Method("added", "t", "s", "pairs", "w", "c")\n'
    try:
        (tmp_path / "added.py").write_text(text, encoding="utf-8")
        assert "added" in registry.names() and registry.find("added").title == "t"
        (tmp_path / "added_too.py").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"'added' is defined twice, the second time in added_too\.py"):
            registry.names()
    finally:
        for module in ("added", "added_too"):
            sys.modules.pop(f"{methods.__name__}.{module}", None)
            vars(methods).pop(module, None)
