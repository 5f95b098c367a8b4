"""Controls: parts that sum to the whole, by hand and on random weights."""

import pytest
import torch
from prefdyn.lens import controls
from prefdyn.lens.controls import Control, check_schedule, factor
from prefdyn.lens.weights import TokenWeights
from prefdyn.methods.dpo import dpo_omega, dpo_weights
from prefdyn.methods.ppo import ppo_weights

# Three pairs of one-token responses, chosen rows first. Omegas 0.2, 0.9, 0.4; beta 1: w = +-omega / 3.
OMEGA = torch.tensor([0.2, 0.9, 0.4])
RESPONSE = torch.tensor([[False, True]] * 6)
PAIRS = dpo_weights(RESPONSE, OMEGA, beta=1.0)


def column(control: str) -> list[float]:
    """Weights of the six responses, times 3."""
    w = controls.apply(control, PAIRS)
    assert (w[:, 0] == 0).all()
    return (3 * w[:, 1]).tolist()


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ("full", [0.2, 0.9, 0.4, -0.2, -0.9, -0.4]),
        ("positive", [0.2, 0.9, 0.4, 0, 0, 0]),
        ("negative", [0, 0, 0, -0.2, -0.9, -0.4]),
        ("uniform", [0.5, 0.5, 0.5, -0.5, -0.5, -0.5]),  # (0.2 + 0.9 + 0.4) / 3
        ("top", [0, 0.9, 0, 0, -0.9, 0]),
        ("middle", [0, 0, 0.4, 0, 0, -0.4]),
        ("bottom", [0.2, 0, 0, -0.2, 0, 0]),
    ],
)
def test_by_hand(control, expected):
    assert column(control) == pytest.approx(expected)


def test_every_control_is_tested_by_hand():
    assert set(controls.CONTROLS) == {"full", "positive", "negative", "uniform", "top", "middle", "bottom"}


# Rollouts before their first step, with advantages 3, -1, 1/2 in one reply and -2, 0, 4 in another: w = A / 6.
ADVANTAGES = torch.tensor([[9.0, 3.0, -1.0, 0.5], [9.0, -2.0, 0.0, 4.0]])
TOKENS = ppo_weights(
    torch.zeros(2, 4), torch.zeros(2, 4), ADVANTAGES, torch.tensor([[False, True, True, True]] * 2), clip=0.2
)


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ("full", [3, -1, 0.5, -2, 0, 4]),
        ("positive", [3, 0, 0.5, 0, 0, 4]),
        ("negative", [0, -1, 0, -2, 0, 0]),
        ("uniform", [1.75, -1.75, 1.75, -1.75, 0, 1.75]),  # (3 + 1 + 1/2 + 2 + 0 + 4) / 6
        ("top", [3, 0, 0, 0, 0, 4]),  # tokens of one reply are in different thirds
        ("middle", [0, -1, 0, -2, 0, 0]),
        ("bottom", [0, 0, 0.5, 0, 0, 0]),
    ],
)
def test_tokens_of_rollouts_by_hand(control, expected):
    w = controls.apply(control, TOKENS)
    assert (w[:, 0] == 0).all()
    assert (6 * w[:, 1:]).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_uniform_does_not_wake_what_the_clip_holds():
    """Ratio 2, advantages 1 and -3: the first is held and stays at 0, the second gets the mean, 2, for its 3."""
    now, response = torch.full((1, 2), 2.0).log(), torch.ones(1, 2, dtype=torch.bool)
    weights = ppo_weights(now, torch.zeros(1, 2), torch.tensor([[1.0, -3.0]]), response, clip=0.2)
    assert controls.apply("uniform", weights)[0].tolist() == pytest.approx([0, 2 * -2 / 2])


@pytest.fixture
def weights() -> TokenWeights:
    rng = torch.Generator().manual_seed(0)
    response = torch.rand(22, 7, generator=rng) < 0.6
    return dpo_weights(response, torch.rand(11, generator=rng), beta=0.1)


