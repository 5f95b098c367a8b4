"""The ledger: planted effects flip verdicts as the rules say, missing runs are "not run", nothing is computed."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from prefdyn.book import evidence, judging, plan
from prefdyn.book.judging import apply_rules
from prefdyn.book.params import check
from prefdyn.findings import claims
from prefdyn.findings.claims import RULES, Finding, apply_rule, judge_all, ledger, verdict
from prefdyn.lab.runs import RunStore
from prefdyn.lab.sizes import Sizes
from prefdyn.lens import controls
from prefdyn.methods import registry

SEEDS, STEPS = (0, 1, 2), (0, 2, 5, 9, 14)
JITTER = {0: -0.01, 1: 0.0, 2: 0.01}  # so that intervals have a width


def alignment(g: float = 1.0, g_opt: float = 1.0, negative: float = 0.5) -> pd.DataFrame:
    """G of a whole and its halves, whose sizes are 1 - negative and negative."""
    parts = {"full": (g, g_opt), "positive": (1 - negative, 1.0), "negative": (-negative, -1.0)}
    return pd.DataFrame(
        {
            "seed": s,
            "step": t,
            "component": c,
            "g": raw + JITTER[s] * (raw > 0) / 10,
            "se": 0.1,
            "g_opt": opt,
            "se_opt": 0.1,
        }
        for s in SEEDS
        for t in STEPS
        for c, (raw, opt) in parts.items()
    )


def choices(above: float) -> pd.DataFrame:
    return pd.DataFrame(
        {"seed": s, "step": t, "choice": c, "cosine": cosine + JITTER[s] * (above > 0)}
        for s in SEEDS
        for t in STEPS
        for c, cosine in (("as declared", above), ("responses: unrelated", 0.0))
    )


def by_seed(**columns: float) -> pd.DataFrame:
    """A row a seed with these values, a little different from seed to seed."""
    return pd.DataFrame(
        {"seed": s} | {k: v + JITTER[s] * (1 + i) for i, (k, v) in enumerate(columns.items())} for s in SEEDS
    )


def curve(column: str, change: float) -> pd.DataFrame:
    return pd.DataFrame({"seed": s, "step": t, column: change * t / 14 + JITTER[s] * t} for s in SEEDS for t in STEPS)


def replies(same: dict[str, float]) -> pd.DataFrame:
    """Final replies of 100 prompts, of which a share is the whole's in each half."""
    return pd.DataFrame(
        {"label": c, "seed": s, "index": i, "step": t, "reply": "yes" if i < 100 * share + s else f"no {c}"}
        for c, share in ({"full": 1.0} | same).items()
        for s in SEEDS
        for i in range(100)
        for t in (0, 9)
    )


def labelled(name: str, differences: dict[str, float], first: str, second: str) -> pd.DataFrame:
    """Two labels in the column `name` whose values differ by so much."""
    return pd.concat(
        [
            by_seed(**differences).assign(**{name: first}),
            by_seed(**dict.fromkeys(differences, 0.0)).assign(**{name: second}) * 1,
        ]
    ).assign(**{k: lambda t, k=k: t[k] + 0.001 * t["seed"] * (t[name] == first) for k in differences})


def variety(entropy: float, coverage: float) -> pd.DataFrame:
    """Two paths with rewards 0 to 4, on one of which more entropy and coverage is left."""
    return pd.DataFrame(
        {
            "label": c,
            "seed": s,
            "step": t,
            "reward": float(t),
            "entropy": 9.0 - t + more * (entropy + JITTER[s]),
            "coverage": 0.5 + more * (coverage + JITTER[s] / 10),
        }
        for c, more in (("full", 1), ("positive", 0), ("negative", 0))
        for s in SEEDS
        for t in range(5)
    )


def gains(final: float, way: float = 0.0, noise: float = 0.05) -> pd.DataFrame:
    """Rewards of 40 prompts: one variant's last replies are better by `final`, those on the way by `way`."""
    rng = np.random.default_rng(0)
    steps = (0, 5, 10)
    effect = {"plain": (0, 0, 0), "a": (0, way, final), "b": (0, 0, 0)}
    return pd.DataFrame(
        {"variant": v, "seed": s, "index": i, "step": t, "reward": 3 + e + noise * rng.normal()}
        for v, sizes in effect.items()
        for s in SEEDS
        for i in range(40)
        for t, e in zip(steps, sizes, strict=True)
    )


