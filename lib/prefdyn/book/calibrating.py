"""Which training G is calibrated on: what is turned, in which methods, and the readings as columns of a study."""

from ..findings import calibration, stats
from ..findings.claims import Rule
from ..findings.turned import TurnedAlignmentRun, TurnedTargetsRun, measuring
from ..lab import turning
from ..lab.online import OnlineRun
from ..lab.ppo import PPORun
from ..lab.recipes import PairRun
from ..lab.turning import Construction
from . import plan
from .params import Parameters

# One phase in two is turned: with two of them at half-time, with eight at every eighth of training. What stays is
# looked at as often as what is turned most.
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
    """A training run whose target is known by construction, all else as in the plain run of the parameters."""
    build = turning.imitation if method == "imitation" else turning.turning
    return build(_plain(p, seed, method), CONSTRUCTIONS[construction])


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
