"""PPO end to end, small: its first ratios, its values and advantages, interrupted, controlled, rewarded, measured."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.lab import data, evaluate, policy, ppo, recipes, train
from prefdyn.lab.ppo import sequence_scores, token_values
from prefdyn.lab.runs import RunStore
from prefdyn.lab.worlds import EASY
from prefdyn.lens import controls, likelihood
from prefdyn.lens.batch import Batch, pad
from safetensors.torch import load_file, load_model, save_model
from toys.models import random_batch, tiny_policy

# 10 rollouts in minibatches of 4, 4 and 2, twice; checkpoints at 4 * (i / 2)^1.5 = 0, 1.4, 4.
SMALL = {
    "difficulty": "easy",
    "profile": "smoke",
    "pairs": 48,
    "check": 16,
    "demonstrations": 128,
    "validation": 8,
    "held_out": 24,
    "width": 16,
    "sft_steps": 40,
    "batch": 16,
    "checkpoints": 3,
    "probe": 24,
    "ppo_probe": 24,
    "choice_probe": 24,
    "iterations": 4,
    "rollouts": 10,
    "ppo_batch": 4,
    "ppo_lr": 3e-3,
}
WORLD = check(SMALL)
STEPS, UPDATES = [0, 1, 4], 6
TABLES = ("steps", "checkpoints", "replies")


def changed(**given):
    return check(SMALL | given)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(store):
    return store.get(plan.run(WORLD, 0, "ppo"))


@pytest.fixture(scope="module")
def sft(store):
    return store.get(plan.sft_run(WORLD, seed=0))


def with_random_head(bias: bool, folder: Path) -> ppo.Headed:
    """A value (with a bias) or reward model whose numbers differ from token to token."""
    model = ppo.headed(folder, bias)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model


def test_a_run_keeps_what_training_runs_keep_and_its_values(run):
    names = {p.name for p in run.folder.iterdir()}
    kept = {f"{what}-{step}.safetensors" for what in ("checkpoint", "value") for step in STEPS}
    kept |= {f"moment-{step}.safetensors" for step in STEPS[1:]}
    tables = {f"{name}.parquet" for name in TABLES}
    assert names == kept | tables | {"policy", "spec.json", "provenance.json", "manifest.json"}
    steps = run.frame("steps")
    assert steps["examples"].nunique() == 4
    assert steps["step"].tolist() == [0, 1, 2, 3] and run.frame("checkpoints")["step"].tolist() == STEPS
    assert (steps["updates"] == UPDATES).all()
    assert np.isfinite(steps).all(axis=None)
    last, _ = recipes.load_checkpoint(run, 4)
    final, _ = recipes.final_policy(run)
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), final.parameters(), strict=True))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"ppo_batch": 5},
        {"ppo_batch": 10},
        {"ppo_batch": 1, "rollouts": 3},
        {"ppo_batch": 7, "kl_estimator": "k3"},
        {"temperature": 0.7},
        {"micro_batch": 2, "sft_batch": 4},
    ],
)
def test_the_first_minibatch_of_an_iteration_meets_the_policy_that_sampled(store, given):
    """Its ratios are 1 to the last bit and none is clipped, whether or not minibatches divide the rollouts."""
    steps = store.get(plan.run(changed(**given), 0, "ppo")).frame("steps")
    assert (steps["first_ratio_max"] == 1.0).all() and (steps["first_clip_fraction"] == 0.0).all()
    assert (steps["ratio_max"] > 1.0).all()  # later ones have moved


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_the_first_step_ppo_is_its_reference(store, temperature):
    run = store.get(plan.run(changed(temperature=temperature), 0, "ppo"))
    start, first = run.frame("checkpoints").iloc[0], run.frame("steps").iloc[0]
    assert start["win_rate"] == 0.5
    assert start["kl"] == pytest.approx(0, abs=1e-6) and start["check_margin"] == pytest.approx(0, abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert first["return"] == pytest.approx(first["reward"], abs=1e-5)  # nothing is to be paid for yet
    assert first["explained_variance"] == pytest.approx(0, abs=1e-5)  # one value for all


def test_values_begin_at_the_mean_return(run, sft):
    """Before the first step nothing is paid for KL: a token's return is its reply's reward, whatever lambda is."""
    known, limits = recipes.dataset(plan.data_spec(WORLD, 0)), {"max_prompt": 24, "max_response": 28}
    model, tokenizer = recipes.final_policy(sft)
    prompts = known.prompts["train"][:10]
    _, replies = evaluate.reply(model, tokenizer, prompts, temperature=1.0, seed=0, **limits)
    rewards = evaluate.rewards(known, prompts, policy.decode(tokenizer, replies))
    lengths = [len(ids) for ids in replies]
    mean = sum(r * n for r, n in zip(rewards, lengths, strict=True)) / sum(lengths)
    assert abs(mean) > 0.3
    value = ppo.headed(run.folder / "policy", bias=True)
    load_model(value, run.folder / "value-0.safetensors")
    assert value.head.bias.item() == pytest.approx(mean, rel=1e-4) and (value.head.weight == 0).all()


def test_training_moves_the_policy_and_its_values(run):
    last, steps = run.frame("checkpoints").iloc[-1], run.frame("steps")
    assert last["kl"] > 0.01 and (steps["kl"].iloc[1:] != 0).all() and (steps["gradient_norm"] > 0).all()
    value = ppo.headed(run.folder / "policy", bias=True)
    kept = []
    for step in STEPS:
        load_model(value, run.folder / f"value-{step}.safetensors")
        kept.append(value.head.weight.clone())
    assert (kept[0] == 0).all() and not torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])


def test_ppo_learns_what_is_rewarded(tmp_path, monkeypatch):
    """Each token costs a point, so that nothing is better than to end at once."""

    def short(self, store, tokenizer):
        return lambda prompts, batch: -batch.response.sum(-1).float()

    monkeypatch.setattr(ppo.PPORun, "score", short)
    p = changed(iterations=30, rollouts=16, ppo_batch=16, ppo_lr=1e-2, value_lr=1e-2, kl_coefficient=0.0)
    steps = RunStore(tmp_path).get(plan.run(p, 0, "ppo")).frame("steps")
    assert (steps["reward"] + steps["length"]).abs().max() < 1e-5
    assert steps["length"].iloc[-5:].mean() < 0.5 * steps["length"].iloc[:5].mean()


class Crash(Exception):
    """What stops a run in the middle."""


def failing(function, at: int):
    """`function`, but its call number `at` (from 0) crashes."""
    calls: list[None] = []

    def called(*args, **kwargs):
        calls.append(None)
        if len(calls) == at + 1:
            raise Crash
        return function(*args, **kwargs)

    return called


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its account of when and how long it ran, and the hashes of all."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("provenance.json", "manifest.json")
    }


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (recipes, "evaluate", 1),  # at the second checkpoint: continued from the first
        (ppo, "update", 2 * UPDATES + 3),  # in the middle of the third iteration
        (ppo, "save_state", 2),  # between the last checkpoint and its state
        (policy, "save", 0),  # when all is done but the writing
    ],
)
def test_an_interrupted_run_ends_with_the_same_files(run, tmp_path, monkeypatch, module, name, call):
    """Continued by another store: tables, checkpoints, values and final weights, byte for byte."""
    said, ticks, spec = [], [], plan.run(WORLD, 0, "ppo")
    interrupted = RunStore(tmp_path, said.append)
    interrupted.ensure(spec.parents(), workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(getattr(module, name), call))
        with pytest.raises(Crash):
            interrupted.get(spec)
    assert interrupted.find(spec) is None
    continued = RunStore(tmp_path, said.append).get(spec, ticks.append)
    assert said == [f"run {continued.key} was interrupted: continuing it"]
    for table in TABLES:
        pd.testing.assert_frame_equal(continued.frame(table), run.frame(table), check_exact=True)
    assert files(continued.folder) == files(run.folder)
    assert sum(ticks) == spec.work()  # the bar reaches its end


def test_passes_end_early_where_the_policy_has_moved_enough(store, run):
    """Nothing has moved at an iteration's first update, and after it more than next to nothing: two are made."""
    tight, loose = (store.get(plan.run(changed(stop_kl=stop), 0, "ppo")).frame("steps") for stop in (1e-9, 1_000.0))
    assert (tight["updates"] == 2).all() and (tight["moved"] > 0).all()
    pd.testing.assert_frame_equal(loose, run.frame("steps"), check_exact=True)


