"""Methods of fresh replies, several to a prompt: advantages by hand, weights by autograd, runs end to end."""

import math

import numpy as np
import pytest
import torch
from prefdyn.book import plan
from prefdyn.book.params import ParameterError, check
from prefdyn.lab import recipes
from prefdyn.lab.runs import RunStore
from prefdyn.lens import alignment
from prefdyn.lens.batch import Batch
from prefdyn.lens.likelihood import token_logps
from prefdyn.lens.losses import from_loss
from prefdyn.methods import registry, rollout
from prefdyn.methods.rollout import Rollouts
from prefdyn.methods.surrogate import surrogate
from toys.models import build, lift_float32, random_batch

ALL = ("reinforce", "rloo", "grpo", "dr_grpo", "dapo", "best_of_n", "online_dpo")
GROUPED = [name for name in ALL if name in registry.names()]  # a file less leaves the others as they are
SURROGATES = [name for name in GROUPED if name not in ("best_of_n", "online_dpo")]


def test_these_are_the_methods_of_rollouts():
    assert set(registry.names("rollouts")) <= {*ALL, "ppo"}


def replies(returns: list[float], lengths: list[int], group: int = 2) -> Rollouts:
    """Replies of given returns and lengths, all after a prompt of one token; log-probs are -1 a token."""
    width = 1 + max(lengths)
    response = torch.tensor([[1 <= t <= n for t in range(width)] for n in lengths])
    attention = response | (torch.arange(width) == 0)
    ids = torch.arange(width).repeat(len(lengths), 1)
    old = -response.to(torch.get_default_dtype())
    return Rollouts(Batch(ids, attention, response), old, old.clone(), torch.tensor(returns), group, 1.0, longest=4)


def weights(name: str, rollouts: Rollouts) -> torch.Tensor:
    objective = registry.find(name).rollouts(rollouts, **registry.find(name).settings)
    index = torch.arange(objective.size)
    return objective.weights(rollouts.old, objective.batch(index), index).w


# Two prompts, two replies each: returns 3 and 1 (mean 2, deviation 1), then 5 and 5 (a group of equals).
# Lengths 1, 2, 1, 2, and 4 at most; the mean return is 14 / 4 = 3.5.
RETURNS, LENGTHS = [3.0, 1.0, 5.0, 5.0], [1, 2, 1, 2]
BY_HAND = {
    # (R - 3.5) / (4 replies * 4 tokens at most)
    "reinforce": [[-0.5 / 16], [-2.5 / 16] * 2, [1.5 / 16], [1.5 / 16] * 2],
    # k / (k - 1) = 2 times the distance from the group's mean: 3 - 1 = 2 and 1 - 3 = -2
    "rloo": [[2 / 16], [-2 / 16] * 2, [0.0], [0.0] * 2],
    # one deviation, divided by the reply's own length and 4 replies
    "grpo": [[1 / 4], [-1 / 8] * 2, [0.0], [0.0] * 2],
    "dr_grpo": [[1 / 16], [-1 / 16] * 2, [0.0], [0.0] * 2],
    # one deviation, divided by the 3 tokens of the only group with a spread
    "dapo": [[1 / 3], [-1 / 3] * 2, [0.0], [0.0] * 2],
}


@pytest.mark.parametrize("name", SURROGATES)
def test_weights_by_hand(name, double):
    w = weights(name, replies(RETURNS, LENGTHS))
    for row, expected in zip(w, BY_HAND[name], strict=True):
        assert row[1 : 1 + len(expected)].tolist() == pytest.approx(expected, abs=2e-6)  # the spread is 1 + 1e-6
        assert (row[1 + len(expected) :] == 0).all() and row[0] == 0


def test_best_of_n_imitates_the_best_and_of_equals_the_first(double):
    """Replies 0 and 2: 1/2 on each of their tokens, of which both have one."""
    objective = registry.find("best_of_n").rollouts(replies(RETURNS, LENGTHS))
    batch = objective.batch(torch.arange(2))
    w = objective.weights(None, batch, torch.arange(2)).w
    assert objective.size == 2 and w[batch.response].tolist() == [0.5, 0.5]


