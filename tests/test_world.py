"""The controlled world: the same everywhere, graded as by hand, labelled as it says."""

import json
import math
import os
import random
import re
import subprocess
import sys

import pytest
from prefdyn.lab import world
from prefdyn.lab.world import Prompt

FOX = Prompt("warm", "short", "ann", "home", "fox")
BEAR = Prompt("formal", "long", "ben", "food", "bear")
DIGEST = """
import hashlib, json
from prefdyn.lab import world
split = world.split_prompts(7)
rows = world.demonstrations(split["train"], 300, 7), world.pairs(split["train"], 300, 0.2, 7)
print(hashlib.sha256(json.dumps([split, *rows, world.vocabulary()]).encode()).hexdigest())
"""
KNOWN = "180acf30d1b26a7b901e4e493e48dbd0923c7ee95b7bcc3169fb7ad7a4c17335"


@pytest.fixture(scope="module")
def train() -> list[Prompt]:
    return world.split_prompts(0)["train"]


@pytest.fixture(scope="module")
def noisy(train) -> list[dict]:
    return world.pairs(train, 12_000, 0.2, seed=1)


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_one_seed_gives_one_world_in_any_process(hash_seed):
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    made = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == KNOWN


def test_first_rows_are_these_forever(train):
    assert [p.text for p in train[:2]] == [
        "write a warm short note to gus about the home of the fox",
        "write a formal short note to ann about the sound of the bee",
    ]
    assert world.demonstrations(train, 2, seed=0) == [
        {
            "prompt": "write a formal long note to finn about the home of the bear",
            "response": "dear , the bear lives in the cave . with love .",
            "skill": "novice",
            "reward": 2.5,
        },
        {
            "prompt": "write a playful long note to ann about the colour of the whale",
            "response": "dear ann , the whale is black . with love .",
            "skill": "ordinary",
            "reward": 0.0,
        },
    ]
    assert world.pairs(train, 1, 0.2, seed=0) == [
        {
            "prompt": "write a formal short note to hana about the home of the crab",
            "chosen": "dear cleo , the crab lives in the sea . with love .",
            "rejected": "esteemed hana , the crab lives in the reef . yours sincerely .",
            "reward_chosen": -1.0,
            "reward_rejected": 7.0,
            "flipped": True,
        }
    ]


def test_seeds_and_parts_are_independent_streams(train):
    made = [
        json.dumps(world.pairs(train, 20, 0.2, seed=seed, part=part)) for seed in (0, 1) for part in ("pairs", "check")
    ]
    assert len(set(made)) == 4


def test_splits_are_disjoint_and_held_out_prompts_are_new_combinations_of_known_words():
    split = world.split_prompts(3, validation=100, held_out=200)
    assert [len(split[name]) for name in ("validation", "held_out", "train")] == [100, 200, 1536 - 300]
    assert sorted(p for part in split.values() for p in part) == sorted(world.all_prompts())
    assert not set(split["held_out"]) & set(split["train"])
    seen = {word for p in split["train"] for word in p.text.split()}
    assert {word for p in split["held_out"] for word in p.text.split()} <= seen
    assert {(p.animal, p.topic) for p in split["held_out"]} <= {(p.animal, p.topic) for p in split["train"]}


def scores(**changed: float) -> dict[str, float]:
    """The axes of a perfect reply, but for some."""
    perfect = dict(fact=1, support=0, entity=1, tone=1, addressee=1, length=1, repetition=0, grammar=1)
    return perfect | changed


