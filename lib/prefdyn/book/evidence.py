"""Evidence: the tables that claims are judged on, from the runs that there are; nothing here computes a run."""

from collections.abc import Callable

import pandas as pd

from ..findings import ablations, reweighting, stats
from ..lab import recipes
from ..lab.runs import RunStore
from . import plan, variants
from .params import Parameters


class NotRun(Exception):
    """What a rule needs is not there; the message says what."""


def _found(store: RunStore, specs: dict, frame: str) -> pd.DataFrame:
    """The table `frame` of runs {(label, seed): spec} under each other, with columns label and seed. Raises NotRun."""
    runs = {key: store.find(spec) for key, spec in specs.items()}
    missing = [key for key, run in runs.items() if run is None]
    if missing:
        label, seed = missing[0]
        raise NotRun(f"{len(missing)} of {len(runs)} runs are missing, the first: {label}, seed {seed}")
    return pd.concat(
        [run.frame(frame).assign(label=label, seed=seed) for (label, seed), run in runs.items()], ignore_index=True
    )


def _true_reward(p: Parameters) -> None:
    if recipes.dataset(plan.data_spec(p, p.seeds[0])).reward is None:
        raise NotRun("it needs the true reward, which this dataset does not have")


def measured(p: Parameters, method: str, aware: bool = True) -> dict:
    """The measurements of the plain runs of "dpo" or "ppo" on the check probe: {(method, seed): spec}.

    aware: the optimiser-aware G too.
    """
    run = plan.dpo_run if method == "dpo" else plan.ppo_run
    return {(method, seed): plan.alignment_run(p, run(p, seed), "check", aware) for seed in p.seeds}


def _measurement(store: RunStore, p: Parameters, method: str, frame: str) -> pd.DataFrame:
    """A table of the measurements, with the optimiser-aware G if it was measured, else without. Raises NotRun."""
    try:
        return _found(store, measured(p, method), frame)
    except NotRun as missing:
        try:
            return _found(store, measured(p, method, aware=False), frame)
        except NotRun:
            raise missing from None


def _parts(p: Parameters, method: str) -> dict:
    run = plan.dpo_run if method == "dpo" else plan.ppo_run
    return {(part, seed): run(p, seed, part) for part in ("full", "positive", "negative") for seed in p.seeds}


def _alignment(method: str) -> Callable:
    return lambda store, p: _measurement(store, p, method, "alignment")


def _choices(store: RunStore, p: Parameters) -> pd.DataFrame:
    choices = plan.target_choices(p)
    if "responses: unrelated" not in choices:
        raise NotRun("with target_responses='unrelated' D' is the floor itself")
    return _found(store, {("dpo", s): plan.targets_run(p, plan.dpo_run(p, s), choices) for s in p.seeds}, "targets")


def _sureness(store: RunStore, p: Parameters) -> pd.DataFrame:
    """How sure DPO's and PPO's G are of their sign at equal numbers of sequences: seed, dpo, ppo."""
    tables = {m: _measurement(store, p, m, "sequences") for m in ("dpo", "ppo")}
    examples = {m: t.groupby("seed")["example"].nunique().min() for m, t in tables.items()}
    sequences = min(2 * examples["dpo"], examples["ppo"])  # a pair has two, a rollout one
    if sequences < 4:
        raise NotRun(f"with {sequences} sequences nothing can be said of signs")
    return pd.DataFrame(
        {"seed": seed}
        | {
            m: stats.subsample_sureness(t[t["seed"] == seed], sequences // (2 if m == "dpo" else 1))
            for m, t in tables.items()
        }
        for seed in p.seeds
    )


def _omega(store: RunStore, p: Parameters) -> pd.DataFrame:
    _true_reward(p)
    sequences = _measurement(store, p, "dpo", "sequences")
    last = reweighting.with_thirds(sequences[sequences["step"] == sequences["step"].max()], "omega")
    return reweighting.signal(last, {s: recipes.dataset(plan.data_spec(p, s)).check for s in p.seeds})


def _long(store: RunStore, p: Parameters) -> pd.DataFrame:
    """The last step of the long runs: label (full, uniform), seed, reward_sampled, overfit."""
    specs = {(c, s): plan.dpo_run(p, s, c, long=True) for c in ("full", "uniform") for s in p.seeds}
    ends = _found(store, specs, "checkpoints").sort_values("step").groupby(["label", "seed"]).last()
    steps = _found(store, specs, "steps")
    pairs = len(recipes.dataset(plan.data_spec(p, p.seeds[0])).pairs)  # a file may hold fewer than were asked for
    batches = max(1, pairs // p.batch)  # a pass
    trained = steps[steps["step"] >= steps["step"].max() + 1 - batches].groupby(["label", "seed"])["accuracy"].mean()
    return ends.assign(overfit=trained - ends["check_accuracy"]).reset_index()


def _replies(method: str) -> Callable:
    return lambda store, p: _found(store, _parts(p, method), "replies")


def _variety(store: RunStore, p: Parameters) -> pd.DataFrame:
    _true_reward(p)
    runs = _parts(p, "ppo")
    explored = _found(store, {key: plan.exploration_run(p, run) for key, run in runs.items()}, "exploration")
    means = explored.groupby(["label", "seed", "step"])[["reward", "coverage"]].mean().reset_index()
    return means.merge(_found(store, runs, "checkpoints")[["label", "seed", "step", "entropy"]])


def _curve(method: str) -> Callable:
    run = plan.dpo_run if method == "dpo" else plan.ppo_run
    return lambda store, p: _found(store, {(method, s): run(p, s) for s in p.seeds}, "checkpoints")


def _roles(store: RunStore, p: Parameters) -> pd.DataFrame:
    """Mean over checkpoints by seed of each third of PPO's tokens: third, seed, g, direction (g per unit of weight)."""
    tokens = reweighting.with_thirds(_measurement(store, p, "ppo", "tokens"), "strength")
    return reweighting.push(tokens, "third").groupby(["third", "seed"])[["g", "direction"]].mean().reset_index()


def variant_runs(p: Parameters, method: str, long: bool = False) -> dict:
    """The plain runs and the variants that the parameters ask for: {(variant, seed): spec}; `long`, of long DPO."""
    run = (lambda p, s: plan.dpo_run(p, s, long=long)) if method == "dpo" else plan.ppo_run
    runs = {(ablations.PLAIN, seed): run(p, seed) for seed in p.seeds}
    return runs | {(v, s): plan.variant_run(p, s, method, v, long) for v in variants.names(p, method) for s in p.seeds}


def _variants(method: str) -> Callable:
    def table(store: RunStore, p: Parameters) -> pd.DataFrame:
        _true_reward(p)
        if not variants.names(p, method):
            raise NotRun("no variant is asked for")
        return _found(store, variant_runs(p, method), "replies").rename(columns={"label": "variant"})

    return table


TABLES: dict[str, Callable[[RunStore, Parameters], pd.DataFrame]] = {
    "G of DPO": _alignment("dpo"),
    "G of PPO": _alignment("ppo"),
    "choices of D'": _choices,
    "sureness": _sureness,
    "curve of PPO": _curve("ppo"),
    "omega": _omega,
    "long runs": _long,
    "replies of DPO's halves": _replies("dpo"),
    "variety of PPO's halves": _variety,
    "roles of PPO's thirds": _roles,
    "variants of DPO": _variants("dpo"),
    "variants of PPO": _variants("ppo"),
}
