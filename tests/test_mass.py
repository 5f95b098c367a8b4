"""Where probability goes: shares, flows and areas by hand, and both measurements on runs, the long way round."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.findings import mass
from prefdyn.lab import evaluate, others, policy, recipes
from prefdyn.lab.runs import RunStore
from prefdyn.lab.train import Optimisation, make_optimizer, update
from prefdyn.lab.worlds import HARD
from prefdyn.lens import displacement
from prefdyn.lens.likelihood import sequence_logps

SMALL = {
    "max_response": 28,
    "profile": "smoke",
    "pairs": 24,
    "check": 12,
    "demonstrations": 64,
    "validation": 4,
    "held_out": 4,
    "width": 16,
    "sft_steps": 40,
    "sft_batch": 16,
    "batch": 8,
    "epochs": 2.0,
    "lr": 5e-3,
    "checkpoints": 3,
}
RUNS = {"iterations": 2, "rollouts": 8, "ppo_batch": 4}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


PAIR = {
    "prompt": "write a warm long note to ann about the home of the fox",
    "chosen": "dear ann , the fox lives in the den . it is red . with love .",  # 8.2 points, see test_others
    "rejected": "dear ann , the fox lives in the barn . with love .",  # 2 points
}


def test_categories_by_hand():
    """Of four replies two are of the chosen's kind, one of them with a point less, one is between, one is broken."""
    replies = [
        PAIR["chosen"],
        PAIR["chosen"].replace("ann", "ben"),
        "dear ann , the fox lives in the den . with love .",
    ]
    rows = {row.pop("category"): row for row in mass.by_category(HARD, PAIR, [*replies, "den den"])}
    assert tuple(rows) == others.KINDS
    assert rows["chosen's kind"] == pytest.approx({"share": 0.5, "reward": (8.2 + 6.2) / 2, "above": 0})
    assert rows["between"] == pytest.approx({"share": 0.25, "reward": 6.0, "above": 0})
    assert rows["ungrammatical"]["share"] == 0.25 and rows["better than both"]["share"] == 0
    assert math.isnan(rows["better than both"]["reward"])
    better = PAIR["chosen"].replace(". with", ". it eats berries . with")  # three facts: another kind, 8.2 + 1.2 - 1
    (row,) = [row for row in mass.by_category(HARD, PAIR, [better]) if row["share"]]
    assert row == pytest.approx({"category": "better than both", "share": 1.0, "reward": 8.4, "above": 1.0})


def table(rows: list[tuple]) -> pd.DataFrame:
    """Rows of seed, step, index, category, share, reward; above is 0."""
    columns = ["seed", "step", "index", "category", "share", "reward"]
    return pd.DataFrame(rows, columns=columns).assign(above=0.0)


def full(rows: list[tuple]) -> pd.DataFrame:
    """The same with rows of share 0 for all categories that are not named."""
    known = {row[:4] for row in rows}
    places = {row[:3] for row in rows}
    empty = [(*p, kind, 0.0, math.nan) for p in sorted(places) for kind in others.KINDS if (*p, kind) not in known]
    return table(rows + empty).sample(frac=1, random_state=0)


C, R, B, U = "chosen's kind", "rejected's kind", "better than both", "ungrammatical"
MASS = full(
    [
        (0, 0, 0, C, 0.5, 4.0), (0, 0, 0, R, 0.5, 0.0),
        (0, 0, 1, C, 1.0, 2.0),
        (0, 9, 0, C, 0.25, 4.0), (0, 9, 0, B, 0.75, 8.0),
        (0, 9, 1, C, 0.5, 2.0), (0, 9, 1, U, 0.5, -2.0),
    ]
)  # fmt: skip


