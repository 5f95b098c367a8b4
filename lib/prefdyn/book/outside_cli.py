"""Commands about judges of one's own: replies in the format that they read, and what they said of them."""

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy import stats

from ..findings.stats import Estimate, mean_interval
from ..lab import outside, policy, recipes
from ..lab.account import count as by_reason
from ..lab.layouts import LeftOut
from ..lab.outside import Annotation, Annotations


def share_interval(scores: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean of independent scores in [0, 1] with its interval.

    Where each is 0, 0.5 or 1, that of Wilson (1927), which holds where few or all are won; a tie counts half, so that
    with ties it is somewhat too wide. Of finer scores, Student's. Raises ValueError if there is none.
    """
    x = np.asarray(scores, float)
    if x.size and not set(x.tolist()) <= {0.0, 0.5, 1.0}:
        return mean_interval(x, level, within=(0, 1))
    if not x.size:
        raise ValueError("share_interval: at least one score is needed, given none")
    n, p, z = x.size, float(x.mean()), float(stats.norm.ppf((1 + level) / 2))
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return Estimate(p, max(0.0, low), min(1.0, high), n, values=tuple(x.tolist()))


def _left_out(left_out: Iterable[LeftOut]) -> Iterator[str]:
    yield from (f"  left out: {n} x {reason}" for reason, n in by_reason(left_out).items())


def _writable(path: Path) -> None:
    """Raise ValueError if a file cannot be made there, before much is spent on what goes into it."""
    if path.is_dir():
        raise ValueError(f"--out {path}: is a folder; name the file to write, such as {path / 'outputs.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"--out {path}: cannot be written ({error.strerror or error})") from error


def replies(
    model: Annotated[str, typer.Argument(help="a folder with a checkpoint, or the name of a model on the hub")],
    out: Annotated[Path, typer.Option(help="file to write, a JSON list in the format of AlpacaEval's outputs")],
    pairs: Annotated[str | None, typer.Option(help="preference pairs, whose different prompts are answered")] = None,
    prompts: Annotated[str | None, typer.Option(help="a file of records with 'instruction' or 'prompt'")] = None,
    count: Annotated[int | None, typer.Option(help="how many prompts, the first ones [all]", min=1)] = None,
    max_prompt: Annotated[int | None, typer.Option(help="tokens of a prompt that are read [all that fit]")] = None,
    max_response: Annotated[int, typer.Option(help="tokens of a reply at most")] = 512,
    temperature: Annotated[float, typer.Option(help="of sampling; 0 is greedy", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    name: Annotated[str | None, typer.Option(help="of the generator in the file [that of the model]")] = None,
) -> None:
    """Answer prompts with a model, and write the replies in the format that AlpacaEval and judges like it read.

    Greedy unless a temperature is given. Conversations of several turns are left out and counted.
    """
    if (pairs is None) == (prompts is None):
        raise ValueError("--pairs, --prompts: exactly one of them says what is answered")
    _writable(out)
    asked = outside.prompts_of(prompts) if pairs is None else outside.prompts_of_pairs(pairs)
    loaded, tokenizer = policy.load(model)
    made = outside.replies(
        loaded.to(recipes.device()),
        tokenizer,
        asked,
        name=name or Path(model).resolve().name,
        max_prompt=max_prompt,
        max_response=max_response,
        count=count,
        temperature=temperature,
        seed=seed,
    )
    outside.write(out, made.rows)
    typer.echo(f"{len(made.rows)} replies of {made.rows[0]['generator']} written to {out}")
    for line in _account(asked, made, max_response):
        typer.echo(line)


def _account(asked: outside.Asked, made: outside.Replies, max_response: int) -> Iterator[str]:
    """What became of the prompts and of the replies."""
    yield f"  prompts: {len(asked.instructions)} different ones in {asked.records} records, {asked.repeated} repeated"
    yield from _left_out((*asked.left_out, *made.left_out))
    if made.unasked:
        yield f"  not asked for: {made.unasked}"
    if made.cut:
        yield f"  prompts cut to their last {made.max_prompt} tokens: {made.cut}"
    yield f"  replies that reached {max_response} tokens before their end: {made.unended}; empty ones: {made.empty}"
    lengths = [len(row["output"]) for row in made.rows]
    yield f"  length of a reply: {np.mean(lengths):.0f} characters (mean)"


def judged(
    file: Annotated[str, typer.Argument(help="annotations of an outside judge, a JSON list as AlpacaEval writes it")],
    against: Annotated[
        str | None, typer.Option(help="annotations of another model against the same replies, to compare with")
    ] = None,
) -> None:
    """Say what an outside judge said: win rate with its interval, ties, unanswered, order of the replies, lengths.

    The win rate is that of generator_2 over generator_1, ties half; of several annotations of an instruction the mean.
    """
    found = outside.annotations(file)
    for line in report(found):
        typer.echo(line)
    if against is not None:
        other = outside.annotations(against)
        typer.echo()
        for line in (*report(other), "", *compared(found, other)):
            typer.echo(line)


def report(found: Annotations) -> Iterator[str]:
    """Lines about a file of annotations. Raises ValueError if none of them has an answer."""
    rows, scores = found.answered, list(found.scores().values())
    yield f"{found.generator} against {found.baseline}: {found.records} annotations"
    yield from _left_out(found.left_out)
    if not rows:
        raise ValueError(f"annotations: none of {len(found.rows)} has an answer; a preference is 1, 2, or a tie")
    won, lost = sum(row.score > 0.5 for row in rows), sum(row.score < 0.5 for row in rows)
    silent = len(found.rows) - len(rows)
    yield f"  win rate of {found.generator}: {share_interval(scores):.3f} (95%, {len(scores)} instructions)"
    yield f"  {won} won, {len(rows) - won - lost} tied, {lost} lost; {silent} without an answer"
    yield from _order(found.generator, rows)
    yield from _lengths(found.generator, rows)


def _rate(rows: Sequence[Annotation]) -> str:
    """The mean score of annotations, and how many they are."""
    return f"{np.mean([row.score for row in rows]):.3f} of {len(rows)}" if rows else "of none"


def _order(generator: str, rows: Sequence[Annotation]) -> Iterator[str]:
    """How often a generator's reply stood second, and how it fared in either place."""
    second, first = [row for row in rows if row.second], [row for row in rows if not row.second]
    if not first:
        yield (
            f"  order: {generator} is output_2 in all {len(rows)}; whether the judge saw them shuffled is not in the "
            "file, nor whether it prefers a place"
        )
        return
    where = f"output_2 in {len(second)} of {len(rows)}"
    yield f"  order: {generator} is {where}; win rate there {_rate(second)}, as output_1 {_rate(first)}"


def _lengths(generator: str, rows: Sequence[Annotation]) -> Iterator[str]:
    """Lengths in characters, and how much of the win rate goes with the longer reply."""
    own, other = (np.mean([getattr(row, name) for row in rows]) for name in ("length", "other_length"))
    yield f"  length: {own:.0f} characters (mean), the other's {other:.0f}"
    longer = [row for row in rows if row.length > row.other_length]
    shorter = [row for row in rows if row.length < row.other_length]
    yield f"  where {generator}'s reply is longer, its win rate is {_rate(longer)}; where shorter, {_rate(shorter)}"
    decided = [row.score > 0.5 for row in longer if row.score != 0.5]
    decided += [row.score < 0.5 for row in shorter if row.score != 0.5]
    if decided:
        share = share_interval(decided)
        yield (
            f"  of {len(decided)} decisions between unequal lengths the longer reply won {share:.3f}; "
            "a judge that likes length gives such a share too: this is no length-controlled win rate"
        )


def compared(one: Annotations, other: Annotations) -> Iterator[str]:
    """Lines about the difference of two win rates on the instructions that both files answer.

    Raises ValueError for two baselines, or if there is no such instruction.
    """
    both = outside.shared(one, other)
    if not both.scores:
        raise ValueError("against: the two files answer no instruction in common, with the same reply of the baseline")
    difference = mean_interval([a - b for a, b in both.scores], within=(-1, 1))
    yield (
        f"{one.generator} minus {other.generator}: {difference:+.3f} in win rate (95%, paired over {len(both.scores)} "
        "instructions)"
    )
    alone = f"{both.alone} answered in one file alone"
    yield f"  left out: {alone}, {both.other_baseline} with another reply of the baseline"
