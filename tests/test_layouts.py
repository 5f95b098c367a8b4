"""Preference files: every layout and format has its right value, and every record is used or left out with a reason."""

import gzip
import hashlib
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pandas
import pyarrow
import pytest
from prefdyn.lab import layouts, sources
from prefdyn.lab.layouts import DataError, LeftOut, Reading
from pyarrow import parquet

ALPACA = Path(__file__).resolve().parents[2] / "shared/data/alpaca-eval-prefs/train.jsonl.gz"


def says(role: str, content) -> dict:
    return {"role": role, "content": content}


def shares(who: str, value) -> dict:
    return {"from": who, "value": value}


SYSTEM, USER, GOOD, BAD = says("system", "s"), says("user", "q"), says("assistant", "yes"), says("assistant", "no")
HISTORY = [USER, says("assistant", "a"), says("user", "r")]
PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}
ANSWERS = {"chosen": "yes", "rejected": "no"}
SYSTEM_TURN, USER_TURN = ("system", "s"), ("user", "q")
HISTORY_TURNS = (USER_TURN, ("assistant", "a"), ("user", "r"))


def write(path: Path, lines: list) -> Path:
    """Write rows (dicts as JSON, text and bytes as they are) one a line, compressed where the name says so."""
    coded = [line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else None for line in lines]
    raw = b"\n".join(c if c is not None else json.dumps(x).encode() for c, x in zip(coded, lines, strict=True)) + b"\n"
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def read(path: Path) -> Reading:
    """Read, with what holds for every reading."""
    reading = layouts.read(str(path))
    assert reading.records == reading.used + len(reading.left_out)
    assert reading == layouts.read(str(path), sources.fingerprint(str(path)))
    return reading


def only(tmp_path: Path, *rows: dict) -> tuple[str, dict]:
    """Layout and pair of rows that make one pair."""
    reading = read(write(tmp_path / "a.jsonl", list(rows)))
    (pair,) = reading.pairs
    assert reading.left_out == [] and reading.used == len(rows)
    return reading.layout, {name: pair[name] for name in PAIR}


def fault(tmp_path: Path, line) -> LeftOut:
    """Why a line is not used, between two that are; the text as it is counted."""
    reading = read(write(tmp_path / "a.jsonl", [PAIR, "", line, PAIR]))
    assert [pair["where"] for pair in reading.pairs] == ["line 1", "line 4"]
    (left_out,) = reading.left_out
    assert left_out.where == "line 3" and reading.records == 3
    left_out.detail.encode()  # it can be printed
    return left_out


