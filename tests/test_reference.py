"""Reference results: what agrees, what differs, what was edited, by name."""

import json
import math

import pytest
from prefdyn.findings import reference
from prefdyn.findings.claims import CLAIMS
from prefdyn.findings.reference import ReferenceError, collect, compare, read, tolerance

SEEDS = [1.0, 2.0, 3.0]
HALF = 4.302652729911275 / math.sqrt(3)  # the 97.5% quantile of t with 2 degrees, times the standard error of 1, 2, 3


def write(folder, chapter: str, **values) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{chapter}.json").write_text(json.dumps(values))


def test_numbers_over_seeds_are_collected_and_nothing_else(tmp_path):
    write(
        tmp_path / "v", "02-targets",
        gain={"value": 2.0, "text": "2", "seeds": SEEDS}, profile={"value": "reader", "text": "reader"},
        one={"value": 1.0, "text": "1", "seeds": [1.0]}, odd={"value": 1.0, "text": "1", "seeds": [1.0, math.nan]},
    )  # fmt: skip
    write(tmp_path / "v", "03-halves", gain={"value": 5.0, "text": "5", "seeds": [4.0, 6.0]})
    assert collect(tmp_path / "v") == {
        "02-targets:gain": {"value": 2.0, "seeds": SEEDS},
        "03-halves:gain": {"value": 5.0, "seeds": [4.0, 6.0]},
    }
    with pytest.raises(ReferenceError, match="no executed chapter has left numbers"):
        collect(tmp_path / "none")


def test_the_tolerance_is_the_interval_of_the_seeds():
    assert tolerance(SEEDS) == pytest.approx(HALF)
    assert tolerance([2.0, 2.0]) == pytest.approx(2e-9)  # equal seeds: up to rounding


def status(now: float | None, kept=None) -> str:
    kept = kept or {"value": 2.0, "seeds": SEEDS}
    (found,) = compare({"a:b": kept}, {} if now is None else {"a:b": {"value": now, "seeds": SEEDS}})["status"]
    return found


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (2.0, "identical"),
        (2.0 + 1e-12, "identical"),
        (2.0 + 0.99 * HALF, "agrees"),
        (2.0 - 0.99 * HALF, "agrees"),
        (2.0 + 1.01 * HALF, "differs"),
        (2.0 - 1.01 * HALF, "differs"),
        (None, "missing"),
    ],
)
def test_what_agrees_and_what_does_not(now, expected):
    assert status(now) == expected


def test_intervals_of_rules_are_read_where_a_chapter_left_them(tmp_path):
    write(
        tmp_path, "08-ledger",
        C1a={"value": 2.0, "text": "2", "seeds": SEEDS, "interval": [1.0, 3.0], "n": 3},
        C1b={"value": 2.0, "text": "2", "seeds": [2.0]},
        C7a={"value": 1.0, "text": "1", "interval": [0.0, 2.0], "n": 5}, other={"value": 1.0, "text": "1"},
    )  # fmt: skip
    found = reference.intervals(tmp_path, "08-ledger", ["C1a", "C1b", "C7a", "C9"])
    assert found == {
        "C1a": {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 3, "values": SEEDS},
        "C7a": {"mean": 1.0, "low": 0.0, "high": 2.0, "n": 5, "values": []},
    }
    assert reference.intervals(tmp_path, "09-none", ["C1a"]) == {}


@pytest.mark.parametrize("kept", [{"value": 2.01, "seeds": SEEDS}, {"value": 2.0, "seeds": [1.0, 2.0, 3.1]}])
def test_an_edited_reference_is_noticed_even_within_the_tolerance(kept):
    assert status(2.0, kept) == "edited" == status(None, kept)


def test_verdicts_are_collected_and_those_that_turned_named(tmp_path):
    write(
        tmp_path, "08-ledger",
        C1={"value": "partly", "text": "partly"}, C2={"value": "supported", "text": ""}, what={"value": "true reward"},
        gain={"value": 2.0, "text": "2", "seeds": SEEDS},
    )  # fmt: skip
    now = reference.verdicts(tmp_path)
    assert now == {"08-ledger:C1": "partly", "08-ledger:C2": "supported"}
    then = {"08-ledger:C1": "partly", "08-ledger:C2": "inconclusive", "08-ledger:C7": "partly"}
    assert reference.turned(then, now) == {
        "08-ledger:C2": ("inconclusive", "supported"),
        "08-ledger:C7": ("partly", "missing"),
    }
    assert reference.turned({}, now) == {}


def test_a_new_number_is_no_fault():
    assert compare({}, {"a:b": {"value": 1.0, "seeds": SEEDS}}).empty


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "reader.json holds no reference results"),
        ("[]", "holds no reference results"),
        ('{"numbers": {"a:b": {"value": 1}}}', "holds no reference results"),
        ('{"numbers": {"a:b": {"value": 1, "seeds": [1]}}}', "a:b needs a value and at least two seeds"),
        ('{"numbers": {}}', "holds no reference results"),
        ('{"numbers": {}, "verdicts": {"a:C1": "maybe"}}', "a:C1 is 'maybe'; a verdict is one of supported, partly, "),
        ('{"numbers": {"a:b": {"value": "x", "seeds": [1, 2]}}}', "a:b needs a value"),
    ],
)
def test_what_is_no_reference_is_refused(tmp_path, text, said):
    (tmp_path / "reader.json").write_text(text)
    with pytest.raises(ReferenceError, match=said):
        read(tmp_path / "reader.json")
    with pytest.raises(ReferenceError, match=r"there are no reference results other\.json"):
        read(tmp_path / "other.json")


def test_the_book_has_reference_results_of_the_reader_profile():
    from pathlib import Path

    known = reference.read(Path(__file__).parents[1] / "data" / "reference" / "reader.json")
    assert known["profile"] == "reader" and len(known["numbers"]) > 50
    assert {f"08-ledger:{claim}" for claim in CLAIMS} <= known["verdicts"].keys()
    table = compare(known["numbers"], known["numbers"])
    assert (table["status"] == "identical").all() and (table["tolerance"] > 0).mean() > 0.9
