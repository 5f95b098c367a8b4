"""Controlled variants by name: what they scale and when, and what cannot be asked for."""

import pytest
from prefdyn.book import plan, profiles, variants
from prefdyn.book.params import ParameterError, check
from prefdyn.lens import controls

P = check({"profile": "smoke", "floor": 0.25, "switch_at": 0.5, "negative_scale": 0.3})


def at(method: str, name: str, step: int, steps: int = 9) -> dict[str, float]:
    """The factors of a variant's parts at a step of a training of 9 updates (the last is number 8)."""
    control = variants.control(P, method, name, steps)
    return {part: controls.factor(rows, step) for part, rows in control.factors.items()}


@pytest.mark.parametrize(
    ("method", "name", "first", "middle", "last"),
    [
        # halfway between 1 and the floor, 1/4, is 5/8; the switch is at round(0.5 * 9) = 4
        (
            "dpo",
            "shift",
            {"positive": 1, "negative": 0.25},
            {"positive": 0.625, "negative": 0.625},
            {"positive": 0.25, "negative": 1},
        ),
        (
            "dpo",
            "reverse",
            {"positive": 0.25, "negative": 1},
            {"positive": 0.625, "negative": 0.625},
            {"positive": 1, "negative": 0.25},
        ),
        (
            "dpo",
            "switch",
            {"positive": 1, "negative": 0},
            {"positive": 0, "negative": 1},
            {"positive": 0, "negative": 1},
        ),
        ("dpo", "scaled", {"negative": 0.3}, {"negative": 0.3}, {"negative": 0.3}),
        ("ppo", "decay", {"negative": 1}, {"negative": 0.625}, {"negative": 0.25}),
        ("ppo", "early", {"negative": 1}, {"negative": 0}, {"negative": 0}),
        ("ppo", "late", {"negative": 0}, {"negative": 1}, {"negative": 1}),
        ("ppo", "scaled", {"negative": 0.3}, {"negative": 0.3}, {"negative": 0.3}),
        ("ppo", "without-top", {"top": 0}, {"top": 0}, {"top": 0}),
        ("ppo", "without-bottom", {"bottom": 0}, {"bottom": 0}, {"bottom": 0}),
        ("ppo", "heavy-top", {"top": 2}, {"top": 2}, {"top": 2}),
    ],
)
def test_variants_by_hand(method, name, first, middle, last):
    for step, expected in ((0, first), (4, middle), (8, last)):
        assert at(method, name, step) == pytest.approx(expected)


def test_a_hard_switch_changes_from_one_update_to_the_next():
    assert at("dpo", "switch", 3) == {"positive": 1, "negative": 0}
    assert at("dpo", "switch", 4) == {"positive": 0, "negative": 1}


def test_every_variant_can_be_asked_for_and_every_name_is_a_variant():
    assert {name for group in variants.VARIANTS.values() for name in group} == set(profiles.VARIANTS)
    assert variants.names(P, "dpo") == list(variants.VARIANTS["pairs"]) == variants.names(P, "simpo")
    assert variants.names(P, "ppo") == list(variants.VARIANTS["rollouts"]) == variants.names(P, "grpo")
    assert variants.names(P, "sft") == []
    some = check({"profile": "smoke", "variants": "late, shift"})
    assert (variants.names(some, "dpo"), variants.names(some, "ppo")) == (["shift"], ["late"])


def test_free_schedules_become_a_variant():
    p = check({"profile": "smoke", "variants": [], "dpo_negative": [[0, 0], [2, 0], [4, 1.5]]})
    assert (variants.names(p, "dpo"), variants.names(p, "ppo")) == (["free"], [])
    control = variants.control(p, "dpo", "free", 8)
    assert control == controls.Control(factors={"negative": ((0, 0.0), (2, 0.0), (4, 1.5))})
    assert [controls.factor(control.factors["negative"], s) for s in (1, 3, 6)] == [0, 0.75, 1.5]
    with pytest.raises(
        ParameterError, match=r"dpo_negative: schedule: given a row at step 4, and training ends after 3"
    ):
        variants.control(p, "dpo", "free", 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"variants": ["shft"]}, "variants: given ['shft'] (list); allowed: a list of some of shift, switch, "),
        ({"variants": "shift,best"}, "variants: given 'shift,best' (str)"),
        ({"switch_at": 1.0}, "switch_at: given 1.0 (float); allowed: a number > 0 and < 1"),
        ({"floor": -0.1}, "floor: given -0.1 (float); allowed: a number >= 0 and <= 1"),
        (
            {"dpo_negative": [[4, 1.0], [2, 0.0]]},
            "dpo_negative: given [[4, 1.0], [2, 0.0]] (list) (schedule: given the steps [4, 2]",
        ),
        ({"ppo_positive": [[0, -1.0]]}, "given the row [0, -1]"),
        (
            {"ppo_positive": [[0.5, 1.0]]},
            "ppo_positive: given [[0.5, 1.0]] (list); allowed: a list of rows [step, factor]",
        ),
        ({"ppo_negative": "fast"}, "ppo_negative: given 'fast' (str); allowed: a list of rows [step, factor]"),
        ({"ppo_negative": [[0, "a"]]}, "ppo_negative: given [[0, 'a']] (list); allowed: a list of rows [step, factor]"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_what_can(given, said):
    with pytest.raises(ParameterError) as error:
        check({"profile": "smoke"} | given)
    assert said in str(error.value)


def test_unknown_variants_and_switches_that_never_happen():
    with pytest.raises(
        ParameterError, match=r"variant 'decay' of dpo: there is none; allowed: shift, switch, reverse, scaled"
    ):
        variants.control(P, "dpo", "decay", 8)
    with pytest.raises(ParameterError, match="variant 'free' of ppo: there is none"):
        variants.control(P, "ppo", "free", 8)
    early = check({"profile": "smoke", "switch_at": 0.01})
    with pytest.raises(
        ParameterError, match=r"switch_at: given 0.01 \(float\), update 0 of 8; allowed: a share of training"
    ):
        variants.control(early, "ppo", "late", 8)


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_a_variant_is_the_plain_run_but_for_its_control(method):
    for name in variants.names(P, method):
        run = plan.variant_run(P, 1, method, name)
        assert run.control != controls.FULL
        assert run.model_copy(update={"control": controls.FULL}) == plan.run(P, 1, method)