# layout, row, prompt; the answers are always "yes" and "no"
RIGHT = {
    "texts": ("pairs", PAIR, "q"),
    "more fields": ("pairs", PAIR | {"source": None, "score_chosen": 1.5, "tools": [], "system": None}, "q"),
    "messages": ("pairs", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "q"),
    "one message": ("pairs", {"prompt": USER, "chosen": GOOD, "rejected": BAD}, "q"),
    "prompt with system": (
        "pairs",
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        (SYSTEM_TURN, USER_TURN),
    ),
    "prompt with history": ("pairs", {"prompt": HISTORY, **ANSWERS}, HISTORY_TURNS),
    "tool's turn": (
        "pairs",
        {"prompt": [USER, says("tool", "42")], **ANSWERS},
        (USER_TURN, ("tool", "42")),
    ),
    "prompt in both": ("pairs", {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "q"),
    "prompt in one": ("pairs", {"prompt": "q", "chosen": [USER, GOOD], "rejected": "no"}, "q"),
    "implicit": ("pairs", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "q"),
    "implicit, null prompt": ("pairs", {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "q"),
    "implicit with system and history": (
        "pairs",
        {"chosen": [SYSTEM, *HISTORY, GOOD], "rejected": [SYSTEM, *HISTORY, BAD]},
        (SYSTEM_TURN, *HISTORY_TURNS),
    ),
    "system apart": ("pairs", PAIR | {"system": "s"}, (SYSTEM_TURN, USER_TURN)),
    "system apart, otherwise named": ("pairs", PAIR | {"system_prompt": "s"}, (SYSTEM_TURN, USER_TURN)),
    "system apart and inside": (
        "pairs",
        {"system": "s", "prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [BAD]},
        (SYSTEM_TURN, USER_TURN),
    ),
    "system apart, not inside": (
        "pairs",
        {"system": "s", "prompt": "q", "chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        (SYSTEM_TURN, USER_TURN),
    ),
    "empty system message": (
        "pairs",
        {"prompt": [says("system", ""), USER], **ANSWERS},
        (("system", ""), USER_TURN),
    ),
    "parts": (
        "pairs",
        PAIR | {"prompt": [says("user", [{"type": "text", "text": "q", "image": None}])]},
        "q",
    ),
    "more parts": (
        "pairs",
        PAIR | {"prompt": [says("user", [{"text": " a\n"}, "b", {"text": ""}, {"type": "text", "text": " c"}])]},
        " a\nb c",
    ),
    "empty extras": ("pairs", PAIR | {"chosen": [GOOD | {"tool_calls": [], "thinking": None, "name": "x"}]}, "q"),
    "no tools": ("pairs", PAIR | {"tools": "[]", "chat_template_kwargs": {"a": None}, "images": [None]}, "q"),
    "a question beside the prompt": ("pairs", PAIR | {"question": "x"}, "q"),
    "scores": ("pairs", PAIR | {"score_chosen": 2, "score_rejected": -0.5}, "q"),
    "one score": ("pairs", PAIR | {"score_chosen": 2, "score_rejected": None}, "q"),
    "copied conversation": (
        "messages",
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        "q",
    ),
    "copied, implicit, with system": (
        "messages",
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD], "messages": [USER, GOOD]},
        (SYSTEM_TURN, USER_TURN),
    ),
    "transcript": (
        "transcript",
        {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"},
        "q",
    ),
    "transcript with history": (
        "transcript",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: yes",
            "rejected": "Human: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: no",
        },
        HISTORY_TURNS,
    ),
    "transcript with the prompt apart": (
        "transcript",
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " yes", "rejected": "\n\nHuman: q\n\nAssistant: no"},
        "q",
    ),
    "question": ("question", {"question": "q", **ANSWERS}, "q"),
    "question with system": ("question", {"system": "s", "question": "q", **ANSWERS}, (SYSTEM_TURN, USER_TURN)),
    "question with empty system": ("question", {"system": "", "question": "q", **ANSWERS}, "q"),
    "first response": (
        "responses",
        {"prompt": "q", "response_0": "yes", "response_1": "no", "better_response_id": 0, "safer_response_id": 1},
        "q",
    ),
    "second response": (
        "responses",
        {"prompt": "q", "response_0": "no", "response_1": "yes", "better_response_id": 1},
        "q",
    ),
    "A": ("human-ref", {"history": "q", "human_ref_A": "yes", "human_ref_B": "no", "labels": 1}, "q"),
    "B": (
        "human-ref",
        {"history": "q", "human_ref_A": "no", "human_ref_B": "yes", "labels": 0, "score_A": 3, "score_B": 4},
        "q",
    ),
    "sharegpt, one message": (
        "sharegpt",
        {"conversations": [shares("human", "q")], "chosen": shares("gpt", "yes"), "rejected": shares("gpt", "no")},
        "q",
    ),
    "sharegpt, texts": ("sharegpt", {"conversations": [shares("system", "s"), shares("user", "q")], **ANSWERS},
                        (SYSTEM_TURN, USER_TURN)),
    "sharegpt, tools": (
        "sharegpt",
        {"conversations": [shares("human", "q"), shares("observation", "42")], "chosen": [shares("gpt", "yes")]}
        | {"rejected": [shares("assistant", "no")]},
        (USER_TURN, ("tool", "42")),
    ),
    "sharegpt, implicit": (
        "sharegpt",
        {side: [shares("human", "q"), shares("gpt", text)] for side, text in ANSWERS.items()},
        "q",
    ),
    "sharegpt, system apart": (
        "sharegpt",
        {"system": "s", "conversations": [shares("human", "q")], "chosen": [shares("gpt", "yes")], "rejected": "no"},
        (SYSTEM_TURN, USER_TURN),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_layouts(tmp_path, case):
    layout, row, prompt = RIGHT[case]
    assert only(tmp_path, row) == (layout, {"prompt": prompt, **ANSWERS})


def test_what_is_between_the_marks_of_a_transcript_is_kept(tmp_path):
    """The marker takes the two newlines before it and the one space after its colon, and nothing else."""
    told = "\n\nHuman:  two spaces\n\tand Human: a tab \n \n\nAssistant:none \n\nHuman: r\n\nAssistant: {} \n"
    _, pair = only(tmp_path, {"chosen": told.format("yes"), "rejected": told.format("no")})
    asked = (("user", " two spaces\n\tand Human: a tab \n "), ("assistant", "none "), ("user", "r"))
    assert pair == {"prompt": asked, "chosen": "yes \n", "rejected": "no \n"}


def test_a_reply_may_look_like_a_transcript_where_the_prompt_does_not(tmp_path):
    row = PAIR | {"chosen": "Human: hi\n\nAssistant: hello"}
    assert only(tmp_path, row) == ("pairs", row)


def unpaired(completion: str, label, prompt="q") -> dict:
    return {"prompt": prompt, "completion": completion, "label": label}


@pytest.mark.parametrize("prompt", ["q", [USER]])
def test_completions_are_paired_in_the_order_of_the_file(tmp_path, prompt):
    rows = [
        unpaired("no 1", False, prompt),
        unpaired("yes 1", True, prompt),
        unpaired("elsewhere", True, "other"),
        unpaired("yes 2", 1, prompt),
        unpaired("yes 3", True, prompt),
        PAIR,
        {"prompt": "q", "completion": [USER, says("assistant", "no 2")], "label": 0.0},
    ]
    reading = read(write(tmp_path / "a.jsonl", rows))
    assert (reading.layout, reading.records, reading.used) == ("unpaired, pairs", 7, 5)
    assert reading.pairs == [
        {"prompt": "q", "chosen": "yes 1", "rejected": "no 1", "where": "line 1 and line 2"},
        {"prompt": "q", "chosen": "yes 2", "rejected": "no 2", "where": "line 4 and line 7"},
        PAIR | {"where": "line 6"},
    ]
    alone = "no completion with the other label to the same prompt"
    assert reading.left_out == [LeftOut("line 3", alone), LeftOut("line 5", alone)]


def test_one_completion_with_both_labels_is_no_pair(tmp_path):
    reading = read(write(tmp_path / "a.jsonl", [unpaired("x", True), PAIR, unpaired("x", False)]))
    same = "'chosen' and 'rejected' are the same text"
    assert reading.left_out == [LeftOut("line 1", same), LeftOut("line 3", same)]


RESPONSES = {"prompt": "q", "response_0": "yes", "response_1": "no"}
REFERENCES = {"history": "q", "human_ref_A": "yes", "human_ref_B": "no", "labels": 1}
SCORED = PAIR | {"score_chosen": 1}
TOLD = "\n\nHuman: q\n\nAssistant: yes"
UNICODE, TWICE = "text that is not valid Unicode", "a JSON object has a key twice"
OTHER_CHOSEN, OTHER_REJECTED = (f"the conversation in {side!r} is not the one in 'prompt'" for side in layouts.SIDES)
NOT_TEXT, IGNORED = "a message holds something other than text", "columns that would be ignored"


def with_content(content) -> dict:
    return PAIR | {"chosen": [says("assistant", content)]}


# line, reason, what the detail holds
FAULTS = {
    "not JSON": ("{'prompt': 1}", "not valid JSON", "property name"),
    "two values": (json.dumps(PAIR) * 2, "not valid JSON", "more after the value"),
    "not UTF-8": (b'{"prompt": "\xff\xfe", "chosen": "a"}', UNICODE, "utf-8"),
    "list": ("[1, 2]", "not an object", "[1, 2]"),
    "text": ('"' + "x" * 99 + '"', "not an object", "..."),
    "null": ("null", "not an object", "None"),
    "endless": ("[" * 50_000, "nested too deeply", ""),
    "endless tools": ('{"tools": ' + "[" * 900 + "]" * 900 + ', "chosen": "a", "rejected": "b"}',
                      "nested too deeply", ""),
    "key twice": ('{"prompt": "q", "chosen": "a", "chosen": "yes", "rejected": "b"}', TWICE, "'chosen'"),
    "key twice, inside": ('{"rejected": "b", "chosen": [{"role": "assistant", "content": "a", "content": "b"}]}',
                          TWICE, "'content'"),
    "half a character": (PAIR | {"chosen": "\ud800"}, UNICODE, "surrogates"),
    "half a character in a turn": (PAIR | {"prompt": [says("system", "\udc80"), USER]}, UNICODE, ""),
    "no columns": ({}, "columns of no known layout", ""),
    "no chosen": ({"prompt": "q", "rejected": "no"}, "columns of no known layout", "'prompt', 'rejected'"),
    "null chosen": (PAIR | {"chosen": None}, "'chosen' is null", ""),
    "number": (PAIR | {"rejected": 3}, "'rejected' is neither a text nor a conversation", "3"),
    "number for a prompt": (PAIR | {"prompt": 3}, "'prompt' is neither a text nor a conversation", "3"),
    "empty prompt": (PAIR | {"prompt": ""}, "'prompt' is empty", ""),
    "no turns": (PAIR | {"prompt": []}, "'prompt' is empty", ""),
    "only a system message": (PAIR | {"prompt": [SYSTEM]}, "'prompt' is empty", ""),
    "blank question": (PAIR | {"prompt": [SYSTEM, says("user", " ")]}, "'prompt' is empty", ""),
    "empty chosen": (PAIR | {"chosen": ""}, "'chosen' is empty", ""),
    "blank rejected": (PAIR | {"rejected": " \n"}, "'rejected' is empty", ""),
    "no messages": (PAIR | {"chosen": []}, "'chosen' is empty", ""),
    "blank message": (with_content(" "), "'chosen' is empty", ""),
    "same texts": (PAIR | {"rejected": "yes"}, "'chosen' and 'rejected' are the same text", ""),
    "same text, otherwise told": (PAIR | {"rejected": [USER, GOOD]}, "'chosen' and 'rejected' are the same text", ""),
    "no prompt": (ANSWERS, "no prompt", ""),
    "no prompt, messages": ({"chosen": [GOOD], "rejected": [BAD]}, "no prompt", ""),
    "prompt in one only": ({"chosen": [USER, GOOD], "rejected": "no"}, "no prompt", ""),
    "other prompts": ({"chosen": [USER, GOOD], "rejected": [says("user", "Q"), BAD]},
                      "chosen and rejected answer different prompts", ""),
    "other system messages": ({"chosen": [SYSTEM, USER, GOOD], "rejected": [USER, BAD]},
                              "chosen and rejected answer different prompts", ""),
    "more than the prompt": (PAIR | {"chosen": [*HISTORY, GOOD]}, OTHER_CHOSEN, ""),
    "another prompt": (PAIR | {"rejected": [says("user", "q "), BAD]}, OTHER_REJECTED, ""),
    "a system message more": (PAIR | {"rejected": [SYSTEM, USER, BAD]}, OTHER_REJECTED, ""),
    "no assistant": (PAIR | {"chosen": [USER]}, "the last message of 'chosen' is not the assistant's", "'user'"),
    "no question": ({"chosen": [USER, GOOD, GOOD], "rejected": [USER, GOOD, BAD]},
                    "the prompt does not end with the user's turn", "'assistant'"),
    "two system messages": (PAIR | {"prompt": [SYSTEM, USER], "system": "t"}, "two different system messages", ""),
    "odd system": (PAIR | {"system": ["s"]}, "'system' is not a text", "['s']"),
    "unknown role": (PAIR | {"prompt": [says("critic", "q")]}, "unknown role", "'critic'"),
    "half a role": (PAIR | {"prompt": [says("\ud800", "q")]}, "unknown role", "ud800"),
    "no role": (PAIR | {"prompt": [{"content": "q"}]}, "a message without a role", ""),
    "a list for a role": (PAIR | {"prompt": [says(["user"], "q")]}, "unknown role", "['user']"),
    "a list for a speaker": (PAIR | {"prompt": [shares(["user"], "q")]}, "unknown role", "['user']"),
    "unknown speaker": (PAIR | {"chosen": [shares("function_call", "f()")]}, "unknown role", "'function_call'"),
    "no message": (PAIR | {"chosen": ["yes"]}, "a message is not an object", "'yes'"),
    "null content": (with_content(None), "a message without content", ""),
    "no content": (PAIR | {"chosen": [{"role": "assistant"}]}, "a message without content", ""),
    "number as content": (with_content(3), "the content of a message is not a text", "3"),
    "image": (with_content([{"type": "text", "text": "yes"}, {"type": "image"}]), NOT_TEXT, "'image'"),
    "image beside text": (with_content([{"type": "text", "text": "yes", "image_url": "u"}]), NOT_TEXT, "'image_url'"),
    "null in a part": (with_content([{"type": "text", "text": None}]),
                       "the content of a message is not a text", "None"),
    "number as a part": (with_content([3]), NOT_TEXT, "int"),
    "tool call": (PAIR | {"chosen": [says("assistant", None) | {"tool_calls": [{"function": "f"}]}]},
                  NOT_TEXT, "tool_calls"),
    "reasoning": (PAIR | {"chosen": [GOOD | {"reasoning_content": "hm"}]}, NOT_TEXT, "reasoning_content"),
    "thinking": (PAIR | {"chosen": [GOOD | {"thinking": "hm"}]}, NOT_TEXT, "thinking"),
    "tools": (PAIR | {"tools": [{"name": "f"}]}, IGNORED, "'tools'"),
    "template's settings": (PAIR | {"chat_template_kwargs": {"enable_thinking": False}}, IGNORED,
                            "'chat_template_kwargs'"),
    "images": (PAIR | {"images": ["a.png"]}, IGNORED, "'images'"),
    "history": (PAIR | {"history": [["a", "b"]]}, IGNORED, "'history'"),
    "tools of a completion": (unpaired("yes", True) | {"tools": ["f"]}, IGNORED, "'tools'"),
    "other messages": (PAIR | {"messages": HISTORY}, IGNORED, "'messages'"),
    "messages for a prompt": ({"messages": HISTORY, **ANSWERS}, "no prompt", ""),
    "conversations beside a prompt": (PAIR | {"conversations": [shares("human", "x")]}, IGNORED, "'conversations'"),
    "equal scores": (SCORED | {"score_rejected": 1.0}, "equal scores: no preference", "1"),
    "contradicting scores": (SCORED | {"score_rejected": 2}, "the scores prefer 'rejected'", "1 against 2"),
    "score in words": (PAIR | {"score_chosen": "8", "score_rejected": 2}, "a score is not a number", "'8'"),
    "truth as score": (PAIR | {"score_chosen": True, "score_rejected": 0}, "a score is not a number", "True"),
    "NaN as score": ('{"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": NaN, "score_rejected": 1}',
                     "a score is not a finite number", "nan"),
    "endless score": ('{"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1e999, "score_rejected": 1}',
                      "a score is not a finite number", "inf"),
    "half a transcript": ({"chosen": TOLD, "rejected": "no"}, "one side is a transcript and the other is not", ""),
    "transcript without reply": ({"chosen": TOLD, "rejected": "\n\nHuman: q"},
                                 "the last message of 'rejected' is not the assistant's", "'user'"),
    "transcript of another prompt": ({"chosen": TOLD, "rejected": TOLD.replace("q", "r")},
                                     "chosen and rejected answer different prompts", ""),
    "transcript with an empty reply": ({"chosen": TOLD.removesuffix(" yes"), "rejected": TOLD},
                                       "'chosen' is empty", ""),
    "third response": (RESPONSES | {"better_response_id": 2}, "'better_response_id' is neither 0 nor 1", "2"),
    "response in words": (RESPONSES | {"better_response_id": "1"}, "'better_response_id' is neither 0 nor 1", "'1'"),
    "no response": (RESPONSES | {"better_response_id": None}, "'better_response_id' is neither 0 nor 1", "None"),
    "no reference": (REFERENCES | {"labels": -1}, "'labels' is neither 0 nor 1", "-1"),
    "a tie": (REFERENCES | {"score_A": 5, "score_B": 5}, "equal scores: no preference", "5"),
    "a contradiction": (REFERENCES | {"score_A": 4, "score_B": 5}, "the scores prefer 'rejected'", "4 against 5"),
    "label in words": (unpaired("yes", "true"), "'label' is neither 0 nor 1", "'true'"),
    "no label": (unpaired("yes", None), "'label' is neither 0 nor 1", "None"),
    "no completion": (unpaired("", True), "'completion' is empty", ""),
    "null prompt": (unpaired("yes", True, None), "'prompt' is null", ""),
    "alone": (unpaired("yes", True, "else"), "no completion with the other label to the same prompt", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_what_cannot_be_used_is_left_out_by_place_and_reason(tmp_path, case):
    line, reason, detail = FAULTS[case]
    left_out = fault(tmp_path, line)
    assert left_out.reason == reason and detail in left_out.detail


def test_of_200_records_of_which_160_cannot_be_used_every_one_is_accounted_for(tmp_path):
    rows = [
        row
        for i in range(40)
        for row in (
            PAIR | {"prompt": f"{i}"},
            PAIR | {"score_chosen": i, "score_rejected": i},
            PAIR | {"rejected": "yes"},
            "{",
            {"prompt": "q", "chosen": "yes"},
        )
    ]
    reading = read(write(tmp_path / "a.jsonl", rows))
    assert (reading.records, reading.used, len(reading.pairs)) == (200, 40, 40)
    assert Counter(left.reason for left in reading.left_out) == {
        "equal scores: no preference": 40,
        "'chosen' and 'rejected' are the same text": 40,
        "not valid JSON": 40,
        "columns of no known layout": 40,
    }
    places = [pair["where"] for pair in reading.pairs] + [left.where for left in reading.left_out]
    assert sorted(places) == sorted(f"line {i}" for i in range(1, 201))


def test_a_file_may_mix_layouts(tmp_path):
    rows = [row for _, row, _ in RIGHT.values()]
    reading = read(write(tmp_path / "a.jsonl", rows))
    assert (reading.records, reading.used) == (len(rows), len(rows))
    assert set(reading.layout.split(", ")) == {layout for layout, _, _ in RIGHT.values()}


def test_no_character_of_a_message_is_changed_by_reading(tmp_path):
    """Of random conversations in every way of writing them down."""
    rng = random.Random(0)
    letters = ["a", "Human:", "Assistant:", "\n", "\n\n", "\r\n", " ", "\t", "\u2028", "\x85", "\ufeff", "é", "e\u0301"]
    letters += ["\U0001f600", "\0", "<|end|>", "{", '"', "\\", "&amp;", "[[", "null"]

    def text() -> str:
        return "x" + "".join(rng.choices(letters, k=rng.randint(0, 9)))

    def parts(content: str):
        cut = rng.randint(0, len(content))
        return rng.choice([content, [{"type": "text", "text": content[:cut]}, content[cut:]]])

    rows, expected = [], []
    for _ in range(300):
        turns = [(rng.choice(("system", "user", "assistant", "tool")), text()) for _ in range(rng.randint(0, 4))]
        turns.append((rng.choice(("user", "tool")), text()))
        if rng.random() < 0.3:
            turns = [("user", text())]
        prompt = turns[0][1] if len(turns) == 1 and turns[0][0] == "user" else tuple(turns)
        chosen, rejected = text() + "1", text() + "2"
        asked = [says(role, parts(content)) for role, content in turns]
        sides = {"chosen": [says("assistant", parts(chosen))], "rejected": [says("assistant", parts(rejected))]}
        shapes = [
            {"prompt": asked, "chosen": chosen, "rejected": rejected},
            {"prompt": asked, **sides},
            {side: [*asked, *reply] for side, reply in sides.items()},
            {"prompt": asked, "chosen": [*asked, *sides["chosen"]], "rejected": rejected},
            {
                "conversations": [shares(role, parts(content)) for role, content in turns],
                "chosen": shares("gpt", parts(chosen)),
                "rejected": rejected,
            },
        ]
        rows.append(rng.choice(shapes))
        expected.append((prompt, chosen, rejected))
    (tmp_path / "b.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8", newline="")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8", newline="")
    for name in ("a.jsonl", "b.json"):
        reading = read(tmp_path / name)
        assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in reading.pairs] == expected


# --- formats ---

ROWS = [PAIR | {"prompt": f"q{i}\u2028é\r\n"} for i in range(3)]


def packed(text: str) -> bytes:
    return gzip.compress(text.encode())


LINES, ARRAY = "\n".join(map(json.dumps, ROWS)), json.dumps(ROWS, indent=1, ensure_ascii=False)
FORMATS = {
    "a.jsonl": (LINES.encode(), "line"),
    "b.JSONL": (b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode() + b"\r\n\r\n", "line"),
    "c.jsonl": ("\ufeff" + LINES.replace("\n", "\n\ufeff")).encode(),
    "d.jsonl.gz": (packed(LINES), "line"),
    "e.jsonl.gz": (packed(LINES[:100]) + packed(LINES[100:]), "line"),
    "f.json": (ARRAY.encode(), "record"),
    "g.json": (b"\xef\xbb\xbf\r\n" + ARRAY.replace("\n", "\r\n").encode(), "record"),
    "h.json.gz": (packed(ARRAY), "record"),
    "i.json": (LINES.encode(), "line"),
    "j.json": (b"[" + json.dumps(ROWS[0]).encode() + b",]", "record"),
    "k.json": (json.dumps(ROWS[0], indent=1).encode(), "record"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    raw, unit = FORMATS[name] if isinstance(FORMATS[name], tuple) else (FORMATS[name], "line")
    (tmp_path / name).write_bytes(raw)
    reading = read(tmp_path / name)
    rows = ROWS[: reading.records]
    assert reading.pairs == [row | {"where": f"{unit} {i}"} for i, row in enumerate(rows, 1)]
    assert reading.records == (1 if name[0] in "jk" else 3)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_parquet_gives_plain_texts_and_lists(tmp_path, size):
    rows = [row for _, row, _ in RIGHT.values() if all(isinstance(row.get(side), list) for side in layouts.SIDES)]
    rows = [row for row in rows if isinstance(row.get("prompt", []), list)] * 2
    columns = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=size)
    expected = read(write(tmp_path / "a.jsonl", rows)).pairs
    reading = read(tmp_path / "a.parquet")
    assert reading.left_out == [] and reading.records == len(rows)
    assert reading.pairs == [row | {"where": row["where"].replace("line", "record")} for row in expected]


def test_damage_that_a_checksum_tells_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({name: [text] for name, text in PAIR.items()})
    parquet.write_table(table, path, write_page_checksum=True, compression=None, use_dictionary=False)
    assert read(path).used == 1
    damaged = path.read_bytes().replace(b"yes", b"yeS")  # the page, and what the file says of it
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read after record 0"):
        layouts.read(str(path))


def test_gaps_of_a_table_are_no_text(tmp_path):
    """A table of two layouts: what the one lacks is null or NaN in the rows of the other."""
    frame = pandas.DataFrame(
        [PAIR | {"tools": None}, unpaired("yes", 1.0), unpaired("no", 0.0), PAIR | {"chosen": None}]
    )
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    lines = [json.dumps(row) for row in frame.astype(object).where(frame.notna(), float("nan")).to_dict("records")]
    assert "NaN" in lines[0]
    write(tmp_path / "c.jsonl", lines)
    for name in ("a.parquet", "b.jsonl", "c.jsonl"):
        reading = read(tmp_path / name)
        assert reading.layout == "pairs, unpaired" and reading.used == 3
        assert [{key: pair[key] for key in PAIR} for pair in reading.pairs] == [PAIR, PAIR]
        assert [left.reason for left in reading.left_out] == ["'chosen' is null"]


def test_bytes_that_are_no_characters_leave_out_their_row_of_a_table_or_an_array(tmp_path):
    texts = pyarrow.array([b"yes", b"\xff", b"yes"]).cast(pyarrow.string(), safe=False)
    others = {"prompt": ["q"] * 3, "rejected": ["no"] * 3}
    table = pyarrow.table(others | {"chosen": pyarrow.StringArray.from_buffers(3, *texts.buffers()[1:])})
    parquet.write_table(table, tmp_path / "a.parquet")
    whole = json.dumps([PAIR, PAIR | {"chosen": "?"}, PAIR]).encode()
    (tmp_path / "b.json").write_bytes(whole.replace(b"?", b"\xff"))
    for name in ("a.parquet", "b.json"):
        reading = read(tmp_path / name)
        assert [pair["where"] for pair in reading.pairs] == ["record 1", "record 3"]
        assert [(left.where, left.reason) for left in reading.left_out] == [
            ("record 2", "text that is not valid Unicode")
        ]


ARRAYS = {
    "not an object": ("[{0}, 3, {0}]", 2, ("record 2", "not an object")),
    "key twice": ('[{0}, {{"a": 1, "a": 2}}, {0}]', 2, ("record 2", "a JSON object has a key twice")),
    "no comma": ("[{0} {0}]", 1, ("after record 1", "not valid JSON")),
    "cut": ('[{0}, {0}, {{"prompt": ', 2, ("after record 2", "not valid JSON")),
    "no end": ("[{0}, {0}", 2, ("after record 2", "not valid JSON")),
    "more": ("[{0}] [{0}]", 1, ("after record 1", "not valid JSON")),
    "endless": ("[{0}, " + "[" * 50_000, 1, ("after record 1", "nested too deeply")),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_a_broken_array_is_read_up_to_the_break(tmp_path, case):
    text, used, left_out = ARRAYS[case]
    (tmp_path / "a.json").write_text(text.format(json.dumps(PAIR)))
    reading = read(tmp_path / "a.json")
    assert reading.used == used
    assert [(left.where, left.reason) for left in reading.left_out] == [left_out]


def compressed(rows: int, between: str, ends: tuple[str, str] = ("", "\n")) -> bytes:
    rng = random.Random(0)
    lines = [json.dumps(PAIR | {"chosen": "".join(rng.choices("abcdefghij ", k=60))}) for _ in range(rows)]
    return packed(ends[0] + between.join(lines) + ends[1])


ARCHIVES = {"cut.jsonl.gz": ("\n", ("", "\n")), "cut.json.gz": (", ", ("[", "]"))}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_truncated_archive_gives_what_is_there_and_says_where_it_ends(tmp_path, name):
    whole = compressed(2_000, *ARCHIVES[name])
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    reading = read(tmp_path / name)
    assert 500 < reading.used < 1_500
    (left_out,) = reading.left_out
    unit = "line" if "jsonl" in name else "record"
    assert (left_out.where, left_out.reason) == (f"after {unit} {reading.used}", "the archive is damaged")


@pytest.mark.parametrize("name", [*ARCHIVES, "one object.json.gz"])
def test_an_archive_that_is_whole_but_for_its_checksum_is_said_to_be_damaged(tmp_path, name):
    whole = compressed(1, *ARCHIVES.get(name, ("",)))
    (tmp_path / name).write_bytes(whole[:-8] + b"\0" * 8)
    reading = read(tmp_path / name)
    assert (reading.records, reading.used) == (2, 1)
    assert reading.left_out[0].reason == "the archive is damaged" and "CRC" in reading.left_out[0].detail


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_damaged_anywhere_is_no_reason_to_crash(tmp_path, name):
    """Of many ways to damage an archive, some are noticed by its checksum, some by the decompressor."""
    whole = compressed(400, *ARCHIVES[name])
    for at in range(20, len(whole) - 20, len(whole) // 40):
        (tmp_path / name).write_bytes(whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :])
        try:
            assert "the archive is damaged" in {left.reason for left in read(tmp_path / name).left_out}
        except DataError as error:
            assert "the archive is damaged" in str(error)


def test_a_folder_is_read_file_by_file_in_the_order_of_their_names(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist([ROWS[2]]), tmp_path / "c.parquet")
    write(tmp_path / "b.jsonl.gz", ["", ROWS[1], "{"])
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0], unpaired("no", False)]))
    write(tmp_path / "d.jsonl", [unpaired("yes", True)])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("{")
    (tmp_path / "e.jsonl").mkdir()
    reading = read(tmp_path)
    assert (reading.records, reading.used) == (6, 5)
    places = ["a.json record 1", "a.json record 2 and d.jsonl line 1", "b.jsonl.gz line 2", "c.parquet record 1"]
    assert [pair["where"] for pair in reading.pairs] == places
    assert [left.where for left in reading.left_out] == ["b.jsonl.gz line 3"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pairs.csv", b"prompt,chosen,rejected\n", "not a file of a kind that can be read; allowed: .jsonl,"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n\r\n \n", "is empty"),
        ("empty.json", b"", "is empty"),
        ("none.json", b"[]", "is empty"),
        ("empty.jsonl.gz", b"", "is empty"),
        ("plain.jsonl.gz", b"{}\n", "no usable pair in 1 records: 1 x the archive is damaged; first, after line 0"),
        ("bad.parquet", b"PAR1", "cannot be read"),
        ("missing.jsonl", None, "no such file"),
        ("broken.jsonl", b"[]\n{", "1 x not an object; 1 x not valid JSON; first, line 1: not an object ([])"),
        ("same.jsonl", b'{"prompt": "q", "chosen": "a", "rejected": "a"}', "1 x 'chosen' and 'rejected' are the same"),
    ],
)
def test_unusable_files_are_an_error_that_names_them(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        layouts.read(str(tmp_path / name))
    assert said in str(error.value) and name in str(error.value)


def test_a_folder_without_data_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("not data")
    for call in (layouts.read, sources.fingerprint):
        with pytest.raises(DataError, match="a folder without a data file"):
            call(str(tmp_path))


def test_columns_of_no_known_layout_are_an_error_that_names_them_and_the_nearest_layout(tmp_path):
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "winner": 0}
    with pytest.raises(DataError) as error:
        layouts.read(str(write(tmp_path / "a.jsonl", [row, "{", row])))
    said = str(error.value)
    assert "its columns are 'prompt', 'response_0', 'response_1', 'winner'" in said
    assert "the nearest is [responses], without 'better_response_id'" in said
    assert all(f"[{layout}]" in said for layout, _, _ in RIGHT.values()) and "[unpaired]" in said
    with pytest.raises(DataError) as error:
        layouts.read(str(write(tmp_path / "a.jsonl", [{"text": "q"}])))
    assert "its columns are 'text'; known: [pairs] prompt, chosen, rejected" in str(error.value)


