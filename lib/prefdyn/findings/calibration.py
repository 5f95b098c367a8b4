"""Is G a good instrument? Its readings on training whose target is known by construction (`lab.turning`).

A reading is a number of one run, larger where the target is more stable: what a reader of G looks at. All readings,
their thresholds and what a verdict on them means were written down here before any turning run had been computed. That
all are read at common checkpoints (`at_common_steps`) was added after first results, when a reader saw that they were
not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.stats

from ..lab import turning
from ..lab.turning import Construction
from . import explore, stats

if TYPE_CHECKING:
    from ..lab.runs import Run

SURE = 0.8  # "nearly every": four in five, as in the ledger's rules C1a and C1b
NEARLY_ORTHOGONAL = 0.1  # cosine, as in the ledger's rule S4
TELLS, USELESS = 0.8, 0.7  # AUC: what a good instrument has at least, and what one has that is none at most
LEVEL = 0.95
STABLE, MOVING, NONE = "stable", "moving", "none"
AGAINST = {"moving + none": (MOVING, NONE), "moving": (MOVING,), "none": (NONE,)}
EQUAL = " at equal KL"  # what follows the name of a reading over checkpoints up to a common KL
DECLARED, FLOOR = "as declared", "responses: unrelated"  # choices of D' of a TurnedTargetsRun
KEYS = ("method", "seed", "construction")

Tables = Mapping[str, pd.DataFrame]


def truth(construction: Construction) -> str:
    """What the target of training is by construction: "stable", "moving" or "none"."""
    if construction.turned == turning.RANDOM:
        return NONE
    changes = any(turning.is_turned(construction.turned, phase) for phase in range(construction.phases))
    return MOVING if changes else STABLE


def tables_of(run: "Run", alignment: "Run", chosen: "Run") -> dict[str, pd.DataFrame]:
    """What readings are made of, from finished runs: a turning run, its TurnedAlignmentRun and its TurnedTargetsRun.

    Returns alignment, sequences, targets, checkpoints as the runs wrote them, each with the column step; and drift:
    step, distance (see `explore.drift`).
    """
    return {
        "alignment": alignment.frame("alignment"),
        "sequences": alignment.frame("sequences"),
        "targets": chosen.frame("targets"),
        "checkpoints": run.frame("checkpoints"),
        "drift": explore.drift(run.frame("replies").assign(seed=0))[["step", "distance"]],
    }


def up_to(tables: Tables, limit: float) -> dict[str, pd.DataFrame]:
    """Tables with the rows of those checkpoints alone whose KL from the reference is at most `limit`, nats a reply.

    A checkpoint that comes back below the limit counts. Distances to the final replies stay those to the run's own.
    """
    checkpoints = tables["checkpoints"]
    stats.require_columns(checkpoints, ["step", "kl"])
    near = checkpoints.loc[checkpoints["kl"] <= limit, "step"]
    return {name: table[table["step"].isin(near)] for name, table in tables.items()}


def equal_kl(checkpoints: pd.DataFrame) -> pd.Series:
    """The smallest final KL of the constructions of each method and seed, nats a reply: as far as all have come.

    Args: checkpoints, with the columns method, seed, construction, step and kl. Returns a Series by (method, seed).
    """
    stats.require_columns(checkpoints, [*KEYS, "step", "kl"])
    final = checkpoints.sort_values("step").groupby(list(KEYS))["kl"].last()
    return final.groupby(["method", "seed"]).min().rename("limit")


def _whole(tables: Tables) -> pd.DataFrame:
    """Alignment of the whole objective, in the order of training."""
    table = tables["alignment"]
    return table[table["component"] == "full"].sort_values("step")


def _mean(values: Sequence[float]) -> float:
    """Mean of what is known, NaN where nothing is."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else math.nan


def surely_positive(tables: Tables, g: str = "g", se: str = "se") -> float:
    """Share of checkpoints whose g - 1.96 se is above 0, first and last included, as in the ledger's rule C1a."""
    table = _whole(tables)
    return stats.sign_summary(table[g], table[se])["positive"]


def flips(tables: Tables) -> float:
    """Minus the number of changes of G's sign between successive checkpoints that are sure of theirs.

    0, as of a stable target, also where no checkpoint is sure of any sign.
    """
    table = _whole(tables)
    return -stats.sign_summary(table["g"], table["se"])["flips"]


