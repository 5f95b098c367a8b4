"""Preference data: how it is split, what becomes of its texts under limits, and how it is padded."""

import dataclasses
import json
import random

import pytest
import torch
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.lab import account, chat, data, layouts, policy, recipes
from prefdyn.lab.account import Cut, Limits
from prefdyn.lab.data import DataError
from prefdyn.lab.worlds import EASY, HARD, WORLDS
from prefdyn.lens.batch import Batch, concatenate, pad

WIDE = Limits(99, 99)


def numbered(prompts: int, each: int = 2) -> list[dict]:
    """Rows of `prompts` different prompts, `each` of every one."""
    return [
        {"prompt": f"prompt {i}", "chosen": f"good {i} {j}", "rejected": f"bad {i} {j}"}
        for i in range(prompts)
        for j in range(each)
    ]


def reading(rows: list[dict], left_out=()) -> layouts.Reading:
    """What a file of these rows holds."""
    pairs = [row | {"where": f"line {i}"} for i, row in enumerate(rows, 1)]
    return layouts.Reading("pairs", len(rows) + len(left_out), pairs, list(left_out), used=len(rows))


def tokenizer():
    return policy.bpe_tokenizer(["prompt good bad 0 1 2 3 4 5 6 7 8 9"], 320)


SIZES = {"pairs": 30, "check": 10, "validation": 3, "held_out": 5}


def from_rows(rows: list[dict], limits: Limits = WIDE, **sizes: int) -> data.Dataset:
    return data.from_file(reading(rows), tokenizer(), limits, **SIZES | sizes)


def prompts_of(dataset: data.Dataset) -> dict[str, set]:
    """The prompts that each part of a dataset touches."""
    return {
        "pairs": {row["prompt"] for row in dataset.pairs + dataset.demonstrations},
        "check": {row["prompt"] for row in dataset.check + dataset.check_demonstrations},
        "validation": set(dataset.prompts["validation"]),
        "held_out": set(dataset.prompts["held_out"]),
    }


def assert_disjoint(parts: dict[str, set]) -> None:
    assert sum(map(len, parts.values())) == len(set.union(*parts.values()))


def test_a_file_is_split_by_prompt():
    dataset = from_rows(numbered(40))
    parts = prompts_of(dataset)
    assert_disjoint(parts)
    assert (len(parts["validation"]), len(parts["held_out"])) == (3, 5)
    # 40 - 8 prompts are left; the check has 10 of 40 pairs, a quarter: 8 prompts of two pairs, 10 of which are used
    assert len(dataset.prompts["train"]) == 24
    assert (len(dataset.pairs), len(dataset.check)) == (30, 10)
    assert dataset.world is None
    assert dataset.demonstrations[0] == {"prompt": dataset.pairs[0]["prompt"], "response": dataset.pairs[0]["chosen"]}
    assert dataset.reward is None
    # 24 and 8 prompts of two pairs each: 18 + 6 pairs more than were asked for, and 16 of the prompts kept
    assert dataset.account.parts == {
        "to train on": 30,
        "to check on": 10,
        "of prompts kept for validation and evaluation": 16,
        "more than were asked for": 24,
    }


def test_the_split_does_not_depend_on_the_order_of_lines():
    rows = numbered(40)
    shuffled = random.Random(1).sample(rows, len(rows))
    one, other = (from_rows(lines, pairs=1000, check=250) for lines in (rows, shuffled))
    assert prompts_of(one) == prompts_of(other) and one.prompts == other.prompts

    def content(dataset):
        return sorted((row["prompt"], row["chosen"], row["rejected"]) for row in dataset.pairs)

    assert content(one) == content(other)


def test_conversations_are_split_like_texts():
    rows = numbered(20) + [row | {"prompt": (("system", "s"), ("user", row["prompt"]))} for row in numbered(20)]
    parts = prompts_of(from_rows(rows))
    assert_disjoint(parts)
    assert any(isinstance(prompt, tuple) for prompt in parts["pairs"])


def test_a_file_too_small_to_split_is_an_error():
    with pytest.raises(DataError, match="held_out=5: the file has 9 different prompts"):
        from_rows(numbered(9))
    assert_disjoint(prompts_of(from_rows(numbered(10))))