def sureness(dpo: float, ppo: float) -> pd.DataFrame:
    """Two methods that are sure so often; the first one comes to KL 7 and reward 3.5, the second twice as far."""
    return pd.DataFrame(
        {"label": m, "seed": s, "step": t, "sure": y + JITTER[s], "kl": t * far, "reward_sampled": t * far / 2}
        for m, y, far in (("dpo", dpo, 0.5), ("ppo", ppo, 1.0))
        for s in SEEDS
        for t in STEPS
    )


def paths(reward: float = 0.0, kl: float = 0.0) -> pd.DataFrame:
    """Curves of variants: at the same KL one earns more by `reward`, or pays more by `kl` for the same."""
    effect = {"plain": (0.0, 0.0), "a": (reward, kl), "b": (0.0, 0.0)}
    return pd.DataFrame(
        {
            "variant": v,
            "seed": s,
            "step": t,
            "kl": t / 7 * (1 + more / 2) + 0.001 * s * t * (v == "a"),
            "reward_sampled": t / 7 * (1 + better / 2),
        }
        for v, (better, more) in effect.items()
        for s in SEEDS
        for t in STEPS
    )


def halves(**parts: tuple[float, float, float]) -> pd.DataFrame:
    """G and cosine of the halves, raw and aware, in the first, second and last third of training."""
    return pd.DataFrame(
        {"seed": s, "step": t, "component": c, "g": g * (1 + JITTER[s]), "g_opt": g * (1 + JITTER[s])}
        for c, thirds in parts.items()
        for s in SEEDS
        for t, g in zip((0, 4, 5, 9, 10, 14), np.repeat(thirds, 2), strict=True)
    )


def cosines(size: float) -> pd.DataFrame:
    return pd.DataFrame(
        {"seed": s, "step": t, "component": "full", "cosine": (size + JITTER[s]) * (-1) ** t}
        for s in SEEDS
        for t in STEPS
    )


def ends(**change: float) -> pd.DataFrame:
    """Rewards of halves, of which the last differs from the first by so much."""
    return pd.concat(curve("reward_sampled", by).assign(label=c, kl=1.0) for c, by in change.items())


def sizes(entropy: float) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": c,
            "seed": s,
            "step": t,
            "reward_sampled": float(t),
            "entropy": 9.0 - t + more * (entropy + JITTER[s]),
        }
        for c, more in (("full", 1), ("uniform", 0))
        for s in SEEDS
        for t in range(5)
    )