def sure(tables: Tables, examples: int) -> float:
    """Share of probes of `examples` examples that are sure of the sign of the whole one's G, mean over checkpoints.

    Of either sign, as in the ledger's rule C2a.
    """
    sequences = tables["sequences"]
    return _mean(stats.subsample_sureness(sequences, examples)) if len(sequences) else math.nan


def surely_positive_of(tables: Tables, examples: int) -> float:
    """Share of probes of `examples` examples whose G is surely positive, mean over checkpoints.

    A checkpoint whose G is not positive on the whole probe counts as 0.
    """
    sequences = tables["sequences"]
    if not len(sequences):
        return math.nan
    positive = sequences.groupby("step")["full"].sum() > 0
    return _mean(stats.subsample_sureness(sequences, examples).where(positive, 0.0))


def cosine(tables: Tables, column: str = "cosine") -> float:
    """Cosine of d and the descent direction, mean over checkpoints."""
    return _mean(_whole(tables)[column])


def _above_floor(tables: Tables) -> pd.Series:
    """Cosine with the final responses minus that with responses to other prompts, by step."""
    wide = tables["targets"].pivot(index="step", columns="choice", values="cosine")
    stats.require_columns(wide, [DECLARED, FLOOR])
    return (wide[DECLARED] - wide[FLOOR]).dropna()


def above_floor(tables: Tables) -> float:
    """Cosine above that with responses to other prompts, mean over checkpoints, as in the ledger's rule C1c."""
    return _mean(_above_floor(tables)) if len(tables["targets"]) else math.nan


def share_above_floor(tables: Tables) -> float:
    """Share of checkpoints whose cosine is above that with responses to other prompts."""
    return _mean(_above_floor(tables) > 0) if len(tables["targets"]) else math.nan


def rises(tables: Tables) -> float:
    """Share of the stretches between checkpoints in which the log-likelihood of D' rises; NaN without a stretch."""
    return _mean(np.diff(_whole(tables)["logp_targets"]) > 0)


def straightness(tables: Tables) -> float:
    """How monotonously greedy replies come nearer to the final ones: from -1 to 1, where they never go away again.

    The fall of their distance from the first to the last checkpoint by the sum of the sizes of all of its changes; NaN
    where it never changes.
    """
    distance = tables["drift"].sort_values("step")["distance"].to_numpy(float)
    path = np.abs(np.diff(distance)).sum()
    return float((distance[0] - distance[-1]) / path) if path > 0 else math.nan


@dataclass(frozen=True)
class Reading:
    """A number of one run, larger where the target is more stable.

    measure: (tables, examples) -> the number, NaN where it cannot be made; examples: of the probe, where it is asked at
    an equal number of sequences. threshold: declared stable from here on. why: where the threshold comes from.
    """

    name: str
    says: str
    measure: Callable[[Tables, int], float]
    threshold: float
    why: str

    def calls_stable(self, value: float) -> bool:
        """Whether a value is read as that of a stable target."""
        return value >= self.threshold


_FOUR_IN_FIVE = "nearly every is four in five, as in the ledger"
_SIGNED = "a style that all replies share is no target; what is above it is one"
READINGS = (
    Reading(
        "positive", "share of checkpoints with G surely positive",
        lambda t, n: surely_positive(t), SURE, _FOUR_IN_FIVE,
    ),
    Reading(
        "positive, aware", "the same of the optimiser-aware G",
        lambda t, n: surely_positive(t, "g_opt", "se_opt"), SURE, _FOUR_IN_FIVE,
    ),
    Reading(
        "positive, equal sequences", "the same of G on equal numbers of sequences",
        surely_positive_of, SURE, _FOUR_IN_FIVE,
    ),
    Reading(
        "sure, equal sequences", "share of probes of equal numbers of sequences that are sure of G's sign, either one",
        sure, SURE, _FOUR_IN_FIVE,
    ),
    Reading(
        "cosine", "mean cosine of d and the descent direction",
        lambda t, n: cosine(t), NEARLY_ORTHOGONAL, "nearly orthogonal below, as in the ledger",
    ),
    Reading(
        "cosine, aware", "the same as the optimiser scales it",
        lambda t, n: cosine(t, "cosine_opt"), NEARLY_ORTHOGONAL, "nearly orthogonal below, as in the ledger",
    ),
    Reading(
        "above floor", "mean cosine with the final responses above that with responses to other prompts",
        lambda t, n: above_floor(t), 0.0, _SIGNED,
    ),
    Reading(
        "share above floor", "share of checkpoints whose cosine is above that with responses to other prompts",
        lambda t, n: share_above_floor(t), SURE, _FOUR_IN_FIVE,
    ),
    Reading(
        "no flips", "minus the number of changes of G's sign between checkpoints that are sure of it",
        lambda t, n: flips(t), 0.0, "a stable target never asks for the contrary",
    ),
    Reading(
        "likelihood rises", "share of stretches between checkpoints in which the likelihood of D' rises",
        lambda t, n: rises(t), SURE, "without any gradient; four in five, as for G",
    ),
    Reading(
        "replies come nearer", "fall of the distance to the final greedy replies by the length of its path",
        lambda t, n: straightness(t), SURE, "without any gradient; four fifths of the way straight, as for G",
    ),
)  # fmt: skip
BY_NAME = {reading.name + where: reading for where in ("", EQUAL) for reading in READINGS}


