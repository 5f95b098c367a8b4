"""Turning runs: what is turned and when, by hand; the plain run where nothing is; interrupted; probed; kept apart."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.lab import ppo, recipes, train, turning
from prefdyn.lab.fingerprint import modules_of
from prefdyn.lab.runs import RunStore
from prefdyn.lab.turning import Construction
from prefdyn.lab.worlds import EASY, HARD
from prefdyn.lens.likelihood import token_logps
from prefdyn.methods.dpo import DPO
from prefdyn.methods.sft import SFT
from toys.models import random_batch

# 48 pairs in batches of 16, four times: 12 updates, of which 4 warm up; checkpoints at 12 * (i / 2)^1.5 = 0, 4, 12.
# 8 rollouts in minibatches of 4, 4 iterations; checkpoints at 0, 1, 4.
SMALL = {
    "difficulty": "easy",
    "profile": "smoke",
    "pairs": 48,
    "check": 32,
    "demonstrations": 128,
    "validation": 8,
    "held_out": 12,
    "width": 16,
    "sft_steps": 40,
    "batch": 16,
    "epochs": 4.0,
    "checkpoints": 3,
    "lr": 5e-3,
    "schedule": "constant",
    "iterations": 4,
    "rollouts": 8,
    "group": 4,
    "ppo_batch": 4,
    "ppo_lr": 3e-3,
    "probe": 16,
    "ppo_probe": 16,
    "choice_probe": 16,
}
WORLD = check(SMALL)
TABLES = ("steps", "checkpoints", "replies")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


def plain(method: str):
    """The plain run of a method, of pairs with a warm-up over a third of training."""
    spec = plan.run(WORLD, 0, method)
    if spec.takes == "rollouts":
        return spec
    return spec.model_copy(update={"optimisation": dataclasses.replace(spec.optimisation, warmup=1 / 3)})


def turned(method: str, what: str, phases: int):
    if method == "sft":
        return turning.imitation(plain("dpo"), Construction(what, phases))
    return turning.turning(plain(method), Construction(what, phases))


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its spec, its account of when and how long it ran, and the hashes of all."""
    left_out = ("spec.json", "provenance.json", "manifest.json")
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in left_out)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


# --- phases ----------------------------------------------------------------------------------------------------------


def test_phases_by_hand(store):
    """12 updates in 8 parts: 12 (k + 1) / 8 = 1.5, 3, 4.5, 6, 7.5, 9, 10.5, 12, rounded down."""
    assert turning.ends(12, 8) == [1, 3, 4, 6, 7, 9, 10, 12]
    assert turning.ends(5, 5) == [1, 2, 3, 4, 5] and turning.ends(7, 1) == [7]
    run = turned("dpo", "labels", 8)
    assert [run.phase(step) for step in range(13)] == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 7]  # the last one: its own
    assert run.steps() == [0, 1, 3, 4, 6, 7, 9, 10, 12]
    half = turned("ppo", "labels", 2)
    assert half.ends() == [2, 4] and half.steps() == [0, 1, 2, 4]
    assert [half.phase(step) for step in range(5)] == [0, 0, 1, 1, 1]
    assert [turning.is_turned("labels", k) for k in range(4)] == [False, True, False, True]
    assert not any(turning.is_turned("nothing", k) for k in range(4))
    assert all(turning.is_turned("random", k) for k in range(4))
    for phases in (0, -1, 13):
        with pytest.raises(ValueError, match=f"phases={phases}: must be from 1 to the number of steps, 12"):
            turned("dpo", "labels", phases)


@pytest.mark.parametrize("phases", [1, 2, 5, 12])
def test_learning_rates_are_those_of_the_whole_training(phases):
    """Also where the warm-up, 4 updates, is longer than a phase."""
    run = turned("dpo", "labels", phases)
    for step in range(12):
        own = run.optimised(run.ends()[run.phase(step)])
        assert train.learning_rate(own, step) == train.learning_rate(run.optimisation, step)
    assert train.learning_rate(run.optimisation, 0) == run.optimisation.lr / 4


