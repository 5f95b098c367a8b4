"""Runs and their measurement end to end, small: from the world, a file or a checkpoint, controlled, interrupted."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.findings import measure
from prefdyn.lab import evaluate, policy, recipes, train
from prefdyn.lab.runs import RunStore
from prefdyn.lab.worlds import EASY
from prefdyn.lens import alignment, controls, likelihood
from safetensors.torch import load_file
from toys.models import tiny_policy
from transformers import Qwen3Config, Qwen3ForCausalLM

SMALL = {
    "profile": "smoke",
    "pairs": 48,
    "check": 32,
    "demonstrations": 128,
    "validation": 8,
    "held_out": 150,
    "width": 16,
    "sft_steps": 40,
    "batch": 16,
    "epochs": 4.0,
    "checkpoints": 3,
    "probe": 48,
    "ppo_probe": 48,
    "choice_probe": 48,
    "lr": 5e-3,
}
EASILY = SMALL | {"difficulty": "easy"}
WORLD = check(EASILY)
TABLES = ("steps", "checkpoints", "replies")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def dpo(store):
    return store.get(plan.run(WORLD, 0, "dpo"))


@pytest.fixture(scope="module")
def measured(store):
    return store.get(plan.alignment_run(WORLD, plan.run(WORLD, 0, "dpo")))


def test_a_training_run_keeps_its_checkpoints_tables_and_policy(store, dpo):
    """3 epochs of 48 pairs in batches of 16, 4 times: 12 updates; checkpoints at 12 * (i / 2)^1.5 = 0, 4.2, 12."""
    steps = plan.run(WORLD, 0, "dpo").steps()
    assert steps == [0, 4, 12]
    names = {p.name for p in dpo.folder.iterdir()}
    expected = {f"checkpoint-{step}.safetensors" for step in steps} | {f"{name}.parquet" for name in TABLES}
    expected |= {f"moment-{step}.safetensors" for step in steps[1:]}  # before the first update there is none
    assert names == expected | {"policy", "spec.json", "provenance.json", "manifest.json"}
    assert dpo.frame("steps")["step"].tolist() == list(range(12))
    assert dpo.frame("checkpoints")["step"].tolist() == steps
    replies = dpo.frame("replies")
    assert len(replies) == 3 * 150 and set(replies["prompt"]) == set(
        recipes.dataset(plan.data_spec(WORLD, 0)).prompts["held_out"]
    )
    rewards = [EASY.reward(EASY.parse_prompt(row.prompt), row.reply) for row in replies.itertuples()]
    assert replies["reward"].tolist() == rewards
    last, _ = recipes.load_checkpoint(dpo, 12)
    final, _ = recipes.final_policy(dpo)
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), final.parameters(), strict=True))


def test_before_the_first_step_dpo_is_its_reference(dpo):
    start = dpo.frame("checkpoints").iloc[0]
    assert start["win_rate"] == 0.5
    assert start["kl"] == pytest.approx(0, abs=1e-6)
    assert start["check_margin"] == pytest.approx(0, abs=1e-4)
    assert start["check_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert dpo.frame("steps").iloc[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_training_moves_away_from_the_reference(store, dpo):
    last = dpo.frame("checkpoints").iloc[-1]
    assert last["kl"] > 0.01
    assert dpo.frame("steps")["loss"].iloc[-1] < math.log(2) - 0.01
    sft = store.get(plan.sft_run(WORLD, seed=0))
    log = sft.frame("steps")
    assert log["loss"].iloc[-1] < 0.6 * log["loss"].iloc[0]
    assert sft.frame("checkpoints")["kl"].isna().all()
    before = sft.frame("replies").query("step == 40")["reward"]
    after = dpo.frame("replies").query("step == 12")["reward"]
    assert last["win_rate"] == evaluate.win_rate(after, before)


def test_tables_of_a_measurement_fit_together(measured):
    table, sequences = measured.frame("alignment"), measured.frame("sequences")
    assert table["step"].unique().tolist() == [0, 4, 12]
    g = table.pivot(index="step", columns="component", values="g")
    assert set(g.columns) == set(controls.CONTROLS)
    thirds = list(controls.THIRDS)
    assert g.loc[0, thirds].isna().all()  # every omega is 1/2: there is nothing to sort by
    assert np.isfinite(g.drop(index=0)).all(axis=None) and np.isfinite(g.drop(columns=thirds)).all(axis=None)
    assert np.allclose(g["positive"] + g["negative"], g["full"], rtol=1e-4, atol=1e-6)
    assert np.allclose(g.loc[[4, 12], thirds].sum(axis=1), g.loc[[4, 12], "full"], rtol=1e-4, atol=1e-6)
    assert np.allclose(g.loc[0, "uniform"], g.loc[0, "full"], rtol=1e-4)
    sums = sequences.groupby("step")[list(g.columns)].sum(min_count=48)
    assert np.allclose(sums[g.columns], g, rtol=1e-4, atol=1e-5, equal_nan=True)
    # the standard error of a sum of n independent contributions is sqrt(n) times their standard deviation
    deviations = sequences.groupby("step")["full"].std(ddof=1)
    se = table.query("component == 'full'").set_index("step")["se"]
    assert np.allclose(se, np.sqrt(48) * deviations, rtol=1e-4)
    assert (table["n"] == 48).all() and (sequences.groupby("step").size() == 48).all()


def test_alignment_for_the_optimiser_from_gradients(store, dpo, measured):
    """<P grad L, grad NLL of D'> by autograd, P from the running squares with grad L in them; <d, real update>."""
    spec, table = plan.run(WORLD, 0, "dpo"), measured.frame("alignment")
    full = table.query("component == 'full'").set_index("step")
    final, tokenizer = recipes.final_policy(dpo)
    targets = plan.target_spec(WORLD).draw(spec.data, final, tokenizer)
    objective = spec.probe(store, tokenizer, "train")
    index, following = torch.arange(48), {0: 4, 4: 12, 12: 12}
    for step in spec.steps():
        model, _ = recipes.load_checkpoint(dpo, step)
        named = dict(model.named_parameters())
        ascent = torch.autograd.grad(likelihood.token_logps(model, targets).sum(-1).mean(), list(named.values()))
        logps = likelihood.token_logps(model, objective.batch(index)).sum(-1)
        margin = logps[:48] - logps[48:] - (objective.reference[0] - objective.reference[1])
        loss = -torch.nn.functional.logsigmoid(WORLD.beta * margin).mean()
        descent = torch.autograd.grad(loss, list(named.values()))
        norm = math.sqrt(sum(g.square().sum().item() for g in descent))
        assert norm < 1  # nothing is clipped
        squares = load_file(dpo.folder / f"moment-{step}.safetensors") if step else {}
        scale = {
            name: 1 / (((0.999 * squares.get(name, 0) + 0.001 * g**2) / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            for name, g in zip(named, descent, strict=True)
        }
        g, g_opt = (
            -sum((a * d * s).sum().item() for a, d, s in zip(ascent, descent, scales, strict=True))
            for scales in ([torch.ones(())] * len(named), [scale[name] for name in named])
        )
        assert full.loc[step, "g"] == pytest.approx(g, rel=1e-3)
        assert full.loc[step, "g_opt"] == pytest.approx(g_opt, rel=1e-3) and abs(g_opt / g - 1) > 1
        after = dict(recipes.load_checkpoint(dpo, following[step])[0].named_parameters())
        moved = sum((a * (after[name] - p)).sum().item() for a, (name, p) in zip(ascent, named.items(), strict=True))
        assert full.loc[step, "moved"] == pytest.approx(moved, rel=1e-3, nan_ok=True) or step == 12
    assert np.isnan(full.loc[12, "moved"])
    parts = table.pivot(index="step", columns="component", values="g_opt")
    assert np.allclose(parts["positive"] + parts["negative"], parts["full"], rtol=1e-3, atol=1e-3)
    sums = measured.frame("sequences").groupby("step")["opt"].sum()
    assert np.allclose(sums, full["g_opt"], rtol=1e-3)


def test_under_sgd_the_alignment_for_the_optimiser_is_the_raw_one_but_for_clipping(store):
    """Where the gradient's norm is below 1 nothing is clipped; the early gradients of SFT are far above."""
    p = WORLD.model_copy(update={"optimizer": "sgd", "lr": 0.5})
    run = store.get(plan.run(p, 0, "dpo"))
    assert not list(run.folder.glob("moment-*"))
    table = store.get(plan.alignment_run(p, plan.run(p, 0, "dpo"))).frame("alignment")
    assert np.allclose(table["g"], table["g_opt"], rtol=1e-6, equal_nan=True)
    sft = store.get(plan.alignment_run(p, plan.sft_run(p, seed=0))).frame("alignment")
    start = sft.query("component == 'full' and step == 0").iloc[0]
    model, tokenizer = recipes.load_checkpoint(store.get(plan.sft_run(p, 0)), 0)
    objective = plan.sft_run(p, 0).probe(store, tokenizer, "train")
    loss = -likelihood.token_logps(model, objective.batch(torch.arange(48))).sum(-1).mean()
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm().item()
    assert norm > 1.5 and start["g_opt"] / start["g"] == pytest.approx(1 / norm, rel=1e-3)


def test_the_alignment_for_the_optimiser_is_measured_where_it_is_asked_for(store, measured):
    plain = store.get(plan.alignment_run(WORLD, plan.run(WORLD, 0, "dpo"), aware=False)).frame("alignment")
    assert plain[["g_opt", "se_opt"]].isna().all(axis=None)
    assert plain["g"].equals(measured.frame("alignment")["g"])


def test_margins_omegas_and_scores_of_a_measurement_fit_together(measured):
    sequences = measured.frame("sequences")
    assert np.allclose(sequences["omega"], 1 / (1 + np.exp(WORLD.beta * sequences["margin"])), atol=1e-6)
    # a pair contributes beta * omega / n * (a of the chosen - a of the rejected response)
    expected = WORLD.beta * sequences["omega"] / 48 * (sequences["a_chosen"] - sequences["a_rejected"])
    assert np.allclose(sequences["full"], expected, rtol=1e-3, atol=1e-5)
    assert np.allclose(
        sequences["positive"], WORLD.beta * sequences["omega"] / 48 * sequences["a_chosen"], rtol=1e-3, atol=1e-5
    )


def test_tokens_of_a_measurement_are_its_sequences_one_by_one(store, measured):
    """By response: positions from 0 without a gap, the words of its text and its end; by pair: w * a sums to G's part.

    The weight of a token is +-beta * omega / n, and its third is its pair's.
    """
    tokens, sequences = measured.frame("tokens"), measured.frame("sequences")
    known = recipes.dataset(plan.data_spec(WORLD, 0))
    reference = store.get(plan.run(WORLD, 0, "dpo").scored()).frame("train")
    assert tokens["step"].unique().tolist() == [0, 4, 12]
    for step, own in tokens.groupby("step"):
        pairs = sequences[sequences["step"] == step].set_index("example")
        thirds = controls.thirds(torch.tensor(pairs["omega"].to_numpy())).numpy()
        assert (thirds == -1).all() == (step == 0)
        example, sign = own["example"].to_numpy(), 1 - 2 * own["side"].to_numpy()
        assert np.array_equal(own["strength"], pairs["omega"].to_numpy()[example])
        assert np.array_equal(own["third"], thirds[example])
        assert np.allclose(own["w"], sign * WORLD.beta * own["strength"] / 48, rtol=1e-5)
        parts = (own["w"] * own["a"]).astype(np.float64).groupby(example).sum()
        assert np.allclose(parts, pairs["full"], rtol=1e-4, atol=1e-5 * pairs["full"].abs().max())
        for (i, side), response in own.groupby(["example", "side"]):
            name = ("chosen", "rejected")[side]
            words = response.sort_values("position")
            assert words.index.equals(response.index)  # they come in order
            assert words["position"].tolist() == list(range(len(words)))
            assert words["token"].tolist() == [*known.pairs[i][name].split(), "<eos>"]
            assert words["a"].sum() == pytest.approx(pairs.loc[i, f"a_{name}"], rel=1e-3, abs=1e-3)
        logps = own.groupby(["example", "side"])["logp"].sum().unstack()
        margin = (logps[0] - reference["chosen"]) - (logps[1] - reference["rejected"])
        assert len(logps) == 48 and np.allclose(margin, pairs["margin"], atol=1e-3)


def test_tokens_of_a_large_probe_are_those_of_its_first_examples(store, measured, tmp_path, monkeypatch):
    """With thirds of all of them."""
    monkeypatch.setattr(measure, "TOKENS_OF", 5)
    plan.alignment_run(WORLD, plan.run(WORLD, 0, "dpo")).compute(tmp_path, store, lambda work: None)
    few, every = pd.read_parquet(tmp_path / "tokens.parquet"), measured.frame("tokens")
    first = every[every["example"] < 5].reset_index(drop=True)
    assert set(few["example"]) == {0, 1, 2, 3, 4} and set(few["side"]) == {0, 1}
    pd.testing.assert_frame_equal(few.astype({"token": str}), first.astype({"token": str}), check_exact=True)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "sequences.parquet"), measured.frame("sequences"))


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_dpo_trains_on_the_pairs_as_they_are_labelled(store, noise):
    """The policy before the first step is SFT's: the likelihoods in the log are those of the labelled responses."""
    p = check(EASILY | {"label_noise": noise, "held_out": 10, "epochs": 1.0})
    spec = plan.run(p, 0, "dpo")
    rows = EASY.pairs(EASY.split_prompts(0, 8, 10)["train"], 48, noise, seed=0)
    assert any(row["flipped"] for row in rows) == (noise > 0)
    model, tokenizer = recipes.final_policy(store.get(spec.sft))
    logps = {
        side: likelihood.sequence_logps(model, recipes.encode(spec.data, tokenizer, rows, side)).numpy()
        for side in ("chosen", "rejected")
    }
    kept = store.get(spec.scored()).frame("train")
    assert np.allclose(kept[["chosen", "rejected"]], np.stack([logps["chosen"], logps["rejected"]], 1), atol=1e-4)
    first = train.example_order(48, 0, spec.optimisation).numpy()
    row = store.get(spec).frame("steps").iloc[0]
    for side in ("chosen", "rejected"):
        assert row[f"logp_{side}"] == pytest.approx(logps[side][first].mean(), abs=1e-4)
    assert abs(logps["chosen"][first].mean() - logps["rejected"][first].mean()) > 1e-2


