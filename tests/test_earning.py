"""Towards what updates point: tables that add up, the same G as elsewhere, errors, and what is read from them."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.findings import agreement, earning
from prefdyn.findings.earning import EarningRun
from prefdyn.lab import evaluate, policy, ppo, recipes
from prefdyn.lab.exact import Enumerated, say
from prefdyn.lab.runs import RunStore
from prefdyn.lens import alignment, likelihood, reward
from prefdyn.lens.batch import pad
from prefdyn.lens.groups import groups
from toys.models import build

SMALL = {
    "max_response": 28,
    "profile": "smoke",
    "pairs": 24,
    "check": 20,
    "demonstrations": 64,
    "validation": 8,
    "held_out": 12,
    "width": 16,
    "sft_steps": 30,
    "batch": 8,
    "epochs": 2.0,
    "lr": 5e-3,
    "checkpoints": 3,
    "probe": 12,
    "ppo_probe": 12,
    "iterations": 2,
    "rollouts": 12,
    "group": 3,
    "ppo_batch": 6,
    "ppo_lr": 3e-3,
    "reward_epochs": 1.0,
    "temperature": 0.7,
}
WORLD = check(SMALL)
RUNS = {
    "sft": plan.sft_run,
    "dpo": lambda p, seed: plan.run(p, seed, "dpo"),
    "ppo": lambda p, seed: plan.run(p, seed, "ppo"),
    "rloo": lambda p, seed: plan.run(p, seed, "rloo"),
}
PROMPTS, SAMPLES = 10, 4


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


def asked(run, **changes) -> EarningRun:
    given = {"prompts": PROMPTS, "samples": SAMPLES, "size": 12, "probe": "check", "method": "forward"}
    return EarningRun(**{"run": run, "targets": plan.target_spec(WORLD), "learned": None, **given, **changes})


def whole(store, kind: str) -> EarningRun:
    """The measurement that most tests look at: of every kind of run, towards a learned reward too."""
    return asked(RUNS[kind](WORLD, 0), learned=plan.reward_run(WORLD, 0))


COLUMNS = {
    "earning": "step towards part g se se_probe se_direction g_opt cosine cosine_opt n",
    "groups": "step towards part group g g_opt cosine",
    "directions": "step towards norm squared reliability halves angle to_final to_reward",
    "replies": "step towards reward se n",
    "moved": "step towards moved se moved_end se_end change change_se",
    "tokens": "step example side position token logp w strength third a_final a_reward a_learned",
}
WAYS = ["final", "reward", "learned"]


@pytest.mark.parametrize("kind", RUNS)
def test_tables_and_their_columns(store, kind, monkeypatch, tmp_path):
    spec, ticks = whole(store, kind), []
    for parent in spec.parents():
        store.get(parent)
    made = store.get(spec, ticks.append)
    assert sum(ticks) == pytest.approx(spec.work())
    steps = spec.run.steps()
    tables = {name: made.frame(name) for name in earning.TABLES}
    assert {name: " ".join(table) for name, table in tables.items()} == COLUMNS
    of = groups(recipes.final_policy(store.get(spec.run))[0])
    order = list(dict.fromkeys(of.values()))
    rows = [(step, way, part) for step in steps for way in WAYS for part in earning.PARTS]
    assert tables["earning"][["step", "towards", "part"]].apply(tuple, axis=1).tolist() == rows
    assert tables["groups"][["step", "towards", "part", "group"]].apply(tuple, axis=1).tolist() == [
        (*row, group) for row in rows for group in order
    ]
    for name in ("directions", "moved"):
        assert tables[name][["step", "towards"]].apply(tuple, axis=1).tolist() == [(s, w) for s in steps for w in WAYS]
    assert tables["replies"]["n"].tolist() == [PROMPTS * SAMPLES] * 2 * len(steps)
    known = tables["earning"].drop(columns=["cosine", "cosine_opt"])
    assert known.notna().all(axis=None) and (tables["earning"]["n"] == 12).all()
    assert tables["tokens"].groupby("step")["example"].nunique().tolist() == [12] * len(steps)
    spec.compute(tmp_path, store, lambda work: None)  # again: the same to the bit
    for name, table in tables.items():
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{name}.parquet"), table, check_exact=True)


@pytest.mark.parametrize("kind", RUNS)
def test_parts_and_groups_add_up(store, kind):
    """Signs to the whole, groups to the component, and errors to one."""
    made = store.get(whole(store, kind))
    table = made.frame("earning").set_index(["step", "towards", "part"])
    by_group = made.frame("groups").groupby(["step", "towards", "part"])[["g", "g_opt"]].sum()
    scale = table[["g", "g_opt"]].abs().groupby(level=[0, 1]).max()
    for name in ("g", "g_opt"):
        bound = 1e-5 * scale[name]
        assert ((by_group[name] - table[name]).abs().groupby(level=[0, 1]).max() <= bound).all()
        wide = table[name].unstack("part")
        assert ((wide["positive"] + wide["negative"] - wide["full"]).abs() <= bound).all()
    assert np.allclose(table["se"] ** 2, table["se_probe"] ** 2 + table["se_direction"] ** 2)
    assert (table.loc[(slice(None), "final"), "se_direction"] == 0).all()
    assert (table.loc[(slice(None), ["reward", "learned"], "full"), "se_direction"] > 0).all()
    tokens = made.frame("tokens")  # all examples are kept, so that weights times worth is G
    for way in WAYS:
        sums = (tokens["w"].astype(float) * tokens[f"a_{way}"]).groupby(tokens["step"]).sum()
        full = table["g"].xs((way, "full"), level=("towards", "part"))
        assert np.allclose(sums, full, rtol=1e-3, atol=1e-4 * full.abs().max())
    if kind == "sft":  # it raises alone
        assert (table.xs("negative", level="part")[["g", "se"]] == 0).all(axis=None)
        assert table.xs("negative", level="part")["cosine"].isna().all()


@pytest.mark.parametrize("kind", RUNS)
def test_towards_final_responses_it_is_the_measurement(store, kind):
    """G, its error, G for the optimiser and cosines are those that `measure` gets along its own way."""
    spec = whole(store, kind)
    measured = store.get(plan.alignment_run(WORLD, spec.run, probe="check"))
    expected = measured.frame("alignment").set_index(["step", "component"])
    found = store.get(spec).frame("earning").query("towards == 'final'").set_index(["step", "part"])
    for name in ("g", "se", "g_opt", "cosine", "cosine_opt"):
        own = found[name]
        if name.startswith("cosine"):  # which is measured there of the whole alone
            own = own.xs("full", level="part", drop_level=False)
        if name == "g_opt":  # before the first update the scale is 1 / |gradient|, and parts of what cancels are huge
            own = own[(own.index.get_level_values("part") == "full") | (own.index.get_level_values("step") > 0)]
        reference = expected[name].rename_axis(["step", "part"]).reindex(own.index)
        assert np.allclose(own, reference, rtol=2e-3, atol=1e-4 * reference.abs().max()), name
    moved = store.get(spec).frame("moved").query("towards == 'final'")
    full = expected.xs("full", level="component")
    assert np.allclose(moved["moved"], full["moved"], rtol=1e-4, equal_nan=True)
    assert np.allclose(moved["change"].iloc[:-1], full["logp_targets"].diff().iloc[1:], atol=1e-4)
    assert moved[["se", "se_end", "change_se"]].isna().all(axis=None)


def replies_at(store, spec: EarningRun, step: int):
    """The policy at a step, its replies as they are declared, and their rewards by the world."""
    known = recipes.dataset(spec.run.data)
    model, tokenizer = recipes.load_checkpoint(store.get(spec.run), step)
    prompts = [prompt for prompt in known.prompts["held_out"][:PROMPTS] for _ in range(SAMPLES)]
    limits = {"max_prompt": 24, "max_response": 28}
    seed = 8_000_000 + 2 * step
    ids, answers = evaluate.reply(model, tokenizer, prompts, temperature=1.0, seed=seed, **limits)
    points = evaluate.rewards(known, prompts, policy.decode(tokenizer, answers))
    return model, pad(ids, answers, tokenizer.pad_token_id), torch.tensor(points)


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_towards_reward_by_whole_losses(store, kind):
    """d_R by autograd of sum (R - mean of the others) log pi / (P K); G_R with it, J, and what the update brings."""
    spec = whole(store, kind)
    made, steps = store.get(spec), spec.run.steps()
    found = {}
    for step in steps:
        model, replies, points = replies_at(store, spec, step)
        others = (points.reshape(PROMPTS, -1).sum(-1, keepdim=True) - points.reshape(PROMPTS, -1)) / (SAMPLES - 1)
        weights = (points - others.flatten()) / len(points)
        value = (weights * likelihood.token_logps(model, replies).sum(-1)).sum()
        grads = torch.autograd.grad(value, list(model.parameters()))
        found[step] = model, torch.cat([g.flatten() for g in grads]).double(), points.reshape(PROMPTS, -1).mean(-1)
    rows = made.frame("replies").query("towards == 'reward'").set_index("step")
    moved = made.frame("moved").query("towards == 'reward'").set_index("step")
    table = made.frame("earning").query("towards == 'reward' and part == 'full'").set_index("step")
    directions = made.frame("directions").query("towards == 'reward'").set_index("step")

    def flat(model) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in model.parameters()]).double()

    for step, following in zip(steps, [*steps[1:], None], strict=True):
        model, d, by_prompt = found[step]
        assert rows.loc[step, "reward"] == pytest.approx(by_prompt.mean().item(), abs=1e-5)
        assert rows.loc[step, "se"] == pytest.approx(by_prompt.std().item() / math.sqrt(PROMPTS), rel=1e-5)
        assert directions.loc[step, "norm"] == pytest.approx(d.norm().item(), rel=1e-3)
        objective, index = spec.run.prober(store, recipes.tokenizer_of(spec.run.data), "check", 12)(step, model)
        batch = objective.batch(index)
        logps = likelihood.token_logps(model, batch, objective.temperature)
        loss = -(objective.weights(logps.detach(), batch, index).w * logps).sum()
        down = -torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()
        lengths = (d.norm() * down.norm()).item()
        assert table.loc[step, "g"] == pytest.approx((d @ down).item(), rel=1e-3, abs=1e-4 * lengths)
        assert table.loc[step, "cosine"] == pytest.approx((d @ down).item() / lengths, abs=1e-4)
        if following is None:
            assert moved.loc[step].drop("towards").isna().all()
            continue
        update = flat(found[following][0]) - flat(model)
        bound = 1e-4 * (d.norm() * update.norm()).item()
        gained = found[following][2] - by_prompt
        assert moved.loc[step, "moved"] == pytest.approx((d @ update).item(), abs=bound)
        assert moved.loc[step, "moved_end"] == pytest.approx((found[following][1] @ update).item(), abs=bound)
        assert moved.loc[step, "change"] == pytest.approx(gained.mean().item(), abs=1e-5)
        assert moved.loc[step, "change_se"] == pytest.approx(gained.std().item() / math.sqrt(PROMPTS), rel=1e-4)


def test_a_learned_reward_that_is_the_true_one_is_the_same_direction(store, tmp_path, monkeypatch):
    """Cosine 1, as it is and free of noise (where that is known), and the same G; another one is not the same."""
    spec = whole(store, "dpo")
    other = store.get(spec).frame("directions").query("towards == 'learned'")
    assert (other["to_reward"] < 0.999).all()
    scorer = ppo.scorer
    monkeypatch.setattr(ppo, "scorer", lambda store, tokenizer, data, model: scorer(store, tokenizer, data, None))
    spec.compute(tmp_path, store, lambda work: None)
    tables = {name: pd.read_parquet(tmp_path / f"{name}.parquet") for name in earning.TABLES}
    own = tables["directions"].query("towards == 'learned'")
    assert np.allclose(own["to_reward"], 1) and np.allclose(own["angle"].dropna(), 1)
    assert own["angle"].notna().any()
    for name, table in tables.items():
        if name not in ("tokens", "directions"):
            true, learned = (
                table[table["towards"] == way].drop(columns="towards").reset_index(drop=True)
                for way in ("reward", "learned")
            )
            pd.testing.assert_frame_equal(true, learned)
    assert (tables["tokens"]["a_reward"] == tables["tokens"]["a_learned"]).all()


def test_a_controlled_run_is_measured_as_it_steps(store):
    """Positive learning alone: the negative part is nothing, and the whole is the positive one."""
    spec = asked(plan.run(WORLD, 0, "dpo", "positive"))
    table = store.get(spec).frame("earning").set_index(["step", "towards", "part"])
    nothing = table.xs("negative", level="part")
    assert (nothing[["g", "g_opt", "se"]] == 0).all(axis=None) and nothing["cosine"].isna().all()
    whole, positive = (table.xs(part, level="part")[["g", "cosine"]] for part in ("full", "positive"))
    assert np.allclose(whole, positive)
    assert (positive["g"] != 0).all() and list(table.index.unique("towards")) == ["final", "reward"]


def file_of(path):
    said = ({"prompt": f"{i}?", "chosen": f"good {i}", "rejected": "bad"} for i in range(40))
    path.write_text("\n".join(map(json.dumps, said)))
    return path


def test_without_a_true_reward_a_learned_one_is_needed(tmp_path):
    store = RunStore(tmp_path / "runs")
    given = {"dataset": str(file_of(tmp_path / "a.jsonl")), "reward": "learned", "demonstrations": None, "sft_batch": 8}
    p = check(SMALL | given | {"pairs": 16, "check": 8, "validation": 4, "held_out": 4})
    run = plan.run(p, 0, "dpo")
    with pytest.raises(ValueError, match="true reward of this dataset is not known, and no learned one is given"):
        store.get(asked(run))
    made = store.get(asked(run, learned=plan.reward_run(p, 0)))
    assert made.frame("earning")["towards"].unique().tolist() == ["final", "learned"]
    assert made.frame("replies")["towards"].unique().tolist() == ["learned"]
    assert made.frame("directions")[["to_reward", "angle"]].isna().all(axis=None)
    assert "a_reward" not in made.frame("tokens")


@pytest.mark.parametrize("name", ["prompts", "samples", "size"])
def test_one_of_anything_has_no_spread(name):
    with pytest.raises(ValueError, match=f"{name}\n.*greater than or equal to 2"):
        asked(plan.run(WORLD, 0, "dpo"), **{name: 1})


def test_keys_tell_measurements_apart(store):
    run = plan.run(WORLD, 0, "dpo")
    learned = plan.reward_run(WORLD, 0)
    others = [{}, {"prompts": 9}, {"samples": 3}, {"size": 9}, {"probe": "train"}, {"method": "central"}]
    others += [
        {"learned": learned},
        {"run": plan.run(WORLD, 1, "dpo")},
        {"targets": plan.target_spec(WORLD, decoding="sampled")},
    ]
    specs = [asked(**{"run": run} | change) for change in others]
    assert len({store.key(spec) for spec in specs}) == len(others)
    assert store.key(asked(run)) == store.key(asked(run)) and store.key(specs[0]).startswith("earning-")
    assert specs[6].parents()[-1] == learned and learned not in specs[0].parents()


def test_what_was_begun_is_made_anew(store, monkeypatch):
    """An interrupted measurement leaves nothing that counts, and comes out as one that was not."""
    spec, error = asked(plan.run(WORLD, 0, "dpo"), prompts=6), RuntimeError("cut off")
    made = earning.moved_table

    def cut_off(seen):
        raise error

    monkeypatch.setattr(earning, "moved_table", cut_off)
    with pytest.raises(RuntimeError, match="cut off"):
        store.get(spec)
    assert store.find(spec) is None
    monkeypatch.setattr(earning, "moved_table", made)
    assert set(store.get(spec).frame("moved")["towards"]) == {"final", "reward"}


@pytest.mark.parametrize("way", ["final", "reward"])
def test_a_measurement_that_is_wrong_is_not_kept(store, tmp_path, monkeypatch, way):
    """Scores along either direction that are wrong by a hundredth are refused, with the step and both numbers."""
    token_scores, seen = alignment.token_scores, []

    def wrong(model, batch, direction, *args, **kwargs):
        logps, scores = token_scores(model, batch, direction, *args, **kwargs)
        seen.append(1)
        return logps, scores * (1.01 if len(seen) == 1 + (way == "reward") else 1.0)

    spec = asked(plan.run(WORLD, 0, "dpo"))
    store.get(spec.run)
    monkeypatch.setattr(alignment, "token_scores", wrong)
    with pytest.raises(alignment.MeasurementError, match=rf"step 0, towards {way}, method='forward'.* backward pass"):
        spec.compute(tmp_path, store, lambda work: None)


def test_central_differences_give_the_same(store):
    run = plan.run(WORLD, 0, "dpo")
    one, other = (store.get(asked(run, method=method)).frame("tokens") for method in ("forward", "central"))
    for name in ("a_final", "a_reward"):
        assert np.allclose(one[name], other[name], atol=1e-2 * one[name].abs().max())


def test_what_is_infinite_and_stays_so_has_not_moved():
    model, after = build("phi"), build("phi")
    with torch.no_grad():
        for one in (model, after):
            one.lm_head.bias[-3:] = -torch.inf
        after.lm_head.bias[:4] += 0.5
    moved = earning.update_between(model, after)
    assert sum(t.sum().item() for t in moved.values()) == pytest.approx(4 * 0.5)


def test_a_small_update_changes_j_as_foretold(double):
    """Six replies, all listed: J(theta + u) - J is <d_R, u> to first order, and half of both ends' to second.

    Halving u makes the first error a quarter and the second one an eighth.
    """
    rng = torch.Generator().manual_seed(0)
    theta, points, way = (torch.randn(6, generator=rng) for _ in range(3))
    replies, errors = say(range(6)), []

    def at(theta):
        model = Enumerated(theta)
        return model, *reward.expected_direction(model, replies, points, 1)

    start, j, d = at(theta)
    for size in (0.1, 0.05, 0.025):
        end, there, d_end = at(theta + size * way)
        update = earning.update_between(start, end)
        first, last = (alignment.inner(x, update).item() for x in (d, d_end))
        change = (there - j).item()
        errors.append([abs(change - first), abs(change - (first + last) / 2)])
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert np.allclose(ratios, [4, 8], rtol=0.1)
    reached = {0: earning.Reached(np.array([j.item()]), {"to": (first, 0.1)})}
    reached[3] = earning.Reached(np.array([there.item()]), {"from": (last, 0.2)})
    table = earning.moved_table({step: {"reward": one} for step, one in reached.items()})
    assert table.iloc[0][["moved", "se", "moved_end", "se_end"]].tolist() == [first, 0.1, last, 0.2]
    assert table.iloc[0]["change"] == pytest.approx(change) and table.iloc[1, 2:].isna().all()


def of_seeds(final, reward, se=(1.0, 1.0)) -> pd.DataFrame:
    """A table as several earning runs leave it, from G by seed and checkpoint, of the whole."""
    rows = [
        {"seed": seed, "step": 10 * i, "towards": way, "part": "full", "g": g, "se": error, "cosine": g / 10}
        for way, table, error in (("final", final, se[0]), ("reward", reward, se[1]))
        for seed, own in table.items()
        for i, g in enumerate(own)
    ]
    return pd.DataFrame(rows)


def test_agreement_by_hand():
    """Seed 0: 3 2 1 and 6 4 2 have correlation 1; seed 1: 1 2 3 and 1 3 2 have 1/2. Means 3/4; same signs 1, 2/3."""
    table = of_seeds({0: [3, 2, 1], 1: [1, 2, 3]}, {0: [6, 4, 2], 1: [1, 3, 2]})
    found = agreement.agreement(table)
    assert found.mean == pytest.approx(0.75) and found.values == pytest.approx((1, 0.5)) and found.n == 2
    assert agreement.agreement(table, reading="cosine").values == pytest.approx((1, 0.5))
    turned = of_seeds({0: [3, 2, 1], 1: [1, 2, 3]}, {0: [6, 4, 2], 1: [1, 3, -2]})
    assert agreement.same_side(turned).values == pytest.approx((1, 2 / 3))
    assert agreement.agreement(of_seeds({0: [1, 1, 1], 1: [1, 2, 3]}, {0: [1, 2, 3], 1: [1, 2, 3]})).n == 1
    none = agreement.agreement(of_seeds({0: [1, 2]}, {0: [1, 2]}))
    assert math.isnan(none.mean) and none.n == 0
    with pytest.raises(ValueError, match="towards learned; there are final, reward"):
        agreement.agreement(table, towards="learned")
    with pytest.raises(ValueError, match="reading='se'"):
        agreement.agreement(table, reading="se")


def test_a_common_trend_makes_no_agreement_of_changes():
    """0, 1, 2, 3.5 and 0, 2, 3, 5 go together; their changes 1, 1, 1.5 and 2, 1, 2 less."""
    rows = [
        {"seed": 0, "step": s, "towards": towards, "part": "full", "g": g}
        for towards, values in (("final", [0, 1, 2, 3.5]), ("reward", [0, 2, 3, 5]))
        for s, g in enumerate(values)
    ]
    table = pd.DataFrame(rows)
    assert agreement.agreement(table).mean > 0.97
    assert agreement.agreement(table, changes=True).mean == pytest.approx(np.corrcoef([1, 1, 1.5], [2, 1, 2])[0, 1])


def test_what_was_foretold_by_hand():
    """Predicted 1 2 3, real 2 4 6 (slope 2, correlation 1); with the other end 3 6 9 it is twice that: slope 1."""
    rows = {"step": [0, 1, 2, 3], "moved": [1.0, 2, 3, math.nan], "moved_end": [3.0, 6, 9, math.nan]}
    table = pd.DataFrame(rows | {"change": [2.0, 4, 6, math.nan]}).assign(seed=0, towards="reward")
    first, second = (agreement.foretold(table, second_order=how) for how in (False, True))
    assert first["slope"].mean == pytest.approx(2) and first["correlation"].mean == pytest.approx(1)
    assert second["slope"].mean == pytest.approx(1)
    both = pd.concat([table, table.assign(seed=1, change=-table["change"])])
    assert agreement.foretold(both)["slope"].values == pytest.approx((2, -2))
    assert all(math.isnan(e.mean) and e.n == 0 for e in agreement.foretold(table, towards="learned").values())


def test_what_tells_the_change_ahead_by_hand():
    """Widths of 1, 2 and 1 updates: rates of 3, 1 and 2 make 3, 2 and 2 (times the learning rate)."""
    rows = {"seed": 0, "part": "full", "towards": "final"}
    table = pd.DataFrame([rows | {"step": s, "g": g, "g_opt": -g} for s, g in ((0, 3.0), (1, 1.0), (3, 2.0), (4, 9.0))])
    changes = pd.DataFrame({"seed": 0, "step": [0, 1, 3, 4], "towards": "reward", "change": [3.0, 2.0, 2.0, math.nan]})
    assert agreement.tells_change(table, changes, "final").mean == pytest.approx(1)
    assert agreement.tells_change(table, changes, "final", "g_opt").mean == pytest.approx(-1)
    assert agreement.tells_change(table, changes, "final", "updates").mean == pytest.approx(-0.5)  # 1, 2, 1
    by_step = np.corrcoef([1, 2 / 2, 1 / 4], [3, 2, 2])[0, 1]
    assert agreement.tells_change(table, changes, "final", "step").mean == pytest.approx(by_step)
    other = changes.assign(change=[2.0, 2.0, 3.0, math.nan])
    assert agreement.tells_change(table, other, "final").mean == pytest.approx(-0.5)
    assert agreement.tells_change(table, changes.assign(change=1.0), "final").n == 0


def test_where_they_part_by_hand():
    """z = 1.64, and 2.24 for four together (1 - 0.05 / 4). Seed 0 parts at 20, then at 30; seed 1 never."""
    table = of_seeds({0: [5, 5, 2, 5], 1: [5, 1, 1, -5]}, {0: [5, -1, -2, -5], 1: [5, -5, 5, -5]})
    assert agreement.parting(table).to_dict() == pytest.approx({0: 20, 1: math.nan}, nan_ok=True)
    assert agreement.parting(table, checkpoints=4).to_dict() == pytest.approx({0: 30, 1: math.nan}, nan_ok=True)


def test_past_the_peak_by_hand():
    """4 less 3, with errors of 0.3 and 0.4: 1 > 1.64 * 0.5; and 4 less 3.5 is not."""
    rows = [
        {"seed": seed, "step": step, "towards": "reward", "reward": j, "se": se}
        for seed, path in {0: [(1, 1.0), (4, 0.3), (3, 0.4)], 1: [(1, 1.0), (4, 0.3), (3.5, 0.4)]}.items()
        for step, (j, se) in enumerate(path)
    ]
    found = agreement.past_peak(pd.DataFrame(rows)).set_index("seed")
    assert found["peak"].tolist() == [1, 1] and found["lost"].tolist() == [1, 0.5]
    assert found["sure"].tolist() == [True, False]