REFUSED = {
    "an axis that is none": (lambda: turned("dpo", "facts", 2), "turned='facts': not one of .* Did you mean 'fact'"),
    "an axis of the other world": (lambda: turned("ppo", "source", 2), "turned='source': not one of .* easy world"),
    "a decay": (
        lambda: turning.TurningPairRun(
            **{
                **{name: getattr(turned("dpo", "labels", 2), name) for name in turning.TurningPairRun.model_fields},
                "optimisation": dataclasses.replace(plain("dpo").optimisation, schedule="linear"),
            }
        ),
        "schedule='linear': a turning run of pairs needs 'constant'",
    ),
    "random labels that stay": (lambda: turned("dpo", "random", 1), "phases=1: random labels that are drawn once"),
    "a coin to imitate": (lambda: turned("sft", "random", 4), "turned='random': imitating one of two"),
    "an axis of a learned reward": (
        lambda: turning.turning(plan.run(WORLD, 0, "ppo", reward="learned"), Construction("fact", 2)),
        "turned='fact': a learned reward has no axes",
    ),
    "a run that is no plain one": (
        lambda: turning.turning(plan.sft_run(WORLD, 0), Construction("labels", 2)),
        "a SFTRun cannot be turned",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_what_a_file_cannot_have_turned():
    """A file has no axes, and no true reward; its labels can be turned all the same."""
    file = {"path": "pairs.jsonl", "content": "abc", "difficulty": ""}
    for method, what, message in (
        ("dpo", "fact", "turned='fact': not one of nothing, labels, random .and a file has no axes"),
        ("ppo", "labels", "reward: the true reward is turned here, which only the world has"),
    ):
        spec = plain(method)
        spec = spec.model_copy(update={"data": spec.data.model_copy(update=file)})
        with pytest.raises(ValueError, match=message):
            turning.turning(spec, Construction(what, 2))
    spec = plain("dpo").model_copy(update={"data": plain("dpo").data.model_copy(update=file)})
    assert turning.turning(spec, Construction("labels", 2)).axis is None


def test_a_copy_that_cannot_be_is_refused_when_it_is_computed(store):
    """Copies with other values are not looked at when they are made."""
    for method in ("dpo", "ppo"):
        spec = turned(method, "labels", 2).model_copy(update={"turned": "facts"})
        with pytest.raises(ValueError, match="turned='facts'"):
            store.get(spec)


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [EASY, HARD], ids=["easy", "hard"])
def test_an_axis_turned_by_brute_force(world):
    """Against the rewards of a world whose weight of the axis has the other sign, to the last pair."""
    rows = world.pairs(world.split_prompts(0)["train"], 300, 0.2, seed=1)
    for axis in world.weights:
        other = dataclasses.replace(world, weights={**world.weights, axis: -world.weights[axis]})
        expected = []
        for row in rows:
            true, reversed_ = (
                [w.reward(w.parse_prompt(row["prompt"]), row[side]) for side in ("chosen", "rejected")]
                for w in (world, other)
            )
            first, second = (round(a - b, 6) for a, b in (true, reversed_))
            expected.append(first * second < 0)
        assert turning.swaps(rows, axis, 1, world, "") == expected
        assert not any(turning.swaps(rows, axis, 2, world, ""))
        assert any(expected) or axis in ("repetition", "grammar", "support")
    share = sum(turning.swaps(rows, "fact", 1, world, "")) / len(rows)
    assert 0.2 < share < 0.6


def test_an_order_by_hand():
    """Of two notes that differ in the fact alone (+2 and -2 points) and of two that it does not tell apart."""
    prompt = "write a warm short note to ann about the home of the fox"
    right, wrong = (f"dear ann , the fox lives in the {place} . with love ." for place in ("den", "sea"))
    cold = right.replace("dear", "esteemed")

    def row(chosen: str, rejected: str) -> dict:
        points = {f"reward_{side}": EASY.reward(EASY.parse_prompt(prompt), said) for side, said in
                  (("chosen", chosen), ("rejected", rejected))}  # fmt: skip
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | points

    assert (
        turning.axis_points(EASY, "fact", prompt, right) == 2 and turning.axis_points(EASY, "fact", prompt, wrong) == -2
    )
    assert turning.other_order(EASY, "fact", row(right, wrong)) and turning.other_order(EASY, "fact", row(wrong, right))
    assert not turning.other_order(EASY, "fact", row(right, cold)) and turning.other_order(
        EASY, "tone", row(right, cold)
    )
    assert not turning.other_order(EASY, "tone", row(right, wrong))
    assert not turning.other_order(EASY, "fact", row(right, right))


def test_random_labels_are_fair_coins_in_every_phase():
    """Of 4,000 pairs half are swapped, give or take four standard deviations of 1/2 / sqrt(4000) = 0.008."""
    rows = [{}] * 4000
    drawn = [turning.swaps(rows, "random", phase, None, "0/turning/train") for phase in range(4)]
    assert all(abs(sum(swap) / 4000 - 0.5) < 0.032 for swap in drawn)
    for i in range(4):
        for j in range(i):
            assert abs(sum(a == b for a, b in zip(drawn[i], drawn[j], strict=True)) / 4000 - 0.5) < 0.032
    assert drawn[1] == turning.swaps(rows, "random", 1, None, "0/turning/train")
    assert drawn[1] != turning.swaps(rows, "random", 1, None, "0/turning/check")
    run = turned("dpo", "random", 4)
    assert len({tuple(run.swaps(probe, phase)) for probe in recipes.PROBES for phase in range(4)}) == 8


@pytest.mark.parametrize("method", ["dpo", "simpo", "kto"])
def test_swapped_pairs_are_those_of_an_objective_that_is_made_of_them(store, method):
    """Weights of an objective built on rows exchanged by hand, and of one turned; KTO's replies to others stay."""
    spec = plain(method)
    store.get(spec.scored())
    tokenizer = recipes.tokenizer_of(spec.data)
    given = spec.probe(store, tokenizer, "train")
    swap = torch.arange(48) % 3 == 0
    ours = turning.swapped(given, swap)
    rows = [
        row | ({"chosen": row["rejected"], "rejected": row["chosen"]} if swap[i] else {})
        for i, row in enumerate(recipes.dataset(spec.data).pairs)
    ]
    sides = [recipes.encode(spec.data, tokenizer, rows, side) for side in ("chosen", "rejected")]
    first, second = given.reference
    sides += [torch.where(swap, second, first), torch.where(swap, first, second)]
    others = [given.rows.take(torch.arange(96, 144)), given.ref_mismatched] if method == "kto" else []
    settings = dict(spec.settings)
    found = spec.found()
    theirs = found.objective(*sides, **settings) if found.objective else type(given)(found, *sides, *others, **settings)
    model, _ = recipes.final_policy(store.get(spec.sft))
    index = torch.arange(5, 25)
    batches = [objective.batch(index) for objective in (ours, theirs)]
    assert torch.equal(batches[0].ids, batches[1].ids) and torch.equal(batches[0].response, batches[1].response)
    with torch.no_grad():
        logps = token_logps(model, batches[0])
    weights = [o.weights(logps, batches[0], index).w for o in (ours, theirs)]
    assert torch.equal(*weights) and not torch.equal(ours.rows.ids, given.rows.ids)
    assert torch.equal(turning.swapped(ours, swap).rows.ids, given.rows.ids)
    with pytest.raises(ValueError, match="a bool for each of 48 pairs"):
        turning.swapped(given, swap[:5])


def by_hand(store, spec, objectives) -> torch.nn.Module:
    """Training by one loop over updates, with `objectives(step)`."""
    model, _ = recipes.final_policy(store.get(spec.sft))
    config = spec.optimisation
    optimizer = train.make_optimizer(model, config)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = train.learning_rate(config, step)
        train.update(model, objectives(step), optimizer, train.example_order(48, step, config), clip=config.clip)
    return model


@pytest.mark.parametrize(("what", "phases"), [("labels", 2), ("fact", 8), ("random", 4)])
def test_dpo_on_turned_labels_is_dpo_on_pairs_swapped_by_hand(store, what, phases):
    """One uninterrupted loop, whose Adam knows nothing of phases, on DPO objectives made of exchanged texts."""
    spec = turned("dpo", what, phases)
    run = store.get(spec)
    tokenizer, kept = recipes.tokenizer_of(spec.data), store.get(spec.scored()).frame("train")

    def dpo(swap: list[bool]) -> DPO:
        rows = recipes.dataset(spec.data).pairs
        named = [("rejected", "chosen") if s else ("chosen", "rejected") for s in swap]
        sides = []
        for side in (0, 1):
            texts = [{"prompt": row["prompt"], "said": row[name[side]]} for row, name in zip(rows, named, strict=True)]
            sides.append(recipes.encode(spec.data, tokenizer, texts, "said"))
        sides += [torch.tensor([kept[name[side]][i] for i, name in enumerate(named)]) for side in (0, 1)]
        return DPO(*sides, beta=WORLD.beta)

    made = {phase: dpo(spec.swaps("train", phase)) for phase in range(phases)}
    if what == "labels":
        assert [any(spec.swaps("train", k)) for k in range(2)] == [False, True] and all(spec.swaps("train", 1))
    model = by_hand(store, spec, lambda step: made[spec.phase(step)])
    final, _ = recipes.final_policy(run)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), final.parameters(), strict=True))
    assert run.frame("steps")["step"].tolist() == list(range(12))
    assert run.frame("checkpoints")["step"].tolist() == spec.steps()