def test_controls_change_the_training(store, run):
    """The first rollouts are the same and so is what is paid for them; the policies that follow are not."""
    logs = {control: store.get(plan.run(WORLD, 0, "ppo", control)).frame("steps") for control in controls.CONTROLS}
    pd.testing.assert_frame_equal(logs["full"], run.frame("steps"))
    for name in ("reward", "length", "entropy"):
        assert len({log[name].iloc[0] for log in logs.values()}) == 1
    assert len({log["kl"].iloc[-1] for log in logs.values()}) == len(logs)
    # raising what was sampled makes it likelier, lowering it less likely: fewer and more nats a token
    assert logs["positive"]["entropy"].iloc[-1] < logs["negative"]["entropy"].iloc[-1]


@pytest.mark.parametrize("probe", recipes.PROBES)
def test_tables_of_a_measurement_fit_together(store, probe):
    measured = store.get(plan.alignment_run(WORLD, plan.run(WORLD, 0, "ppo"), probe))
    table, sequences = measured.frame("alignment"), measured.frame("sequences")
    g = table.pivot(index="step", columns="component", values="g")
    assert g.index.tolist() == STEPS and set(g.columns) == set(controls.CONTROLS)
    assert np.isfinite(g).all(axis=None) and (g != 0).all(axis=None)
    size = g.abs().max(axis=1)
    assert ((g["positive"] + g["negative"] - g["full"]).abs() < 1e-5 * size).all()
    assert ((g[list(controls.THIRDS)].sum(axis=1) - g["full"]).abs() < 1e-5 * size).all()
    sums = sequences.groupby("step")[list(g.columns)].sum()
    assert ((sums[g.columns] - g).abs().max(axis=1) < 1e-5 * size).all()
    assert (table["n"] == 24).all() and (sequences.groupby("step").size() == 24).all()
    assert np.isfinite(table[["se", "logp_targets"]]).all(axis=None)