# --- what was planned is what is read ---


def test_a_fingerprint_is_of_bytes_and_of_the_names_in_a_folder(tmp_path):
    path = write(tmp_path / "a.jsonl", [PAIR])
    seen = {sources.fingerprint(str(path)), sources.fingerprint(str(tmp_path))}
    assert hashlib.sha256(path.read_bytes()).hexdigest() in seen and len(seen) == 2
    (tmp_path / "README.md").write_text("not data")
    assert sources.fingerprint(str(tmp_path)) in seen
    path.rename(tmp_path / "b.jsonl")
    assert sources.fingerprint(str(tmp_path)) not in seen
    # the same names and bytes in a row, otherwise cut into files
    (tmp_path / "b.jsonl").write_bytes(b"1")
    (tmp_path / "c.jsonl").write_bytes(b"2")
    two = sources.fingerprint(str(tmp_path))
    (tmp_path / "c.jsonl").unlink()
    (tmp_path / "b.jsonl").write_bytes(b"1c.jsonl\x002")
    assert sources.fingerprint(str(tmp_path)) != two


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_that_has_changed_is_not_read(tmp_path, folder):
    path = write(tmp_path / "a.jsonl", [PAIR])
    source = str(tmp_path if folder else path)
    planned = sources.fingerprint(source)
    assert layouts.read(source, planned).records == 1
    write(path, [PAIR, PAIR])
    with pytest.raises(DataError, match="has changed since the work was planned; start again"):
        layouts.read(source, planned)