def test_flow_by_hand():
    """Two pairs. Mean reward at first: (0.5 * 4 + 0.5 * 0 + 2) / 2 = 2; at last (1 + 6 + 1 - 1) / 2 = 3.5.

    Relative to 2: at first C adds (0.5 * 2 + 0) / 2 = 0.5 and R (0.5 * -2) / 2 = -0.5. At last C adds 0.25 * 2 / 2 =
    0.25, B 0.75 * 6 / 2 = 2.25 and U 0.5 * -4 / 2 = -1. Changes: -0.25, +0.5, +2.25, -1, in all 1.5.
    """
    found = mass.flow(MASS)
    assert found[["step", "category"]].to_numpy().tolist() == [[s, k] for s in (0, 9) for k in others.KINDS]
    last = found[found["step"] == 9].set_index("category")
    assert last.loc[[C, R, B, U], "share"].tolist() == pytest.approx([0.375, 0, 0.375, 0.25])
    assert last.loc[[C, R, B, U], "change"].tolist() == pytest.approx([-0.375, -0.25, 0.375, 0.25])
    assert last.loc[[C, R, B, U], "gained"].tolist() == pytest.approx([-0.25, 0.5, 2.25, -1.0])
    assert last["gained"].sum() == pytest.approx(1.5) and last["change"].sum() == pytest.approx(0)
    assert (found[found["step"] == 0][["change", "gained"]] == 0).all(axis=None)
    both = pd.concat([MASS, MASS.assign(seed=1, reward=MASS["reward"] + 100)])  # no zero of reward is special
    apart = mass.flow(both).set_index("seed")
    assert np.allclose(apart.loc[0, "gained"], apart.loc[1, "gained"])
    with pytest.raises(ValueError, match="no column above"):
        mass.flow(MASS.drop(columns="above"))


LOGPS = pd.DataFrame(
    [
        (0, 0, 0, "chosen", -4.0, 4), (0, 0, 1, "chosen", -6.0, 2), (0, 0, 1, "paraphrase", -8.0, 4),
        (0, 9, 0, "chosen", -2.0, 4), (0, 9, 1, "chosen", -8.0, 2), (0, 9, 1, "paraphrase", -6.0, 4),
    ],
    columns=["seed", "step", "index", "sort", "logp", "tokens"],
)  # fmt: skip


def test_moved_by_hand():
    """Chosen: +2 and -2 nats, +1/2 and -1 a token. The one paraphrase: +2, 4 more than its own chosen response."""
    found = mass.moved(LOGPS.sample(frac=1, random_state=1)).set_index(["step", "sort"])
    assert found.loc[(9, "chosen"), ["n", "change", "change_token", "beside"]].tolist() == [2, 0.0, -0.25, 0.0]
    assert found.loc[(9, "paraphrase"), ["n", "change", "change_token", "beside"]].tolist() == [1, 2.0, 0.5, 4.0]
    assert (found.loc[0, ["change", "beside"]] == 0).all(axis=None)


def test_outcomes_by_hand():
    """Pair 0: the chosen response rises, reward from 2 to 7. Pair 1: it falls, and half of the replies break."""
    found = mass.outcomes(MASS, LOGPS).set_index("index")
    assert found["chosen"].tolist() == [2.0, -2.0]
    assert found["reward"].tolist() == pytest.approx([1 + 6 - 2, 1 - 1 - 2])
    assert found.loc[0, [C, R, B, U]].tolist() == pytest.approx([-0.25, -0.5, 0.75, 0])
    assert found.loc[1, [C, R, B, U]].tolist() == pytest.approx([-0.5, 0, 0, 0.5])


def test_squeezed_by_hand():
    """Three tokens in the first place and one in the second: (3 * 0.5 + 0.9) / 4 = 0.6."""
    rows = [(0, 0, "chosen", 0, 0.5, 0.4, 1.0, 3), (0, 0, "chosen", 1, 0.9, 0.8, 0.2, 1)]
    peak = pd.DataFrame(rows, columns=["seed", "step", "response", "position", "likeliest", "own", "entropy", "n"])
    found = mass.squeezed(peak)
    assert found.iloc[0].tolist() == [0, 0, "chosen", pytest.approx(0.6), pytest.approx(0.5), pytest.approx(0.8)]


