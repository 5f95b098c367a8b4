"""Methods by name: each trains, is measured and keeps its numbers apart; one more is one more file."""

import sys

import numpy as np
import pytest
import torch
from prefdyn import methods
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.lab import recipes
from prefdyn.lab.fingerprint import code_fingerprint
from prefdyn.lab.runs import RunStore
from prefdyn.lens import controls
from prefdyn.lens.likelihood import token_logps
from prefdyn.methods import registry
from prefdyn.methods.base import Method, PairObjective
from toys.models import random_batch

SMALL = {
    "profile": "smoke",
    "pairs": 24,
    "check": 16,
    "demonstrations": 64,
    "validation": 4,
    "held_out": 6,
    "width": 16,
    "sft_steps": 20,
    "sft_batch": 16,
    "batch": 8,
    "epochs": 2.0,
    "lr": 5e-3,
    "checkpoints": 3,
    "probe": 16,
}
P = check(SMALL)
OFFLINE = registry.names("pairs")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


def test_there_are_methods_of_every_kind_of_data():
    assert {"sft", "dpo", "ppo"} <= set(registry.names()) and set(OFFLINE) < set(registry.names())
    assert {registry.find(name).takes for name in registry.names()} == {"demonstrations", "pairs", "rollouts"}


def test_a_name_that_is_none_is_an_error_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"'simp'.* Did you mean 'simpo'.* There are: .*dpo"):
        registry.find("simp")
    with pytest.raises(ValueError, match=r"dpo: no such setting: gamma; there are: beta"):
        registry.settings("dpo", {"gamma": 1.0})
    assert registry.settings("dpo", {"beta": 0.3}) == (("beta", 0.3),)


@pytest.mark.parametrize("name", OFFLINE)
def test_every_method_of_pairs_trains_and_is_measured(store, name):
    """Its loss falls on the pairs, and its G, checked against backward passes, splits into halves and thirds."""
    spec = plan.run(P, 0, name, lr=5e-3)
    run = store.get(spec)
    assert run.key.startswith(f"{name}-") and dict(spec.settings) == dict(registry.find(name).settings)
    table = run.frame("checkpoints")
    assert np.isfinite(table[["check_loss", "kl", "check_margin"]]).all(axis=None)
    objective = spec.probe(store, recipes.final_policy(run)[1], "train")
    index = torch.arange(objective.size)
    losses = []
    for step in (0, spec.steps()[-1]):
        model, _ = recipes.load_checkpoint(run, step)
        batch = objective.batch(index)
        with torch.no_grad():
            losses.append(objective.metrics(token_logps(model, batch), batch, index)["loss"])
    assert losses[1] < losses[0]
    measured = store.get(plan.alignment_run(P, spec, "check"))
    g = measured.frame("alignment").pivot(index="step", columns="component", values="g")
    assert set(g.columns) == set(controls.CONTROLS)
    assert np.allclose(g["positive"] + g["negative"], g["full"], rtol=1e-3, atol=1e-5)
    assert (measured.frame("sequences").groupby("step").size() == 16).all()


def test_methods_and_their_settings_do_not_share_keys(store):
    specs = [plan.run(P, 0, name) for name in OFFLINE] + [plan.run(P, 0, "dpo", beta=0.3)]
    assert len({store.key(spec) for spec in specs}) == len(specs)
    assert store.key(plan.run(P, 0, "dpo")) == store.key(plan.run(P, 0, "dpo", beta=P.beta))


MINE = """
import torch

from .base import Method


def loss(pairs, *, tau):
    chosen, rejected = pairs.sums()
    return torch.nn.functional.softplus((rejected - chosen) / tau)


METHOD = Method("mine", "Mine", "nobody", "pairs", "w", "falls", loss, {"tau": 5.0}, {"tau": "temperature"})
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A method of ten lines in a file of its own, where methods are looked for."""
    assert len([line for line in MINE.splitlines() if line.strip()]) <= 10
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield tmp_path / "mine.py"
    sys.modules.pop("prefdyn.methods.mine", None)


def test_one_more_method_is_one_more_file(store, mine):
    """It trains, is measured, and its numbers are kept under its own code."""
    spec = plan.run(P, 0, "mine", tau=3.0)
    table = store.get(spec).frame("checkpoints")
    assert table["check_loss"].iloc[-1] < table["check_loss"].iloc[0]
    assert np.isfinite(store.get(plan.alignment_run(P, spec)).frame("alignment")["moved"].iloc[0])
    key = store.key(spec)
    mine.write_text(MINE.replace("/ tau", "/ (2 * tau)"))
    code_fingerprint.cache_clear()
    assert store.key(spec) != key
    assert store.key(plan.run(P, 0, "dpo")) == store.key(plan.run(P, 0, "dpo"))


def sided(rows: int, seed: int):
    return random_batch(rows, seed), random_batch(rows, seed + 1)


def test_a_method_that_compares_with_other_prompts_gets_their_replies():
    """Three blocks of rows: chosen, rejected, and replies to other prompts, which have no weight."""
    (chosen, rejected), (others, _) = sided(4, 1), sided(4, 5)
    zero = torch.zeros(4)
    objective = PairObjective(registry.find("kto"), chosen, rejected, zero, zero, others, zero)
    index = torch.tensor([2, 0])
    batch = objective.batch(index)
    assert len(batch) == 6
    logps = -torch.rand(batch.ids.shape, generator=torch.Generator().manual_seed(0)) * batch.response
    weights = objective.weights(logps, batch, index)
    assert (
        (weights.w[4:] == 0).all() and (weights.unit[4:] == -1).all() and (weights.w[:2][batch.response[:2]] > 0).all()
    )
    assert objective.pairs(logps, batch.response, index).kl == 0  # never below
    with pytest.raises(ValueError, match="kto: replies to other prompts"):
        PairObjective(registry.find("kto"), chosen, rejected, zero, zero)
    with pytest.raises(ValueError, match="dpo: no such setting: tau"):
        PairObjective(registry.find("dpo"), chosen, rejected, zero, zero, tau=1.0)
    with pytest.raises(ValueError, match="differ in number"):
        PairObjective(registry.find("ipo"), chosen, rejected, zero, zero[:3])


def test_dpo_by_autograd_is_dpo_as_it_is_written_down():
    """The general objective of DPO's loss and the one with its analytic weights and omega."""
    chosen, rejected = sided(5, 3)
    ref = -torch.rand(2, 5, generator=torch.Generator().manual_seed(1)) * 9
    written = registry.find("dpo").objective(chosen, rejected, *ref, beta=0.3)
    general = PairObjective(registry.find("dpo"), chosen, rejected, *ref, beta=0.3)
    index = torch.arange(5)
    batch = written.batch(index)
    logps = -torch.rand(batch.ids.shape, generator=torch.Generator().manual_seed(0)) * batch.response
    ours, theirs = (objective.weights(logps, batch, index) for objective in (written, general))
    assert torch.allclose(ours.w, theirs.w, atol=1e-7) and torch.equal(ours.unit, theirs.unit)
    assert torch.allclose(theirs.strength / theirs.strength.sum(), ours.strength / ours.strength.sum(), atol=1e-6)
    assert written.metrics(logps, batch, index) == general.metrics(logps, batch, index)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"takes": "chats"}, "takes='chats'"), ({"settings": {"beta": 1.0}}, "what beta means is not said")],
)
def test_a_record_that_does_not_hold_together_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Method(**{"name": "x", "title": "X", "source": "y", "takes": "pairs", "formula": "w", "curves": "c"} | given)
