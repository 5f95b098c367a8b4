"""Preference files in the layouts of the field: told apart by their columns, every record used or left out by name.

No text is changed or dropped in silence: what cannot be kept as it is leaves the whole record out, with a reason.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from . import sources
from .sources import DataError, Entry, Unusable, brief

Turn = tuple[str, str]  # (role, content), the role one of ROLES
Prompt = str | tuple[Turn, ...]  # one message of the user, or a conversation that awaits an answer

ROLES = ("system", "user", "assistant", "tool")

# The layouts by the columns that tell them, the first that fits; `_LAYOUTS` says what else a record may hold.
_COLUMNS = (
    ("question", ("question", "chosen", "rejected")),
    ("messages", ("messages", "chosen", "rejected")),
    ("sharegpt", ("conversations", "chosen", "rejected")),
    ("pairs", ("chosen", "rejected")),
    ("responses", ("prompt", "response_0", "response_1", "better_response_id")),
    ("human-ref", ("history", "human_ref_A", "human_ref_B", "labels")),
    ("unpaired", ("prompt", "completion", "label")),
)
_LAYOUTS = {
    "pairs": "prompt, chosen, rejected; or chosen and rejected as conversations that begin with the prompt",
    "messages": "the same with messages, a copy of the chosen conversation",
    "transcript": "chosen, rejected as texts of paragraphs 'Human: ...' and 'Assistant: ...'",
    "question": "system (optional), question, chosen, rejected",
    "responses": "prompt, response_0, response_1, better_response_id",
    "human-ref": "history, human_ref_A, human_ref_B, labels",
    "sharegpt": "conversations, chosen, rejected of messages with from and value",
    "unpaired": "prompt, completion, label",
}
SIDES = ("chosen", "rejected")
_SYSTEM = ("system", "system_prompt")
_COPIES = ("messages", "conversations")
# What a model or its template would be given and this book does not give.
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_UNREAD_COLUMNS = ("tools", "chat_template_kwargs", "documents", "history", *_MEDIA)
_UNREAD_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", *_MEDIA)
_SHAREGPT = {
    **{"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
}
_NOT_TEXT, _IGNORED = "a message holds something other than text", "columns that would be ignored"


@dataclass(frozen=True)
class LeftOut:
    """A record that is not used: its place, the reason in words shared by all of the kind, and what is particular."""

    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Reading:
    """What was read: records == used + len(left_out).

    layout: names of the layouts found. records: lines that are not blank, elements or rows, all files together; what
    is lost to damage counts as one. pairs: dicts of prompt (Prompt), chosen, rejected and where (str). used: records
    that the pairs are made of, two for each in the layout "unpaired". unread: columns, and keys of
    messages ("chosen[].name"), that hold something and are not read, such as where a record comes from. passed_over:
    files of a folder that are not read.
    """

    layout: str
    records: int
    pairs: list[dict]
    left_out: list[LeftOut]
    used: int
    unread: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()


class _Pair(NamedTuple):
    """A pair as its record holds it: the sides, and the prompt where it is apart, are texts or turns."""

    prompt: Prompt | None
    chosen: Prompt
    rejected: Prompt


def shown(prompt: Prompt) -> str:
    """A prompt as text for people; of a conversation, each turn after its role."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{role}: {content}" for role, content in prompt)


def identity(prompt: Prompt) -> str:
    """A text that differs for different prompts: the text itself, or the turns as JSON."""
    if not isinstance(prompt, str):
        return json.dumps(prompt)
    # a text that could be taken for turns is marked, and so is one that could be taken for a marked one
    return "\0" + prompt if prompt.startswith(("[[", "\0")) else prompt


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN is how tables write a gap


def _filled(value: object) -> bool:
    """Whether there is anything in a value; tables give every record all columns, and every message all keys."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, dict | list | tuple):
        return any(map(_filled, value.values() if isinstance(value, dict) else value))
    return not _missing(value)


def _part(part: object) -> str:
    """The text of one part of a message. Raises Unusable."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in (None, "text"):
        raise Unusable(_NOT_TEXT, f"a part of type {brief(kind)}")
    _none_filled(part, [key for key in part if key not in ("type", "text")], _NOT_TEXT)
    if not isinstance(part.get("text"), str):
        raise Unusable("the content of a message is not a text", brief(part.get("text")))
    return part["text"]