def test_area_with_an_interval_over_pairs_by_hand():
    """Falls at 3 and 1, none at 2 and 0: of four comparisons three are won, 0.75.

    Shares won, of the first two: 1 and 1/2; of the others: 1/2 and 1. Variances 1/8 each: error sqrt(1/16 + 1/16).
    """
    found = mass.auc_over_pairs([3, 2, 1, 0], [True, False, True, False])
    assert found.mean == 0.75 and found.n == 4
    assert found.low == pytest.approx(0.75 - 1.959964 * math.sqrt(1 / 8)) and found.high == 1.0
    perfect = mass.auc_over_pairs([4, 3, 2, 1], [True, True, False, False])
    assert (perfect.mean, perfect.low, perfect.high) == (1.0, 1.0, 1.0)
    one = mass.auc_over_pairs([3, 2, 1], [True, False, False])
    assert one.mean == 1.0 and math.isnan(one.low)


def test_the_interval_over_pairs_covers():
    """Normal scores a standard deviation apart have an area of Phi(1 / sqrt 2) = 0.760; 300 draws of 20 and 30."""
    rng = np.random.default_rng(0)
    falls = np.arange(50) < 20
    found = [mass.auc_over_pairs(rng.normal(size=50) + falls, falls) for _ in range(300)]
    assert 0.9 < np.mean([x.low <= 0.7602 <= x.high for x in found]) <= 0.98


def test_area_over_seeds_by_hand():
    """Seed 0: 1; seed 1: 0.5 (one won, one lost); in seed 2 nothing falls, which tells nothing."""
    rows = [(0, 2, -1), (0, 1, 1), (1, 3, 1), (1, 2, -1), (1, 1, 1), (2, 1, 1), (2, 2, 0)]
    scored = pd.DataFrame(rows, columns=["seed", "score", "change"])
    found = mass.auc_of_falling(scored, "score")
    assert found.mean == 0.75 and found.n == 2 and found.values == (1.0, 0.5) and (found.low, found.high) == (0, 1)
    assert mass.auc_of_falling(scored[scored["seed"] == 1], "score").mean == 0.5
    assert math.isnan(mass.auc_of_falling(scored[scored["seed"] == 2], "score").mean)


