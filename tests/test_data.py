"""Preference data: what a file may look like, what is reported about it, how it is split, and how it is padded."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from prefdyn import data, policy, world
from prefdyn.data import Batch, DataError

ALPACA = Path(__file__).resolve().parents[2] / "shared/data/alpaca-eval-prefs/train.jsonl.gz"
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "yes"), ("assistant", "no")))
PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}


def write(path: Path, lines: list) -> Path:
    """Write rows (dicts as JSON, text and bytes as they are) one a line, compressed where the name says so."""
    coded = [line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else None for line in lines]
    raw = b"\n".join(c if c is not None else json.dumps(x).encode() for c, x in zip(coded, lines, strict=True)) + b"\n"
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def numbered(prompts: int, each: int = 2) -> list[dict]:
    """Rows of `prompts` different prompts, `each` of every one."""
    return [
        {"prompt": f"prompt {i}", "chosen": f"good {i} {j}", "rejected": f"bad {i} {j}"}
        for i in range(prompts)
        for j in range(each)
    ]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        PAIR | {"score_chosen": 1.5, "source": None},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [{"role": "system", "content": "s"}, USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},  # the prompt is implicit
    ],
    ids=["standard", "more fields", "conversational", "with system", "prompt and conversation", "implicit prompt"],
)
def test_layouts_that_can_be_read(tmp_path, name, row):
    assert data.read_pairs(write(tmp_path / name, [row])) == ([PAIR], [])


BROKEN = {
    "not JSON": ("{'prompt': 1}", "property name"),
    "not UTF-8": (b'{"prompt": "\xff\xfe", "chosen": "a", "rejected": "b"}', "utf-8"),
    "not an object": ("[1, 2]", "not a JSON object"),
    "endless": ("[" * 50_000, "nested"),
    "no chosen": ({"prompt": "q", "rejected": "no"}, "no 'chosen'"),
    "no rejected": ({"prompt": "q", "chosen": "yes"}, "no 'rejected'"),
    "no prompt": ({"chosen": "yes", "rejected": "no"}, "no 'prompt'"),
    "null": (PAIR | {"chosen": None}, "neither a text nor a list"),
    "number": (PAIR | {"rejected": 3}, "neither a text nor a list"),
    "empty prompt": (PAIR | {"prompt": ""}, "'prompt' is empty"),
    "blank answer": (PAIR | {"rejected": " \n"}, "'rejected' is empty"),
    "same texts": (PAIR | {"rejected": "yes"}, "same text"),
    "no assistant": ({"prompt": "q", "chosen": [USER], "rejected": [BAD]}, "'assistant'"),
    "half a character": (PAIR | {"chosen": "\ud800"}, "surrogates"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_lines_are_reported_by_number_and_the_others_used(tmp_path, case):
    line, reason = BROKEN[case]
    pairs, problems = data.read_pairs(write(tmp_path / "some.jsonl", [PAIR, "", line, PAIR]))
    assert pairs == [PAIR, PAIR]
    (problem,) = problems
    assert problem.startswith("line 3: ") and reason in problem


def compressed(rows: int) -> bytes:
    rng = random.Random(0)
    lines = [PAIR | {"chosen": "".join(rng.choices("abcdefghij ", k=60))} for _ in range(rows)]
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())


def test_a_truncated_archive_gives_what_is_there_and_says_where_it_ends(tmp_path):
    whole = compressed(2_000)
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    pairs, problems = data.read_pairs(path)
    assert 500 < len(pairs) < 1_500
    assert len(problems) == 1 and problems[0].startswith(f"after line {len(pairs)}: ")


def test_an_archive_damaged_in_the_middle_is_no_reason_to_crash(tmp_path):
    """Of many ways to damage an archive, some are noticed by its checksum, some by the decompressor."""
    whole = compressed(400)
    path = tmp_path / "damaged.jsonl.gz"
    for at in range(20, len(whole) - 20, len(whole) // 40):
        path.write_bytes(whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :])
        try:
            _, problems = data.read_pairs(path)
        except DataError as error:
            problems = [str(error)]
        assert problems


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pairs.csv", b"prompt,chosen,rejected\n", "must be 'world' or the path"),
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.jsonl", b"\n\n", "the file is empty"),
        ("bad.jsonl", b"{}\n[]\n", "line 1: no 'chosen'; line 2: not a JSON object"),
        ("plain.jsonl.gz", b"{}\n", "no usable pair"),
        ("missing.jsonl", None, "no such file"),
    ],
)
def test_unusable_files_are_an_error_that_names_them(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        data.read_pairs(tmp_path / name)
    assert said in str(error.value) and name in str(error.value)


SIZES = {"pairs": 30, "check": 10, "validation": 3, "held_out": 5}


def prompts_of(dataset: data.Dataset) -> dict[str, set[str]]:
    """The prompts that each part of a dataset touches."""
    return {
        "pairs": {row["prompt"] for row in dataset.pairs + dataset.demonstrations},
        "check": {row["prompt"] for row in dataset.check + dataset.check_demonstrations},
        "validation": set(dataset.prompts["validation"]),
        "held_out": set(dataset.prompts["held_out"]),
    }


def assert_disjoint(parts: dict[str, set[str]]) -> None:
    assert sum(map(len, parts.values())) == len(set.union(*parts.values()))


def test_a_file_is_split_by_prompt(tmp_path):
    dataset = data.from_file(write(tmp_path / "a.jsonl", numbered(40)), **SIZES)
    parts = prompts_of(dataset)
    assert_disjoint(parts)
    assert (len(parts["validation"]), len(parts["held_out"])) == (3, 5)
    # 40 - 8 prompts are left; the check has 10 of 40 pairs, a quarter: 8 prompts of two pairs, 10 of which are used
    assert len(dataset.prompts["train"]) == 24
    assert (len(dataset.pairs), len(dataset.check)) == (30, 10)
    assert dataset.demonstrations[0] == {"prompt": dataset.pairs[0]["prompt"], "response": dataset.pairs[0]["chosen"]}
    assert dataset.reward is None and dataset.problems == ()


def test_the_split_does_not_depend_on_the_order_of_lines(tmp_path):
    rows = numbered(40)
    shuffled = random.Random(1).sample(rows, len(rows))
    one, other = (
        data.from_file(write(tmp_path / name, lines), **SIZES | {"pairs": 1000, "check": 250})
        for name, lines in (("a.jsonl", rows), ("b.jsonl", shuffled))
    )
    assert prompts_of(one) == prompts_of(other) and one.prompts == other.prompts
    key = json.dumps
    assert sorted(map(key, one.pairs)) == sorted(map(key, other.pairs)) and one.pairs != rows


def test_problems_of_a_file_travel_with_the_dataset(tmp_path):
    dataset = data.from_file(write(tmp_path / "a.jsonl", [*numbered(40), "{}"]), **SIZES)
    assert dataset.problems == ("line 81: no 'chosen'",)


def test_a_file_too_small_to_split_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", numbered(9))
    with pytest.raises(DataError, match="held_out=5: the file has 9 different prompts"):
        data.from_file(path, **SIZES)
    assert_disjoint(prompts_of(data.from_file(write(path, numbered(10)), **SIZES)))


@pytest.mark.skipif(not ALPACA.is_file(), reason="the shared extract of AlpacaEval is not beside this checkout")
def test_a_real_preference_file_is_read_whole_and_split_by_prompt():
    pairs, problems = data.read_pairs(ALPACA)
    assert (len(pairs), problems) == (2_700, [])
    dataset = data.from_file(ALPACA, pairs=2_048, check=256, validation=16, held_out=64)
    assert_disjoint(prompts_of(dataset))
    assert len({row["prompt"] for row in pairs}) == 675


WORLD = {
    "pairs": 200,
    "check": 100,
    "demonstrations": 150,
    "label_noise": 0.2,
    "validation": 64,
    "held_out": 64,
}


def test_the_world_as_a_dataset():
    dataset = data.from_world(seed=3, **WORLD)
    sizes = [len(rows) for rows in (dataset.pairs, dataset.check, dataset.demonstrations, dataset.check_demonstrations)]
    assert sizes == [200, 100, 150, 100]
    train = set(dataset.prompts["train"])
    assert all(row["prompt"] in train for row in dataset.pairs + dataset.check + dataset.demonstrations)
    assert not train & (set(dataset.prompts["held_out"]) | set(dataset.prompts["validation"]))
    unordered = [
        {(r["prompt"], *sorted((r["chosen"], r["rejected"]))) for r in p} for p in (dataset.pairs, dataset.check)
    ]
    assert not unordered[0] & unordered[1]
    row = dataset.pairs[0]
    assert dataset.reward(row["prompt"], row["chosen"]) == row["reward_chosen"]


def test_seeds_of_the_world_share_prompts_and_differ_in_pairs():
    one, other = (data.from_world(seed=seed, **WORLD) for seed in (0, 1))
    assert one.prompts == other.prompts
    assert one.pairs != other.pairs and one.demonstrations != other.demonstrations


def test_padding_on_either_side():
    # prompts of 2 and 1 tokens, responses of 1 and 3: four columns are needed
    right = data.pad([[5, 6], [7]], [[8], [9, 3, 2]], 0)
    assert right.ids.tolist() == [[5, 6, 8, 0], [7, 9, 3, 2]]
    assert right.attention.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert right.response.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    left = data.pad([[5, 6], [7]], [[8], [9, 3, 2]], 0, side="left")
    assert left.ids.tolist() == [[0, 5, 6, 8], [7, 9, 3, 2]]
    assert left.attention.int().tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert left.response.int().tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([[1]], [[1]], 0, "middle"), "side='middle'"),
        (([[1]], [], 0), "1 prompts and 0 responses"),
        (([], [], 0), "0 prompts"),
        (([[1], []], [[1], [1]], 0), "empty prompt"),
        (([[1], [1]], [[1], []], 0), "empty prompt or response"),
    ],
)
def test_what_cannot_be_padded(arguments, said):
    with pytest.raises(ValueError, match=said):
        data.pad(*arguments)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "attention", "response"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_keep_only_the_columns_that_they_use(side):
    prompts, responses = [[5, 6], [7], [4]], [[8], [9, 3, 2, 1], [1]]
    batch = data.pad(prompts, responses, 0, side)
    index = torch.tensor([2, 0])
    expected = data.pad([[4], [5, 6]], [[1], [8]], 0, side)
    assert equal(batch.rows(index), expected)
    assert [part.ids.shape for part in batch.chunks(2)] == [(2, 5), (1, 2)]


def test_slices_keep_all_columns_and_concatenate_to_the_whole():
    batch = data.pad([[5, 6], [7], [4]], [[8], [9, 3, 2, 1], [1]], 0)
    parts = batch.slices(2)
    assert [part.ids.shape for part in parts] == [(2, 5), (1, 5)]
    assert equal(data.concatenate(parts), batch)


def test_concatenating_pads_on_the_right_to_the_longest():
    joined = data.concatenate([data.pad([[5]], [[6]], 0), data.pad([[1, 2]], [[3, 4]], 0)])
    assert equal(joined, data.pad([[5], [1, 2]], [[6], [3, 4]], 0))


def test_a_batch_has_one_shape():
    with pytest.raises(ValueError, match="one shape"):
        Batch(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one shape"):
        Batch(torch.zeros(3), torch.zeros(3), torch.zeros(3))


def test_encoding_with_a_chat_template():
    """A prompt ends with the marker, a response with the end; both are cut where they are too long."""
    tokenizer = policy.word_tokenizer(["a", "b", "c"])
    pad, eos, unk, reply, a, b, c = range(7)
    assert data.prompt_ids(tokenizer, "a b zoo", max_prompt=9) == [a, b, unk, reply]
    assert data.prompt_ids(tokenizer, "a b c", max_prompt=2) == [c, reply]
    assert data.response_ids(tokenizer, "b c", max_response=3) == [b, c, eos]
    assert data.response_ids(tokenizer, "b c", max_response=2) == [b, c]
    batch = data.encode(tokenizer, ["a", "a"], ["b", "c c"], max_prompt=5, max_response=5)
    assert batch.ids.tolist() == [[a, reply, b, eos, pad], [a, reply, c, c, eos]]
    assert batch.response.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_encoding_without_a_chat_template_puts_two_newlines_between():
    tokenizer = policy.bpe_tokenizer(["hello there"] * 5, 300)
    tokenizer.chat_template = None
    assert tokenizer.decode(data.prompt_ids(tokenizer, "hello", max_prompt=9)) == "hello\n\n"


def test_no_text_of_the_world_is_cut_at_the_default_lengths():
    tokenizer = policy.word_tokenizer(world.vocabulary())
    rows = data.from_world(seed=0, **WORLD).pairs
    assert max(len(data.prompt_ids(tokenizer, row["prompt"], 99)) for row in rows) <= 24
    assert max(len(data.response_ids(tokenizer, row["chosen"], 99)) for row in rows) <= 28