def test_both_methods_and_probes_measure(store, measured):
    run = plan.run(WORLD, 0, "dpo")
    other = store.get(plan.alignment_run(WORLD.model_copy(update={"method": "central"}), run)).frame("alignment")
    ours = measured.frame("alignment")
    assert np.allclose(other["g"], ours["g"], atol=2e-3 * ours["g"].abs().max(), equal_nan=True)
    check_probe = store.get(plan.alignment_run(WORLD, run, probe="check")).frame("alignment")
    assert (check_probe["n"] == 32).all() and not np.allclose(check_probe["g"], ours["g"], equal_nan=True)


def test_sft_is_measured_too(store):
    table = store.get(plan.alignment_run(WORLD, plan.sft_run(WORLD, seed=0))).frame("alignment")
    g = table.pivot(index="step", columns="component", values="g")
    assert (g["full"] > 0).all()  # imitation raises the likelihood of what it ends up answering
    assert (g["negative"] == 0).all() and np.allclose(g["positive"], g["full"])
    assert g[list(controls.THIRDS)].isna().all(axis=None)  # demonstrations are not weighted
    logp = table.query("component == 'full'")["logp_targets"]
    assert logp.iloc[-1] > logp.iloc[0]


def test_controls_change_the_training(store, dpo):
    ends = {"full": dpo.frame("steps")["margin"].iloc[-1]}
    for control in ("positive", "negative", "uniform", "top"):
        log = store.get(plan.run(WORLD, 0, "dpo", part=control)).frame("steps")
        assert log["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-5)
        ends[control] = log["margin"].iloc[-1]
    assert len(set(ends.values())) == len(ends)
    positive = store.get(plan.run(WORLD, 0, "dpo", part="positive")).frame("steps")
    negative = store.get(plan.run(WORLD, 0, "dpo", part="negative")).frame("steps")
    assert positive["logp_chosen"].iloc[-1] > positive["logp_chosen"].iloc[0]
    assert negative["logp_rejected"].iloc[-1] < negative["logp_rejected"].iloc[0]


class Crash(Exception):
    """What stops a run in the middle."""


@pytest.mark.parametrize("evaluation", [1, 2])
def test_an_interrupted_run_ends_with_the_same_tables(store, dpo, tmp_path, monkeypatch, evaluation):
    """Stopped at its second or last checkpoint, continued by another store: the same files, byte for byte."""
    calls, said = [], []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == evaluation + 1:
            raise Crash
        return evaluate.evaluate(*args, **kwargs)

    interrupted = RunStore(tmp_path, said.append)
    interrupted.get(plan.sft_run(WORLD, seed=0))
    spec = plan.run(WORLD, 0, "dpo")
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "evaluate", failing)
        with pytest.raises(Crash):
            interrupted.get(spec)
    assert interrupted.find(spec) is None
    continued = RunStore(tmp_path, said.append).get(spec)
    assert said == [f"run {continued.key} was interrupted: continuing it"]
    for name in TABLES:
        pd.testing.assert_frame_equal(continued.frame(name), dpo.frame(name), check_exact=True)
    assert {p.name for p in continued.folder.iterdir()} == {p.name for p in dpo.folder.iterdir()}
    weights = [(run.folder / "checkpoint-12.safetensors").read_bytes() for run in (continued, dpo)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("removed", [0, 1])
def test_a_run_stopped_while_it_clears_its_state_away_can_be_continued(tmp_path, monkeypatch, removed):
    """Whatever part of the state is gone already, the rest must not be taken for a state to continue from."""
    spec, gone = plan.sft_run(check(SMALL | {"sft_steps": 4, "held_out": 10}), seed=0), []
    store = RunStore(tmp_path, lambda text: None)
    unlink = Path.unlink

    def failing(path, missing_ok=False):
        if path.parent.name.endswith(".partial") and path.name.startswith("state") and (tmp_path / "armed").exists():
            if len(gone) == removed:
                raise Crash
            gone.append(path.name)
        unlink(path, missing_ok)

    def save(*args):
        (tmp_path / "armed").touch()
        policy_save(*args)

    policy_save = policy.save
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing)
        patch.setattr(policy, "save", save)
        with pytest.raises(Crash):
            store.get(spec)
    assert len(gone) == removed
    assert store.get(spec).frame("steps")["step"].tolist() == [0, 1, 2, 3]


