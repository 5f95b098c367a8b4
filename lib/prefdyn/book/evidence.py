"""Evidence: the tables that claims are judged on, from the runs that there are; nothing here computes a run."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from ..findings import ablations, calibration, reweighting, stats
from ..lab import recipes
from ..lab.runs import RunStore
from ..methods import registry
from . import calibrating, plan, variants
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
    if plan.data_spec(p, p.seeds[0]).path is not None:
        raise NotRun("it needs the true reward, which this dataset does not have")


def _plain(p: Parameters, *methods: str) -> dict:
    """The runs of methods as the parameters have them, {(method, seed): spec}; of demonstrations, the SFT runs."""
    taught = {method: registry.find(method).takes == "demonstrations" for method in methods}
    return {
        (method, seed): plan.sft_run(p, seed) if taught[method] else plan.run(p, seed, method)
        for method in methods
        for seed in p.seeds
    }


def measured(p: Parameters, method: str) -> dict:
    """The measurements of the plain runs of a method on the check probe: {(method, seed): spec}."""
    return {key: plan.alignment_run(p, run, "check") for key, run in _plain(p, method).items()}


def _measurement(store: RunStore, p: Parameters, method: str, frame: str) -> pd.DataFrame:
    """A table of the measurements."""
    return _found(store, measured(p, method), frame)


def _parts(p: Parameters, method: str) -> dict:
    return {
        (part, seed): plan.run(p, seed, method, part) for part in ("full", "positive", "negative") for seed in p.seeds
    }


def _both(p: Parameters, *methods: str) -> dict:
    """The measurements of the plain runs of several methods."""
    return {key: spec for method in methods for key, spec in measured(p, method).items()}


def _chosen(p: Parameters, method: str) -> dict:
    choices = plan.target_choices(p)
    return {key: plan.targets_run(p, run, choices) for key, run in _plain(p, method).items()}


def _explored(p: Parameters, method: str) -> dict:
    return {key: plan.exploration_run(p, run) for key, run in _parts(p, method).items()}


def _alignment(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    return _measurement(store, p, method, "alignment")


def _choices(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    if "responses: unrelated" not in plan.target_choices(p):
        raise NotRun("with target_responses='unrelated' D' is the floor itself")
    return _found(store, _chosen(p, method), "targets")


def _sureness(store: RunStore, p: Parameters, first: str, second: str) -> pd.DataFrame:
    """How sure the G of two methods is of its sign at equal numbers of sequences, by checkpoint.

    Columns: label (the method), seed, step, sure, and those of the method's checkpoints.
    """
    compared = {"first": first, "second": second}
    tables = {name: _measurement(store, p, method, "sequences") for name, method in compared.items()}
    each = {name: 2 if registry.find(method).takes == "pairs" else 1 for name, method in compared.items()}
    sequences = min(each[name] * t.groupby("seed")["example"].nunique().min() for name, t in tables.items())
    if sequences < 4:
        raise NotRun(f"with {sequences} sequences nothing can be said of signs")
    sure = pd.concat(
        stats.subsample_sureness(own, sequences // each[name]).reset_index().assign(label=compared[name], seed=seed)
        for name, table in tables.items()
        for seed, own in table.groupby("seed")
    )
    return sure.merge(pd.concat(_curve(store, p, method) for method in compared.values()))


def _omega(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    _true_reward(p)
    sequences = _measurement(store, p, method, "sequences")
    last = reweighting.with_thirds(sequences[sequences["step"] == sequences["step"].max()], "omega")
    return reweighting.signal(last, {s: recipes.dataset(plan.data_spec(p, s)).check for s in p.seeds})


def _sizes(p: Parameters, method: str) -> dict:
    """Runs with the weights' sizes as they are and all alike, {(label, seed): spec}."""
    return {(c, s): plan.run(p, s, method, c) for c in ("full", "uniform") for s in p.seeds}