def _content(content: object) -> str:
    """The text of a message: a text, or parts that are texts. Raises Unusable."""
    if isinstance(content, str):
        return content
    if _missing(content):
        raise Unusable("a message without content")
    if not isinstance(content, list):
        raise Unusable("the content of a message is not a text", brief(content))
    return "".join(map(_part, content))


def _none_filled(holder: dict, keys: Iterable[str], reason: str) -> None:
    """Raise Unusable for `reason` if any of these keys holds something."""
    if filled := [key for key in keys if _filled(holder.get(key))]:
        raise Unusable(reason, ", ".join(map(brief, filled)))


def _turn(message: object) -> Turn:
    """One message, with role and content or with from and value. Raises Unusable."""
    if not isinstance(message, dict):
        raise Unusable("a message is not an object", brief(message))
    _none_filled(message, _UNREAD_KEYS, _NOT_TEXT)
    is_sharegpt = _missing(message.get("role")) and not _missing(message.get("from"))
    given = message["from"] if is_sharegpt else message.get("role")
    if _missing(given):
        raise Unusable("a message without a role")
    role = _SHAREGPT.get(given) if is_sharegpt and isinstance(given, str) else given
    if role not in ROLES:
        raise Unusable("unknown role", brief(given))
    return role, _content(message.get("value" if is_sharegpt else "content"))


def _told(value: object, name: str) -> Prompt:
    """A text as it is, a conversation as turns. Raises Unusable."""
    if isinstance(value, str):
        return value
    if _missing(value):
        raise Unusable(f"{name!r} is null")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Unusable(f"{name!r} is neither a text nor a conversation", brief(value))
    return tuple(_turn(message) for message in value)


def _either(record: dict, name: str) -> int:
    """0 or 1, however a table writes it. Raises Unusable."""
    value = record[name]
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise Unusable(f"{name!r} is neither 0 nor 1", brief(value))
    return int(value)


_OPENING = re.compile(r"\s*(Human|Assistant):")
_MARKER = re.compile(r"\n\n(Human|Assistant): ?")


def _transcript(text: str) -> tuple[Turn, ...]:
    """The turns of a text of paragraphs "Human: ..." and "Assistant: ...". Raises Unusable if it does not begin so."""
    if not _OPENING.match(text):
        raise Unusable("one side is a transcript and the other is not")
    _, *pieces = _MARKER.split("\n\n" + text.lstrip())
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return tuple(("user" if who == "Human" else "assistant", content) for who, content in turns)


def _is_transcript(record: dict) -> bool:
    """Whether the sides are texts that hold the prompt as a transcript, or that go on with one."""
    prompt, sides = record.get("prompt"), (record["chosen"], record["rejected"])
    if not all(isinstance(side, str) for side in sides):
        return False
    if _missing(prompt):
        return any(_OPENING.match(side) for side in sides)
    if not isinstance(prompt, str) or not _OPENING.match(prompt):
        return False
    several = len(_MARKER.findall("\n\n" + prompt.lstrip())) > 1  # else it may be a text that begins so
    return several or any(_MARKER.match(side) for side in sides)


def _has_sharegpt(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and _missing(first.get("role")) and "from" in first


def _layout(record: dict) -> str | None:
    """The name of a record's layout, by the columns that are filled, else by those that are there; None if unknown."""
    filled = {name for name, value in record.items() if not _missing(value)}
    for columns in (filled, set(record)):
        fitting = (name for name, needed in _COLUMNS if columns.issuperset(needed))
        # beside a prompt, a question or conversations are columns like any other
        name = next((name for name in fitting if "prompt" not in columns or name not in ("question", "sharegpt")), None)
        if name == "pairs" and _is_transcript(record):
            return "transcript"
        if name in ("pairs", "messages") and any(_has_sharegpt(record[side]) for side in SIDES):
            return "sharegpt"
        if name is not None:
            return name
    return None


# Columns of scores of the chosen and of the rejected side, as files of the field name them.
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
)