def test_tokens_of_a_measurement_are_those_of_its_rollouts(store):
    """Every token is a unit: its strength is its advantage's size, its third that among all tokens of all rollouts."""
    spec = plan.run(changed(temperature=0.7), 0, "ppo")
    measured = store.get(plan.alignment_run(WORLD, spec, "check"))
    tokens, sequences = measured.frame("tokens"), measured.frame("sequences")
    assert (tokens["side"] == 0).all()
    parts = (tokens["w"] * tokens["a"]).astype(np.float64).groupby([tokens["step"], tokens["example"]]).sum()
    full = sequences.set_index(["step", "example"])["full"]
    assert parts.index.equals(full.index) and len(parts) == 3 * 24
    assert np.allclose(parts, full, rtol=1e-4, atol=1e-5 * full.abs().max())
    model, tokenizer = recipes.load_checkpoint(store.get(spec), 4)
    objective, _ = spec.prober(store, tokenizer, "check", 24)(4, model)
    batch, own = objective.rollouts, tokens[tokens["step"] == 4]
    advantages = objective.advantages[batch.response]
    assert np.allclose(own["w"], advantages / len(advantages), rtol=1e-4, atol=1e-7)
    assert np.allclose(own["strength"], advantages.abs(), rtol=1e-5)
    assert own["third"].tolist() == controls.thirds(advantages.abs()).tolist()
    # the policy at the temperature at which it was sampled
    assert np.allclose(own["logp"], likelihood.token_logps(model, batch, 0.7).detach()[batch.response], atol=1e-5)
    for i, response in own.groupby("example"):
        ids = batch.ids[i][batch.response[i]].tolist()
        assert response["token"].tolist() == [tokenizer.decode([token]) for token in ids]
        assert response["position"].tolist() == list(range(len(ids)))