def test_what_is_parsed_is_what_was_hashed(tmp_path, monkeypatch):
    """Every file is read from disk once: nothing can change between the hash and the parser."""
    path = write(tmp_path / "a.jsonl.gz", [PAIR])
    planned, opened, bytes_of = sources.fingerprint(str(path)), [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self) or bytes_of(self))
    layouts.read(str(path), planned)
    assert opened == [path]


# --- the hub ---


class Hub:
    """A hub with one dataset, org/prefs, of one split, that notes what it is asked for."""

    def __init__(self, monkeypatch, tmp_path: Path):
        self.commit, self.asked, self.split = "c0ffee", [], "train"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=self.info))
        fake = SimpleNamespace(load_dataset=self.load, get_dataset_split_names=self.splits)
        monkeypatch.setitem(sys.modules, "datasets", fake)

    def info(self, name: str) -> SimpleNamespace:
        self.asked.append(name)
        return SimpleNamespace(sha=self.commit)

    def load(self, name: str, **how) -> list[dict]:
        self.asked.append((name, how))
        if how["split"] != self.split:
            raise ValueError("unknown split")
        return [PAIR, {"prompt": "q"}]

    def splits(self, name: str, revision: str) -> list[str]:
        self.asked.append((name, revision))
        return [self.split]


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    return Hub(monkeypatch, tmp_path)