def test_online_dpo_prefers_the_best_to_the_worst_and_leaves_out_equals(double):
    """One pair, at the reference: omega is 1/2, so the weights are +-beta / 2 on one and on two tokens."""
    objective = registry.find("online_dpo").rollouts(replies(RETURNS, LENGTHS), beta=0.3)
    index = torch.arange(1)
    batch = objective.batch(index)
    w = objective.weights(-batch.response.double(), batch, index).w
    assert objective.size == 1 and w[batch.response].tolist() == pytest.approx([0.15, -0.15, -0.15])
    assert registry.find("online_dpo").rollouts(replies([5.0, 5.0], [1, 2]), beta=0.3) is None


@pytest.mark.parametrize("name", [name for name in GROUPED if name != "reinforce"])
def test_one_reply_to_a_prompt_has_nothing_to_be_compared_with(name):
    with pytest.raises(ValueError, match=f"{name}: group=1: at least 2 replies"):
        registry.find(name).rollouts(replies([1.0, 2.0], [1, 1], group=1), **registry.find(name).settings)
    with pytest.raises(ValueError, match="group=3: must divide"):
        replies([1.0, 2.0], [1, 1], group=3)


@pytest.mark.parametrize("name", SURROGATES)
def test_weights_are_those_of_the_loss_by_autograd(name, double):
    """Away from the policy that sampled, with tokens on both sides of the clip, on a part of the replies."""
    rng = torch.Generator().manual_seed(3)
    whole = replies([3.0, 1.0, 5.0, 4.0, 0.0, 2.0], [3, 4, 2, 4, 1, 4])
    objective = registry.find(name).rollouts(whole, **registry.find(name).settings)
    index = torch.tensor([4, 0, 3])
    batch = objective.batch(index)
    old = objective.old_logps[index]
    now = (old + 0.4 * torch.randn(old.shape, generator=rng)) * batch.response
    expected = from_loss(lambda x: objective.loss(x, batch.response, index), now, batch.response)
    found = objective.weights(now, batch, index)
    assert torch.allclose(found.w, expected.w, atol=1e-15) and (found.w[batch.response] == 0).any()
    assert objective.metrics(now, batch, index)["loss"] == pytest.approx(
        objective.loss(now, batch.response, index).item()
    )


@pytest.mark.parametrize("name", SURROGATES)
def test_scores_and_weights_give_the_inner_product_of_gradients(name, double, monkeypatch):
    """sum w a = <grad L, d> to 1e-8, with grad L by a backward pass of the loss through the model."""
    lift_float32(monkeypatch)
    model, batch = build("gpt_neox"), random_batch(6, 2)
    old = token_logps(model, batch).detach() + 0.05 * batch.response
    whole = Rollouts(batch, old, old, torch.tensor([1.0, 2.0, 0.0, 5.0, 4.0, 4.5]).double(), 2, 1.0, longest=9)
    objective = registry.find(name).rollouts(whole, **registry.find(name).settings)
    index = torch.arange(6)
    direction = alignment.target_direction(model, random_batch(3, 7))
    logps, scores = alignment.token_scores(model, batch, direction)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(objective.loss(token_logps(model, batch), batch.response, index), list(named.values()))
    expected = -sum((g * direction[n]).sum() for n, g in zip(named, grads, strict=True))
    found = (objective.weights(logps, batch, index).w * scores).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-8)


def test_grpo_says_nothing_by_its_loss(double):
    """Before any step the ratio is 1, so the loss is minus the mean advantage: 0, whatever was earned."""
    objective = registry.find("grpo").rollouts(replies(RETURNS, LENGTHS), clip=0.2)
    index = torch.arange(4)
    assert objective.loss(objective.old_logps, objective.rollouts.response, index).item() == pytest.approx(0, abs=1e-12)
    assert objective.weights(objective.old_logps, objective.rollouts, index).w.abs().sum() > 0.4