def _check_scores(chosen: object, rejected: object) -> None:
    """Raise Unusable unless the scores, where both are there, prefer the chosen side."""
    if chosen is None or rejected is None:
        return
    for score in (chosen, rejected):
        if not isinstance(score, int | float) or isinstance(score, bool):
            raise Unusable("a score is not a number", brief(score))
        if isinstance(score, float) and not math.isfinite(score):
            raise Unusable("a score is not a finite number", brief(score))
    if chosen == rejected:
        raise Unusable("equal scores: no preference", brief(chosen))
    if chosen < rejected:
        raise Unusable("the scores prefer 'rejected'", f"{brief(chosen)} against {brief(rejected)}")


def _pair(layout: str, record: dict) -> _Pair:
    """The prompt and the sides of a record where its layout has them. Raises Unusable."""
    if layout == "transcript":
        asked = "" if _missing(record.get("prompt")) else record["prompt"]
        texts = [text if text.startswith(asked) else asked + text for text in (record[side] for side in SIDES)]
        return _Pair(None, *map(_transcript, texts))
    prompt, sides = "prompt", SIDES
    if layout == "question":
        prompt = "question"
    elif layout == "sharegpt" and _missing(record.get("prompt")) and not _missing(record.get("conversations")):
        prompt = "conversations"
    elif layout == "responses":
        best = _either(record, "better_response_id")
        sides = (f"response_{best}", f"response_{1 - best}")
    elif layout == "human-ref":
        best, other = "AB" if _either(record, "labels") else "BA"
        prompt, sides = "history", (f"human_ref_{best}", f"human_ref_{other}")
        _check_scores(record.get(f"score_{best}"), record.get(f"score_{other}"))
    chosen, rejected = (_told(record[column], side) for column, side in zip(sides, SIDES, strict=True))
    return _Pair(None if _missing(record.get(prompt)) else _told(record[prompt], "prompt"), chosen, rejected)


def _apart(side: Prompt, name: str) -> tuple[tuple[Turn, ...], str]:
    """The turns before a reply, none if the side is the reply alone, and the reply. Raises Unusable."""
    if isinstance(side, str):
        return (), side
    if not side:
        raise Unusable(f"{name!r} is empty")
    if side[-1][0] != "assistant":
        raise Unusable(f"the last message of {name!r} is not the assistant's", f"it is of role {side[-1][0]!r}")
    return side[:-1], side[-1][1]


def _with_system(turns: tuple[Turn, ...], record: dict) -> tuple[Turn, ...]:
    """Turns after the system message that a record holds in a column of its own, if any. Raises Unusable."""
    for name in _SYSTEM:
        told = record.get(name)
        if not isinstance(told, str) and not _missing(told):
            raise Unusable(f"{name!r} is not a text", brief(told))
        if isinstance(told, str) and told.strip() and turns[:1] != (("system", told),):
            if any(role == "system" for role, _ in turns):
                raise Unusable("two different system messages", name)
            turns = (("system", told), *turns)
    return turns


def _joined(prompt: Prompt | None, sides: dict[str, Prompt], record: dict) -> tuple[tuple[Turn, ...], dict[str, str]]:
    """The turns that all sides answer, the system's included, and the replies by name. Raises Unusable."""
    parts = {name: _apart(side, name) for name, side in sides.items()}
    befores = [before for before, _ in parts.values()]
    if prompt is None:
        if not all(befores):
            raise Unusable("no prompt", "it is neither a column nor the beginning of both sides")
        if any(before != befores[0] for before in befores):
            raise Unusable("chosen and rejected answer different prompts")
        turns = _with_system(befores[0], record)
    else:
        own = (("user", prompt),) if isinstance(prompt, str) else prompt
        turns = _with_system(own, record)
        for name, (before, _) in parts.items():
            if before not in ((), own, turns):
                raise Unusable(f"the conversation in {name!r} is not the one in 'prompt'")
    return turns, {name: reply for name, (_, reply) in parts.items()}