@pytest.mark.parametrize("kind", ["sft", "dpo", "ppo"])
def test_replies_of_a_run_are_sorted_at_every_step(store, tmp_path, kind):
    p = check(SMALL | RUNS)
    run = plan.sft_run(p, 0) if kind == "sft" else plan.run(p, 0, kind)
    spec, ticks = mass.MassRun(run=run, pairs=6, samples=5), []
    store.get(run)
    found = store.get(spec, ticks.append)
    assert sum(ticks) == pytest.approx(spec.work())
    shares, logps, peak = (found.frame(name) for name in ("mass", "others", "peak"))
    steps, rows = run.steps(), recipes.dataset(run.data).check[:6]
    places = [[step, i, kind] for step in steps for i in range(6) for kind in others.KINDS]
    assert shares[["step", "index", "category"]].to_numpy().tolist() == places
    assert shares.groupby(["step", "index"])["share"].sum().to_numpy() == pytest.approx(1)
    assert (shares["reward"].isna() == (shares["share"] == 0)).all() and (shares["above"] <= shares["share"]).all()
    step = steps[-1]
    model, tokenizer = recipes.load_checkpoint(store.get(run), step)
    prompts = [row["prompt"] for row in rows]
    limits = {"max_prompt": 24, "max_response": 28}
    heat = [0.0] * 6 + [1.0] * 30
    asked = prompts + [prompt for prompt in prompts for _ in range(5)]
    _, ids = evaluate.reply(model, tokenizer, asked, temperature=heat, seed=step, **limits)
    texts = policy.decode(tokenizer, ids)
    last = shares[shares["step"] == step]
    for i, row in enumerate(rows):
        own = pd.DataFrame(mass.by_category(HARD, row, texts[6 + 5 * i : 11 + 5 * i]))
        mine = last[last["index"] == i][list(own)].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, own)
    beside = others.beside(HARD, recipes.dataset(run.data).check[:7])
    for sort, own in beside.items():
        there = [i for i in range(6) if own[i] is not None]
        batch = recipes.encode(run.data, tokenizer, [{"prompt": prompts[i], "text": own[i]} for i in there], "text")
        mine = logps[(logps["step"] == step) & (logps["sort"] == sort)]
        assert mine["index"].tolist() == there
        assert mine["logp"].to_numpy() == pytest.approx(sequence_logps(model, batch).numpy(), rel=1e-4)
        assert mine["tokens"].tolist() == batch.response.sum(-1).tolist()
    assert (logps["sort"] == mass.GREEDY).sum() == 6 * len(steps)
    # the greedy reply is likeliest in every place, and its places are as many as its tokens
    greedy = peak[peak["response"] == mass.GREEDY]
    assert greedy["own"].to_numpy() == pytest.approx(greedy["likeliest"].to_numpy(), rel=1e-5)
    for name in ("chosen", mass.GREEDY):
        tokens = logps[logps["sort"] == name].groupby("step")["tokens"].sum()
        assert peak[peak["response"] == name].groupby("step")["n"].sum().tolist() == tokens.tolist()
    assert mass.flow(shares.assign(seed=0)).groupby("step")["change"].sum().to_numpy() == pytest.approx(0)
    assert len(mass.outcomes(shares.assign(seed=0), logps.assign(seed=0))) == 6
    spec.compute(tmp_path, store, lambda work: None)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "mass.parquet"), shares, check_exact=True)