# What a rule must find as predicted, and what it must find against the prediction.
PLANTED = {
    "C1a": (alignment(g=1), alignment(g=-1)),
    "C1b": (alignment(g_opt=1), alignment(g_opt=-1)),
    "C1c": (choices(0.5), choices(-0.5)),
    "C2a": (sureness(0.9, 0.3), sureness(0.3, 0.9)),
    "C2d": (sureness(0.9, 0.3), sureness(0.3, 0.9)),
    "C2e": (sureness(0.9, 0.3), sureness(0.3, 0.9)),
    "C2b": (curve("reward_sampled", 2), curve("reward_sampled", -2)),
    "C2c": (curve("entropy", -2), curve("entropy", 2)),
    "C3a": (alignment(negative=0.5), alignment(negative=0.02)),
    "C3b": (alignment(negative=0.5), alignment(negative=0.98)),
    "C3c": (replies({"positive": 0.2, "negative": 1.0}), replies({"positive": 0.97, "negative": 0.0})),
    "C3d": (replies({"positive": 1.0, "negative": 0.2}), replies({"positive": 0.0, "negative": 0.97})),
    "C4a": (by_seed(correlation=-0.7), by_seed(correlation=0.3)),
    "C4b": (by_seed(auc_worse=0.9), by_seed(auc_worse=0.3)),
    "C4c": (
        labelled("label", {"reward_sampled": 1.0}, "full", "uniform"),
        labelled("label", {"reward_sampled": -1.0}, "full", "uniform"),
    ),
    "C4d": (
        labelled("label", {"overfit": -0.1}, "full", "uniform"),
        labelled("label", {"overfit": 0.1}, "full", "uniform"),
    ),
    "C5a": (alignment(negative=0.2), alignment(negative=0.7)),
    "C5b": (variety(1.0, 0.0), variety(-1.0, 0.0)),
    "C5c": (variety(0.0, 0.1), variety(0.0, -0.1)),
    "C6a": (labelled("third", {"g": 1.0}, "top", "bottom"), labelled("third", {"g": -1.0}, "top", "bottom")),
    "C6b": (
        labelled("third", {"direction": 1.0}, "top", "bottom"),
        labelled("third", {"direction": -1.0}, "top", "bottom"),
    ),
    "C6c": (
        labelled("third", {"later_g": 1.0}, "top", "bottom"),
        labelled("third", {"later_g": -1.0}, "top", "bottom"),
    ),
    "C6d": (
        labelled("third", {"later_direction": 1.0}, "top", "bottom"),
        labelled("third", {"later_direction": -1.0}, "top", "bottom"),
    ),
    "C7a": (gains(1.0), gains(0.0)),
    "C7b": (gains(-1.0), gains(0.05)),
    "C7c": (gains(0.0, way=1.0), gains(0.3, way=-0.1)),
    "C7d": (gains(0.0, way=-1.0), gains(0.0)),
    "C7e": (paths(reward=1.0), paths()),
    "C7f": (paths(reward=-1.0), paths()),
    "C7g": (paths(kl=1.0), paths()),
    "C7h": (paths(kl=-1.0), paths()),
    "S1a": (halves(positive=(1, 1, 1), negative=(-1, -0.5, -1)), halves(positive=(1, 1, 1), negative=(1, 1, 1))),
    "S1b": (halves(positive=(1, 1, 1), negative=(-1, -0.5, -1)), halves(positive=(1, 1, 1), negative=(-0.1, 0, 0))),
    "S2a": (halves(positive=(3, 1, 1), negative=(1, 1, 9)), halves(positive=(1, 9, 9), negative=(3, 0, 0))),
    "S2b": (halves(positive=(3, 1, 1), negative=(1, 1, 9)), halves(positive=(1, 1, 9), negative=(3, 3, 1))),
    "S2c": (halves(positive=(3, 1, 1), negative=(1, 1, 9)), halves(positive=(1, 1, 9), negative=(3, 3, 1))),
    "S3a": (ends(negative=-2, positive=1), ends(negative=2, positive=-1)),
    "S3b": (ends(negative=-2, positive=1), ends(negative=2, positive=-1)),
    "S4a": (cosines(0.03), cosines(0.4)),
    "S5a": (sizes(-1.0), sizes(0.05)),
}
UNDECIDED = {
    "C1b": alignment().assign(
        g_opt=lambda t: np.where(t["step"] == 14, -1.0, 1.0)
    ),  # four in five is not more than that
    "C1a": alignment().assign(g=lambda t: np.where(t["seed"] == 0, -1.0, 1.0)),
    "C2a": sureness(0.5, 0.501).assign(sure=lambda t: t["sure"] + np.where(t["label"] == "dpo", t["seed"] % 2 / 9, 0)),
    "C4a": pd.DataFrame({"seed": SEEDS, "correlation": [-0.5, 0.4, 0.1]}),
    "C7a": gains(0.2, noise=0.5),
    "C7d": gains(0.0, way=0.3, noise=1.5),
}


def rule(name: str) -> claims.Rule:
    (found,) = [r for r in RULES if r.name == name]
    return found


def test_every_rule_has_its_effects_planted_and_a_claim():
    assert [r.name for r in RULES] == list(PLANTED)
    assert {r.claim for r in RULES} == {*claims.CLAIMS, *claims.STATEMENTS}
    assert all(r.name.startswith(r.claim) for r in RULES)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_effects_flip_the_verdict(name):
    good, bad = (apply_rule(rule(name), table) for table in PLANTED[name])
    assert good.verdict == "as predicted", good
    assert bad.verdict == "against the prediction", bad
    assert good.found.n == bad.found.n == 3