def test_every_record_is_accounted_for():
    """200 records: 160 unusable for four reasons, three of reading and one of cutting; the other 40 have a use."""
    usable = [{"prompt": f"{i} p", "chosen": "good", "rejected": "bad"} for i in range(40)]
    twins = [{"prompt": f"{i} q", "chosen": "a" * 30 + "x", "rejected": "a" * 30 + "y"} for i in range(40)]
    unread = [layouts.LeftOut(f"line {i}", f"reason {i % 3}") for i in range(81, 201)]
    known = data.from_file(reading(usable + twins, unread), tokenizer(), Limits(20, 10), **SIZES)
    found = known.account
    assert found.records == 200 == sum(found.parts.values()) + len(found.unread) + len(found.dropped)
    reason = "cut to max_response=10 tokens, chosen and rejected are the same"
    assert account.count(found.unread) == {"reason 0": 40, "reason 1": 40, "reason 2": 40}
    assert account.count(found.dropped) == {reason: 40}
    assert [left.where for left in found.dropped] == [f"line {i}" for i in range(41, 81)]  # in the order of the file
    told = dict(found.rows())
    assert told["records read"] == "200 (pairs)" and told[f"left out: {reason}"] == "40"
    assert {told[f"left out: reason {i}"] for i in range(3)} == {"40"}


def test_pairs_that_cutting_makes_equal_are_left_out_and_counted():
    """Responses of which the first three tokens are the same say nothing about a preference for them."""
    tokenizer = policy.word_tokenizer(["a", "b", "c"])
    row = {"prompt": "a", "chosen": "a a a b", "rejected": "a a a c", "where": "line 1"}
    for most, fault in ((4, None), (3, "cut to max_response=3 tokens, chosen and rejected are the same")):
        encoder = account.Encoder(tokenizer, Limits(9, most), ["a"], [row["chosen"], row["rejected"]])
        assert encoder.fault(row) == (fault and (fault, ""))
        assert [left.reason for left in encoder.faults([row])] == ([fault] if fault else [])


def test_texts_that_a_tokenizer_cannot_tell_apart_are_no_pair():
    """To a tokenizer of the words a and b, "x" and "y" are both unknown."""
    row = {"prompt": "a", "chosen": "x", "rejected": "y"}
    encoder = account.Encoder(policy.word_tokenizer(["a", "b"]), WIDE, ["a"], ["x", "y"])
    assert encoder.fault(row) == ("chosen and rejected are the same tokens", "")
    assert encoder.cuts(["a"], chosen=["x"])["chosen"] == Cut(texts=1, cut=0, tokens=2, lost=0, unknown=1)


def test_prompts_that_cutting_makes_equal_are_left_out_with_their_pairs():
    """Fifty prompts that differ only in their first word are one prompt of two tokens: one remains."""
    words = [f"w{i}" for i in range(50)]
    tokenizer = policy.word_tokenizer([*words, "a", "b"])
    rows = [{"prompt": f"{word} a", "chosen": "a", "rejected": "b"} for word in words]
    prompts = [row["prompt"] for row in rows]
    encoder = account.Encoder(tokenizer, Limits(2, 9), prompts, ["a", "b"])
    assert [encoder.fault(row) is None for row in rows] == [True] + [False] * 49
    reason = "cut to max_prompt=2 tokens, the prompt is the same as another one"
    assert account.count(encoder.faults(rows)) == {reason: 49}
    assert all(account.Encoder(tokenizer, Limits(3, 9), prompts, ["a", "b"]).fault(row) is None for row in rows)


def test_a_held_out_prompt_stays_rather_than_a_training_prompt_that_cutting_makes_equal():
    rows = [{"prompt": f"{i} " + "same " * 9, "chosen": "good", "rejected": "bad"} for i in range(40)]
    with pytest.raises(DataError, match=r"pairs: nothing is left .* \(39 x cut to max_prompt=4"):
        from_rows(rows, Limits(4, 99))  # one prompt is left, for validation
    known = from_rows(rows + numbered(20), Limits(8, 99))
    assert len(known.prompts["validation"] + known.prompts["held_out"]) <= 8
    shown = [tuple(chat.prompt_ids(tokenizer(), [p])[0][-8:]) for own in known.prompts.values() for p in own]
    assert len(set(shown)) == len(shown)


