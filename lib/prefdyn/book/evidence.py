"""Evidence: the tables that claims are judged on, from the runs that there are; nothing here computes a run."""

from collections.abc import Callable

import pandas as pd

from ..findings import ablations, reweighting, stats
from ..lab import recipes
from ..lab.runs import RunStore
from ..methods import registry
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
    """The measurements of the plain runs of a method on the check probe: {(method, seed): spec}.

    aware: the optimiser-aware G too.
    """
    return {(method, seed): plan.alignment_run(p, plan.run(p, seed, method), "check", aware) for seed in p.seeds}


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
    return {
        (part, seed): plan.run(p, seed, method, part) for part in ("full", "positive", "negative") for seed in p.seeds
    }


def _alignment(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    return _measurement(store, p, method, "alignment")


def _choices(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    choices = plan.target_choices(p)
    if "responses: unrelated" not in choices:
        raise NotRun("with target_responses='unrelated' D' is the floor itself")
    return _found(
        store, {(method, s): plan.targets_run(p, plan.run(p, s, method), choices) for s in p.seeds}, "targets"
    )


def _sureness(store: RunStore, p: Parameters, first: str, second: str) -> pd.DataFrame:
    """How sure the G of two methods is of its sign at equal numbers of sequences: seed, first, second."""
    compared = {"first": first, "second": second}
    tables = {name: _measurement(store, p, method, "sequences") for name, method in compared.items()}
    each = {name: 2 if registry.find(method).takes == "pairs" else 1 for name, method in compared.items()}
    sequences = min(each[name] * t.groupby("seed")["example"].nunique().min() for name, t in tables.items())
    if sequences < 4:
        raise NotRun(f"with {sequences} sequences nothing can be said of signs")
    return pd.DataFrame(
        {"seed": seed}
        | {name: stats.subsample_sureness(t[t["seed"] == seed], sequences // each[name]) for name, t in tables.items()}
        for seed in p.seeds
    )


def _omega(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    _true_reward(p)
    sequences = _measurement(store, p, method, "sequences")
    last = reweighting.with_thirds(sequences[sequences["step"] == sequences["step"].max()], "omega")
    return reweighting.signal(last, {s: recipes.dataset(plan.data_spec(p, s)).check for s in p.seeds})


def _long(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    """The last step of the long runs: label (full, uniform), seed, reward_sampled, overfit."""
    specs = {(c, s): plan.run(p, s, method, c, long=True) for c in ("full", "uniform") for s in p.seeds}
    ends = _found(store, specs, "checkpoints").sort_values("step").groupby(["label", "seed"]).last()
    steps = _found(store, specs, "steps")
    pairs = len(recipes.dataset(plan.data_spec(p, p.seeds[0])).pairs)  # a file may hold fewer than were asked for
    batches = max(1, pairs // p.batch)  # a pass
    trained = steps[steps["step"] >= steps["step"].max() + 1 - batches].groupby(["label", "seed"])["accuracy"].mean()
    return ends.assign(overfit=trained - ends["check_accuracy"]).reset_index()


def _replies(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    return _found(store, _parts(p, method), "replies")


def _variety(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    _true_reward(p)
    runs = _parts(p, method)
    explored = _found(store, {key: plan.exploration_run(p, run) for key, run in runs.items()}, "exploration")
    means = explored.groupby(["label", "seed", "step"])[["reward", "coverage"]].mean().reset_index()
    return means.merge(_found(store, runs, "checkpoints")[["label", "seed", "step", "entropy"]])


def _curve(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    return _found(store, {(method, seed): plan.run(p, seed, method) for seed in p.seeds}, "checkpoints")


def _roles(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    """Mean over checkpoints by seed of each third of tokens: third, seed, g, direction (g per unit of weight)."""
    tokens = reweighting.with_thirds(_measurement(store, p, method, "tokens"), "strength")
    return reweighting.push(tokens, "third").groupby(["third", "seed"])[["g", "direction"]].mean().reset_index()


def variant_runs(p: Parameters, method: str, **choices) -> dict:
    """The plain runs and the variants that the parameters ask for, {(variant, seed): spec}.

    choices: as for `plan.run`.
    """
    runs = {(ablations.PLAIN, seed): plan.run(p, seed, method, **choices) for seed in p.seeds}
    return runs | {
        (name, seed): plan.variant_run(p, seed, method, name, **choices)
        for name in variants.names(p, method)
        for seed in p.seeds
    }


def _variants(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    _true_reward(p)
    if not variants.names(p, method):
        raise NotRun("no variant is asked for")
    return _found(store, variant_runs(p, method), "replies").rename(columns={"label": "variant"})


# Each is called with the store, the parameters and the methods that a rule names.
TABLES: dict[str, Callable[..., pd.DataFrame]] = {
    "G": _alignment,
    "choices of D'": _choices,
    "sureness": _sureness,
    "curve": _curve,
    "omega": _omega,
    "long runs": _long,
    "replies of halves": _replies,
    "variety of halves": _variety,
    "roles of thirds": _roles,
    "variants": _variants,
}