@pytest.mark.parametrize("name", UNDECIDED)
def test_intervals_that_hold_the_threshold_decide_nothing(name):
    found = apply_rule(rule(name), UNDECIDED[name])
    assert found.verdict == "undecided" and found.found.low <= rule(name).threshold <= found.found.high


def test_measures_by_hand():
    """Share of negatives 0.3 / (0.3 + 0.7); agreement 20, 21 and 22 of 100; the largest effect is that of variant a."""
    assert apply_rule(rule("C3a"), alignment(negative=0.3)).found.mean == pytest.approx(0.3, abs=1e-3)
    assert apply_rule(rule("C3c"), PLANTED["C3c"][0]).found.mean == pytest.approx(0.21)
    assert apply_rule(rule("C7b"), gains(-1.0)).found.mean == pytest.approx(1.0, abs=0.03)
    # trapezoids over steps 0, 5, 10: the effect half-way counts half
    assert apply_rule(rule("C7c"), gains(0.0, way=1.0)).found.mean == pytest.approx(0.5, abs=0.03)
    # halves of 1 and -0.5 leave 0.5 of 1.5, halves of 1 and -1 nothing: (0 + 1/3 + 0) / 3
    assert apply_rule(rule("S1a"), PLANTED["S1a"][0]).found.mean == pytest.approx(1 / 9)
    assert apply_rule(rule("S2c"), PLANTED["S2c"][0]).found.mean == pytest.approx(0.9 - 0.25)
    # plain comes to KL 2 with reward 2, the variant with 1.5 times as much
    assert apply_rule(rule("C7e"), paths(reward=1.0)).found.mean == pytest.approx(1.0, abs=0.03)


def test_a_rule_tells_methods_apart_or_names_no_foil():
    """A foil is a method that the library has, other than the rule's own, and its table is there for it too."""
    for r in RULES:
        assert not set(r.foil) & set(r.methods) and (not r.foil or len(r.foil) == len(r.methods))
        assert all(registry.find(name) for name in r.foil)
        assert r.since in (claims.FIRST, claims.SECOND)


def finding(*words: str) -> list[Finding]:
    return [Finding(RULES[0], None, word) for word in words]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["as predicted", "as predicted"], "supported"),
        (["as predicted", "undecided"], "partly"),
        (["as predicted", "against the prediction"], "partly"),
        (["against the prediction", "undecided"], "not supported"),
        (["undecided", "undecided"], "inconclusive"),
        (["as predicted", "not run"], "not run"),
        (["against the prediction", "not run"], "not run"),
        ([], "not run"),
    ],
)
def test_verdicts_on_claims_by_hand(words, expected):
    assert verdict(finding(*words)) == expected and expected in claims.VERDICTS


def test_a_rule_that_refers_to_a_missing_column_is_named_with_what_there_is():
    table = alignment().drop(columns="g_opt")
    with pytest.raises(ValueError, match=r"rule C1b: its table 'G' has no column g_opt; there are: seed, step, "):
        apply_rule(rule("C1b"), table)


def test_a_rule_that_refers_to_a_missing_table_is_named_with_what_there_is(tmp_path):
    lost = replace(rule("C1a"), table="H")
    with pytest.raises(ValueError, match="rule C1a: there is no table 'H'; there are: G, choices of D'"):
        apply_rules(RunStore(tmp_path), check({"profile": "smoke"}), [lost])
    assert {r.table for r in RULES} <= set(evidence.TABLES)


def test_what_is_not_known_is_not_judged():
    unknown = curve("reward_sampled", float("nan"))
    assert apply_rule(rule("C2b"), unknown).verdict == "not run"
    assert "not known" in apply_rule(rule("C2b"), unknown).reason