def test_probes_are_different_rollouts_and_always_the_same(store, run):
    """At step 0 one policy replies to one set of prompts, in one way for each probe."""
    spec = plan.run(WORLD, 0, "ppo")
    model, tokenizer = recipes.load_checkpoint(run, 0)
    drawn = [spec.prober(store, tokenizer, probe, 24)(0, model)[0].rollouts for probe in recipes.PROBES]
    again = spec.prober(store, tokenizer, "train", 24)(0, model)[0].rollouts
    assert torch.equal(again.ids, drawn[0].ids)
    assert drawn[0].ids.shape != drawn[1].ids.shape or not torch.equal(drawn[0].ids, drawn[1].ids)


def collected(spec, store, sft, value_model, size: int):
    """24 rollouts of a policy that is not the reference, with random values."""
    model, tokenizer = recipes.final_policy(sft)
    reference, _ = tiny_policy(seed=3)
    prompts = recipes.dataset(spec.data).prompts["train"][:24]
    objective, values, returns, _ = spec.collect(
        model, reference, value_model, tokenizer, spec.score(store, tokenizer), prompts, 5, size
    )
    inside = objective.rollouts.response
    assert (objective.advantages[~inside] == 0).all() and (returns[~inside] == 0).all()
    return [t[inside] for t in (objective.old_logps, objective.advantages, values, returns)]


def test_padding_and_batch_size_change_no_advantage(store, sft, monkeypatch):
    spec = plan.run(changed(kl_coefficient=0.5, gamma=0.9), 0, "ppo")
    value_model = with_random_head(True, sft.folder / "policy")
    whole = collected(spec, store, sft, value_model, 24)
    in_parts = collected(spec, store, sft, value_model, 5)
    monkeypatch.setattr(ppo, "pad", functools.partial(pad, side="left"))
    on_the_left = collected(spec, store, sft, value_model, 24)
    for ours, parts, left in zip(whole, in_parts, on_the_left, strict=True):
        assert ours.std() > 0.1
        assert (ours - parts).abs().max() < 1e-5 and (ours - left).abs().max() < 1e-5


def test_what_is_collected_follows_from_its_parts(store, sft):
    """Score at the last token and penalties before it, discounted back, less the value: with lambda 1, by a loop."""
    spec = plan.run(changed(kl_coefficient=0.5, gamma=0.9, lam=1.0, whiten=False), 0, "ppo")
    value_model = with_random_head(True, sft.folder / "policy")
    model, tokenizer = recipes.final_policy(sft)
    reference, _ = tiny_policy(seed=3)
    prompts = recipes.dataset(spec.data).prompts["train"][:6]
    objective, values, _, metrics = spec.collect(
        model, reference, value_model, tokenizer, spec.score(store, tokenizer), prompts, 5, 4
    )
    batch, points, kls = objective.rollouts, [], []
    ref = likelihood.token_logps(reference, batch).detach()
    for row, prompt in enumerate(prompts):
        inside = batch.response[row]
        text = policy.decode(tokenizer, [batch.ids[row][inside].tolist()])[0]
        points.append(EASY.reward(EASY.parse_prompt(prompt), text))
        kl = (objective.old_logps - ref)[row][inside].tolist()
        kls.append(sum(kl))
        rewards = [-0.5 * nats for nats in kl]
        rewards[-1] += points[-1]
        returns = [sum(0.9 ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]
        expected = np.array(returns) - values[row][inside].numpy()
        assert objective.advantages[row][inside].tolist() == pytest.approx(expected, abs=1e-4)
    assert metrics["reward"] == pytest.approx(np.mean(points), abs=1e-5)
    assert metrics["kl"] == pytest.approx(np.mean(kls), abs=1e-4)
    assert metrics["return"] == pytest.approx(np.mean(points) - 0.5 * np.mean(kls), abs=1e-4)
    assert metrics["length"] == pytest.approx(batch.response.sum().item() / 6)
    assert metrics["entropy"] == pytest.approx(-objective.old_logps.sum().item() / batch.response.sum().item())


def test_rollouts_are_sampled_at_the_temperature(store, sft):
    """They are the policy's replies at it, near 0 the greedy ones, and colder ones are likelier to the policy at 1."""
    model, tokenizer = recipes.final_policy(sft)
    prompts = recipes.dataset(plan.data_spec(WORLD, 0)).prompts["train"][:24]
    value_model = ppo.headed(sft.folder / "policy", bias=True)
    limits, means = {"max_prompt": 24, "max_response": 28}, {}
    for temperature in (1e-4, 0.5, 1.0, 1.5):
        spec = plan.run(changed(temperature=temperature), 0, "ppo")
        score = spec.score(store, tokenizer)
        objective, *_ = spec.collect(model, model, value_model, tokenizer, score, prompts, 5, 24)
        batch = objective.rollouts
        drawn = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.response, strict=True)]
        at = 0.0 if temperature == 1e-4 else temperature
        assert drawn == evaluate.reply(model, tokenizer, prompts, temperature=at, seed=5, **limits)[1]
        logps = likelihood.token_logps(model, batch).detach()
        means[temperature] = logps[batch.response].mean().item()
        old = objective.old_logps
        assert (old - likelihood.token_logps(model, batch, temperature).detach()).abs().max() < 1e-4
        assert temperature == 1 or (old - logps).abs().max() > 0.1
        assert objective.temperature == temperature
    assert sorted(means.values(), reverse=True) == list(means.values())


