"""A loss of one's own, written in a notebook: it trains, is measured and keeps its numbers apart, or is refused."""

import sys

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.lab.runs import RunStore
from prefdyn.methods import own, registry
from test_methods import SMALL

P = check(SMALL)


def tempered(pairs, *, beta=2.0, gamma=1.0, tau=1.0):
    """SimPO with a temperature."""
    chosen, rejected = (total / length for total, length in zip(pairs.sums(), pairs.lengths(), strict=True))
    return -F.logsigmoid((beta * (chosen - rejected) - gamma) / tau) * tau  # noqa: F821


def test_a_function_trains_and_is_measured_as_a_file_does(tmp_path):
    """At temperature 1 the function is SimPO: every number is the same, under another key."""
    store = RunStore(tmp_path)
    mine, file = plan.run(P, 0, tempered), plan.run(P, 0, "simpo")
    assert dict(mine.settings) == {"beta": 2.0, "gamma": 1.0, "tau": 1.0} and store.key(mine).startswith("tempered-")
    ends = [store.get(spec).frame("checkpoints") for spec in (mine, file)]
    assert np.array_equal(*(end[["reward_greedy", "kl", "check_loss"]].to_numpy() for end in ends))
    g = [store.get(plan.alignment_run(P, spec)).frame("alignment")[["g", "se", "g_opt"]] for spec in (mine, file)]
    assert np.array_equal(*(one.to_numpy() for one in g))
    cold = plan.run(P, 0, tempered, tau=0.5)
    assert store.key(cold) != store.key(mine)
    assert not np.array_equal(store.get(cold).frame("checkpoints")["kl"], ends[0]["kl"])


def test_it_is_computed_in_other_processes_and_one_more_word_is_another_run(tmp_path):
    shell = InteractiveShell.instance()
    try:
        keys = []
        for factor in ("1.0", "2.0"):
            shell.run_cell(f"def scaled(pairs):\n    return torch.exp(-{factor} * pairs.margin())")
            spec = plan.run(P, 0, shell.user_ns["scaled"])
            keys.append(RunStore(tmp_path).key(spec))
        assert len(set(keys)) == 2
        two = [spec, spec.model_copy(update={"checkpoints": 2})]
        assert len(RunStore(tmp_path).ensure(two, workers=2)) == 2
        RunStore(tmp_path).get(plan.alignment_run(P, spec))
    finally:
        InteractiveShell.clear_instance()


def far(pairs, *, scale=1.0):
    return scale * OUTSIDE * pairs.margin()  # noqa: F821


def inside(pairs):
    from prefdyn.methods import simpo

    return simpo.loss(pairs, beta=1.0, gamma=1.0)


def relative(pairs):
    from . import simpo

    return simpo.loss(pairs, beta=1.0, gamma=1.0)


def nothing(*, beta=1.0):
    return beta


def undecided(pairs, *, beta):
    return beta * pairs.margin()


def named(pairs, *, side="left"):
    return pairs.margin() if side == "left" else -pairs.margin()


def one_number(pairs):
    return pairs.margin().mean()


def constant(pairs):
    return torch.zeros(2)


def infinite(pairs):
    return pairs.margin() / 0.0


def arrays(pairs):
    return np.exp(pairs.margin())


def cut(pairs):
    return pairs.margin().detach()


def breaks(pairs):
    return pairs.margins()


def dpo(pairs):
    return pairs.margin()


def wrapped(pairs):
    return far(pairs)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (far, "far: reads OUTSIDE from outside of the function, .*: make a number a setting with a default"),
        (arrays, "arrays: reads np from outside of the function, .*no numpy"),
        (cut, r"cut: its loss does not depend on the policy's log-probs; detach\(\) and numpy cut the gradient"),
        (wrapped, "wrapped: reads far from outside"),
        (inside, "inside: imports prefdyn.methods; allowed: torch, math"),
        (relative, "relative: imports ."),
        (nothing, "nothing: its first argument is the pairs"),
        (undecided, "undecided: its setting 'beta' needs a number as its default"),
        (named, "named: its setting 'side' needs a number as its default"),
        (one_number, r"one_number: gives \[\] for 2 pairs; a tensor of one loss a pair is needed, \[2\], not a mean"),
        (constant, "constant: its loss does not depend"),
        (infinite, "infinite: the loss of two pairs is .*, and has to be finite"),
        (breaks, "breaks: fails on two pairs .AttributeError.* torch's operations"),
        (dpo, "method=dpo: there is a method of this name"),
        (
            lambda pairs: pairs.margin(),
            "method=<lambda>: a loss of one's own is a function with a name, written with def",
        ),
        (torch.nn.ReLU(), "method=ReLU: .* is a function with a name"),
    ],
)
def test_what_cannot_travel_or_is_no_loss_of_pairs_is_refused_by_name(loss, said):
    with pytest.raises(ValueError, match=said):
        plan.run(P, 0, loss)


def test_a_function_without_text_and_settings_that_it_does_not_have():
    space = {}
    exec("def unseen(pairs):\n    return pairs.margin()", space)
    with pytest.raises(ValueError, match="unseen: its text cannot be had"):
        own.from_function(space["unseen"])
    with pytest.raises(
        ValueError, match=r"tempered: no such setting: temperature. .*There are: beta, gamma, tau; and "
    ):
        plan.run(P, 0, tempered, temperature=2.0)
    with pytest.raises(ValueError, match=r"tempered: tau: given '0.5' \(str\); allowed: a number"):
        plan.run(P, 0, tempered, tau="0.5")
    for method, given, said in (
        (tempered, {"lr": -1.0}, r"lr: given -1.0 \(float\); allowed: a number > 0"),
        (
            "grpo",
            {"gruop": 4},
            "grpo: no such setting: gruop. Did you mean 'group'.* clip; and .*: reward, leash, group, lr",
        ),
        ("ppo", {"group": 4}, "ppo: no such setting: group. .*There are: clip; and beside settings: reward, leash, lr"),
    ):
        with pytest.raises(ValueError, match=said):
            plan.run(P, 0, method, **given)
    assert "tempered" not in registry.names() and "test_own" in sys.modules
