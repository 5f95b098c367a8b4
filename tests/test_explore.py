"""Asking a policy again and again: the variety of replies by hand, and on a run, from the world or a file."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.findings import explore
from prefdyn.lab import evaluate, policy, recipes
from prefdyn.lab.runs import RunStore
from prefdyn.lab.worlds import EASY, HARD

SMALL = {
    "max_response": 28,
    "profile": "smoke",
    "pairs": 24,
    "check": 8,
    "demonstrations": 64,
    "validation": 4,
    "held_out": 9,
    "width": 16,
    "sft_steps": 30,
    "sft_batch": 16,
    "batch": 8,
    "epochs": 2.0,
    "lr": 5e-3,
    "checkpoints": 3,
    "explore_prompts": 5,
    "explore_samples": 6,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


REPLIES = [
    "dear ann , the fox lives in the den . with love .",
    "dear ann , the fox lives in the den . with love .",
    "dear dan , the fox lives in the den . with love .",  # another text of the same type
    "hey ann , the fox lives in the barn . see you soon .",
    "den den den",
]


@pytest.mark.parametrize(("animal", "types", "ideal"), [("fox", 18, 3 / 5), ("bee", 12, 0)])
def test_variety_by_hand(animal, types, ideal):
    """Four of five texts differ; two types are given by four replies; 2 + 2 + 1 + 0 - 5 points make 0, the best 2.

    Most is earned by a warm short note that says what is right of the asked topic, as three do of the home.
    """
    prompt = f"write a warm short note to ann about the {'home' if animal == 'fox' else 'colour'} of the {animal}"
    measures = explore.variety(prompt, REPLIES, [2.0, 2.0, 1.0, 0.0, -5.0], EASY)
    expected = {"distinct": 0.8, "reward": 0, "best": 2, "coverage": 2 / types, "typed": 0.8, "ideal": ideal}
    assert measures == pytest.approx(expected)


def test_variety_in_the_hard_world_by_hand():
    """Three of 36 types, the ideal one twice: right, bold, of four facts and cited, whatever animal and tone."""
    more = "it eats berries . it is red . it makes a bark"
    replies = [
        f"dear ann , the fox lives in the den . {more} . so says the atlas . with love .",
        f"hey ann , the owl lives in the den . {more} . so says the atlas . see you soon .",
        "dear ann , the fox perhaps lives in the den . so says the atlas . with love .",
        "dear ann , the fox lives in the barn . with love .",
    ]
    prompt = "write a warm short note to ann about the home of the fox"
    measures = explore.variety(prompt, replies, [4.0, 3.0, 2.0, -1.0], HARD)
    expected = {"distinct": 1, "reward": 2, "best": 4, "coverage": 3 / 36, "typed": 1, "ideal": 2 / 4}
    assert measures == pytest.approx(expected)


def test_variety_of_other_texts_by_hand():
    """Elsewhere there are no types, and the reward may not be known."""
    measures = explore.variety("What?", ["a", "a", "b", "a"], [math.nan] * 4, None)
    assert measures == pytest.approx({"distinct": 0.5, "reward": math.nan, "best": math.nan}, nan_ok=True)


@pytest.mark.parametrize("kind", ["sft", "dpo", "ppo"])
def test_a_run_is_asked_at_every_checkpoint(store, tmp_path, kind):
    """Each row is the variety of replies of that step's policy at temperature 1, whatever it was trained at."""
    given = {"iterations": 2, "rollouts": 8, "ppo_batch": 4, "temperature": 0.7}
    p = check(SMALL | {"difficulty": "easy"} | given)
    run = plan.sft_run(p, 0) if kind == "sft" else plan.run(p, 0, kind)
    spec, ticks = plan.exploration_run(p, run), []
    store.get(run)
    table = store.get(spec, ticks.append).frame("exploration")
    assert table[["step", "index"]].to_numpy().tolist() == [[step, i] for step in run.steps() for i in range(5)]
    assert table["distinct"].between(1 / 6, 1).all() and (table["best"] >= table["reward"]).all()
    assert sum(ticks) == pytest.approx(spec.work())
    known = recipes.dataset(run.data)
    for step in (run.steps()[0], run.steps()[-1]):
        model, tokenizer = recipes.load_checkpoint(store.get(run), step)
        prompts = [prompt for prompt in known.prompts["held_out"][:5] for _ in range(6)]
        limits = {"max_prompt": 24, "max_response": 28}
        _, ids = evaluate.reply(model, tokenizer, prompts, temperature=1.0, seed=step, **limits)
        texts = policy.decode(tokenizer, ids)
        for i, row in enumerate(table[table["step"] == step].itertuples()):
            asked, own = EASY.parse_prompt(prompts[6 * i]), texts[6 * i : 6 * i + 6]
            points = [EASY.reward(asked, text) for text in own]
            types = [EASY.answer_type(asked, text) for text in own]
            assert row.distinct == len(set(own)) / 6 and row.best == max(points)
            assert row.reward == pytest.approx(sum(points) / 6)
            assert row.typed == (6 - types.count(None)) / 6
            assert row.coverage == len(set(types) - {None}) / len(EASY.answer_types(asked))
            assert row.ideal == types.count((asked.tone, "right", asked.length)) / 6
    spec.compute(tmp_path, store, lambda work: None)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "exploration.parquet"), table, check_exact=True)


def test_no_more_prompts_are_asked_than_are_held_out(store):
    p = check(SMALL | {"explore_prompts": 500, "explore_samples": 2})
    run = plan.run(p, 0, "dpo")
    table = store.get(plan.exploration_run(p, run)).frame("exploration")
    assert table.groupby("step")["index"].agg(list).tolist() == [list(range(9))] * len(run.steps())


def test_replies_to_a_file_have_no_types_and_no_reward(store, tmp_path):
    path = tmp_path / "preferences.jsonl"
    rows = [
        {"prompt": f"What is {i} + {i}?", "chosen": f"It is {2 * i}.", "rejected": f"No idea{'!' * (1 + i % 3)}"}
        for i in range(45)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    p = check(SMALL | {"dataset": str(path), "vocab_size": 300, "sft_steps": 4, "demonstrations": None})
    table = store.get(plan.exploration_run(p, plan.run(p, 0, "dpo"))).frame("exploration")
    assert set(table.columns) == {"step", "index", "distinct", "reward", "best"} and len(table) == 3 * 5
    assert table[["reward", "best"]].isna().all(axis=None) and np.isfinite(table["distinct"]).all()


def test_drift_by_hand():
    """Two prompts: one reply is final from the start; the other changes one of three words: 2 * 2 / 6 are alike."""
    rows = [(0, 0, "a b c"), (0, 1, "x y z"), (3, 0, "a b c"), (3, 1, "x q z")]
    replies = pd.DataFrame(rows, columns=["step", "index", "reply"]).assign(seed=5)
    found = explore.drift(replies.sample(frac=1, random_state=1)).set_index("step")
    assert (found["seed"] == 5).all()
    assert found["same"].to_dict() == {0: 0.5, 3: 1.0}
    assert found["distance"].to_dict() == pytest.approx({0: (0 + 1 / 3) / 2, 3: 0.0})
    assert explore.distance("", "") == 0.0 and explore.distance("a", "b") == 1.0