def test_a_dataset_of_the_hub_is_read_at_the_commit_that_was_planned(hub):
    planned = sources.fingerprint("org/prefs")
    assert planned == "hub:c0ffee" and hub.asked == ["org/prefs"]
    hub.commit = "another"
    reading = layouts.read("org/prefs", planned)
    assert hub.asked[1:] == [("org/prefs", {"split": "train", "revision": "c0ffee"})]
    assert reading.pairs == [PAIR | {"where": "record 1"}] and (reading.records, reading.used) == (2, 1)
    assert [left.where for left in reading.left_out] == ["record 2"]


def test_a_split_is_part_of_the_name_and_of_the_fingerprint(hub):
    hub.split = "test_prefs"
    assert sources.fingerprint("org/prefs:test_prefs") == "hub:c0ffee:test_prefs"
    assert layouts.read("org/prefs:test_prefs").used == 1
    assert hub.asked[-1] == ("org/prefs", {"split": "test_prefs", "revision": "c0ffee"})
    with pytest.raises(DataError, match="has changed since the work was planned"):
        layouts.read("org/prefs:test_prefs", "hub:c0ffee")


def test_a_split_that_is_not_there_is_an_error_that_names_those_that_are(hub):
    with pytest.raises(DataError, match=r"has no split 'dev'; allowed: 'org/prefs:train'"):
        layouts.read("org/prefs:dev", "hub:c0ffee:dev")
    assert hub.asked[-1] == ("org/prefs", "c0ffee")


