"""Which training G is calibrated on: what is turned, in which methods, and the readings as columns of a study."""

import pandas as pd
from pydantic import ValidationError

from ..findings import calibration, stats
from ..findings.claims import Rule
from ..findings.turned import TurnedAlignmentRun, TurnedTargetsRun, measuring
from ..lab import turning
from ..lab.online import OnlineRun
from ..lab.ppo import PPORun
from ..lab.recipes import PairRun
from ..lab.turning import Construction
from . import plan
from .params import ParameterError, Parameters

# One phase in two is turned: with two of them at half-time, with eight at every eighth of training.
CONSTRUCTIONS = {
    "fixed": Construction(turning.NOTHING, 8),
    "turned once": Construction(turning.LABELS, 2),
    "turned often": Construction(turning.LABELS, 8),
    "fact turned once": Construction("fact", 2),
    "fact turned often": Construction("fact", 8),
    "random": Construction(turning.RANDOM, 8),
}
SINCE = "2026-11-25"


def constructions(method: str) -> dict[str, Construction]:
    """Those that a method can have: there is nothing random to imitate."""
    return {name: c for name, c in CONSTRUCTIONS.items() if method != "imitation" or c.turned != turning.RANDOM}


def _plain(p: Parameters, seed: int, method: str) -> PairRun | PPORun | OnlineRun:
    return plan.run(p, seed, "dpo" if method == "imitation" else method)


def run(p: Parameters, seed: int, method: str, construction: str) -> turning.Turning:
    """A training run whose target is known by construction, all else as in the plain run of the parameters.

    Raises ParameterError for a construction that the method cannot have.
    """
    if construction not in constructions(method):
        raise ParameterError(
            f"construction: given {construction!r} (str), which {method} cannot have; allowed here: one of "
            + ", ".join(constructions(method))
        )
    build = turning.imitation if method == "imitation" else turning.turning
    try:
        return build(_plain(p, seed, method), CONSTRUCTIONS[construction])
    except ValidationError as error:
        why = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
        raise ParameterError(f"construction: given {construction!r} (str), not possible here: {why}") from error


def alignment(p: Parameters, seed: int, method: str, run: turning.Turning) -> TurnedAlignmentRun:
    """G on the check probe at every checkpoint, with what the update after it is trained on."""
    return measuring(plan.alignment_run(p, _plain(p, seed, method), "check"), run)


def targets(p: Parameters, seed: int, method: str, run: turning.Turning) -> TurnedTargetsRun:
    """The cosine with the final responses and with responses to other prompts."""
    choices = plan.target_choices(p)
    kept = {name: choices[name] for name in (calibration.DECLARED, calibration.FLOOR)}
    return measuring(plan.targets_run(p, _plain(p, seed, method), kept), run)


def _rule(name: str, reading: calibration.Reading) -> Rule:
    return Rule(
        claim="instrument",
        name=name,
        says=reading.says,
        why=reading.why,
        table="readings",
        methods=(),
        columns=("seed", name),
        measure=lambda table: stats.mean_interval(table[name]),
        predicted="above",
        threshold=reading.threshold,
        figure="10-instrument#fig-instrument",
        since=SINCE,
    )


# Columns of a study, read as a ledger's rules are; they are predictions of nothing.
READINGS = tuple(_rule(name, reading) for name, reading in calibration.BY_NAME.items())


def calibrated(rows: pd.DataFrame) -> pd.DataFrame:
    """How well readings tell, as `calibration.calibrations` has it; empty where there is nothing to compare.

    Args: rows of the study, with the columns calibrated, construction, seed, and readings.
    """
    told = rows.assign(method=rows["calibrated"], truth=_truths(rows))
    return calibration.calibrations(told) if told["truth"].nunique() > 1 else pd.DataFrame()


def _truths(rows: pd.DataFrame) -> list[str]:
    return [calibration.truth(CONSTRUCTIONS[name]) for name in rows["construction"]]


def curve(rows: pd.DataFrame, reading: str) -> pd.DataFrame:
    """The ROC curve of a reading over all of these rows (`calibration.roc`); rows without a value are left out."""
    known = rows.dropna(subset=[reading])
    return calibration.roc(known[reading], [truth == calibration.STABLE for truth in _truths(known)])


def estimate(row: pd.Series, what: str) -> stats.Estimate:
    """A number of a calibration ("auc", "sensitivity" or "specificity") with its interval over seeds."""
    return stats.Estimate(row[what], row[f"{what}_low"], row[f"{what}_high"], int(row["seeds"]))


def of(found: pd.DataFrame, method: str, reading: str, against: str = "moving + none") -> pd.Series | None:
    """One calibration, None where there is none."""
    own = found[(found["method"] == method) & (found["reading"] == reading) & (found["against"] == against)]
    return own.iloc[0] if len(own) else None


def error(rows: pd.DataFrame, method: str = "all") -> str:
    """The instrument's error as a sentence: of reading a target as stable if G is surely positive at four in five."""
    found = calibrated(rows)
    row = of(found, method, "positive") if len(found) else None
    if row is None:
        return "How often the reading *G surely positive at nearly every checkpoint* errs has not been computed"
    name = {"all": "all methods together", "dpo": "DPO alone", "ppo": "PPO alone"}.get(method, method)
    others = {"those that move": of(found, method, "positive", "moving"), "none": of(found, method, "positive", "none")}
    areas = [f"from {kind} {estimate(one, 'auc')}" for kind, one in others.items() if one is not None]
    return (
        f"Where targets are known ({name}, n = {int(row['seeds'])} seeds), *G surely positive at a share of "
        f"{calibration.SURE:g} of checkpoints or more* calls {estimate(row, 'sensitivity')} of stable targets stable, "
        f"and leaves {estimate(row, 'specificity')} of those that move or are none uncalled; the share tells stable "
        f"targets {', '.join(areas)} (AUC; 0.5 is a coin), as a reading of stability: *{row['verdict']}*"
    )