def test_two_samples_of_one_policy_win_half_of_the_time(store):
    """With ties counted half, a prompt's score has mean 1/2 and deviation at most 1/2; 4 deviations of the mean."""
    run = store.get(plan.sft_run(WORLD, seed=0))
    model, tokenizer = recipes.final_policy(run)
    dataset = recipes.dataset(plan.data_spec(WORLD, 0))
    prompts, limits = dataset.prompts["held_out"], {"max_prompt": WORLD.max_prompt, "max_response": WORLD.max_response}
    rewards = []
    for seed in (0, 1):
        _, replies = evaluate.reply(model, tokenizer, prompts, temperature=1.0, seed=seed, **limits)
        rewards.append(evaluate.rewards(dataset, prompts, policy.decode(tokenizer, replies)))
    assert rewards[0] != rewards[1]
    assert abs(evaluate.win_rate(*rewards) - 0.5) < 4 * 0.5 / math.sqrt(len(prompts))


def test_win_rates_by_hand():
    """Two wins, one tie, one loss: (2 + 1/2) / 4."""
    assert evaluate.win_rate([3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]) == 0.625
    for wrong in ([], [1.0, 2.0]):
        with pytest.raises(ValueError, match="equal length"):
            evaluate.win_rate(wrong, [1.0] if wrong else [])