def _uniform(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    """The last step of `_sizes`: label (full, uniform), seed, reward_sampled, overfit."""
    specs = _sizes(p, method)
    ends = _found(store, specs, "checkpoints").sort_values("step").groupby(["label", "seed"]).last()
    steps = _found(store, specs, "steps")
    pairs = plan.sizes_of(plan.data_spec(p, p.seeds[0])).pairs
    batches = max(1, pairs // p.batch)  # a pass
    trained = steps[steps["step"] >= steps["step"].max() + 1 - batches].groupby(["label", "seed"])["accuracy"].mean()
    return ends.assign(overfit=trained - ends["check_accuracy"]).reset_index()


def _replies(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    return _found(store, _parts(p, method), "replies")


def _halves(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    _true_reward(p)
    return _found(store, _parts(p, method), "checkpoints")


def _even(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    _true_reward(p)
    return _found(store, _sizes(p, method), "checkpoints")


def _variety(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    _true_reward(p)
    explored = _found(store, _explored(p, method), "exploration")
    means = explored.groupby(["label", "seed", "step"])[["reward", "coverage"]].mean().reset_index()
    return means.merge(_found(store, _parts(p, method), "checkpoints")[["label", "seed", "step", "entropy"]])


def _curve(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    return _found(store, _plain(p, method), "checkpoints")


def _roles(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    """Mean over checkpoints by seed of each third of tokens: third, seed, g, direction (g per unit of weight).

    later_g, later_direction: the same without the first checkpoint.
    """
    tokens = reweighting.with_thirds(_measurement(store, p, method, "tokens"), "strength")
    pushed = reweighting.push(tokens, "third")
    later = pushed[pushed["step"] > pushed["step"].min()]
    means, after = (one.groupby(["third", "seed"])[["g", "direction"]].mean() for one in (pushed, later))
    return means.join(after.add_prefix("later_")).reset_index()


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


def _variant_curves(store: RunStore, p: Parameters, method: str) -> pd.DataFrame:
    _true_reward(p)
    if not variants.names(p, method):
        raise NotRun("no variant is asked for")
    return _found(store, variant_runs(p, method), "checkpoints").rename(columns={"label": "variant"})


def _constructed(p: Parameters) -> dict:
    """Every construction of the method that is calibrated, trained and measured: {((what, construction), seed): spec}.

    All of them, since readings at equal KL reach as far as all have come.
    """
    found = {}
    for name in calibrating.constructions(p.calibrated):
        for seed in p.seeds:
            of = p, seed, p.calibrated
            run = calibrating.run(*of, name)
            each = {"run": run, "G": calibrating.alignment(*of, run), "targets": calibrating.targets(*of, run)}
            found |= {((what, name), seed): spec for what, spec in each.items()}
    return found


def _readings(store: RunStore, p: Parameters) -> pd.DataFrame:
    """The table of `calibration.reading_table`, of the parameters' construction alone."""
    specs = _constructed(p)
    runs = {key: store.find(spec) for key, spec in specs.items()}
    if missing := [key for key, run in runs.items() if run is None]:
        (what, name), seed = missing[0]
        raise NotRun(f"{len(missing)} of {len(runs)} runs are missing, the first: {what} of {name!r}, seed {seed}")
    tables = {
        (p.calibrated, seed, calibrating.CONSTRUCTIONS[name]): calibration.tables_of(
            *(runs[(what, name), seed] for what in ("run", "G", "targets"))
        )
        for name in calibrating.constructions(p.calibrated)
        for seed in p.seeds
    }
    table = calibration.reading_table(tables, min(2 * p.probe, p.ppo_probe))  # the same for all methods
    return table[table["construction"] == str(calibrating.CONSTRUCTIONS[p.construction])]


@dataclass(frozen=True)
class Table:
    """A table that rules read.

    read: from the runs that the store has; called with it, the parameters and the methods that a rule names; raises
    NotRun. needs: the runs that it rests on, {(label, seed): spec}; called with the parameters and the methods. Their
    parents are runs too.
    """

    read: Callable[..., pd.DataFrame]
    needs: Callable[..., dict]


TABLES: dict[str, Table] = {
    "G": Table(_alignment, measured),
    "choices of D'": Table(_choices, _chosen),
    "sureness": Table(_sureness, _both),
    "curve": Table(_curve, _plain),
    "omega": Table(_omega, measured),
    "with and without omega": Table(_uniform, _sizes),
    "halves": Table(_halves, _parts),
    "replies of halves": Table(_replies, _parts),
    "sizes of advantages": Table(_even, _sizes),
    "variety of halves": Table(_variety, _explored),
    "roles of thirds": Table(_roles, measured),
    "variants": Table(_variants, variant_runs),
    "readings": Table(_readings, _constructed),
    "curves of variants": Table(_variant_curves, variant_runs),
}