def test_whatever_else_goes_wrong_on_the_hub_is_said(hub, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("scripts are not supported")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", refuse)
    with pytest.raises(DataError, match="the hub does not give: scripts are not supported"):
        layouts.read("org/prefs", "hub:c0ffee")
    monkeypatch.setattr(sys.modules["datasets"], "get_dataset_split_names", refuse)
    with pytest.raises(DataError, match="the hub does not give: scripts are not supported"):
        layouts.read("org/prefs:dev", "hub:c0ffee:dev")


def test_the_hub_needs_an_extra_and_only_the_hub(hub, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(DataError, match=re.escape("pip install datasets")):
        layouts.read("org/prefs", "hub:c0ffee")
    assert read(write(tmp_path / "a.jsonl", [PAIR])).used == 1


def test_without_a_network_the_commit_is_that_of_the_cache(hub, monkeypatch, tmp_path):
    def unreachable():
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "HfApi", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"does not say its commit \(no network\), and no dataset"):
        sources.fingerprint("org/prefs")
    refs = tmp_path / "cache/datasets--org--prefs/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("dec0de\n")
    assert sources.fingerprint("org/prefs:test") == "hub:dec0de:test"


def test_a_name_that_the_hub_cannot_have_is_an_error():
    with pytest.raises(DataError, match="the hub does not give it: Cannot have --"):
        sources.fingerprint("org/a--b")


def test_what_is_here_is_not_looked_for_on_the_hub(hub, tmp_path):
    (tmp_path / "org/prefs").mkdir(parents=True)
    write(tmp_path / "org/prefs/a.jsonl", [PAIR])
    assert layouts.read("org/prefs").pairs == [PAIR | {"where": "a.jsonl line 1"}]
    for missing in ("data/missing.jsonl", "./org/other", "../org", "/org/other", "a/b/c", "missing"):
        with pytest.raises(DataError, match="no such file"):
            layouts.read(missing)
    assert hub.asked == []
    with pytest.raises(DataError, match="has changed since the work was planned"):
        layouts.read("org/gone", hashlib.sha256(b"a file that was planned").hexdigest())


# --- prompts ---


def test_prompts_as_text_for_people():
    assert layouts.shown("q\n") == "q\n"
    assert layouts.shown((SYSTEM_TURN, USER_TURN)) == "system: s\n\nuser: q"


def test_different_prompts_have_different_identities():
    turns = (SYSTEM_TURN, USER_TURN)
    assert layouts.identity("q") == "q" and json.loads(layouts.identity(turns)) == [["system", "s"], ["user", "q"]]
    prompts = ["q", turns, layouts.identity(turns), "\0" + layouts.identity(turns), (("user", "s\n\nuser: q"),)]
    prompts += ["system: s\n\nuser: q", (("system", "s"), ("user", "q"), ("user", ""))]
    assert len({layouts.identity(prompt) for prompt in prompts}) == len(prompts)


@pytest.mark.skipif(not ALPACA.is_file(), reason="the shared extract of AlpacaEval is not beside this checkout")
def test_a_real_preference_file_is_read_whole():
    reading = read(ALPACA)
    assert (reading.layout, reading.records, reading.used, reading.left_out) == ("pairs", 2_700, 2_700, [])
    with gzip.open(ALPACA, "rt", encoding="utf-8", newline="\n") as lines:
        rows = [json.loads(line) for line in lines]
    assert [{key: pair[key] for key in PAIR} for pair in reading.pairs] == [{key: r[key] for key in PAIR} for r in rows]
    assert len({pair["prompt"] for pair in reading.pairs}) == 675


def test_columns_that_are_not_read_are_named(tmp_path):
    """Of each layout those beside its own; empty ones hold nothing that could be missed."""
    rows = [PAIR | {"source": "a", "note": None, "score_chosen": 2, "score_rejected": 1}, PAIR | {"input": "b"}]
    assert layouts.read(str(write(tmp_path / "a.jsonl", rows))).unread == ("source", "input")
    asked = {"question": "q", "chosen": "yes", "rejected": "no", "system": "s", "prompt_id": 3}
    assert layouts.read(str(write(tmp_path / "b.jsonl", [asked]))).unread == ("prompt_id",)


def test_keys_of_messages_and_files_of_a_folder_that_are_not_read_are_named(tmp_path):
    chosen = [{"role": "user", "content": "q", "name": "ann"}, {"role": "assistant", "content": "yes", "weight": 2}]
    rejected = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "no", "weight": 0.5}]
    write(tmp_path / "a.jsonl", [{"chosen": chosen, "rejected": rejected}])
    (tmp_path / "sub").mkdir()
    (tmp_path / "c.csv").write_text("prompt")
    (tmp_path / ".hidden").write_text("")
    reading = layouts.read(str(tmp_path))
    assert reading.unread == ("chosen[].name", "chosen[].weight", "rejected[].weight")
    assert reading.passed_over == ("c.csv", "sub/")