def in_parts(spec, micro_batch: int, lr: float, **more):
    """A spec with so many sequences in memory at once, by plain gradient steps, which rounding changes by little."""
    optimisation = replace(spec.optimisation, optimizer="sgd", lr=lr, micro_batch=micro_batch)
    return spec.model_copy(update={"optimisation": optimisation} | more)


def at_once(monkeypatch, module, name: str) -> set[int]:
    """Numbers of sequences that `module.name` is given at once while gradients are kept; filled as it is called."""
    function, sizes = getattr(module, name), set()

    def noting(model, batch, *args, **kwargs):
        if torch.is_grad_enabled():
            sizes.add(len(batch))
        return function(model, batch, *args, **kwargs)

    monkeypatch.setattr(module, name, noting)
    return sizes


def assert_same_model(ours: Path, theirs: Path, before: Path) -> None:
    """Equal weights, but for a thousandth of how far training moved them."""
    ours, theirs, before = (load_file(path) for path in (ours, theirs, before))
    moved = max((ours[name] - before[name]).abs().max() for name in ours.keys() & before.keys())
    assert moved > 1e-2 and max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-3 * moved


@pytest.mark.parametrize(("micro_batch", "parts_of"), [(3, {3, 2}), (7, {7, 1, 2})])
def test_training_in_parts_is_the_same_training(store, monkeypatch, micro_batch, parts_of):
    """10 rollouts in minibatches of 8 and 2, these in parts of 3, 3 and 2 or of 7 and 1; policy and values."""
    spec = plan.run(changed(ppo_batch=8, value_clip=0.2, iterations=3), 0, "ppo")
    whole = store.get(in_parts(spec, 0, lr=0.1, value_lr=0.05))
    sizes = [at_once(monkeypatch, train, "token_logps"), at_once(monkeypatch, ppo, "token_values")]
    parts = store.get(in_parts(spec, micro_batch, lr=0.1, value_lr=0.05))
    assert sizes == [parts_of, parts_of]
    logs = [run.frame("steps") for run in (whole, parts)]
    assert list(logs[0].columns) == list(logs[1].columns)
    assert np.allclose(logs[0], logs[1], rtol=1e-4, atol=1e-5)
    for name in ("checkpoint", "value"):
        assert_same_model(
            whole.folder / f"{name}-3.safetensors",
            parts.folder / f"{name}-3.safetensors",
            whole.folder / f"{name}-0.safetensors",
        )


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_value_at_a_token_sees_what_is_before_it_alone(sft, side):
    model = with_random_head(True, sft.folder / "policy")
    batch = random_batch(8, side=side)
    values = token_values(model, batch).detach()
    assert (values[~batch.response] == 0).all() and (values[batch.response] != 0).all()
    for column in range(1, batch.ids.shape[1]):
        ids = batch.ids.clone()
        ids[:, column] = torch.where(batch.attention[:, column], ids[:, column] % 20 + 1, ids[:, column])
        other = token_values(model, Batch(ids, batch.attention, batch.response)).detach()
        difference = (other - values).abs()
        assert difference[:, : column + 1].max() < 1e-5  # the token itself included
        after = batch.response[:, column + 1 :] & batch.attention[:, column, None]
        assert not after.any() or difference[:, column + 1 :][after].max() > 1e-3