def test_imitation_of_what_is_turned(store):
    """The chosen responses in the first half, the rejected ones in the second; data, order and reference as DPO's."""
    spec = turned("sft", "labels", 2)
    tokenizer, rows = recipes.tokenizer_of(spec.data), recipes.dataset(spec.data).pairs
    made = [SFT(recipes.encode(spec.data, tokenizer, rows, side)) for side in ("chosen", "rejected")]
    model = by_hand(store, spec, lambda step: made[step >= 6])
    run = store.get(spec)
    final, _ = recipes.final_policy(run)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), final.parameters(), strict=True))
    dpo = store.get(turned("dpo", "labels", 2)).frame("steps")
    assert run.frame("steps")["examples"].equals(dpo["examples"])
    kl = run.frame("checkpoints")["kl"]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl.iloc[-1] > 0.01
    assert "win_rate" in run.frame("checkpoints") and "check_loss" in run.frame("checkpoints")


# --- nothing turned, and interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "ppo", "online_dpo"])
def test_where_nothing_is_turned_it_is_the_plain_run(store, method):
    """Byte for byte with the checkpoints of the plain run; with more of them the policies are the same."""
    own, same = store.get(plain(method)), store.get(turned(method, "nothing", 1))
    assert files(own.folder) == files(same.folder)
    more = store.get(turned(method, "nothing", 4))
    assert set(files(more.folder)) > set(files(own.folder))
    for name in ("policy/model.safetensors", *(p.name for p in own.folder.glob("checkpoint-*"))):
        assert (more.folder / name).read_bytes() == (own.folder / name).read_bytes()
    pd.testing.assert_frame_equal(more.frame("steps"), own.frame("steps"), check_exact=True)


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


