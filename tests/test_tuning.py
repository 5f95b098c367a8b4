"""Learning rates by one rule: what is best on validation prompts, counted in by hand; equal effort or none."""

import json

import pandas as pd
import pytest
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.findings import tuning
from prefdyn.lab import evaluate, policy, ppo, recipes
from prefdyn.lab.runs import RunStore
from prefdyn.lens.batch import pad
from safetensors.torch import load_model

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
    "checkpoints": 3,
}
P = check(SMALL)
DPO = plan.run(P, 0, "dpo", lr=5e-3)


def tried(**earned: dict[float, float]) -> pd.DataFrame:
    """What each method earns at each rate, in an order that says nothing."""
    rows = [(name, lr, reward) for name, rates in earned.items() for lr, reward in rates.items()]
    return pd.DataFrame(rows, columns=["method", "lr", "reward"]).sample(frac=1, random_state=0, ignore_index=True)


def test_methods_keep_their_order_and_rows_need_no_numbers_of_their_own():
    names = [f"m{i}" for i in range(25)]
    parts = [pd.DataFrame({"method": names, "lr": lr, "reward": lr}) for lr in (0.3, 0.1, 0.2)]
    found = tuning.chosen(pd.concat(parts))
    assert found["method"].tolist() == names and set(found["lr"]) == {0.3}


@pytest.mark.parametrize(
    ("earned", "lr", "at_edge"),
    [
        ({1e-4: 1.0, 1e-3: 3.0, 1e-2: 2.0}, 1e-3, False),
        ({1e-4: 3.0, 1e-3: 2.0, 1e-2: 1.0}, 1e-4, True),
        ({1e-4: -3.0, 1e-3: -2.0, 1e-2: -1.0}, 1e-2, True),
        ({1e-4: 1.0, 1e-3: 3.0, 1e-2: 3.0}, 1e-3, False),  # of equals the smallest
        ({1e-4: 2.0, 1e-3: 2.0, 1e-2: 2.0}, 1e-4, True),
        ({1e-3: 1.0, 1e-4: 1.5}, 1e-4, True),
        ({1e-3: 1.0}, 1e-3, False),  # nothing else was tried, so nothing is said of what lies beyond
    ],
)
def test_the_rate_that_earns_most_is_chosen(earned, lr, at_edge):
    found = tuning.chosen(tried(a=earned))
    assert found.to_dict("records") == [{"method": "a", "lr": lr, "reward": earned[lr], "at_edge": at_edge}]


def test_each_method_has_a_rate_of_its_own():
    """Rates need not be the same ones; a method may be called by another column."""
    found = tuning.chosen(
        tried(a={1e-4: 1.0, 1e-3: 2.0}, b={1e-3: 9.0, 1e-2: 8.0}).rename(columns={"method": "x"}), "x"
    )
    assert found.columns.tolist() == ["x", "lr", "reward", "at_edge"]
    assert found.set_index("x")["lr"].to_dict() == {"a": 1e-3, "b": 1e-3}


EQUAL = tried(a={1e-4: 1.0, 1e-3: 2.0}, b={1e-4: 1.0, 1e-3: 2.0})


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (
            tried(a={1e-4: 1.0, 1e-3: 2.0}, b={1e-4: 1.0}),
            r"effort is not equal, rates tried a method: {'a': 2, 'b': 1}",
        ),
        (pd.concat([EQUAL, EQUAL[:1]]), r"effort is not equal, rates tried a method: {'a': 2, 'b': 2}"),
        (EQUAL.replace({"lr": {1e-3: float("nan")}}), "effort is not equal"),
        (tried(a={1e-4: 1.0}, b={1e-4: float("nan")}), "no reward is known of b"),
        (EQUAL.drop(columns=["lr", "reward"]), "the table has no column lr, reward; there are: method"),
        (EQUAL.rename(columns={"method": "name"}), "the table has no column method; there are: name, lr, reward"),
    ],
)
def test_unequal_effort_is_no_choice(grid, said):
    with pytest.raises(ValueError, match=said):
        tuning.chosen(grid)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


def asked_and_answered(store: RunStore, run: recipes.PairRun, samples: int, step: int):
    """Validation prompts, each so many times, and a checkpoint's sampled replies, as ids and as texts."""
    model, tokenizer = recipes.load_checkpoint(store.get(run), step)
    prompts = [p for p in recipes.dataset(run.data).prompts["validation"] for _ in range(samples)]
    limits = {"max_prompt": run.data.max_prompt, "max_response": run.data.max_response}
    asked, answers = evaluate.reply(model, tokenizer, prompts, temperature=1.0, seed=0, **limits)
    return prompts, asked, answers, policy.decode(tokenizer, answers)