@pytest.fixture
def rollout_weights() -> TokenWeights:
    rng = torch.Generator().manual_seed(1)
    response = torch.rand(22, 7, generator=rng) < 0.6
    now, then, advantages = (torch.randn(22, 7, generator=rng) for _ in range(3))
    return ppo_weights(now / 3, then / 3, advantages, response, clip=0.2)


@pytest.mark.parametrize("objective", ["weights", "rollout_weights"])
@pytest.mark.parametrize("parts", [("positive", "negative"), ("top", "middle", "bottom")])
def test_parts_sum_to_the_whole_and_do_not_overlap(request, objective, parts):
    weights = request.getfixturevalue(objective)
    applied = torch.stack([controls.apply(part, weights) for part in parts])
    assert torch.equal(applied.sum(0), weights.w)
    assert ((applied != 0).sum(0) <= 1).all()
    assert ((applied != 0).flatten(1).sum(1) > 0).all()


def test_uniform_keeps_the_mean_strength_and_the_signs(weights):
    w = controls.apply("uniform", weights)
    inside = weights.unit >= 0
    assert torch.allclose(w[inside].abs(), weights.strength.mean() * 0.1 / 11)
    assert torch.equal(w.sign(), weights.w.sign())


@pytest.mark.parametrize(
    ("units", "sizes"), [(3, [1, 1, 1]), (6, [2, 2, 2]), (7, [3, 2, 2]), (8, [3, 3, 2]), (2, [1, 1, 0])]
)
def test_thirds_have_equal_sizes_and_follow_the_strength(units, sizes):
    strength = torch.rand(units, generator=torch.Generator().manual_seed(1))
    group = controls.thirds(strength)
    assert torch.bincount(group, minlength=3).tolist() == sizes
    assert group[strength.argsort()].tolist() == sorted(group.tolist())


@pytest.mark.parametrize("strength", [[0.5, 0.5, 0.5], [0.5, 0.5 + 1e-6, 0.5 - 1e-6], [0.7]])
def test_there_are_no_thirds_of_ties(strength):
    """Equal but for float32 noise: an order would be made up."""
    strength = torch.tensor(strength)
    assert (controls.thirds(strength) == -1).all()
    response = torch.tensor([[False, True]] * 2 * len(strength))
    weights = dpo_weights(response, strength, beta=1.0)
    for control in controls.THIRDS:
        w = controls.apply(control, weights)
        assert w[response].isnan().all() and (w[~response] == 0).all()
        assert torch.equal(controls.apply_in_training(Control(part=control), weights, 0), weights.w)
        left_out = Control(factors={control: ((0, 0.0),)})
        assert torch.equal(controls.apply_in_training(left_out, weights, 0), weights.w)  # there is nobody to leave out


def test_small_but_real_differences_are_no_ties():
    assert controls.thirds(torch.tensor([0.5, 0.5001, 0.4999])).tolist() == [1, 2, 0]


def test_training_uses_the_control_where_it_is_defined(weights):
    for control in controls.CONTROLS:
        trained = controls.apply_in_training(Control(part=control), weights, step=3)
        assert torch.equal(trained, controls.apply(control, weights))


def test_uniform_holds_pairs_that_dpo_has_long_forgotten():
    """Margins of 0 and 2,000 nats at beta 0.1: omega 1/2 and, to float32, nothing; uniform gives both 1/4."""
    omega = dpo_omega(torch.tensor([0.0, 2_000.0]), beta=0.1)
    weights = dpo_weights(torch.tensor([[False, True]] * 4), omega, beta=0.1)
    w = controls.apply("uniform", weights)
    assert (w[:, 1] * 2 / 0.1).tolist() == pytest.approx([0.25, 0.25, -0.25, -0.25])


def test_unknown_controls_list_the_known_ones():
    with pytest.raises(ValueError, match=r"control='best': must be one of full, positive, .*bottom"):
        controls.apply("best", PAIRS)