SMALL = {
    "profile": "smoke",
    "seeds": [0, 1],
    "pairs": 24,
    "check": 16,
    "demonstrations": 64,
    "validation": 8,
    "held_out": 12,
    "width": 16,
    "sft_steps": 20,
    "batch": 8,
    "epochs": 1.0,
    "checkpoints": 3,
    "probe": 16,
    "ppo_probe": 12,
    "choice_probe": 12,
    "iterations": 2,
    "rollouts": 10,
    "ppo_batch": 5,
}
P = check(SMALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    """What C3 and the statements about DPO's halves need, and nothing else."""
    store = RunStore(tmp_path_factory.mktemp("runs"))
    halves = [plan.run(P, s, "dpo", c) for s in P.seeds for c in ("full", "positive", "negative")]
    store.ensure([*halves, *evidence.measured(P, "dpo").values()], workers=1)
    return store


def test_an_empty_store_judges_nothing_and_computes_nothing(tmp_path):
    store = RunStore(tmp_path)
    findings = apply_rules(store, P)
    assert set(ledger(findings).values()) == {"not run"} and len(findings) == len(RULES)
    assert all("missing" in f.reason and f.found is None for f in findings)
    assert store.list() == []


def test_claims_whose_runs_are_there_are_judged_and_no_others(store):
    verdicts = ledger(apply_rules(store, P))
    assert {c for c, v in verdicts.items() if v != "not run"} == {"C3", "S1", "S2", "S3"}


def test_removing_a_run_turns_its_claims_into_not_run(store, tmp_path):
    import shutil

    copy = tmp_path / "runs"
    shutil.copytree(store.root, copy)
    fewer = RunStore(copy)
    before = {f.rule.name: f.verdict for f in apply_rules(fewer, P)}
    fewer.remove(fewer.key(plan.run(P, 1, "dpo", "negative")))
    findings = {f.rule.name: f for f in apply_rules(RunStore(copy), P)}
    assert ledger(findings.values())["C3"] == "not run"
    assert findings["C3c"].verdict == findings["C3d"].verdict == "not run" != before["C3c"]
    assert findings["C3c"].reason == "1 of 6 runs are missing, the first: negative, seed 1"
    assert findings["C3a"].verdict == before["C3a"] != "not run"  # the measurement is still there


def test_other_parameters_find_no_runs_of_these(store):
    assert ledger(apply_rules(store, P.model_copy(update={"beta": 0.7})))["C3"] == "not run"


def test_rules_are_tried_where_they_should_fail_and_where_they_should_hold(store):
    """The yardstick of C1 is SFT, which has no measurement here; its foil PPO has none either, and says so."""
    for where, named in (("foil", "ppo"), ("yardstick", "sft")):
        found = judging.elsewhere(store, P, where)
        assert found.keys() == {r.name for r in RULES if getattr(r, where)} and "C1a" in found
        assert found["C1a"].rule.methods == (named,) and found["C1a"].verdict == "not run"
    sft = evidence.measured(P, "sft")
    store.ensure(sft.values(), workers=1)
    assert [spec.run for spec in sft.values()] == [plan.sft_run(P, seed) for seed in P.seeds]
    tried = judging.elsewhere(store, P, "yardstick")["C1a"]
    assert tried.found == apply_rule(rule("C1a"), evidence.TABLES["G"].read(store, P, "sft")).found


def test_firmness_is_that_of_the_tables_that_there_are(store):
    rules = [rule(name) for name in ("C3a", "C2b")]
    shares = judging.firm(rules, judging.read_tables(store, P, rules))
    assert 0 <= shares["C3a"] <= 1 and "C2b" not in shares and shares["C2"] is None


def test_the_machines_of_other_parameters_have_said_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "reference"
    folder.mkdir(parents=True)
    monkeypatch.setattr(judging, "project_root", lambda: tmp_path)
    intervals = {"C1a": {"mean": 0.9, "low": 0.8, "high": 1.0, "n": 3, "values": [0.8, 0.9, 1.0]}}
    known = {"numbers": {}, "verdicts": {}, "intervals": intervals}
    (folder / "smoke.json").write_text(json.dumps(known))
    assert judging.machines(check({"profile": "smoke"})) == (intervals, {})
    (folder / "smoke-second.json").write_text(json.dumps(known))
    assert judging.machines(check({"profile": "smoke"})) == (intervals, intervals)
    assert judging.machines(P) == judging.machines(check({"profile": "reader"})) == ({}, {})


def test_what_rules_need_is_what_their_tables_read(store):
    """With what they need computed, no table of a rule on DPO's halves is missing; nothing else is asked for."""
    rules = [r for r in RULES if r.claim in ("C3", "S1", "S2", "S3")]
    needed = {store.key(s) for r in rules for s in evidence.TABLES[r.table].needs(P, *r.methods).values()}
    assert all(f.verdict != "not run" for f in apply_rules(store, P, rules))
    assert len(needed) == 2 * (3 + 1)  # halves and the whole, and its measurement


def test_variants_are_found_beside_their_plain_method():
    runs = evidence.variant_runs(P, "ppo")
    assert {s for _, s in runs} == {0, 1} and len(runs) == 2 * 8
    assert runs["plain", 0] == plan.run(P, 0, "ppo") and runs["plain", 0].control == controls.FULL


@pytest.mark.parametrize(
    ("given", "table", "said"),
    [
        ({"target_responses": "unrelated"}, ("choices of D'", "dpo"), "D' is the floor itself"),
        ({"iterations": 1}, ("variants", "ppo"), "switch_at: given 0.5"),
        ({"variants": []}, ("variants", "dpo"), "no variant is asked for"),
    ],
)
def test_rules_that_parameters_make_impossible_are_not_run(tmp_path, given, table, said):
    p = check(SMALL | {"dataset": "world"} | given)
    findings = [f for f in apply_rules(RunStore(tmp_path), p) if (f.rule.table, *f.rule.methods) == table]
    assert findings and all(f.verdict == "not run" and said in f.reason for f in findings)


def test_the_last_pass_of_a_file_counts_the_pairs_that_there_are(tmp_path, monkeypatch):
    """24 pairs in batches of 8 make passes of 3 updates, though 4,800 were asked for; accuracy counts updates."""
    p = P.model_copy(update={"pairs": 4_800})
    monkeypatch.setattr(evidence.plan, "sizes_of", lambda spec: Sizes(24, 0, 0))
    monkeypatch.setattr(evidence.plan, "data_spec", lambda p, seed: SimpleNamespace(path=None))
    monkeypatch.setattr(evidence.plan, "run", lambda p, seed, method, part: (part, seed))
    tables = {
        "checkpoints": pd.DataFrame({"label": "full", "seed": 0, "step": [0, 12], "check_accuracy": [0.0, 2.0]}),
        "steps": pd.DataFrame({"label": "full", "seed": 0, "step": range(12), "accuracy": range(12)}),
    }
    monkeypatch.setattr(evidence, "_found", lambda store, specs, frame: tables[frame])
    found = evidence.TABLES["with and without omega"].read(RunStore(tmp_path), p, "dpo")
    assert found["overfit"].tolist() == [(9 + 10 + 11) / 3 - 2]


def test_rules_are_judged_on_the_tables_that_there_are():
    """In the order of the rules; a table that is not there is no verdict, one that no rule reads is nothing."""
    rules = [rule(name) for name in ("C4a", "C1a", "C2b", "C1b")]
    tables = {"G": alignment(g_opt=-1), "omega": by_seed(correlation=-0.7), "weather": curve("rain", 1)}
    found = judge_all(rules, tables)
    assert [f.rule for f in found] == rules
    assert [f.verdict for f in found] == ["as predicted", "as predicted", "not run", "against the prediction"]
    assert [found[i] for i in (0, 1, 3)] == [apply_rule(r, tables[r.table]) for r in rules if r.table in tables]
    missing = "what it needs has not been trained, or is not known here"
    assert found[2] == Finding(rule("C2b"), None, "not run", missing)
    assert verdict(found) == "not run"
    assert judge_all(iter(rules), {}) == [Finding(r, None, "not run", missing) for r in rules]
    with pytest.raises(ValueError, match="rule C1b: its table 'G' has no column g_opt"):
        judge_all(rules, {"G": alignment().drop(columns="g_opt")})