def test_values_by_hand_of_one_sequence(sft):
    """The value at a token is the head's output at the token before it, in the sequence alone and unpadded."""
    model = with_random_head(True, sft.folder / "policy")
    batch = random_batch(5)
    values = token_values(model, batch)
    for row in range(5):
        states = model.body(input_ids=batch.ids[row : row + 1][:, batch.attention[row]]).last_hidden_state
        out = model.head(states)[0, :, 0]
        positions = batch.response[row].nonzero().flatten()
        assert torch.allclose(values[row, positions], out[positions - 1], atol=1e-5)


def test_a_headed_model_is_the_policy_and_zero(sft, capfd):
    """Silently: the output layer is left out on purpose."""
    kept, _ = recipes.final_policy(sft)
    batch = random_batch(4)
    for bias, read in ((True, token_values), (False, sequence_scores)):
        model = ppo.headed(sft.folder / "policy", bias)
        parts = zip(model.body.parameters(), kept.base_model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in parts) and not model.training
        assert (model.head.bias is not None) == bias and (read(model, batch) == 0).all()
    assert capfd.readouterr().err == ""


def test_a_head_has_weights_of_its_own():
    """Those of the policy that it was made of stay where they are when it learns."""
    model, _ = tiny_policy()
    headed, before = ppo.Headed(model, bias=True), model.base_model.get_input_embeddings().weight.clone()
    torch.nn.init.normal_(headed.head.weight)
    token_values(headed, random_batch(4)).sum().backward()
    torch.optim.SGD(headed.parameters(), lr=1.0).step()
    assert torch.equal(model.base_model.get_input_embeddings().weight, before)
    assert not torch.equal(headed.body.get_input_embeddings().weight, before)


def test_what_a_head_cannot_replace():
    with pytest.raises(ValueError, match="GPTNeoXModel has no output layer"):
        ppo.Headed(tiny_policy()[0].base_model, bias=True)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_score_is_read_at_the_last_token_whatever_it_is(sft, side):
    """Token 0 is the padding token; a reply may hold it, and models without one pad with their end of text."""
    model = with_random_head(False, sft.folder / "policy")
    prompts, replies = [[5, 6], [7], [8, 9, 10]], [[11, 12, 0], [13], [0, 14]]
    scores = sequence_scores(model, pad(prompts, replies, 0, side))
    for prompt, reply, score in zip(prompts, replies, scores, strict=True):
        states = model.body(input_ids=torch.tensor([prompt + reply])).last_hidden_state
        assert score.item() == pytest.approx(model.head(states[0, -1]).item(), abs=1e-5)
    assert len(set(scores.tolist())) == 3


CLEAN = {"pairs": 256, "check": 128, "label_noise": 0.0, "width": 32, "sft_steps": 60, "reward_epochs": 6.0}


def test_a_reward_model_learns_the_preferences(store):
    """256 clean pairs in batches of 16, six times; chance is 1/2, on 128 new pairs give or take 1/23."""
    learned = store.get(plan.reward_run(changed(**CLEAN, reward_lr=3e-3), seed=0))
    steps, new = learned.frame("steps"), learned.frame("check")
    assert steps["step"].tolist() == list(range(96))
    assert steps["loss"].iloc[0] == pytest.approx(np.log(2)) and steps["accuracy"].iloc[0] == 0.5  # all are ties
    assert steps["accuracy"].iloc[-16:].mean() > 0.75
    assert len(new) == 128 and np.isfinite(new).all(axis=None)
    assert (np.sign(new["difference"]) == np.sign(new["true_difference"])).mean() > 0.5 + 2 / 23
    names = {p.name for p in learned.folder.iterdir()}
    assert names == {
        "steps.parquet",
        "check.parquet",
        "model.safetensors",
        "spec.json",
        "provenance.json",
        "manifest.json",
    }