def test_what_is_cut_is_counted_in_texts_and_tokens():
    """Responses of 2, 3 and 6 tokens (ends included) under a limit of 3: one is cut, 3 of 11 tokens are lost."""
    tokenizer = policy.word_tokenizer(["a", "b"])
    encoder = account.Encoder(tokenizer, Limits(3, 3), ["a", "a b a"], ["a", "a b", "a b a b a"])
    cuts = encoder.cuts(["a", "a b a"], chosen=["a", "a b", "a b a b a"])
    assert cuts["chosen"] == Cut(texts=3, cut=1, tokens=11, lost=3, unknown=0)
    assert cuts["prompts"] == Cut(texts=2, cut=1, tokens=6, lost=1, unknown=0)  # with the marker of a reply


def test_pairs_that_cannot_be_encoded_are_left_out_and_counted():
    tokenizer = policy.word_tokenizer(["a", "b"])  # cannot tell the text "<eos>" from the end
    rows = [{"prompt": p, "chosen": c, "rejected": "b"} for p, c in (("a", "a"), ("a", "a <eos> a"), ("b <eos>", "a"))]
    encoder = account.Encoder(tokenizer, WIDE, ["a", "b <eos>"], ["a", "b", "a <eos> a"])
    reason = "the text spells out a control token that the tokenizer cannot read as text"
    assert [encoder.fault(row) for row in rows] == [None, (reason, "<eos>"), (reason, "<eos>")]


WORLD = {
    "pairs": 200,
    "check": 100,
    "demonstrations": 150,
    "label_noise": 0.2,
    "validation": 64,
    "held_out": 64,
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_the_world_as_a_dataset(world):
    dataset = data.from_world(world, seed=3, **WORLD)
    assert dataset.world is world
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
    assert row["reward_chosen"] == world.reward(world.parse_prompt(row["prompt"]), row["chosen"])


def test_the_world_under_wide_limits_is_the_world():
    known, words = data.from_world(EASY, seed=3, **WORLD), policy.word_tokenizer(EASY.vocabulary())
    limited = data.under_limits(known, words, Limits(24, 28))
    assert dataclasses.replace(limited, account=None) == known
    assert not limited.account.changed() and limited.account.pairs == 300
    assert {kind: cut.texts for kind, cut in limited.account.cut.items()} == {
        "prompts": 1536, "chosen": 300, "rejected": 300, "demonstrations": 250,
    }  # fmt: skip


def test_the_world_under_narrow_limits_loses_what_cannot_be_told_apart_and_says_so():
    known, words = data.from_world(EASY, seed=3, **WORLD), policy.word_tokenizer(EASY.vocabulary())
    limited = data.under_limits(known, words, Limits(24, 4))
    same = [row for row in known.pairs if row["chosen"].split()[:4] == row["rejected"].split()[:4]]
    assert len(known.pairs) - len(limited.pairs) == len(same) > 0
    assert limited.account.changed() and limited.account.cut["chosen"].cut == 300
    with pytest.raises(DataError, match="max_prompt=1, max_response=28 too little of the world"):
        data.under_limits(known, words, Limits(1, 28))


def test_a_digest_names_pairs_and_labels():
    """Two worlds have the same prompts about the same animals, but not the same said of them."""
    one, same, other, hard = (
        data.from_world(world, seed=0, **WORLD | {"label_noise": noise})
        for world, noise in ((EASY, 0.2), (EASY, 0.2), (EASY, 0.0), (HARD, 0.2))
    )
    assert one.digest() == same.digest() != other.digest()
    assert hard.digest() not in (one.digest(), other.digest())


def test_the_dataset_of_a_spec_is_of_its_world_and_that_of_a_file_of_none(tmp_path):
    """Which world is a matter of difficulty alone: else the two specs are the same."""
    p = {"profile": "smoke", "pairs": 16, "check": 8, "validation": 4, "held_out": 4}
    specs = {name: plan.data_spec(check(p | {"difficulty": name, "max_response": 36}), 0) for name in WORLDS}
    assert specs["hard"] == specs["easy"].model_copy(update={"difficulty": "hard"})
    for name, spec in specs.items():
        assert recipes.dataset(spec).world is WORLDS[name] and WORLDS[name].difficulty == name
        assert set(WORLDS[name].vocabulary()) <= recipes.tokenizer_of(spec).get_vocab().keys()
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, numbered(20))))
    spec = plan.data_spec(check(p | {"dataset": str(path)}), 0)
    assert spec.difficulty == "" and recipes.dataset(spec).world is None