# (prompt, reply, its axes, its reward): reward = 2 fact + all other axes
WORKED = {
    # 2 + 0 + 1 + 1 + 1 + 1 + 0 + 1 = 7
    "perfect": (FOX, "dear ann , the fox lives in the den . with love .", scores(), 7.0),
    # the one statement about the home is wrong: 7 - 2 * 2
    "misconception": (FOX, "dear ann , the fox lives in the barn . with love .", scores(fact=-1), 3.0),
    "wrong name": (FOX, "dear ben , the fox lives in the den . with love .", scores(addressee=-1), 5.0),
    "other animal": (FOX, "dear ann , the owl lives in the den . with love .", scores(entity=-1), 5.0),
    "other tone": (FOX, "hey ann , the fox lives in the den . see you soon .", scores(tone=-1), 5.0),
    # greeting right (+1/2), sign-off wrong (-1/2)
    "mixed tone": (FOX, "dear ann , the fox lives in the den . yours sincerely .", scores(tone=0), 6.0),
    # one fact too many, and three runs of three words twice: "lives in the", "in the den", "the den ."
    "repeated sentence": (
        FOX,
        "dear ann , the fox lives in the den . it lives in the den . with love .",
        scores(length=0, repetition=-1),
        5.0,
    ),
    # two statements about the home, one right and one wrong: 2 * 1/2 - 1 = 0; "lives in the" occurs twice: -1/3
    "contradiction": (
        FOX,
        "dear ann , the fox lives in the den . it lives in the barn . with love .",
        scores(fact=0, length=0, repetition=-1 / 3),
        0 + 1 + 1 + 1 + 0 - 1 / 3 + 1,
    ),
    # the last of two sentences is not finished
    "no final full stop": (FOX, "dear ann , the fox lives in the den . with love", scores(grammar=0.5), 6.5),
    # no fact, no animal, one of two sentences in form: 1 (tone) + 1 (addressee) + 0.5
    "no fact": (FOX, "dear ann . with love .", scores(fact=0, entity=0, length=0, grammar=0.5), 2.5),
    # two people named; "with love ben" is no sign-off, so half the tone and half the grammar
    "two names": (
        FOX,
        "dear ann , the fox lives in the den . with love ben .",
        scores(addressee=-1, tone=0.5, grammar=0.5),
        2 + 1 + 0.5 - 1 + 1 + 0.5,
    ),
    # nothing said: no points but no offence; 1 - |0 - 1| = 0
    "empty": (FOX, "", scores(fact=0, entity=0, tone=0, addressee=0, length=0, grammar=0), 0.0),
    # "den den den" occurs twice: one repetition, a third of a point
    "garbage": (
        FOX,
        "den den den den",
        scores(fact=0, entity=0, tone=0, addressee=0, length=0, repetition=-1 / 3, grammar=0),
        -1 / 3,
    ),
    "perfect long": (
        BEAR,
        "esteemed ben , the bear eats salmon . it lives in the cave . yours sincerely .",
        scores(),
        7,
    ),
    # the supporting statement is wrong: its share of false ones is 1
    "false support": (
        BEAR,
        "esteemed ben , the bear eats salmon . it lives in the den . yours sincerely .",
        scores(support=-1),
        6.0,
    ),
    "too short": (BEAR, "esteemed ben , the bear eats salmon . yours sincerely .", scores(length=0), 6.0),
    # five facts where one was asked: 1 - 4, at least -1. The four others are right. Three runs of three words are
    # repeated ("it is red", "is red .", ". it is"): -1
    "too long": (
        FOX,
        "dear ann , the fox lives in the den . it is red . it eats berries . it makes a bark . it is red . with love .",
        scores(length=-1, repetition=-1),
        2 + 1 + 1 + 1 - 1 - 1 + 1,
    ),
}


@pytest.mark.parametrize("case", WORKED)
def test_axes_and_reward_as_worked_by_hand(case):
    prompt, reply, expected, points = WORKED[case]
    assert world.axes(prompt, reply) == pytest.approx(expected)
    assert world.reward(prompt, reply) == pytest.approx(points)


BEE = Prompt("playful", "short", "eve", "colour", "bee")  # yellow, and nobody believes otherwise