@pytest.mark.parametrize(
    ("method", "what", "phases", "module", "name", "call"),
    [
        ("dpo", "labels", 3, train, "update", 6),  # in the middle of the second phase of updates 4 to 7
        ("dpo", "random", 3, recipes, "evaluate", 3),  # at the end of the last one
        ("sft", "labels", 2, train, "save_state", 2),  # between a checkpoint at the end of a phase and its state
        ("ppo", "labels", 2, ppo, "update", 2 * 2 * 3 + 1),  # in the fourth iteration, the second of the second phase
    ],
)
def test_an_interrupted_run_ends_with_the_same_files(
    store, tmp_path, monkeypatch, method, what, phases, module, name, call
):
    spec, ticks = turned(method, what, phases), []
    whole = store.get(spec)
    interrupted = RunStore(tmp_path, lambda text: None)
    for parent in spec.parents():
        interrupted.get(parent)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(getattr(module, name), call))
        with pytest.raises(Crash):
            interrupted.get(spec)
    continued = RunStore(tmp_path, lambda text: None).get(spec, ticks.append)
    assert files(continued.folder) == files(whole.folder)
    assert sum(ticks) == pytest.approx(spec.work())


def test_a_run_tells_of_each_step_once(store, tmp_path):
    for method in ("dpo", "sft"):
        spec, ticks = turned(method, "labels", 5), []
        spec.compute(tmp_path, store, ticks.append)
        assert len(ticks) == 12 and sum(ticks) == pytest.approx(spec.work())


