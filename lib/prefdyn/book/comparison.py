"""Many methods on equal ground: which are compared, at which learning rates, and on what they are measured."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pandas as pd

from ..findings import tuning
from ..findings.measure import AlignmentRun
from ..findings.tuning import ValidationRun
from ..lab.recipes import Training
from ..lab.runs import RunStore
from ..methods import own, registry
from . import plan
from .params import Parameters


@dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    name: how it is called. method: a name in `methods.registry`, or a loss of one's own. settings, part: as for
    `plan.run`. rate_of: the entry whose learning rate it takes, by default its own: where one thing is switched off,
    all else is to stay equal.
    """

    name: str
    method: str | Callable
    settings: Mapping[str, float] = field(default_factory=dict)
    part: str = "full"
    rate_of: str | None = None

    def __post_init__(self):
        """Raises ValueError for a method or a setting that is none."""
        method = own.from_function(self.method) if callable(self.method) else registry.find(self.method)
        registry.settings(method, self.settings)

    def run(self, p: Parameters, seed: int, lr: float) -> Training:
        """Its training run at a learning rate."""
        return plan.run(p, seed, self.method, self.part, lr=lr, **self.settings)


def _distinct(entries: Iterable[Entry]) -> list[Entry]:
    """The entries. Raises ValueError where two have one name."""
    entries = list(entries)
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two entries are named {twice[0]!r}; give each its own name")
    return entries


def grid(p: Parameters, entries: Iterable[Entry]) -> list[tuple[str, ValidationRun]]:
    """What each entry that is tuned earns on validation prompts, at each of the rates, with the first seed."""
    seed, entries = p.seeds[0], _distinct(entries)
    return [
        (entry.name, plan.validation_run(p, seed, entry.run(p, seed, lr)))
        for entry in entries
        if entry.rate_of is None
        for lr in sorted(p.rates)
    ]


def tuned(store: RunStore, p: Parameters, entries: Iterable[Entry]) -> pd.DataFrame:
    """The table of `tuning.chosen` for the `grid`, which the store has, or computes."""
    tried = grid(p, entries)
    store.ensure(spec for _, spec in tried)
    return tuning.chosen(tuning.means(store, tried))


def runs(p: Parameters, entries: Iterable[Entry], rates: Mapping[str, float]) -> dict[tuple[str, int], Training]:
    """Each entry's training runs at its rate, {(name, seed): spec}.

    Args: rates, the learning rate of each entry that is tuned, by name. Raises ValueError for an entry without one.
    """
    entries = _distinct(entries)
    for entry in entries:
        if (entry.rate_of or entry.name) not in rates:
            raise ValueError(
                f"entry {entry.name!r}: no learning rate of {entry.rate_of or entry.name!r} among {sorted(dict(rates))}"
            )
    return {
        (entry.name, seed): entry.run(p, seed, float(rates[entry.rate_of or entry.name]))
        for entry in entries
        for seed in p.seeds
    }


def measured(p: Parameters, trained: Mapping[tuple[str, int], Training]) -> dict[tuple[str, int], AlignmentRun]:
    """G of training runs on as many sequences each, two a pair and one a reply, that they were not trained on.

    A method that keeps some of its fresh replies (the best of each group, a pair of it) is measured on those, and fresh
    replies come in whole groups.
    """
    equal = p.model_copy(update={"probe": p.sequences // 2, "ppo_probe": p.sequences})
    return {key: plan.alignment_run(equal, run, "check") for key, run in trained.items()}


def gathered(store: RunStore, specs: Mapping[tuple[str, int], object], frame: str) -> pd.DataFrame:
    """One table of runs {(name, seed): spec} under each other, with the columns name and seed."""
    return pd.concat(
        [store.get(spec).frame(frame).assign(name=name, seed=seed) for (name, seed), spec in specs.items()],
        ignore_index=True,
    )