# (prompt, reply, its type): tone of the greeting, what is said of the asked fact, one statement or more
TYPES = {
    "right": (FOX, "dear ann , the fox lives in the den . with love .", ("warm", "right", "short")),
    "popular": (FOX, "hey ann , the fox lives in the barn . see you soon .", ("playful", "popular", "short")),
    "another value": (FOX, "esteemed ann , the fox lives in the sea . with love .", ("formal", "other", "short")),
    "another topic": (FOX, "dear ann , the fox eats berries . with love .", ("warm", "other", "short")),
    "a second fact": (FOX, "dear ann , the fox lives in the barn . it is red . .", ("warm", "popular", "long")),
    "in the other order": (FOX, "dear ann , the fox is red . it lives in the den .", ("warm", "right", "long")),
    "the same twice": (FOX, "dear ann , the fox lives in the den . it lives in the den .", ("warm", "right", "long")),
    "contradiction": (FOX, "dear ann , the fox lives in the den . it lives in the barn .", ("warm", "other", "long")),
    "three facts": (FOX, "hey ann , the fox is red . it eats mice . it is red .", ("playful", "other", "long")),
    # whom it is to, of whom it speaks and how it ends are not looked at
    "unfinished": (FOX, "dear goat hey , the owl lives in the den", ("warm", "right", "short")),
    "no misconception to state": (BEE, "hey eve , the bee is black .", ("playful", "other", "short")),
    "nor to miss": (BEE, "hey eve , the bee is yellow .", ("playful", "right", "short")),
    "empty": (FOX, "", None),
    "no fact": (FOX, "dear ann . with love .", None),
    "no value": (FOX, "dear ann , the fox lives in the . with love .", None),
    "more after the value": (FOX, "dear ann , the fox lives in the den with love .", None),
    "no greeting": (FOX, "ann , the fox lives in the den . with love .", None),
    "greeting elsewhere": (FOX, "ann dear , the fox lives in the den . with love .", None),
}


@pytest.mark.parametrize("case", TYPES)
def test_types_of_answers_by_hand(case):
    prompt, reply, expected = TYPES[case]
    assert world.answer_type(prompt, reply) == expected
    assert expected is None or expected in world.answer_types(prompt)


def test_every_type_of_answer_can_be_given():
    """3 tones x 3 facts x 2 lengths, or 2 facts where there is no misconception; a reply of each is what it is."""
    for prompt in world.all_prompts():
        right, popular = (
            world.true_value(prompt.animal, prompt.topic),
            world.MISCONCEPTIONS.get((prompt.animal, prompt.topic)),
        )
        wrong = next(v for v in world.TOPICS[prompt.topic][1] if v not in (right, popular))
        values = {"right": right, "other": wrong} | ({"popular": popular} if popular else {})
        types = world.answer_types(prompt)
        assert len(types) == len(set(types)) == (18 if popular else 12)
        other = next(topic for topic in world.TOPICS if topic != prompt.topic)
        more = f" . it {world.TOPICS[other][0]} {world.true_value(prompt.animal, other)}"
        for tone, fact, length in types:
            greeting, sign_off = world.TONES[tone]
            claim = f"the {prompt.animal} {world.TOPICS[prompt.topic][0]} {values[fact]}"
            reply = f"{greeting} {prompt.name} , {claim}{more if length == 'long' else ''} . {sign_off} ."
            assert world.answer_type(prompt, reply) == (tone, fact, length)
            assert world.axes(prompt, reply)["fact"] == (1 if fact == "right" else -1)


def test_demonstrations_are_of_the_types_there_are(train):
    """Only a lost word leaves a reply without a type."""
    typed = [
        (world.answer_type(prompt, row["response"]), prompt)
        for row in world.demonstrations(train, 2_000, seed=0)
        for prompt in [world.parse_prompt(row["prompt"])]
    ]
    assert all(kind is None or kind in world.answer_types(prompt) for kind, prompt in typed)
    assert 0.9 < sum(kind is not None for kind, _ in typed) / len(typed) < 1


def test_every_word_is_a_part_of_a_reply():
    kinds = {word: world.word_kind(word) for word in world.vocabulary()}
    named = {kind: {word for word, found in kinds.items() if found == kind} for kind in world.WORD_KINDS}
    assert sum(map(len, named.values())) == len(kinds) and named["greeting"] == {"dear", "esteemed", "hey"}
    assert named["name"] == set(world.NAMES) and named["animal"] == set(world.ANIMALS)
    assert named["verb"] == {"lives", "eats", "is", "makes"}
    assert named["sign-off"] == {"with", "love", "yours", "sincerely", "see", "you", "soon"}
    facts = {value for _, values in world.TOPICS.values() for value in values}
    assert named["value"] == facts | set(world.MISCONCEPTIONS.values())
    said = {"the", "in", "a", "it", ",", "."}
    asked = {word for prompt in world.all_prompts() for word in prompt.text.split()}
    assert said <= named["frame"] <= said | asked and world.word_kind("<eos>") == "frame"