@pytest.mark.parametrize(("micro_batch", "parts_of"), [(1, {1}), (6, {3, 1})])
def test_a_reward_model_learns_in_parts_what_it_learns_at_once(
    store, sft, tmp_path, monkeypatch, micro_batch, parts_of
):
    """Batches of 16 pairs, of two sequences each, in parts of 1 or of 3, with 1 left over."""
    spec = plan.reward_run(changed(reward_epochs=2.0), seed=0)
    whole = store.get(in_parts(spec, 0, lr=0.5))
    sizes = at_once(monkeypatch, ppo, "sequence_scores")
    parts = store.get(in_parts(spec, micro_batch, lr=0.5))
    assert sizes == parts_of
    for name in ("steps", "check"):
        assert np.allclose(whole.frame(name), parts.frame(name), rtol=1e-4, atol=1e-5), name
    start = ppo.headed(sft.folder / "policy", bias=False)
    save_model(start, str(tmp_path / "start.safetensors"))
    models = (run.folder / "model.safetensors" for run in (whole, parts))
    assert_same_model(*models, tmp_path / "start.safetensors")


@pytest.mark.parametrize("at", [10, 55, 99])
def test_an_interrupted_reward_model_ends_with_the_same_files(store, tmp_path, monkeypatch, at):
    """60 updates with a state after 50: stopped before it, after it, and while it scores the check pairs."""
    spec = plan.reward_run(changed(reward_epochs=20.0), seed=0)
    whole, ticks = store.get(spec), []
    assert spec.optimisation.steps == 60
    interrupted = RunStore(tmp_path, lambda text: None)
    interrupted.get(spec.sft)
    call = min(2 * at + 1, 121)
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "sequence_scores", failing(sequence_scores, call))
        with pytest.raises(Crash):
            interrupted.get(spec)
    continued = RunStore(tmp_path, lambda text: None).get(spec, ticks.append)
    assert files(continued.folder) == files(whole.folder)
    assert sum(ticks) == spec.work()


def test_ppo_learns_from_a_reward_model(store, run):
    """Its reward is the model's score of the reply; the measurement goes by it too."""
    p = changed(reward="learned", reward_epochs=20.0)
    spec = plan.run(p, 0, "ppo")
    assert spec.reward == plan.reward_run(p, seed=0)
    steps = store.get(spec).frame("steps")
    assert np.isfinite(steps).all(axis=None) and (steps["first_ratio_max"] == 1.0).all()
    assert steps["length"].iloc[0] == run.frame("steps")["length"].iloc[0]  # the same first rollouts
    assert steps["reward"].iloc[0] != run.frame("steps")["reward"].iloc[0]
    _, tokenizer = recipes.final_policy(store.get(spec.sft))
    head = ppo.headed(store.get(spec.sft).folder / "policy", bias=False)
    load_model(head, store.get(spec.reward).folder / "model.safetensors")
    batch = random_batch(6)
    scored = spec.score(store, tokenizer)([""] * 6, batch)
    assert torch.allclose(scored, sequence_scores(head, batch)) and not scored.requires_grad
    g = store.get(plan.alignment_run(p, spec)).frame("alignment")["g"]
    assert np.isfinite(g).all()


def test_the_true_reward_must_be_known(store, sft, monkeypatch):
    spec = plan.run(WORLD, 0, "ppo")
    nobody = data.Dataset([], [], [], [], {"train": []}, reward=None)
    monkeypatch.setattr(recipes, "dataset", lambda spec: nobody)
    with pytest.raises(ValueError, match="reward='true': the true reward of this dataset is not known"):
        spec.score(store, recipes.final_policy(sft)[1])