def _finished(turns: tuple[Turn, ...], replies: dict[str, str]) -> Prompt:
    """The prompt that turns are, once everything is checked. Raises Unusable."""
    if not any(content.strip() for role, content in turns if role != "system"):
        raise Unusable("'prompt' is empty")
    if turns[-1][0] not in ("user", "tool"):
        raise Unusable("the prompt does not end with the user's turn", f"it ends with one of role {turns[-1][0]!r}")
    for name, reply in replies.items():
        if not reply.strip():
            raise Unusable(f"{name!r} is empty")
    for text in (*(content for _, content in turns), *replies.values()):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Unusable("text that is not valid Unicode", str(error)) from None
    return turns[0][1] if [role for role, _ in turns] == ["user"] else turns


def _read_columns(layout: str) -> set[str]:
    """The columns that are read of a record of this layout, or compared with what is read."""
    needed = dict(_COLUMNS).get(layout, SIDES)  # a transcript has the columns of pairs
    scores = ("score_A", "score_B") if layout == "human-ref" else [name for names in _SCORES for name in names]
    return {"prompt", *needed, *scores, *_SYSTEM, *_COPIES}


_MESSAGE = ("role", "content", "from", "value")


def _unread(layout: str, record: dict) -> Iterator[str]:
    """Names of what a record holds beside what is read: columns, and keys of messages."""
    read = _read_columns(layout)
    for name, value in record.items():
        if name not in read and _filled(value):
            yield name
        messages = value if isinstance(value, list) else [value]
        for message in (m for m in messages if name in read and isinstance(m, dict)):
            yield from (f"{name}[].{key}" for key, held in message.items() if key not in _MESSAGE and _filled(held))


def _check_columns(layout: str, record: dict) -> None:
    """Raise Unusable if a column would be ignored that a model was meant to be given."""
    _none_filled(record, [name for name in _UNREAD_COLUMNS if (layout, name) != ("human-ref", "history")], _IGNORED)


def _check_copies(record: dict, turns: tuple[Turn, ...], chosen: str) -> None:
    """Raise Unusable if a column of messages holds more than a copy of what is read."""
    own = [turns, turns[1:]] if turns[0][0] == "system" else [turns]
    copies = [*own, *((*part, ("assistant", chosen)) for part in own)]
    for name in _COPIES:
        if _filled(record.get(name)):
            try:
                told = _told(record[name], name)
            except Unusable:
                told = None
            if told not in copies:
                raise Unusable(_IGNORED, f"{name!r} is not a copy of the chosen conversation")


def _row_of(layout: str, record: dict) -> dict:
    """Prompt, chosen and rejected of one record of a layout with pairs. Raises Unusable."""
    _check_columns(layout, record)
    prompt, chosen, rejected = _pair(layout, record)
    turns, replies = _joined(prompt, {"chosen": chosen, "rejected": rejected}, record)
    row = {"prompt": _finished(turns, replies), **replies}
    _check_copies(record, turns, replies["chosen"])
    for names in _SCORES:
        _check_scores(*map(record.get, names))
    _check_different(**replies)
    return row


def _check_different(chosen: str, rejected: str) -> None:
    if chosen == rejected:
        raise Unusable("'chosen' and 'rejected' are the same text")


def _completion_of(record: dict) -> tuple[Prompt, str, int]:
    """Prompt, completion and label of a record of the layout "unpaired". Raises Unusable."""
    _check_columns("unpaired", record)
    prompt, completion = (_told(record[name], name) for name in ("prompt", "completion"))
    turns, replies = _joined(prompt, {"completion": completion}, record)
    return _finished(turns, replies), replies["completion"], _either(record, "label")


class _Completion(NamedTuple):
    at: int
    where: str
    text: str