def test_what_a_token_counts(double):
    """Of 1 + 2 + 2 + 4 = 9 tokens in 4 replies of 4 tokens at most."""
    response = replies([0.0] * 4, [1, 2, 2, 4]).batch.response
    assert rollout.token_count(response, "token").item() == 9
    assert rollout.token_count(response, "reply").tolist() == [[4], [8], [8], [16]]
    assert rollout.token_count(response, "limit", 4).item() == 16
    with pytest.raises(ValueError, match="per='row'"):
        rollout.token_count(response, "row")


def test_advantages_have_the_shape_of_the_rollouts():
    with pytest.raises(ValueError, match="must share one shape"):
        surrogate(replies(RETURNS, LENGTHS), torch.zeros(4, 2), 0.2, 0.2, "token")


SMALL = {
    "profile": "smoke",
    "pairs": 16,
    "check": 16,
    "demonstrations": 128,
    "validation": 4,
    "held_out": 6,
    "width": 16,
    "sft_steps": 40,
    "sft_batch": 16,
    "batch": 8,
    "checkpoints": 3,
    "iterations": 4,
    "rollouts": 16,
    "ppo_batch": 8,
    "ppo_lr": 3e-3,
    "ppo_probe": 16,
}
P = check(SMALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", GROUPED)
def test_every_method_of_fresh_replies_trains_and_is_measured(store, name):
    spec = plan.run(P, 0, name)
    run = store.get(spec)
    steps, table = run.frame("steps"), run.frame("checkpoints")
    assert run.key.startswith(f"{name}-") and (steps["updates"] > 0).all()
    assert np.isfinite(steps[["reward", "kl", "entropy", "spread", "loss"]]).all(axis=None)
    assert table["kl"].iloc[0] == pytest.approx(0, abs=1e-5) and table["kl"].iloc[-1] > 0
    assert steps["kl"].iloc[0] == pytest.approx(0, abs=1e-4)  # the first replies are the reference's own
    if name in SURROGATES:
        assert steps["clip_fraction"].notna().all() and steps["ratio_max"].iloc[0] > 0
    measured = store.get(plan.alignment_run(P, spec, "check"))
    g = measured.frame("alignment").pivot(index="step", columns="component", values="g")
    assert np.allclose(g["positive"] + g["negative"], g["full"], rtol=1e-3, atol=1e-5)


def test_the_same_prompts_replies_and_rewards_serve_every_method(store):
    """Before any update all methods see the same replies: one sampler, one reward, one penalty."""
    first = [store.get(plan.run(P, 0, name)).frame("steps").iloc[0] for name in GROUPED]
    for name in ("examples", "reward", "return", "spread", "length"):
        assert len({step[name] for step in first}) == 1


def test_positive_or_negative_samples_alone(store):
    """REINFORCE with the weights above 0, or below: two runs of their own from the same first replies."""
    specs = [plan.run(P, 0, "reinforce", part=part) for part in ("full", "positive", "negative")]
    assert len({store.key(spec) for spec in specs}) == 3
    rewards = [store.get(spec).frame("steps")["reward"].tolist() for spec in specs]
    assert len({row[0] for row in rewards}) == 1 and len({tuple(row) for row in rewards}) == 3


def test_an_interrupted_run_ends_as_if_it_had_not_been(store, tmp_path, monkeypatch):
    """Stopped in its third iteration, continued by another store: the same steps and weights."""
    spec = plan.run(P, 0, "rloo")
    whole, calls = store.get(spec), []
    iterate = type(spec)._iterate

    def stop(self, step, *rest):
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return iterate(self, step, *rest)

    other = RunStore(tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(type(spec), "_iterate", stop)
        with pytest.raises(KeyboardInterrupt):
            other.get(spec)
    again = other.get(spec)
    assert again.frame("steps").equals(whole.frame("steps"))
    ours, theirs = (recipes.final_policy(run)[0].state_dict() for run in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_replies_come_in_whole_groups():
    with pytest.raises(ParameterError, match=r"rollouts: given 16 .* a multiple of 3 replies"):
        plan.run(P, 0, GROUPED[0], group=3)
    assert math.isclose(dict(plan.run(P, 0, GROUPED[0], clip=0.4).settings)["clip"], 0.4)