# --- rollouts --------------------------------------------------------------------------------------------------------


def test_rewards_that_are_turned(store):
    """The other sign; those of a world whose weight of an axis has the other sign; noise of the declared spread."""
    rows = recipes.dataset(plain("ppo").data).demonstrations[:64]
    prompts = [row["prompt"] for row in rows]
    tokenizer = recipes.tokenizer_of(plain("ppo").data)
    batch = recipes.encode(plain("ppo").data, tokenizer, rows, "response")
    own = plain("ppo").score(store, tokenizer)(prompts, batch)
    assert torch.allclose(own, torch.tensor([row["reward"] for row in rows]))
    for method in ("ppo", "online_dpo"):
        labels = turned(method, "labels", 4).score(store, tokenizer)
        assert torch.equal(labels(prompts, batch), own)
        assert [torch.equal(labels.at(k)(prompts, batch), own) for k in range(4)] == [True, False, True, False]
        assert torch.equal(labels.at(3)(prompts, batch), -own)
        assert torch.equal(turned(method, "nothing", 2).score(store, tokenizer).at(1)(prompts, batch), own)
        for axis in ("fact", "tone"):
            other = dataclasses.replace(EASY, weights={**EASY.weights, axis: -EASY.weights[axis]})
            expected = [other.reward(other.parse_prompt(row["prompt"]), row["response"]) for row in rows]
            points = turned(method, axis, 2).score(store, tokenizer)
            assert torch.allclose(points.at(1)(prompts, batch), torch.tensor(expected), atol=1e-5)
            assert torch.equal(points.at(0)(prompts, batch), own)
    noise = turned("ppo", "random", 2).score(store, tokenizer)
    drawn = [noise.at(k)(prompts, batch) for k in (0, 1)]
    assert torch.equal(drawn[0], noise(prompts, batch)) and not torch.equal(*drawn)
    assert not torch.equal(drawn[0][:32], noise(prompts[:32], batch.take(torch.arange(32))))


def test_noise_has_its_spread_and_no_memory():
    """20,000 numbers: mean 0 give or take 4 * 3 / sqrt(20000) = 0.085, spread 3 within 2%; two seeds are unrelated."""
    batches = [random_batch(500, seed=seed) for seed in range(20)]
    drawn = torch.stack([torch.cat([turning.noise(batch, s, 2 * s) for batch in 2 * batches[:20]]) for s in (0, 1)])
    assert abs(drawn.mean()) < 0.085 and drawn.std().item() == pytest.approx(turning.SPREAD, rel=0.02)
    assert abs(torch.corrcoef(drawn)[0, 1]) < 0.04
    assert torch.equal(drawn[:, :10_000], drawn[:, 10_000:])  # the same batches again


@pytest.mark.parametrize("method", ["ppo", "online_dpo"])
def test_rollouts_turn_at_half_time(store, method):
    """The first half is the plain run's; the first turned iteration has its replies, with rewards of the other sign."""
    ours, theirs = (store.get(run).frame("steps") for run in (turned(method, "labels", 2), plain(method)))
    same = [name for name in ("reward", "kl", "entropy", "examples", "loss") if name in ours]
    pd.testing.assert_frame_equal(ours.loc[:1, same], theirs.loc[:1, same], check_exact=True)
    assert ours["reward"][2] == pytest.approx(-theirs["reward"][2]) and ours["entropy"][2] == theirs["entropy"][2]
    assert ours["entropy"][3] != theirs["entropy"][3]


# --- what is measured, and keys --------------------------------------------------------------------------------------


