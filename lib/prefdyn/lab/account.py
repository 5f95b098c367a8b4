"""What becomes of the texts of a data set: encoded once, cut at the limits, left out with a reason, and counted."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from . import chat
from .chat import ChatError
from .layouts import LeftOut, Prompt


class Limits(NamedTuple):
    """Tokens of a prompt, of which the last ones are kept, and of a response, of which the first ones are."""

    max_prompt: int
    max_response: int

    def __str__(self) -> str:
        return f"max_prompt={self.max_prompt}, max_response={self.max_response}"


class Cut(NamedTuple):
    """Texts of one kind: how many there are and how many of them are cut; their tokens, and how many of these are cut
    away; and how many tokens stand for something that the tokenizer does not know."""

    texts: int
    cut: int
    tokens: int
    lost: int
    unknown: int


@dataclass(frozen=True)
class Account:
    """What became of every record of the data.

    columns, files: those of the source that hold something and are not read. records: its lines or rows, 0 for the
    world. unread: the records that hold no usable pair. pairs: those that were read. dropped: the pairs that encoding
    and cutting ruled out. parts: what the others are for, and how many. cut: by kind of text ("prompts", "chosen",
    "rejected", "demonstrations"), of what is in use.
    """

    layout: str
    columns: tuple[str, ...]
    files: tuple[str, ...]
    records: int
    unread: tuple[LeftOut, ...]
    pairs: int
    dropped: tuple[LeftOut, ...]
    parts: dict[str, int]
    limits: Limits
    cut: dict[str, Cut]

    def changed(self) -> bool:
        """Whether anything was left out, cut or not known: else there is nothing to tell of the world."""
        return bool(self.unread or self.dropped or any(cut.lost or cut.unknown for cut in self.cut.values()))

    def use(self) -> list[tuple[str, str]]:
        """What became of the pairs as rows (what, how much): left out by reason, used for what, and cut."""
        rows = [("pairs read" if self.records else "pairs", str(self.pairs)), *_by_reason(self.dropped)]
        rows += [(f"pairs {what}", str(n)) for what, n in self.parts.items()]
        for kind, cut in self.cut.items():
            limit = self.limits.max_prompt if kind == "prompts" else self.limits.max_response
            rows.append((f"{kind} cut to {limit} tokens", _share_of(cut)))
        return rows

    def rows(self, examples: int = 3) -> list[tuple[str, str]]:
        """The whole account as rows (what, how much); of what is left out the first few by place. Not escaped."""
        rows = [("records read", f"{self.records} ({self.layout})")] if self.records else []
        rows += [("columns not read", ", ".join(self.columns))] if self.columns else []
        rows += [("files not read", ", ".join(self.files))] if self.files else []
        rows += [*_by_reason(self.unread), *self.use()]
        for left in (*self.unread, *self.dropped)[:examples]:
            rows.append((f"for example, {left.where}", f"{left.reason}: {left.detail}" if left.detail else left.reason))
        return rows


def _by_reason(left_out: Iterable[LeftOut]) -> list[tuple[str, str]]:
    return [(f"left out: {reason}", str(n)) for reason, n in count(left_out).items()]


def _share_of(cut: Cut) -> str:
    if not cut.texts:
        return "none there"
    told = (
        f"{cut.cut} of {cut.texts} ({cut.cut / cut.texts:.0%}): {cut.lost / cut.tokens:.0%} of all {cut.tokens} tokens"
    )
    return told + (f"; {cut.unknown} tokens are of no known word" if cut.unknown else "")


def count(left_out: Iterable[LeftOut]) -> dict[str, int]:
    """How many were left out for each reason, the most frequent first."""
    return dict(Counter(left.reason for left in left_out).most_common())


def _encoded_or_why(encode: Callable[[Sequence], list[list[int]]], texts: Iterable) -> dict:
    """Ids by text, or the ChatError where one cannot be encoded; all at once where that works."""
    distinct = list(dict.fromkeys(texts))
    try:
        return dict(zip(distinct, encode(distinct), strict=True))
    except ChatError:
        found = {}
        for text in distinct:
            try:
                found[text] = encode([text])[0]
            except ChatError as error:
                found[text] = error
        return found


class Encoder:
    """Each text of a data set encoded once, whole, and what cannot be used of it under limits.

    A prompt that cutting makes equal to an earlier one, in the order of `prompts`, cannot be used, nor can a pair whose
    sides it makes equal. Raises ValueError if nothing ends a turn.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, limits: Limits, prompts: Iterable[Prompt], responses: Iterable[str]
    ):
        self._limits, self._unknown = limits, tokenizer.unk_token_id
        self._prompts = _encoded_or_why(functools.partial(chat.prompt_ids, tokenizer), prompts)
        self._responses = _encoded_or_why(functools.partial(chat.response_ids, tokenizer), responses)
        self._first: dict[tuple[int, ...], Prompt] = {}  # that is cut to these tokens
        for prompt, ids in self._prompts.items():
            if not isinstance(ids, ChatError):
                self._first.setdefault(tuple(ids[-limits.max_prompt :]), prompt)

    def prompt_fault(self, prompt: Prompt) -> tuple[str, str] | None:
        """Why a prompt cannot be used (reason, detail), or None."""
        ids = self._prompts[prompt]
        if isinstance(ids, ChatError):
            return ids.reason, ids.detail
        first = self._first[tuple(ids[-self._limits.max_prompt :])]
        if self._prompts[first] == ids and first != prompt:
            return "the prompt has the same tokens as another one", ""
        if first != prompt:
            return f"cut to max_prompt={self._limits.max_prompt} tokens, the prompt is the same as another one", ""
        return None

    def fault(self, row: dict) -> tuple[str, str] | None:
        """Why a pair cannot be used (reason, detail), or None."""
        chosen, rejected = (self._responses[row[side]] for side in ("chosen", "rejected"))
        for ids in (chosen, rejected):
            if isinstance(ids, ChatError):
                return ids.reason, ids.detail
        most = self._limits.max_response
        if chosen == rejected:
            return "chosen and rejected are the same tokens", ""  # they differ in nothing that the tokenizer sees
        if chosen[:most] == rejected[:most]:
            return f"cut to max_response={most} tokens, chosen and rejected are the same", ""
        return self.prompt_fault(row["prompt"])

    def faults(self, rows: Iterable[dict]) -> list[LeftOut]:
        """The pairs that cannot be used, in order."""
        return [
            LeftOut(row.get("where", row["prompt"]), *fault) for row in rows if (fault := self.fault(row)) is not None
        ]

    def cuts(self, prompts: Sequence[Prompt], **responses: Sequence[str]) -> dict[str, Cut]:
        """How much the limits cut of prompts ("prompts") and of each kind of response, by its name."""
        kinds = {"prompts": self._measure([self._prompts[p] for p in prompts], self._limits.max_prompt)}
        for kind, texts in responses.items():
            kinds[kind] = self._measure([self._responses[text] for text in texts], self._limits.max_response)
        return kinds

    def _measure(self, encoded: Sequence[list[int]], limit: int) -> Cut:
        encoded = [ids for ids in encoded if not isinstance(ids, ChatError)]
        return Cut(
            texts=len(encoded),
            cut=sum(len(ids) > limit for ids in encoded),
            tokens=sum(map(len, encoded)),
            lost=sum(max(0, len(ids) - limit) for ids in encoded),
            unknown=0 if self._unknown is None else sum(ids.count(self._unknown) for ids in encoded),
        )