def _paired(completions: dict[Prompt, tuple[list[_Completion], ...]]) -> Iterator[tuple[int, dict | LeftOut]]:
    """Of each prompt, the i-th desired completion with the i-th undesired one, each with its position."""
    for prompt, (undesired, desired) in completions.items():
        for bad, good in itertools.zip_longest(undesired, desired):
            both = sorted(one for one in (bad, good) if one is not None)
            try:
                if len(both) == 1:
                    raise Unusable("no completion with the other label to the same prompt")
                _check_different(good.text, bad.text)
                where = " and ".join(one.where for one in both)
                yield both[0].at, {"prompt": prompt, "chosen": good.text, "rejected": bad.text, "where": where}
            except Unusable as error:
                yield from ((one.at, LeftOut(one.where, error.reason, error.detail)) for one in both)


def _no_layout(source: str, columns: Iterable[str]) -> DataError:
    """What to say where no record fits: the columns found, the layouts, and the one that they are nearest to."""
    found = list(columns)
    nearest, needed = max(_COLUMNS, key=lambda known: sum(name in found for name in known[1]) / len(known[1]))
    lacking = [repr(name) for name in needed if name not in found]
    near = f"; the nearest is [{nearest}], without {', '.join(lacking)}" if len(lacking) < len(needed) else ""
    return DataError(
        f"dataset: given {source!r}, of no known layout: its columns are {', '.join(map(brief, found[:30]))}{near}; "
        "known: " + "; ".join(f"[{name}] {columns}" for name, columns in _LAYOUTS.items())
    )


def _no_pair(source: str, records: int, left_out: list[LeftOut]) -> DataError:
    if not records:
        return DataError(f"dataset: given {source!r}, which is empty")
    counts = Counter(left.reason for left in left_out).most_common()
    reasons = "; ".join(f"{n} x {reason}" for reason, n in counts)
    return DataError(f"dataset: given {source!r}, no usable pair in {records} records: {reasons}; first, {left_out[0]}")


def _reading(source: str, entries: Iterable[Entry]) -> Reading:
    """Every record used or left out. Raises DataError if none is of a known layout or none can be used."""
    outcomes: list[tuple[int, dict | LeftOut]] = []
    completions: dict[Prompt, tuple[list[_Completion], list[_Completion]]] = {}
    layouts, columns, unread, records = {}, {}, {}, 0
    for at, (where, record) in enumerate(entries):
        records += 1
        try:
            if isinstance(record, Unusable):
                raise record
            columns |= dict.fromkeys(record)
            layout = _layout(record)
            if layout is None:
                raise Unusable("columns of no known layout", ", ".join(map(brief, record)))
            layouts[layout] = None
            unread |= dict.fromkeys(_unread(layout, record))
            if layout == "unpaired":
                prompt, text, label = _completion_of(record)
                completions.setdefault(prompt, ([], []))[label].append(_Completion(at, where, text))
            else:
                outcomes.append((at, _row_of(layout, record) | {"where": where}))
        except Unusable as error:
            outcomes.append((at, LeftOut(where, error.reason, error.detail)))
        except RecursionError:
            outcomes.append((at, LeftOut(where, "nested too deeply")))
    if columns and not layouts:
        raise _no_layout(source, columns)
    outcomes = sorted([*outcomes, *_paired(completions)], key=lambda outcome: outcome[0])
    pairs = [outcome for _, outcome in outcomes if isinstance(outcome, dict)]
    left_out = [outcome for _, outcome in outcomes if isinstance(outcome, LeftOut)]
    if not pairs:
        raise _no_pair(source, records, left_out)
    return Reading(
        ", ".join(layouts),
        records,
        pairs,
        left_out,
        records - len(left_out),
        tuple(unread),
        sources.passed_over(source),
    )


def read(source: str, content: str | None = None) -> Reading:
    """Read preference pairs from a file, a folder of files or the hub ("org/name" or "org/name:split").

    content: as for `sources.entries`. Raises DataError, also if the source holds no usable pair.
    """
    return _reading(source, sources.entries(source, content))