def test_pairs_are_probed_with_the_labels_of_the_update_that_follows(store):
    """Halves of 12: up to step 5 as labelled, from 6 on turned, the final step with what it was trained on."""
    spec = turned("dpo", "labels", 2)
    tokenizer = recipes.tokenizer_of(spec.data)
    store.get(spec.scored())
    for probe, size in (("train", 48), ("check", 32)):
        given = spec.probe(store, tokenizer, probe)
        prober = spec.prober(store, tokenizer, probe, 20)
        for step, turned_by_then in ((0, False), (4, False), (6, True), (12, True)):
            objective, index = prober(step, None)
            assert objective.size == size and index.tolist() == list(range(20))
            first, second = given.reference
            assert torch.equal(objective.reference[0], second if turned_by_then else first)
    imitation = turned("sft", "labels", 2)
    prober = imitation.prober(store, tokenizer, "check", 20)
    for step, side in ((5, "chosen"), (6, "rejected"), (12, "rejected")):
        told = recipes.encode(spec.data, tokenizer, recipes.dataset(spec.data).check, side)
        assert torch.equal(prober(step, None)[0].demonstrations.ids, told.ids)


def test_rollouts_are_probed_with_the_reward_of_the_iteration_that_follows(store):
    """Online DPO's best reply is the worst where rewards have the other sign, but for the penalty, which is off."""
    spec = turned("online_dpo", "labels", 2).model_copy(update={"kl_coefficient": 0.0})
    other = turned("online_dpo", "nothing", 2).model_copy(update={"kl_coefficient": 0.0})
    store.get(spec.scored())
    tokenizer = recipes.tokenizer_of(spec.data)
    model, _ = recipes.final_policy(store.get(spec.sft))
    for step, by_then in ((1, False), (2, True), (4, True)):
        (ours, _), (theirs, _) = (run.prober(store, tokenizer, "check", 16)(step, model) for run in (spec, other))
        chosen, rejected = theirs.reference
        assert torch.equal(ours.reference[0], rejected if by_then else chosen)
        assert torch.equal(ours.reference[1], chosen if by_then else rejected)


def test_ppo_is_probed_with_the_reward_of_the_iteration_that_follows(store):
    """Replies of one seed and policy are the same; with another reward they have other advantages."""
    spec = turned("ppo", "labels", 2)
    store.get(spec)
    tokenizer = recipes.tokenizer_of(spec.data)
    told = []
    rewards = turning.Rewards.at

    class Noted(turning.Rewards):
        def at(self, phase: int):
            told.append(phase)
            return rewards(self, phase)

    model, _ = recipes.final_policy(store.get(spec.sft))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turning, "Rewards", Noted)
        prober = spec.prober(store, tokenizer, "check", 16)
        for step in spec.steps():
            objective, index = prober(step, model)
            assert objective.size == len(index) == 16
    assert told == [0, 0, 1, 1]


def test_keys_tell_constructions_apart_and_specs_come_back_from_json(store):
    specs = [
        turned(method, what, phases)
        for method in ("dpo", "sft", "ppo", "online_dpo")
        for what, phases in (("nothing", 2), ("nothing", 4), ("labels", 2), ("fact", 2), ("random", 2))
        if (method, what) != ("sft", "random")
    ]
    keys = [store.key(spec) for spec in specs]
    assert len(set(keys)) == len(keys) == 19
    assert [key.rpartition("-")[0] for key in keys[::5]] == [
        "turning_dpo",
        "turning_sft",
        "turning_ppo",
        "turning_online_dpo",
    ]
    for spec, key in zip(specs, keys, strict=True):
        again = type(spec).model_validate_json(spec.model_dump_json())
        assert again == spec and store.key(again) == key
        modules = modules_of(spec)
        assert modules[0] == "prefdyn.lab.turning"
        assert ("prefdyn.methods.dpo" in modules) == (spec.kind == "turning_dpo")
        assert ("prefdyn.methods.online_dpo" in modules) == (spec.kind == "turning_online_dpo")
    assert str(specs[0].construction) == "nothing, 2 phases" and str(Construction("labels", 1)) == "labels, 1 phase"