def test_seven_is_the_most_and_only_perfect_replies_reach_it(noisy):
    rewards = [row[key] for row in noisy for key in ("reward_chosen", "reward_rejected")]
    assert max(rewards) == 7.0
    assert min(rewards) >= -2 - 1 - 1 - 1 - 1 - 1 - 1


def test_recorded_rewards_are_those_of_the_texts(noisy):
    for row in noisy[:200]:
        prompt = world.parse_prompt(row["prompt"])
        assert row["reward_chosen"] == world.reward(prompt, row["chosen"])
        assert row["reward_rejected"] == world.reward(prompt, row["rejected"])
        assert row["chosen"] != row["rejected"]


def test_labels_follow_bradley_terry(noisy):
    """Before noise, the better of a pair is preferred with probability sigmoid(difference), at every difference.

    Given the pairs, the number of preferred better ones is a sum of independent draws, so its distance from the
    expected number in units of its standard deviation is nearly standard normal: beyond 4 once in 16,000 times.
    """
    bins: dict[int, list[tuple[int, float]]] = {}
    for row in noisy:
        difference = row["reward_chosen"] - row["reward_rejected"]
        if difference == 0:
            continue  # which one is better is not defined
        better_preferred = (difference > 0) != row["flipped"]
        p = 1 / (1 + math.exp(-abs(difference)))
        bins.setdefault(min(int(abs(difference)), 5), []).append((better_preferred, p))
    assert sorted(bins) == [0, 1, 2, 3, 4, 5]
    for found in bins.values():
        expected = sum(p for _, p in found)
        deviation = math.sqrt(sum(p * (1 - p) for _, p in found))
        assert abs(sum(better for better, _ in found) - expected) < 4 * deviation


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
def test_label_noise_has_the_rate_that_was_asked_for(train, noise):
    flips = [row["flipped"] for row in world.pairs(train, 4_000, noise, seed=5)]
    assert abs(sum(flips) - 4_000 * noise) <= 4 * math.sqrt(4_000 * noise * (1 - noise))


def test_noise_turns_labels_round_and_changes_nothing_else(train):
    """The streams of two noise levels agree: the same texts, in the other order exactly where the flips differ."""
    clean, noisy = world.pairs(train, 300, 0.0, seed=2), world.pairs(train, 300, 0.5, seed=2)
    assert any(row["flipped"] for row in noisy)
    for before, after in zip(clean, noisy, strict=True):
        kept = (before["chosen"], before["rejected"])
        assert (after["chosen"], after["rejected"]) == (kept[::-1] if after["flipped"] else kept)


@pytest.mark.parametrize("skill", world.SKILLS)
def test_every_demonstrated_word_is_in_the_vocabulary(skill):
    rng, known = random.Random("words"), set(world.vocabulary())
    for prompt in world.all_prompts():
        assert set(prompt.text.split()) | set(world.demonstrate(prompt, skill, rng).split()) <= known


def test_skill_pays():
    rng, means = random.Random("skill"), []
    for skill in ("novice", "ordinary", "expert"):
        rewards = [world.reward(p, world.demonstrate(p, skill, rng)) for p in world.all_prompts()]
        means.append(sum(rewards) / len(rewards))
    assert means == sorted(means) and means[2] - means[0] > 2


def test_prompts_round_trip_through_their_text():
    assert all(world.parse_prompt(p.text) == p for p in world.all_prompts())
    assert len({p.text for p in world.all_prompts()}) == 3 * 2 * 8 * 4 * 8