@pytest.mark.parametrize("strength", [torch.zeros(0), torch.zeros(2, 2)])
def test_thirds_need_a_list_of_units(strength):
    with pytest.raises(ValueError, match="at least one unit"):
        controls.thirds(strength)


# Steps 0 to 4: rises to 1; from 4 to 8 constant; a jump at 8 from 1 to 0.2; constant from there.
ROWS = ((0, 0.0), (4, 1.0), (8, 1.0), (8, 0.2))


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0), (1, 0.25), (3, 0.75), (4, 1), (6, 1), (7, 1), (8, 0.2), (9, 0.2), (500, 0.2)]
)
def test_schedules_by_hand(step, expected):
    assert factor(ROWS, step) == pytest.approx(expected)


def test_a_schedule_is_constant_outside_of_its_rows():
    assert [factor(((5, 0.3), (7, 0.9)), step) for step in (0, 4, 5, 6, 7, 8)] == pytest.approx(
        [0.3, 0.3, 0.3, 0.6, 0.9, 0.9]
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ((), "given no rows"),
        (((3, 1.0), (2, 1.0)), r"given the steps \[3, 2\]"),
        (((1, 1.0), (1, 0.5), (1, 0.0)), "at most twice the same"),
        (((-1, 1.0),), r"given the row \[-1, 1\]"),
        (((0, -0.5),), r"given the row \[0, -0.5\]"),
        (((0, float("nan")),), r"given the row \[0, nan\]"),
        (((0, 1.0), (65, 0.0)), "a row at step 65, and training ends after 64"),
    ],
)
def test_impossible_schedules_are_refused_with_what_is_allowed(rows, said):
    with pytest.raises(ValueError, match=said) as error:
        check_schedule(rows, steps=64)
    assert "allowed: rows of [step, factor]" in str(error.value)


def test_possible_schedules_pass():
    assert check_schedule(ROWS, steps=8) == ROWS


def test_scaled_parts_by_hand():
    """Negative learning fades from 1 to 0 over 4 updates: at update 1 each negative weight counts three quarters."""
    fading = Control(factors={"negative": ((0, 1.0), (4, 0.0))})
    expected = {
        0: [0.2, 0.9, 0.4, -0.2, -0.9, -0.4],
        1: [0.2, 0.9, 0.4, -0.15, -0.675, -0.3],
        4: [0.2, 0.9, 0.4, 0, 0, 0],
    }
    for step, weights in expected.items():
        w = controls.apply_in_training(fading, PAIRS, step)
        assert (w[:, 0] == 0).all()
        assert (3 * w[:, 1]).tolist() == pytest.approx(weights)


def test_scaled_thirds_and_signs_multiply():
    """Advantages 3, -1, 1/2, -2, 0, 4: top are 3 and 4, bottom 1/2 and 0. Top counts twice, what is positive half."""
    both = Control(factors={"top": ((0, 2.0),), "bottom": ((0, 0.0),), "positive": ((0, 0.5),)})
    w = controls.apply_in_training(both, TOKENS, 0)
    assert (6 * w[:, 1:]).flatten().tolist() == pytest.approx([3, -1, 0, -2, 0, 4])


def test_a_part_and_factors_go_together():
    """Positive learning alone, without its top third."""
    control = Control(part="positive", factors={"top": ((0, 0.0),)})
    w = controls.apply_in_training(control, PAIRS, 0)
    assert (3 * w[:, 1]).tolist() == pytest.approx([0.2, 0, 0.4, 0, 0, 0])


def test_factors_of_1_change_nothing(rollout_weights):
    control = Control(factors={name: ((0, 1.0),) for name in controls.SCALED})
    assert torch.equal(controls.apply_in_training(control, rollout_weights, 5), rollout_weights.w)


def test_a_control_of_unknown_parts_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"control='best': must be one of full, .*bottom"):
        Control(part="best")
    with pytest.raises(ValueError, match=r"factors of 'loud': must be of some of positive, negative, bottom"):
        Control(factors={"loud": ((0, 1.0),)})
    with pytest.raises(ValueError, match="given no rows"):
        Control(factors={"negative": ()})