@pytest.mark.parametrize("names", layouts._SCORES, ids=lambda names: names[0])
def test_scores_by_any_of_their_names_have_a_say(tmp_path, names):
    rows = [PAIR | dict(zip(names, scores, strict=True)) for scores in ((2, 1), (1, 2), (1, 1))]
    reading = layouts.read(str(write(tmp_path / "a.jsonl", rows)))
    assert [left.reason for left in reading.left_out] == ["the scores prefer 'rejected'", "equal scores: no preference"]
    assert reading.unread == ()


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["prompt", "chosen", "chosen"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the column 'chosen' twice"):
        layouts.read(str(tmp_path / "a.parquet"))


def test_a_transcript_that_lacks_its_last_marker_is_no_text(tmp_path):
    """The sides bring the marker, or the record cannot be used; the markers never become text."""
    asked = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
    whole = {"prompt": asked, "chosen": "\n\nAssistant: yes", "rejected": "\n\nAssistant: no"}
    broken = {"prompt": asked, "chosen": "yes", "rejected": "no"}
    plain = {"prompt": "Human: what is that?", "chosen": "yes", "rejected": "no"}
    reading = layouts.read(str(write(tmp_path / "a.jsonl", [whole, broken, plain])))
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert [(row["prompt"], row["chosen"]) for row in reading.pairs] == [
        (turns, "yes"),
        ("Human: what is that?", "yes"),
    ]
    assert [left.reason for left in reading.left_out] == ["the last message of 'chosen' is not the assistant's"]