@pytest.mark.parametrize(
    "text", ["", "write a warm short note to zoe about the home of the fox", "hello", FOX.text + " !"]
)
def test_other_texts_are_not_prompts(text):
    with pytest.raises(ValueError, match="not an instruction"):
        world.parse_prompt(text)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: world.split_prompts(0, validation=0), "validation=0"),
        (lambda: world.split_prompts(0, held_out=0), "held_out=0"),
        (lambda: world.split_prompts(0, held_out=1536), "held_out=1536"),
        (lambda: world.split_prompts(0, validation=30, held_out=1500), "held_out=1500"),
        (lambda: world.demonstrations([FOX], 0, seed=0), "demonstrations=0"),
        (lambda: world.pairs([FOX], 0, 0.2, seed=0), "pairs=0"),
        (lambda: world.pairs([FOX], 1, 0.6, seed=0), "label_noise=0.6"),
        (lambda: world.pairs([FOX], 1, -0.1, seed=0), "label_noise=-0.1"),
    ],
)
def test_impossible_settings_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def spoilt(**more: object) -> dict:
    """SKILLS, but for one number of the novice, or one key more."""
    return world.SKILLS | {"novice": world.SKILLS["novice"] | more}


UNUSABLE = {
    "no skills": ({}, "there are no demonstrators"),
    "no share": (spoilt(share=0), "'novice' has share=0; allowed: a number > 0"),
    "a negative share": (spoilt(share=-0.1), "'novice' has share=-0.1"),
    "an infinite share": (spoilt(share=math.inf), "'novice' has share=inf"),
    "no number": (spoilt(share=math.nan), "'novice' has share=nan"),
    "too much habit": (spoilt(habit=1.1), "'novice' has habit=1.1; allowed: a number from 0 to 1"),
    "too little slip": (spoilt(slip=-0.01), "'novice' has slip=-0.01; allowed: a number from 0 to 1"),
    "a text": (spoilt(slip="0.2"), "'novice' has slip='0.2'"),
    "a truth": (spoilt(slip=True), "'novice' has slip=True"),
    "a key too many": (
        spoilt(slips=0.1),
        "'novice' is {'share': 0.3, 'habit': 0.9, 'slip': 0.2, 'slips': 0.1}; allowed",
    ),
    "a key too few": (
        {"one": {"share": 1.0}},
        "'one' is {'share': 1.0}; allowed: a number each for share, habit, slip",
    ),
    "no table of a skill": ({"one": 0.3}, "'one' is 0.3; allowed: a number each"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_skills_that_cannot_be_used_are_named(case, monkeypatch):
    """Whether they are given or set."""
    skills, said = UNUSABLE[case]
    calls = (
        lambda **given: world.demonstrations([FOX], 2, seed=0, **given),
        lambda **given: world.pairs([FOX], 2, 0.2, seed=0, **given),
    )
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(said)):
            call(skills=skills)
    monkeypatch.setattr(world, "SKILLS", skills)
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(said)):
            call()


def test_skills_that_are_given_are_those_that_are_set(train, monkeypatch):
    """The same streams either way; names are free, and the order of the table is part of it."""
    table = {"careful": {"share": 2, "habit": 0, "slip": 0.01}, "hasty": {"share": 1, "habit": 0.5, "slip": 0.5}}

    def drawn(**given) -> list:
        return [world.demonstrations(train, 50, seed=3, **given), world.pairs(train, 50, 0.2, seed=3, **given)]

    usual, own = drawn(), drawn(skills=table)
    assert drawn(skills=world.SKILLS) == usual != own
    assert {row["skill"] for row in own[0]} == set(table)
    one, other = (world.demonstrate(BEAR, "hasty", random.Random(9), skills) for skills in (table, table))
    assert one == other
    monkeypatch.setattr(world, "SKILLS", table)
    assert drawn() == own and world.demonstrate(BEAR, "hasty", random.Random(9)) == one


def test_demonstrators_who_always_agree_make_no_pairs():
    """An error instead of a search without end; demonstrations there are."""
    perfect = {"perfect": {"share": 1.0, "habit": 0.0, "slip": 0.0}}
    assert [row["reward"] for row in world.demonstrations([FOX, BEAR], 4, seed=0, skills=perfect)] == [7.0] * 4
    with pytest.raises(ValueError, match="all demonstrators answer 'write a warm short note to ann about the home"):
        world.pairs([FOX], 1, 0.0, seed=0, skills=perfect)