FILE = {
    **SMALL,
    "demonstrations": None,  # a file has none of its own
    "pairs": 24,
    "check": 8,
    "held_out": 6,
    "validation": 2,
    "sft_steps": 6,
    "sft_batch": 8,
    "batch": 8,
    "epochs": 2.0,
    "vocab_size": 300,
    "probe": 24,
    "ppo_probe": 24,
    "choice_probe": 24,
}


@pytest.fixture
def preferences(tmp_path):
    path = tmp_path / "own" / "preferences.jsonl"
    path.parent.mkdir()
    rows = [
        {
            "prompt": f"What is {i} + {i}?",
            "chosen": f"It is {2 * i}, naïvely.",
            "rejected": f"No idea{'!' * (1 + i % 3)}",
        }
        for i in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n{broken\n")
    return path


def test_a_file_of_preferences_end_to_end(tmp_path, preferences):
    p = check(FILE | {"dataset": str(preferences)})
    store = RunStore(tmp_path / "runs")
    spec = plan.run(p, 0, "dpo")
    run = store.get(spec)
    table = run.frame("checkpoints")
    assert table["win_rate"].isna().all() and table["reward_greedy"].isna().all()  # nobody knows the true reward
    assert table["kl"].iloc[0] == pytest.approx(0, abs=1e-5) and table["kl"].iloc[-1] > 0
    assert (table["length"] > 0).all()
    measured = store.get(plan.alignment_run(p, spec))
    g = measured.frame("alignment").query("component == 'full'")["g"]
    assert np.isfinite(g).all() and len(g) == len(spec.steps())
    pairs, tokens = recipes.dataset(spec.data).pairs, measured.frame("tokens").query("step == 0")
    assert len({len(row["prompt"]) for row in pairs}) > 1  # responses begin in different columns
    for (i, side), response in tokens.groupby(["example", "side"]):
        assert response["position"].tolist() == list(range(len(response)))
        if side == 1:  # plain ASCII; other characters may be two tokens
            assert "".join(response["token"]) == pairs[i]["rejected"] + "<eos>"
    table = store.get(plan.targets_run(p, spec, plan.target_choices(p))).frame("targets")
    assert np.isfinite(table[["g", "se", "cosine", "logp"]]).all(axis=None) and table["choice"].nunique() == 6
    assert [left.reason for left in recipes.dataset(spec.data).account.unread] == ["not valid JSON"]


def test_a_file_is_identified_by_what_is_in_it_not_by_where_it_is(tmp_path, preferences):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(preferences.read_bytes())
    changed = tmp_path / "changed.jsonl"
    changed.write_bytes(preferences.read_bytes() + b"\n")
    store = RunStore(tmp_path / "runs")
    keys = [
        store.key(plan.run(check(FILE | {"dataset": str(path)}), 0, "dpo")) for path in (preferences, moved, changed)
    ]
    assert keys[0] == keys[1] != keys[2]
    assert store.key(plan.run(check(FILE), 0, "dpo")) not in keys


def tied_policy():
    """A model whose output and input embeddings are the same tensor, as in Qwen3's small ones."""
    _, tokenizer = tiny_policy()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config), tokenizer


@pytest.mark.parametrize("kind", [tiny_policy, tied_policy])
def test_a_checkpoint_by_path_is_used_as_it_is(tmp_path, kind):
    model, tokenizer = kind()
    policy.save(model, tokenizer, tmp_path / "checkpoint")
    given = {name: value for name, value in FILE.items() if name not in ("vocab_size", "width")}  # it has its own
    given |= {"model": str(tmp_path / "checkpoint"), "max_response": 28}
    p = check(given | {"sft_steps": 0, "epochs": 1.0, "sft_batch": 10_000})
    store = RunStore(tmp_path / "runs")
    sft = store.get(plan.sft_run(p, seed=0))
    kept, _ = recipes.final_policy(sft)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept.parameters(), strict=True))
    assert sft.frame("checkpoints")["step"].tolist() == [0] and sft.frame("steps").empty
    spec = plan.run(p, 0, "dpo")
    assert store.get(spec).frame("checkpoints")["win_rate"].iloc[0] == 0.5
    table = store.get(plan.alignment_run(p, spec)).frame("alignment")
    assert np.isfinite(table.query("component == 'full'")["g"]).all()
    trained, _ = recipes.load_checkpoint(store.get(spec), spec.steps()[-1])
    assert type(trained) is type(model)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))