def test_seeds_of_the_world_share_prompts_and_differ_in_pairs():
    one, other = (data.from_world(EASY, seed=seed, **WORLD) for seed in (0, 1))
    assert one.prompts == other.prompts
    assert one.pairs != other.pairs and one.demonstrations != other.demonstrations


def test_padding_on_either_side():
    # prompts of 2 and 1 tokens, responses of 1 and 3: four columns are needed
    right = pad([[5, 6], [7]], [[8], [9, 3, 2]], 0)
    assert right.ids.tolist() == [[5, 6, 8, 0], [7, 9, 3, 2]]
    assert right.attention.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert right.response.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    left = pad([[5, 6], [7]], [[8], [9, 3, 2]], 0, side="left")
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
        pad(*arguments)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "attention", "response"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_keep_only_the_columns_that_they_use(side):
    prompts, responses = [[5, 6], [7], [4]], [[8], [9, 3, 2, 1], [1]]
    batch = pad(prompts, responses, 0, side)
    index = torch.tensor([2, 0])
    expected = pad([[4], [5, 6]], [[1], [8]], 0, side)
    assert equal(batch.rows(index), expected)
    assert [part.ids.shape for part in batch.chunks(2)] == [(2, 5), (1, 2)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_pieces_hold_rows_of_like_length_and_say_where_they_belong(side):
    batch = pad([[5, 6], [7], [4]], [[8], [9, 3, 2, 1], [1]], 0, side)
    pieces = list(batch.pieces(2))
    assert [part.ids.shape for _, part in pieces] == [(2, 3), (1, 5)]
    assert equal(pieces[0][1], pad([[4], [5, 6]], [[1], [8]], 0, side))
    for name in ("ids", "attention", "response"):
        found = torch.zeros_like(getattr(batch, name))
        for place, part in pieces:
            assert torch.equal(getattr(batch, name)[place], getattr(part, name))
            found[place] = getattr(part, name)
        assert torch.equal(found, getattr(batch, name))


def test_slices_keep_all_columns_and_concatenate_to_the_whole():
    batch = pad([[5, 6], [7], [4]], [[8], [9, 3, 2, 1], [1]], 0)
    parts = batch.slices(2)
    assert [part.ids.shape for part in parts] == [(2, 5), (1, 5)]
    assert equal(concatenate(parts), batch)


def test_concatenating_pads_on_the_right_to_the_longest():
    joined = concatenate([pad([[5]], [[6]], 0), pad([[1, 2]], [[3, 4]], 0)])
    assert equal(joined, pad([[5], [1, 2]], [[6], [3, 4]], 0))


def test_a_batch_has_one_shape():
    with pytest.raises(ValueError, match="one shape"):
        Batch(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one shape"):
        Batch(torch.zeros(3), torch.zeros(3), torch.zeros(3))


def test_encoding_cuts_prompts_at_their_beginning_and_responses_at_their_end():
    """A prompt ends with the marker, a response with the end; both are cut where they are too long."""
    tokenizer = policy.word_tokenizer(["a", "b", "c"])
    pad, eos, unk, reply, a, b, c = range(7)
    batch = data.encode(tokenizer, ["a", "a"], ["b", "c c"], max_prompt=5, max_response=5)
    assert batch.ids.tolist() == [[a, reply, b, eos, pad], [a, reply, c, c, eos]]
    assert batch.response.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    cut = data.encode(tokenizer, ["a b zoo", "c"], ["b c", "b c"], max_prompt=2, max_response=2)
    assert cut.ids.tolist() == [[unk, reply, b, c], [c, reply, b, c]]


@pytest.mark.parametrize(("world", "longest"), [(EASY, 28), (HARD, 36)], ids=WORLDS)
def test_no_text_of_a_world_is_cut_at_the_default_lengths(world, longest):
    """Nor is the best reply, of which a policy has to be able to make an end."""
    tokenizer = policy.word_tokenizer(world.vocabulary())
    rows = data.from_world(world, seed=0, **WORLD).pairs
    best = [world.best(prompt) for prompt in world.all_prompts()[::7]]
    assert max(map(len, chat.prompt_ids(tokenizer, [row["prompt"] for row in rows]))) <= 24
    assert max(map(len, chat.response_ids(tokenizer, [row["chosen"] for row in rows] + best))) <= longest
