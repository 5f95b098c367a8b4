"""Responses beside a pair's own two, and what kind of reply each is: where probability goes when it leaves the chosen.

A response has one text and many neighbours. Whether a chosen text that becomes less likely is harm or success depends
on which of them gain: texts of its own kind, better ones, or what no one would say (see *Learning Dynamics of LLM
Finetuning*, Ren & Sutherland, ICLR 2025, who follow rephrased, mismatched and permuted responses).
"""

import functools
import itertools
import math
import random
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from .data import mismatched
from .world import TONES, Prompt, Statement, World

SORTS = ("chosen", "rejected", "paraphrase", "other prompt", "permuted")
KINDS = (
    "chosen's kind",
    "rejected's kind",
    "both's kind",
    "better than both",
    "between",
    "worse than both",
    "ungrammatical",
)


class Standing(NamedTuple):
    """What a reply is to a prompt: its `World.answer_type`, its grammar (0 to 1) and its true reward (points)."""

    kind: tuple[str, ...] | None
    grammar: float
    reward: float


@functools.lru_cache(maxsize=2**14)
def standing(world: World, prompt: Prompt, text: str) -> Standing:
    """The `Standing` of a reply; kept, since policies say the same again and again."""
    axes = world.axes(prompt, text)
    reward = sum(weight * axes[axis] for axis, weight in world.weights.items())
    return Standing(world.answer_type(prompt, text), axes["grammar"], reward)


def kind_of(world: World, prompt: Prompt, reply: str, chosen: str, rejected: str) -> str:
    """Which one of KINDS a reply is, relative to a pair of responses to the same prompt.

    The first that holds, in this order: "ungrammatical" (a sentence that is not in form, or no answer type); then, of
    the answer type of both, of the chosen or of the rejected response, "both's kind", "chosen's kind" or "rejected's
    kind", whatever it earns; then by true reward "better than both", "worse than both" or "between", bounds included.
    An answer type does not tell who is addressed, for one: replies of the chosen's kind may earn more or less than it.
    """
    said, first, second = (standing(world, prompt, text) for text in (reply, chosen, rejected))
    if said.kind is None or said.grammar < 1:
        return "ungrammatical"
    if said.kind in (first.kind, second.kind):
        if first.kind == second.kind:
            return "both's kind"
        return "chosen's kind" if said.kind == first.kind else "rejected's kind"
    if said.reward > max(first.reward, second.reward):
        return "better than both"
    return "worse than both" if said.reward < min(first.reward, second.reward) else "between"


def permuted(text: str, seed: int) -> str | None:
    """The words of `text` in another order, drawn from `seed`; None where there is no other order."""
    words = text.split()
    if len(set(words)) < 2:
        return None
    rng = random.Random(f"{seed}/permuted/{text}")
    while (mixed := rng.sample(words, len(words))) == words:
        pass
    return " ".join(mixed)


class _Note(NamedTuple):
    """The arguments of `World.note`."""

    tone: str
    name: str
    animal: str
    said: tuple[Statement, ...]
    source: str | None


def _read(world: World, text: str) -> _Note | None:
    """What a whole note states; None for a text that is none, such as one with a word missing."""
    words = text.split()
    tones = [tone for tone, (greeting, _) in TONES.items() if words[:1] == [greeting]]
    named = [[w for w in words if w in known] for known in (world.names, world.animals, world.sources.values())]
    names, animals, sources = named
    said = world.statements(text)
    if not (tones and names and animals and said):
        return None
    note = _Note(tones[0], names[0], animals[0], tuple(said), sources[0] if sources else None)
    return note if world.note(*note) == text else None


def _rewordings(world: World, prompt: Prompt, note: _Note) -> Iterator[list[_Note]]:
    """Groups of notes that may be worth as much as `note`, the closest to what people write first.

    The same statements with the first one kept, since the asked fact usually opens a note; a true further fact in the
    place of another; the same statements in any order.
    """
    orders = [note._replace(said=said) for said in itertools.permutations(note.said)]
    told = {one.topic for one in note.said} | {prompt.topic}
    yield [other for other in orders if other.said[0] == note.said[0]]
    yield [
        note._replace(said=(*note.said[:i], Statement(topic, value, one.hedged), *note.said[i + 1 :]))
        for i, one in enumerate(note.said)
        for topic, value in ((topic, world.true_value(prompt.animal, topic)) for topic in world.topics)
        if one.topic != prompt.topic and topic not in told
    ]
    yield orders


def paraphrase(world: World, prompt: Prompt, text: str, seed: int = 0, avoid: Collection[str] = ()) -> str | None:
    """Another note of the same answer type and the same true reward as `text`, or None where there is none.

    With the same statements in another order, else with another true further fact; among equals drawn from `seed`.
    A note of one fact that was asked for has none, since these worlds know one form for each fact, and neither has a
    text that is no whole note. avoid: texts that it must not be.
    """
    note, known = _read(world, text), standing(world, prompt, text)
    for group in _rewordings(world, prompt, note) if note else ():
        texts = {world.note(*other) for other in group} - {text, *avoid}
        alike = [
            other
            for other in sorted(texts)
            if (found := standing(world, prompt, other)).kind == known.kind
            and math.isclose(found.reward, known.reward, abs_tol=1e-9)
        ]
        if alike:
            return random.Random(f"{seed}/paraphrase/{text}").choice(alike)
    return None


def beside(world: World | None, rows: Sequence[dict], seed: int = 0) -> dict[str, list[str | None]]:
    """A response of each of SORTS for each pair of `rows`, None where there is none: {sort: [text or None]}.

    "other prompt" is the chosen response of the next pair (`data.mismatched`). world: None for texts of a file, which
    have no paraphrases. Raises ValueError for fewer than two pairs.
    """
    if len(rows) < 2:
        raise ValueError(f"beside: given {len(rows)} pairs; a response to another prompt needs at least 2")
    said = [None] * len(rows)
    if world is not None:
        asked = (world.parse_prompt(row["prompt"]) for row in rows)
        said = [
            paraphrase(world, prompt, row["chosen"], seed, (row["rejected"],))
            for prompt, row in zip(asked, rows, strict=True)
        ]
    texts = {
        "chosen": [row["chosen"] for row in rows],
        "rejected": [row["rejected"] for row in rows],
        "paraphrase": said,
        "other prompt": [row["chosen"] for row in mismatched(rows)],
        "permuted": [permuted(row["chosen"], seed) for row in rows],
    }
    return {sort: texts[sort] for sort in SORTS}