def test_a_run_without_a_control_steps_on_the_objective_itself(store, dpo):
    """And one under a control on what it leaves of it at that step, whatever the run learns from."""
    spec = plan.run(WORLD, 0, "dpo")
    objective = spec.probe(store, recipes.final_policy(dpo)[1], "train")
    for free in (plan.sft_run(WORLD, 0), spec, plan.run(WORLD, 0, "ppo"), plan.run(WORLD, 0, "grpo")):
        assert free.trained_on(objective, 4) is objective
    for method in ("dpo", "ppo", "grpo"):
        held = plan.run(WORLD, 0, method, part="negative").trained_on(objective, 4)
        assert isinstance(held, train.Controlled) and held.objective is objective
        assert (held.control, held.step) == (controls.Control(part="negative"), 4)


def test_a_run_of_one_half_is_measured_with_that_half_alone(store, measured):
    """No weight below 0 is left, so nothing of G comes from there, by component, by pair and by token."""
    run = store.get(plan.alignment_run(WORLD, plan.run(WORLD, 0, "dpo", part="positive")))
    table, tokens = run.frame("alignment"), run.frame("tokens")
    for column in ("g", "g_opt", "weight"):
        parts = table.pivot(index="step", columns="component", values=column)
        assert (parts["negative"] == 0).all() and (parts["full"] != 0).all()
        assert parts["full"].tolist() == parts["positive"].tolist()
    sequences = run.frame("sequences")
    assert (sequences["negative"] == 0).all() and sequences["full"].equals(sequences["positive"])
    assert (tokens.query("side == 1")["w"] == 0).all() and (tokens.query("side == 0")["w"] > 0).all()
    # the same policy before the first step: there the half is the plain run's
    first, plain = (t.query("step == 0").set_index("component") for t in (table, measured.frame("alignment")))
    assert first.loc["full", "weight"] == pytest.approx(plain.loc["positive", "weight"], rel=1e-6)
    assert first.loc["full", "weight"] < 0.9 * plain.loc["full", "weight"]


