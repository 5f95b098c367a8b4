"""What is in a preference file and what would become of it, before anything is trained: the text of `prefdyn data`."""

import statistics
from collections.abc import Iterable, Iterator

from ..lab import recipes
from ..lab.account import count
from ..lab.layouts import DataError, Reading, shown
from . import plan
from .params import Parameters


def _lengths(texts: list[str]) -> str:
    words = [len(text.split()) for text in texts]
    deciles = statistics.quantiles(words, n=10) if len(words) > 1 else words * 9
    return f"{deciles[4]:.0f} words (median), {deciles[0]:.0f} to {deciles[8]:.0f} (without the outer tenths)"


def content(reading: Reading) -> list[tuple[str, str]]:
    """What a file holds, whatever it is used for: rows of (what, how much)."""
    prompts = {row["prompt"] for row in reading.pairs}
    several = sum(not isinstance(prompt, str) for prompt in prompts)
    return [
        ("layout", reading.layout),
        ("columns not read", ", ".join(reading.unread) or "none"),
        *([("files not read", ", ".join(reading.passed_over))] if reading.passed_over else []),
        ("records", str(reading.records)),
        *((f"left out: {reason}", str(n)) for reason, n in count(reading.left_out).items()),
        ("pairs", str(len(reading.pairs))),
        ("different prompts", f"{len(prompts)}, {several} of them of several turns or with a system message"),
        ("prompts", _lengths([shown(prompt) for prompt in prompts])),
        *((side, _lengths([row[side] for row in reading.pairs])) for side in ("chosen", "rejected")),
    ]


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    rows = list(rows)
    width = max((len(what) for what, _ in rows), default=0)
    yield from (f"  {what:{width}}  {how_much}" for what, how_much in rows)


def _pair(row: dict) -> Iterator[str]:
    yield f"{row['where']}"
    for side in ("prompt", "chosen", "rejected"):
        text = " ".join(shown(row[side]).split())
        yield f"  {side:9}{text[:300]}{' ...' if len(text) > 300 else ''}"


def report(p: Parameters, examples: int) -> Iterator[str]:
    """Lines about the file that the parameters name: content, a few pairs, then its use under their limits, if any.

    examples: pairs, and records and pairs that are left out, to show. Raises DataError, after what could be told.
    """
    spec = plan.data_spec(p, p.seeds[0])
    reading = recipes.reading(spec.path, spec.content)
    yield from _table(content(reading))
    for row in reading.pairs[:examples]:
        yield from ("", *_pair(row))
    left_out = list(reading.left_out)
    try:
        account = recipes.dataset(spec).account
        left_out += account.dropped
        yield from ("", f"With profile {p.profile}, {account.limits}", *_table(account.use()))
    except DataError as error:
        raise DataError(f"with profile {p.profile} it cannot be used: {error}") from error
    finally:
        if left_out and examples:
            yield from ("", "Left out, the first of them", *(f"  {left}" for left in left_out[:examples]))