@pytest.mark.parametrize("samples", [plan.SAMPLES, 70])  # 280 replies are more than are scored at once
def test_a_policy_is_paid_for_its_sampled_replies_to_validation_prompts(store, samples):
    """Those of every checkpoint, by the true reward; replies to one prompt differ."""
    spec, ticks = plan.validation_run(P, 0, DPO).model_copy(update={"samples": samples}), []
    store.get(DPO)
    table = store.get(spec, ticks.append).frame("validation")
    reward = recipes.dataset(DPO.data).reward
    points = {}
    for step in DPO.steps():
        prompts, _, _, texts = asked_and_answered(store, DPO, samples, step)
        points[step] = [reward(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    assert table.columns.tolist() == ["step", "prompt", "reward"]
    assert table["prompt"].tolist() == [i for i in range(P.validation) for _ in range(samples)] * len(DPO.steps())
    assert table["step"].tolist() == [step for step in DPO.steps() for _ in range(P.validation * samples)]
    assert table["reward"].tolist() == pytest.approx([x for own in points.values() for x in own], abs=1e-6)
    assert points[0] != points[DPO.steps()[-1]] and table.groupby("prompt")["reward"].nunique().max() > 1
    assert sum(ticks) == pytest.approx(spec.work())


def test_the_true_reward_needs_no_reward_model_and_each_run_its_own_validation(store):
    """Of whatever kind the run is, and also where it was itself trained on a learned reward."""
    runs = [DPO, plan.run(P, 0, "grpo"), plan.run(P, 0, "ppo"), plan.run(P, 0, "ppo", reward="learned")]
    specs = [plan.validation_run(P, 0, run) for run in runs]
    assert [(s.run, s.reward, s.samples, s.parents()) for s in specs] == [(r, None, plan.SAMPLES, [r]) for r in runs]
    assert len({store.key(s) for s in [*specs, specs[0].model_copy(update={"samples": 3})]}) == 5


def test_where_no_true_reward_is_known_a_model_of_the_pairs_pays(store, tmp_path):
    """The same replies, each scored alone, without the padding of a batch."""
    rows = [{"prompt": f"What is {i} + {i}?", "chosen": f"It is {2 * i}.", "rejected": "No idea!"} for i in range(40)]
    path = tmp_path / "preferences.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    p = check(SMALL | {"dataset": str(path), "vocab_size": 300, "demonstrations": None, "sft_batch": 8})
    run = plan.run(p, 0, "dpo")
    spec, learned = plan.validation_run(p, 0, run), plan.reward_run(p, 0)
    assert (spec.reward, spec.parents()) == (learned, [run, learned])
    table = store.get(spec).frame("validation").query("step == step.max()")
    _, asked, answers, _ = asked_and_answered(store, run, plan.SAMPLES, run.steps()[-1])
    judge = ppo.headed(store.get(run.sft).folder / "policy", bias=False)
    load_model(judge, store.get(learned).folder / "model.safetensors")
    pairs = zip(asked, answers, strict=True)
    alone = [ppo.sequence_scores(judge, pad([ids], [told], 0)).item() for ids, told in pairs]
    assert table["reward"].tolist() == pytest.approx(alone, abs=1e-5) and table["reward"].std() > 1e-3
    assert table["prompt"].tolist() == [i for i in range(4) for _ in range(plan.SAMPLES)]


def test_what_is_chosen_from_are_means_over_replies_at_the_best_checkpoint(store):
    specs = [("a", plan.validation_run(P, 0, DPO)), ("b", plan.validation_run(P, 0, DPO))]
    table = tuning.means(store, specs)
    points = store.get(specs[0][1]).frame("validation")
    each = {step: own["reward"].sum() / (4 * plan.SAMPLES) for step, own in points.groupby("step")}
    best = max(each, key=each.get)
    assert len(points) == 4 * plan.SAMPLES * len(each) and len(set(each.values())) > 1
    assert table["reward"].tolist() == pytest.approx([each[best]] * 2)
    same = {"lr": 5e-3, "step": best}
    assert table.drop(columns="reward").to_dict("records") == [{"method": n} | same for n in ("a", "b")]