def test_pairs_may_have_the_labels_of_other_data(store):
    """PPO reads no label, so its own data has none that are wrong; compared with DPO, its pairs should be DPO's."""
    p = check(SMALL | RUNS | {"label_noise": 0.5})
    run, data = plan.run(p, 0, "ppo"), plan.data_spec(p, 0)
    own, other = (recipes.dataset(spec).check for spec in (run.data, data))
    turned = [i for i in range(12) if own[i]["chosen"] == other[i]["rejected"]]
    assert 0 < len(turned) < 12
    tables = [
        store.get(mass.MassRun(run=run, pairs=12, samples=2, data=d)).frame("others").query("step == 0")
        for d in (None, data)
    ]
    chosen, rejected = (x.set_index(["sort", "index"])["logp"] for x in tables)
    for i in turned:
        assert chosen["chosen", i] == pytest.approx(rejected["rejected", i], rel=1e-5)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("file") / "preferences.jsonl"
    rows = [
        {"prompt": f"What is {i} + {i}?", "chosen": f"It is {2 * i}.", "rejected": f"No idea{'!' * (1 + i % 3)}"}
        for i in range(45)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return SMALL | {"dataset": str(path), "vocab_size": 300, "sft_steps": 4, "demonstrations": None}


def test_texts_of_a_file_have_no_kinds(store, file):
    run = plan.run(check(file), 0, "dpo")
    found = store.get(mass.MassRun(run=run, pairs=4, samples=2))
    assert found.frame("mass").empty and list(found.frame("mass")) == list(mass.COLUMNS)
    assert set(found.frame("others")["sort"]) == {*others.SORTS, mass.GREEDY} - {"paraphrase"}
    assert set(found.frame("peak")["response"]) == {"chosen", mass.GREEDY}


def test_displacement_of_texts_of_a_file(store, file):
    found = store.get(mass.DisplacementRun(run=plan.run(check(file), 0, "dpo"), pairs=3)).frame("displacement")
    assert found["reward"].isna().all() and np.isfinite(found[["condition", "ches", "one_step", "change"]]).all(
        axis=None
    )


@pytest.mark.parametrize(("method", "part"), [("dpo", "full"), ("dpo", "negative"), ("kto", "full")])
def test_displacement_of_a_run(store, method, part):
    p = check(SMALL | RUNS)
    run = plan.run(p, 0, method, part)
    rates = (1e-4, 1e-5)
    spec, ticks = mass.DisplacementRun(run=run, pairs=5, rates=rates), []
    store.get(run)
    found = store.get(spec, ticks.append)
    assert sum(ticks) == pytest.approx(spec.work())
    pairs, alone = found.frame("displacement"), found.frame("alone")
    steps = run.steps()
    assert pairs[["step", "index"]].to_numpy().tolist() == [[s, i] for s in steps for i in range(5)]
    model, tokenizer = recipes.load_checkpoint(store.get(run), 0)
    rows = recipes.dataset(run.data).check[:5]
    chosen, rejected = (recipes.encode(run.data, tokenizer, rows, side) for side in recipes.SIDES)
    own, shared = displacement.condition(model, chosen, rejected)
    first, last = (pairs[pairs["step"] == step].reset_index() for step in (0, steps[-1]))
    assert first["condition"].to_numpy() == pytest.approx((shared - own).numpy(), rel=1e-5)
    assert first["ches"].to_numpy() == pytest.approx(displacement.ches(model, chosen, rejected).numpy(), rel=1e-5)
    assert (first[["change", "change_rejected"]] == 0).all(axis=None)
    assert first["tokens"].tolist() == [len(row["chosen"].split()) + 1 for row in rows]  # words and the end
    assert first["reward_rejected"].tolist() == [row["reward_rejected"] for row in rows]
    final, _ = recipes.final_policy(store.get(run))
    for side, column in ((chosen, "change"), (rejected, "change_rejected")):
        moved = sequence_logps(final, side) - sequence_logps(model, side)
        assert last[column].to_numpy() == pytest.approx(moved.numpy(), abs=1e-4)
    assert alone[["index", "lr"]].to_numpy().tolist() == [[i, lr] for i in range(5) for lr in sorted(rates)]
    assert first["one_step"].tolist() == alone[alone["lr"] == 1e-5]["change"].tolist()
    assert alone["change"].to_numpy() == pytest.approx(alone["predicted"].to_numpy(), rel=0.1, abs=2e-5)
    if method == "dpo":  # at the start omega is a half: a step of lr along beta / 2 times (g_c - g_r), or its half
        assert first["omega"].to_numpy() == pytest.approx(0.5)
        slope = (own - shared if part == "full" else -shared).numpy()
        per_rate = alone[alone["lr"] == 1e-4]["predicted"].to_numpy() / 1e-4
        assert per_rate == pytest.approx(p.beta / 2 * slope, rel=1e-4)


def test_a_step_on_one_pair_is_that_of_the_trainer(store):
    """The change that `alone` states is what plain gradient descent of the library's own trainer does to that pair."""
    p = check(SMALL)
    run = plan.run(p, 1, "dpo")
    alone = store.get(mass.DisplacementRun(run=run, pairs=3, rates=(0.02,))).frame("alone")
    rows = recipes.dataset(run.data).check[:3]
    for i in range(3):
        model, tokenizer = recipes.load_checkpoint(store.get(run), 0)
        chosen = recipes.encode(run.data, tokenizer, rows[i : i + 1], "chosen")
        before = sequence_logps(model, chosen)
        objective = run.probe(store, tokenizer, "check")
        optimizer = make_optimizer(model, Optimisation(steps=1, batch_size=1, lr=0.02, optimizer="sgd"))
        update(model, objective, optimizer, torch.tensor([i]), clip=0.0)
        change = (sequence_logps(model, chosen) - before).item()
        assert alone.loc[i, "change"] == pytest.approx(change, rel=1e-3, abs=1e-5)