def read(tables: Tables, examples: int, limit: float) -> dict[str, float]:
    """All readings of one run, over all checkpoints and over those up to a KL of `limit` (nats a reply, EQUAL).

    Args: tables, of `tables_of`. examples: of the probe, for readings at an equal number of sequences. Returns also
    "checkpoints" and "checkpoints at equal KL", their numbers. Raises ValueError for a missing column, or where the
    probe has fewer examples.
    """
    found = {}
    for where, seen in (("", tables), (EQUAL, up_to(tables, limit))):
        found |= {reading.name + where: reading.measure(seen, examples) for reading in READINGS}
        found["checkpoints" + where] = len(seen["checkpoints"])
    return found


def equal_examples(runs: Mapping[tuple, Tables], sequences: int | None = None) -> dict[tuple, int]:
    """How many examples of each run make the same number of sequences for all: a pair is two, all else one.

    sequences: how many, at most; by default, and at most, as many as all have.
    """
    sizes = {
        key: (2 if "a_rejected" in tables["sequences"] else 1, tables["sequences"]["example"].nunique())
        for key, tables in runs.items()
    }
    most = min(each * count for each, count in sizes.values())
    sequences = most if sequences is None else min(sequences, most)
    return {key: sequences // each for key, (each, _) in sizes.items()}


Runs = Mapping[tuple[str, int, Construction], Tables]  # by method, seed and construction: `tables_of`


def at_common_steps(runs: Runs) -> dict[tuple[str, int, Construction], dict[str, pd.DataFrame]]:
    """Tables with those checkpoints alone that all constructions of a method and seed have.

    Phases end at checkpoints, so that what is turned often has more of them, late in training: shares of checkpoints
    would differ for that alone.
    """
    steps: dict[tuple[str, int], set] = {}
    for (method, seed, _), tables in runs.items():
        own = {*tables["checkpoints"]["step"]}
        steps[method, seed] = steps.get((method, seed), own) & own
    return {
        key: {name: table[table["step"].isin(steps[key[:2]])] for name, table in tables.items()}
        for key, tables in runs.items()
    }


def reading_table(runs: Runs, sequences: int | None = None) -> pd.DataFrame:
    """All readings of all runs, a row a run, at the checkpoints that all constructions of a method and seed have.

    sequences: as for `equal_examples`.

    Columns: method, seed, construction, truth, the names of BY_NAME, checkpoints (two columns, see `read`), and limit,
    the KL that the constructions of a method and seed are compared up to.
    """
    runs = at_common_steps(runs)
    far = equal_kl(
        pd.concat(
            tables["checkpoints"][["step", "kl"]].assign(method=method, seed=seed, construction=str(construction))
            for (method, seed, construction), tables in runs.items()
        )
    )
    examples = equal_examples(runs, sequences)
    rows = []
    for (method, seed, construction), tables in runs.items():
        limit = float(far[method, seed])
        key = {"method": method, "seed": seed, "construction": str(construction), "truth": truth(construction)}
        found = read(tables, examples[method, seed, construction], limit)
        rows.append(key | found | {"limit": limit})
    return pd.DataFrame(rows)


def roc(values: Sequence[float], stable: Sequence[bool]) -> pd.DataFrame:
    """The ROC curve of a reading: what share of each kind of run it calls stable from each threshold on.

    Args: values, one a run; stable, the truth. Returns a row a threshold, falling from infinity: threshold, sensitivity
    (of stable runs), false_positives (of all others). Runs that tie are passed together. Raises ValueError where a
    value is missing, or all runs are of one kind.
    """
    values, stable = np.asarray(values, float), np.asarray(stable, bool)
    if values.shape != stable.shape or not np.isfinite(values).all() or stable.all() or not stable.any():
        raise ValueError("roc: a number for each run, and runs of both kinds, are needed")
    thresholds = np.array([math.inf, *np.unique(values)[::-1]])
    called = values >= thresholds[:, None]
    return pd.DataFrame(
        {
            "threshold": thresholds,
            "sensitivity": called[:, stable].mean(1),
            "false_positives": called[:, ~stable].mean(1),
        }
    )


def _wins(values: np.ndarray, stable: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By seed of the stable and seed of the other run, [S, S] each: how often the stable one wins, ties half; pairs."""
    own, seed = np.unique(seeds, return_inverse=True)
    beats = np.sign(values[stable][:, None] - values[~stable]) / 2 + 0.5
    belongs = np.arange(len(own)) == seed[:, None]  # [runs, seeds]
    first, second = belongs[stable].astype(float), belongs[~stable].astype(float)
    return first.T @ beats @ second, np.outer(first.sum(0), second.sum(0))


def auc_interval(
    values: Sequence[float], stable: Sequence[bool], seeds: Sequence[int], draws: int = 10_000, level: float = LEVEL
) -> stats.Estimate:
    """Probability that a stable run has the larger value than another one, ties half, with its interval over seeds.

    Runs of a seed share start and data, and are not independent: seeds are drawn with replacement, and a draw has all
    runs of its seeds. The interval is the expanded percentile one, whose quantiles lie as much further out as Student's
    t and the factor sqrt(n / (n - 1)) would set them: the plain one is too narrow for few seeds. (*What Teachers Should
    Know about the Bootstrap*, Hesterberg 2015.) Where no run is on the wrong side in any seed, it is [1, 1]:
    it knows of nothing but the seeds that there are.

    Args: values, stable, seeds: one a run. Runs whose value is NaN are left out. Returns an Estimate whose n is the
    number of seeds; NaN where all runs are of one kind, no interval from one seed.
    """
    values, stable, seeds = np.asarray(values, float), np.asarray(stable, bool), np.asarray(seeds)
    known = np.isfinite(values)
    values, stable, seeds = values[known], stable[known], seeds[known]
    n = len(np.unique(seeds))
    found = stats.auc(values, stable)
    if n < 2 or math.isnan(found):
        return stats.Estimate(found, math.nan, math.nan, n)
    wins, pairs = _wins(values, stable, seeds)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    total = np.einsum("di,ij,dj->d", counts, pairs, counts)
    drawn = np.einsum("di,ij,dj->d", counts, wins, counts)[total > 0] / total[total > 0]
    tail = scipy.stats.norm.cdf(math.sqrt(n / (n - 1)) * scipy.stats.t.ppf((1 - level) / 2, n - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return stats.Estimate(found, float(low), float(high), n)


def share_interval(right: Sequence[bool], seeds: Sequence[int], level: float = LEVEL) -> stats.Estimate:
    """Share of runs that are called rightly, with an interval of Clopper and Pearson for as many trials as seeds.

    Runs of a seed are not independent: they are counted as one trial, as if they all said the same. That is exact for
    one run a seed and cautious for more; a bootstrap would be sure of a share of 1 from any number of seeds. See *The
    Use of Confidence or Fiducial Limits*, Clopper and Pearson 1934.

    Args: right, seeds: one a run. Returns an Estimate whose n is the number of seeds; NaN without a run.
    """
    right, n = np.asarray(right, bool), len(set(seeds))
    if right.size == 0:
        return stats.Estimate(math.nan, math.nan, math.nan, 0)
    share, tail = float(right.mean()), (1 - level) / 2
    hits = share * n
    low = scipy.stats.beta.ppf(tail, hits, n - hits + 1) if share > 0 else 0.0
    high = scipy.stats.beta.ppf(1 - tail, hits + 1, n - hits) if share < 1 else 1.0
    return stats.Estimate(share, float(low), float(high), n)


def verdict(found: stats.Estimate) -> str:
    """What an AUC says of a reading: "tells", "does not tell" or "undecided".

    "tells": the whole interval lies above 0.8 (TELLS). "does not tell": it lies below 0.7 (USELESS), or reaches down to
    a coin's 0.5 and not up to 0.8. An interval with both 0.5 and 0.8 in it says that there are too few runs:
    "undecided", as is all else, and what has no interval.

    By simulation (600 calibrations of random numbers, one or two stable runs a seed and two to four others), a useless
    reading "tells" in 0.8% with three seeds, and never did with five or ten; its interval has 0.5 in it in 74% with
    three seeds, in 92% to 96% with five and ten.
    """
    if not math.isfinite(found.low):
        return "undecided"
    if found.low > TELLS:
        return "tells"
    if found.high < USELESS or (found.low <= 0.5 and found.high < TELLS):
        return "does not tell"
    return "undecided"


@dataclass(frozen=True)
class Calibration:
    """How well a reading tells stable targets from others.

    auc: of stable runs against the others. sensitivity: share of stable runs that the reading calls stable by its
    declared threshold. specificity: share of the others that it does not. missing: runs without a value, left out.
    """

    reading: str
    against: str
    auc: stats.Estimate
    sensitivity: stats.Estimate
    specificity: stats.Estimate
    runs: int
    missing: int

    @property
    def verdict(self) -> str:
        """See `verdict`."""
        return verdict(self.auc)


def calibrate(table: pd.DataFrame, name: str, against: str = "moving + none") -> Calibration:
    """How well the reading `name` (of BY_NAME) tells stable targets from those of `against` (of AGAINST).

    Args: table, a row a run, with the columns seed, truth and that of the reading. Raises ValueError for a missing
    column, an unknown truth, or a name that is none.
    """
    if name not in BY_NAME or against not in AGAINST:
        raise ValueError(
            f"calibrate: {name!r} against {against!r}; allowed: {', '.join(BY_NAME)}; {', '.join(AGAINST)}"
        )
    stats.require_columns(table, ["seed", "truth", name])
    if unknown := set(table["truth"]) - {STABLE, MOVING, NONE}:
        raise ValueError(f"calibrate: truth={sorted(map(str, unknown))[0]!r}; allowed: {STABLE}, {MOVING}, {NONE}")
    table = table[table["truth"].isin([STABLE, *AGAINST[against]])]
    known = table[np.isfinite(table[name])]
    values, seeds = known[name].to_numpy(float), known["seed"].to_numpy()
    stable = (known["truth"] == STABLE).to_numpy()
    called = np.array([BY_NAME[name].calls_stable(value) for value in values], bool)
    return Calibration(
        reading=name,
        against=against,
        auc=auc_interval(values, stable, seeds),
        sensitivity=share_interval(called[stable], seeds[stable]),
        specificity=share_interval(~called[~stable], seeds[~stable]),
        runs=len(known),
        missing=len(table) - len(known),
    )


def calibrations(table: pd.DataFrame) -> pd.DataFrame:
    """`calibrate` of all readings in a table, of each method and of all together ("all"), against each of AGAINST.

    Args: table, of `reading_table`. Returns a row a method, reading and against: runs, missing, seeds; auc,
    sensitivity and specificity, each also with _low and _high; threshold; verdict. What has no runs of both kinds is
    left out. With "all", a seed's runs of all methods stay together.
    """
    stats.require_columns(table, ["method", "seed", "truth"])
    parts = {"all": table} | {str(method): own for method, own in table.groupby("method", sort=False)}
    if len(parts) == 2:
        del parts["all"]
    rows = []
    for method, own in parts.items():
        for name in (name for name in BY_NAME if name in table):
            for against, kinds in AGAINST.items():
                if not {STABLE} < {*own["truth"]} & {STABLE, *kinds}:
                    continue
                found = calibrate(own, name, against)
                row = {"method": method, "reading": name, "against": against, "runs": found.runs}
                row |= {"missing": found.missing, "seeds": found.auc.n, "threshold": BY_NAME[name].threshold}
                for what in ("auc", "sensitivity", "specificity"):
                    e = getattr(found, what)
                    row |= {what: e.mean, f"{what}_low": e.low, f"{what}_high": e.high}
                rows.append(row | {"verdict": found.verdict})
    return pd.DataFrame(rows)