def test_a_schedule_is_measured_as_far_as_it_has_come(store):
    """From nothing to a half of negative learning over 12 updates: 0, 1/6 and 1/2 at the checkpoints 0, 4 and 12."""
    rising = controls.Control(factors={"negative": ((0, 0.0), (12, 0.5))})
    spec = plan.run(WORLD, 0, "dpo").model_copy(update={"control": rising})
    tokens = store.get(plan.alignment_run(WORLD, spec)).frame("tokens")
    for step, factor in ((0, 0), (4, 1 / 6), (12, 1 / 2)):
        own = tokens[tokens["step"] == step]
        expected = np.where(own["side"] == 0, 1, -factor) * WORLD.beta * own["strength"] / 48
        assert np.allclose(own["w"], expected, rtol=1e-5, atol=0)


def test_sizes_of_weights_are_those_of_the_objective(store, dpo, measured):
    """Sums of |w| over all tokens of the probe, of every component; of pairs by hand, beta * omega / n a token."""
    spec, table = plan.run(WORLD, 0, "dpo"), measured.frame("alignment")
    size = table.pivot(index="step", columns="component", values="weight")
    objective, index = spec.probe(store, recipes.final_policy(dpo)[1], "train"), torch.arange(48)
    batch = objective.batch(index)
    lengths = batch.response.sum(-1).reshape(2, 48).numpy()
    for step in spec.steps():
        with torch.no_grad():
            logps = likelihood.token_logps(recipes.load_checkpoint(dpo, step)[0], batch)
        w = objective.weights(logps, batch, index).w
        found = size.loc[step]
        assert found["full"] == pytest.approx(w.abs().sum().item(), rel=1e-5)
        assert found["positive"] == pytest.approx(w[w > 0].sum().item(), rel=1e-5)
        assert found["negative"] == pytest.approx(-w[w < 0].sum().item(), rel=1e-5)
        omega = measured.frame("sequences").query("step == @step")["omega"].to_numpy()
        by_hand = (WORLD.beta * omega / 48 * lengths).sum(-1)
        assert found[["positive", "negative"]].tolist() == pytest.approx(by_hand.tolist(), rel=1e-5)
        assert found["uniform"] == pytest.approx(WORLD.beta * omega.mean() / 48 * lengths.sum(), rel=1e-5)
    assert np.allclose(size["positive"] + size["negative"], size["full"], rtol=1e-6)
    thirds = size[list(controls.THIRDS)]
    assert thirds.loc[0].isna().all() and np.allclose(thirds.loc[[4, 12]].sum(axis=1), size.loc[[4, 12], "full"])


