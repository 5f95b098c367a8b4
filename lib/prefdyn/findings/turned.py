"""The measurement of training whose target is known by construction (`lab.turning`), as specs of the run store.

Apart from what is made of them (`calibration`): a change there leaves what was measured as it is.
"""

from ..lab import turning
from . import measure, targets


class TurnedAlignmentRun(measure.AlignmentRun):
    """The measurement of a turning run, at each checkpoint with what the update after it is trained on.

    Retyped, since a spec is written down by the declared types of its fields: what is turned would not be in the key.
    """

    run: turning.Turning


class TurnedTargetsRun(targets.TargetsRun):
    """The same for several choices of D'; DECLARED and FLOOR are those that readings need."""

    run: turning.Turning


def measuring(
    plain: measure.AlignmentRun | targets.TargetsRun, run: turning.Turning
) -> TurnedAlignmentRun | TurnedTargetsRun:
    """The measurement of a turning run with all settings of a plain one (probe, its size, D', ...).

    Not by giving a plain measurement the turning run: its key would not say what is turned. Raises ValueError where the
    plain measurement is of rollouts and this run is not, or the other way round: their sizes mean different things.
    """
    if "rollouts" in {plain.run.takes, run.takes} and plain.run.takes != run.takes:
        raise ValueError(f"measuring: a run on {run.takes} as one on {plain.run.takes}")
    kind = TurnedAlignmentRun if isinstance(plain, measure.AlignmentRun) else TurnedTargetsRun
    return kind(**{name: getattr(plain, name) for name in type(plain).model_fields} | {"run": run})