@pytest.mark.parametrize("part", ["full", "positive"])
def test_the_cosine_is_that_of_one_gradient_of_the_probe(store, part):
    """From scores and from gradients in blocks: two ways to the same direction, raw and as the optimiser scales it."""
    spec = plan.run(WORLD, 0, "dpo", part=part)
    choices = {"as declared": plan.target_spec(WORLD)}
    expected = store.get(plan.targets_run(WORLD, spec, choices)).frame("targets").set_index("step")
    table = store.get(plan.alignment_run(WORLD, spec, "check")).frame("alignment")
    full = table.query("component == 'full'").set_index("step")
    assert (expected["n"] == 32).all() and (full["n"] == 32).all()
    for column in ("cosine", "cosine_opt"):
        assert full[column].to_dict() == pytest.approx(expected[column].to_dict(), abs=1e-5)
        assert full[column].abs().max() > 0.01 and full[column].between(-1, 1).all()
        assert table.query("component != 'full'")[column].isna().all()
    plain = store.get(plan.alignment_run(WORLD, spec, "check", aware=False)).frame("alignment")
    assert plain[["cosine", "cosine_opt"]].isna().all(axis=None)
    assert plain["weight"].equals(table["weight"])


def test_cosines_by_hand():
    """(3, 4) and (4, 3): 24 / 25. Over two parameters (1, 2; 2) and (2, 0; -1): 2 - 2 = 0, though neither is 0."""
    one, other = {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([4.0, 3.0])}
    assert alignment.cosine(one, other) == pytest.approx(24 / 25)
    assert alignment.cosine(one, {"a": -7 * other["a"]}) == pytest.approx(-24 / 25)
    split = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[2.0]])}
    across = {"b": torch.tensor([[-1.0]]), "a": torch.tensor([2.0, 0.0])}
    assert alignment.cosine(split, across) == 0 and alignment.cosine(split, split) == pytest.approx(1)
    for pair in ((one, {"a": torch.zeros(2)}), ({"a": torch.zeros(2)}, one)):
        assert math.isnan(alignment.cosine(*pair))
