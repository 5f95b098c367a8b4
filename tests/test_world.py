"""The controlled worlds: the same everywhere, graded as by hand, labelled as they say."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys

import pytest
from prefdyn.lab import world
from prefdyn.lab.world import HEDGE, LENGTHS, SKILLS, TONES, WORD_KINDS, Prompt, Statement, World
from prefdyn.lab.worlds import EASY, HARD, WORLDS
from scipy import stats

FOX = Prompt("warm", "short", "ann", "home", "fox")
BEAR = Prompt("formal", "long", "ben", "food", "bear")
WOLF = Prompt("playful", "long", "eve", "sound", "wolf")  # of the hard world
DIGEST = """
import hashlib, json, sys
from prefdyn.lab.worlds import WORLDS
world = WORLDS[sys.argv[1]]
split = world.split_prompts(7)
rows = world.demonstrations(split["train"], 300, 7), world.pairs(split["train"], 300, 0.2, 7)
print(hashlib.sha256(json.dumps([split, *rows, world.vocabulary()]).encode()).hexdigest())
"""
KNOWN = {
    "easy": "180acf30d1b26a7b901e4e493e48dbd0923c7ee95b7bcc3169fb7ad7a4c17335",
    "hard": "db0d1cc89f0b298e35d5502157d0b0761aa38c3dafedeeab45f26e1184c3cbe1",
}


@pytest.fixture(scope="module")
def train() -> list[Prompt]:
    return EASY.split_prompts(0)["train"]


@pytest.fixture(scope="module", params=WORLDS.values(), ids=WORLDS)
def any_world(request) -> World:
    return request.param


@pytest.fixture(scope="module")
def noisy(any_world) -> list[dict]:
    return any_world.pairs(any_world.split_prompts(0)["train"], 12_000, 0.2, seed=1)


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
@pytest.mark.parametrize("difficulty", KNOWN)
def test_one_seed_gives_one_world_in_any_process(difficulty, hash_seed):
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", DIGEST, difficulty]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == KNOWN[difficulty]


def test_difficulty_names_a_world():
    assert {name: found.difficulty for name, found in WORLDS.items()} == {"easy": "easy", "hard": "hard"}
    assert WORLDS["easy"] is EASY and WORLDS["hard"] is HARD


def test_first_rows_are_these_forever(train):
    assert [p.text for p in train[:2]] == [
        "write a warm short note to gus about the home of the fox",
        "write a formal short note to ann about the sound of the bee",
    ]
    assert EASY.demonstrations(train, 2, seed=0) == [
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
    assert EASY.pairs(train, 1, 0.2, seed=0) == [
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
        json.dumps(EASY.pairs(train, 20, 0.2, seed=seed, part=part)) for seed in (0, 1) for part in ("pairs", "check")
    ]
    assert len(set(made)) == 4


@pytest.mark.parametrize(("any_world", "prompts"), [(EASY, 1536), (HARD, 3072)], ids=WORLDS)
def test_splits_are_disjoint_and_held_out_prompts_are_new_combinations_of_known_words(any_world, prompts):
    split = any_world.split_prompts(3, validation=100, held_out=200)
    assert [len(split[name]) for name in ("validation", "held_out", "train")] == [100, 200, prompts - 300]
    assert sorted(p for part in split.values() for p in part) == sorted(any_world.all_prompts())
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
    assert EASY.axes(prompt, reply) == pytest.approx(expected)
    assert EASY.reward(prompt, reply) == pytest.approx(points)


def hard_scores(**changed: float) -> dict[str, float]:
    """The axes of a note of the hard world that says the asked thing alone and names nobody, but for some."""
    return scores(source=0, detail=0) | changed


THE_DEN = "dear ann , the fox lives in the den ."
LOVE = "with love ."
CITED = "so says the atlas ."
# (prompt, reply, its axes, its reward): reward = 2 fact + 2 source + 3.6 detail + all other axes
HARD_WORKED = {
    # 2 + 1 + 1 + 1 + 1 + 1
    "plain": (FOX, f"{THE_DEN} {LOVE}", hard_scores(), 7.0),
    "cited": (FOX, f"{THE_DEN} {CITED} {LOVE}", hard_scores(source=1), 9.0),
    # four facts where one was asked: 1 - 3, at least -1; three more topics are all of the detail that counts
    "generous and cited": (
        FOX,
        f"{THE_DEN} it eats berries . it is red . it makes a bark . {CITED} {LOVE}",
        hard_scores(length=-1, source=1, detail=1),
        2 + 1 + 1 + 1 - 1 + 1 + 2 + 3.6,
    ),
    "hedged right": (FOX, f"dear ann , the fox perhaps lives in the den . {LOVE}", hard_scores(fact=0.4), 5.8),
    "hedged wrong": (FOX, f"dear ann , the fox perhaps lives in the barn . {LOVE}", hard_scores(fact=-0.2), 4.6),
    "bold and wrong": (FOX, f"dear ann , the fox lives in the barn . {LOVE}", hard_scores(fact=-1), 3.0),
    # twice the same, once hedged: (1 + 0.4) / 2; repeated are "lives in the", "in the den" and "the den ."
    "bold, then hedged": (
        FOX,
        f"{THE_DEN} it perhaps lives in the den . {LOVE}",
        hard_scores(fact=0.7, length=0, repetition=-1),
        2 * 0.7 + 1 + 1 + 1 + 0 - 1 + 1,
    ),
    # (1 - 0.2) / 2; repeated is "lives in the"
    "right, then wrong but hedged": (
        FOX,
        f"{THE_DEN} it perhaps lives in the barn . {LOVE}",
        hard_scores(fact=0.4, length=0, repetition=-1 / 3),
        2 * 0.4 + 1 + 1 + 1 + 0 - 1 / 3 + 1,
    ),
    # (0.4 - 1) / 2
    "right but hedged, then wrong": (
        FOX,
        f"dear ann , the fox perhaps lives in the den . it lives in the barn . {LOVE}",
        hard_scores(fact=-0.3, length=0, repetition=-1 / 3),
        2 * -0.3 + 1 + 1 + 1 + 0 - 1 / 3 + 1,
    ),
    # bold twice it is as in the easy world: 2 * 1/2 - 1
    "right, then wrong": (
        FOX,
        f"{THE_DEN} it lives in the barn . {LOVE}",
        hard_scores(fact=0, length=0, repetition=-1 / 3),
        0 + 1 + 1 + 1 + 0 - 1 / 3 + 1,
    ),
    # a hedge of another topic is none of the asked one, and takes nothing from the detail
    "a further fact, hedged": (
        FOX,
        f"{THE_DEN} it perhaps is red . {LOVE}",
        hard_scores(length=0, detail=1 / 3),
        2 + 1 + 1 + 1 + 0 + 1 + 1.2,
    ),
    "a false further fact": (
        FOX, f"{THE_DEN} it eats grapes . {LOVE}", hard_scores(support=-1, length=0), 2 - 1 + 1 + 1 + 1 + 0 + 1,
    ),
    "a false further fact, hedged": (
        FOX, f"{THE_DEN} it perhaps eats grapes . {LOVE}", hard_scores(support=-1, length=0), 5.0,
    ),
    # one of two is false; the true one is detail
    "two further facts, one false": (
        FOX,
        f"{THE_DEN} it eats grapes . it is red . {LOVE}",
        hard_scores(support=-0.5, length=-1, detail=1 / 3),
        2 - 0.5 + 1 + 1 + 1 - 1 + 1 + 1.2,
    ),
    # one topic is one third, however often; repeated are ". it is", "it is red" and "is red ."
    "a further fact twice": (
        FOX,
        f"{THE_DEN} it is red . it is red . {LOVE}",
        hard_scores(length=-1, repetition=-1, detail=1 / 3),
        2 + 1 + 1 + 1 - 1 - 1 + 1 + 1.2,
    ),
    # the asked topic is no detail
    "the other topics alone": (
        FOX,
        f"dear ann , the fox is red . it eats berries . {LOVE}",
        hard_scores(fact=0, length=0, detail=2 / 3),
        0 + 1 + 1 + 1 + 0 + 1 + 2.4,
    ),
    "another's source": (FOX, f"{THE_DEN} so says the farmer . {LOVE}", hard_scores(source=-1), 5.0),
    "a source that knows nothing": (
        FOX, f"{THE_DEN} so says the fox . {LOVE}", hard_scores(grammar=2 / 3), 6 + 2 / 3,
    ),
    # ". so says" and "so says the" twice
    "two sources": (
        FOX,
        f"{THE_DEN} {CITED} so says the farmer . {LOVE}",
        hard_scores(source=-1, repetition=-2 / 3),
        2 + 1 + 1 + 1 + 1 - 2 / 3 + 1 - 2,
    ),
    # these and two more: four thirds, at least -1
    "the source twice": (
        FOX,
        f"{THE_DEN} {CITED} {CITED} {LOVE}",
        hard_scores(source=1, repetition=-1),
        2 + 1 + 1 + 1 + 1 - 1 + 1 + 2,
    ),
    "the source between facts": (
        FOX,
        f"{THE_DEN} {CITED} it is red . {LOVE}",
        hard_scores(length=0, source=1, detail=1 / 3),
        2 + 1 + 1 + 1 + 0 + 1 + 2 + 1.2,
    ),
    # no greeting at the beginning: half the tone; of three sentences only the last is in its place
    "the source first": (
        FOX,
        f"{CITED} {THE_DEN} {LOVE}",
        hard_scores(tone=0.5, grammar=1 / 3, source=1),
        2 + 1 + 0.5 + 1 + 1 + 1 / 3 + 2,
    ),
    # nor a sign-off at the end: only the first is in its place
    "the source last": (
        FOX,
        f"{THE_DEN} {LOVE} {CITED}",
        hard_scores(tone=0.5, grammar=1 / 3, source=1),
        2 + 1 + 0.5 + 1 + 1 + 1 / 3 + 2,
    ),
    # no fact is stated, since its sentence ends otherwise, and of two sentences one is in form
    "the source in the sentence": (
        FOX,
        f"dear ann , the fox lives in the den so says the atlas . {LOVE}",
        hard_scores(fact=0, length=0, grammar=0.5, source=1),
        0 + 1 + 1 + 1 + 0 + 0.5 + 2,
    ),
    "a source in other words": (
        FOX, f"{THE_DEN} atlas . {LOVE}", hard_scores(grammar=2 / 3, source=1), 8 + 2 / 3,
    ),
    # hedged it is, but not well said
    "hedged twice": (
        FOX,
        f"dear ann , the fox perhaps perhaps lives in the den . {LOVE}",
        hard_scores(fact=0.4, grammar=0.5),
        0.8 + 1 + 1 + 1 + 1 + 0.5,
    ),
    # only before the verb is it a hedge of what is said
    "hedged elsewhere": (
        FOX,
        f"dear ann , perhaps the fox lives in the den . {LOVE}",
        hard_scores(grammar=0.5),
        2 + 1 + 1 + 1 + 1 + 0.5,
    ),
    "hedged within": (
        FOX,
        f"dear ann , the fox lives perhaps in the den . {LOVE}",
        hard_scores(fact=0, length=0, grammar=0.5),
        0 + 1 + 1 + 1 + 0 + 0.5,
    ),
    # an animal and a source of the hard world: 2 + 1 + 1 + 1 + 1 + 1 + 2 + 1.2
    "a long note as it should be": (
        WOLF,
        "hey eve , the wolf makes a howl . it eats deer . so says the singer . see you soon .",
        hard_scores(source=1, detail=1 / 3),
        10.2,
    ),
    "nothing": (FOX, "", hard_scores(fact=0, entity=0, tone=0, addressee=0, length=0, grammar=0), 0.0),
}  # fmt: skip


@pytest.mark.parametrize("case", HARD_WORKED)
def test_axes_and_reward_of_the_hard_world_as_worked_by_hand(case):
    prompt, reply, expected, points = HARD_WORKED[case]
    found = HARD.axes(prompt, reply)
    assert found == pytest.approx(expected, abs=1e-12)
    assert HARD.reward(prompt, reply) == pytest.approx(points, abs=1e-12)
    assert list(found) == list(HARD.weights)


# True facts stated, the asked one first, to the length, the detail and the reward of a cited bold note without fault:
# 2 (fact) + 1 (entity) + 1 (tone) + 1 (addressee) + length + 1 (grammar) + 2 (source) + 3.6 detail.
NUMBERS = {
    "short": {1: (1, 0, 9.0), 2: (0, 1 / 3, 9.2), 3: (-1, 2 / 3, 9.4), 4: (-1, 1, 10.6)},
    "long": {1: (0, 0, 8.0), 2: (1, 1 / 3, 10.2), 3: (0, 2 / 3, 10.4), 4: (-1, 1, 10.6)},
}


@pytest.mark.parametrize("length", NUMBERS)
@pytest.mark.parametrize("prompt", [FOX, BEAR, WOLF])
def test_detail_pulls_against_length(prompt, length):
    """Up to the third further fact, whose length costs nothing more: from there on generosity pays, and pays most."""
    asked = prompt._replace(length=length)
    topics = [asked.topic, *(topic for topic in HARD.topics if topic != asked.topic)]
    said = [Statement(topic, HARD.true_value(asked.animal, topic), False) for topic in topics]
    for facts, (fitting, detail, points) in NUMBERS[length].items():
        note = HARD.note(asked.tone, asked.name, asked.animal, said[:facts], HARD.sources[asked.topic])
        expected = hard_scores(length=fitting, detail=detail, source=1)
        assert HARD.axes(asked, note) == pytest.approx(expected, abs=1e-12)
        assert HARD.reward(asked, note) == pytest.approx(points, abs=1e-12)


@pytest.mark.parametrize("case", WORKED)
def test_the_hard_world_judges_a_note_of_the_easy_one_alike(case):
    """But for what it looks at beside that: nobody is cited, and detail is worth points."""
    prompt, reply, expected, points = WORKED[case]
    found = HARD.axes(prompt, reply)
    assert {axis: found[axis] for axis in EASY.weights} == pytest.approx(expected)
    assert found["source"] == 0
    assert HARD.reward(prompt, reply) == pytest.approx(points + 3.6 * found["detail"])


def test_a_source_is_nobody_in_the_easy_world():
    """What it does not know is out of form, and earns and costs nothing else."""
    reply = f"{THE_DEN} {CITED} {LOVE}"
    assert EASY.axes(FOX, reply) == pytest.approx(scores(grammar=2 / 3))


def true_notes(any_world: World, prompt: Prompt) -> list[str]:
    """All notes that say something true: any topics in any order; where there are sources, hedged or not, any or none.

    64 orders of topics; hedged and cited in the hard world, (4 x 2 + 12 x 4 + 24 x 8 + 24 x 16) x 5 notes.
    """
    notes, hedges = [], (False, True) if any_world.sources else (False,)
    for facts in range(1, len(any_world.topics) + 1):
        for topics in itertools.permutations(any_world.topics, facts):
            for hedged in itertools.product(hedges, repeat=facts):
                true = [any_world.true_value(prompt.animal, topic) for topic in topics]
                said = list(map(Statement, topics, true, hedged))
                for source in (None, *any_world.sources.values()):
                    notes.append(any_world.note(prompt.tone, prompt.name, prompt.animal, said, source))
    return notes


ASKED = [FOX._replace(topic=topic, length=length) for topic in EASY.topics for length in LENGTHS]
ASKED += [BEAR, WOLF, Prompt("formal", "short", "hana", "colour", "swan")]


@pytest.mark.parametrize(
    ("any_world", "prompt"),
    [(one, prompt) for one in WORLDS.values() for prompt in ASKED if prompt.animal in one.animals],
    ids=lambda given: given.difficulty if isinstance(given, World) else given.text,
)
def test_the_best_reply_says_no_more_than_is_needed_to_earn_most(any_world, prompt):
    notes = true_notes(any_world, prompt)
    assert len(notes) == len(set(notes)) == (64 if any_world is EASY else (8 + 48 + 192 + 384) * 5)
    rewards = {note: any_world.reward(prompt, note) for note in notes}
    best, most = any_world.best(prompt), max(rewards.values())
    assert rewards[best] == most
    told = {len(any_world.statements(note)) for note, reward in rewards.items() if reward == most}
    assert len(any_world.statements(best)) == min(told)


def test_the_best_reply_to_any_prompt():
    """Seven points in the easy world; in the hard one 10.6, for all there is to tell, boldly and cited: see NUMBERS."""
    assert EASY.best(FOX) == f"{THE_DEN} {LOVE}"
    assert EASY.best(BEAR) == "esteemed ben , the bear eats salmon . it lives in the cave . yours sincerely ."
    assert HARD.best(FOX) == f"{THE_DEN} it eats berries . it is red . it makes a bark . {CITED} {LOVE}"
    assert HARD.best(WOLF) == (
        "hey eve , the wolf makes a howl . it lives in the woods . it eats deer . it is silver . so says the singer . "
        "see you soon ."
    )
    assert {EASY.reward(prompt, EASY.best(prompt)) for prompt in EASY.all_prompts()} == {7.0}
    most = {HARD.reward(prompt, HARD.best(prompt)) for prompt in HARD.all_prompts()}
    assert (min(most), max(most)) == pytest.approx((10.6, 10.6), abs=1e-12)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", []),
        ("the fox lives in the den", [("home", "den", False)]),
        ("the fox perhaps lives in the den .", [("home", "den", True)]),
        ("it perhaps makes a song . it eats mice .", [("sound", "song", True), ("food", "mice", False)]),
        ("it\n perhaps  is\tred .", [("colour", "red", True)]),
        ("it is perhaps red .", []),
        ("perhaps it is red .", [("colour", "red", False)]),  # a hedge stands before the verb
        ("it perhaps perhaps is red .", [("colour", "red", True)]),
        ("it perhaps is red it is blue .", [("colour", "blue", False)]),  # what a sentence says stands at its end
        ("it is perhaps .", [("colour", "perhaps", False)]),  # a value that is none, and false
        ("so says the atlas . perhaps .", []),
        ("it eats moonlight .", [("food", "moonlight", False)]),
    ],
)
def test_statements_by_hand(text, said):
    assert HARD.statements(text) == [Statement(*one) for one in said]


def test_notes_by_hand():
    den, red, bark = (
        Statement("home", "den", False),
        Statement("colour", "red", True),
        Statement("sound", "bark", False),
    )
    assert EASY.note("warm", "ann", "fox", [den]) == f"{THE_DEN} {LOVE}"
    assert HARD.note("warm", "ann", "fox", [den], "atlas") == f"{THE_DEN} {CITED} {LOVE}"
    assert HARD.note("formal", "ben", "fox", [red, den, bark]) == (
        "esteemed ben , the fox perhaps is red . it lives in the den . it makes a bark . yours sincerely ."
    )
    assert HARD.note("playful", "eve", "owl", [bark, red], "singer") == (
        "hey eve , the owl makes a bark . it perhaps is red . so says the singer . see you soon ."
    )


def test_what_a_note_states_is_read_in_it_and_it_is_in_form(any_world):
    for prompt in any_world.all_prompts()[::97]:
        for note in true_notes(any_world, prompt)[::41]:
            assert any_world.axes(prompt, note)["grammar"] == 1
            said = any_world.statements(note)
            source = next((who for who in any_world.sources.values() if who in note.split()), None)
            assert any_world.note(prompt.tone, prompt.name, prompt.animal, said, source) == note


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
    assert EASY.answer_type(prompt, reply) == expected
    assert expected is None or expected in EASY.answer_types(prompt)


def test_every_type_of_answer_can_be_given():
    """3 tones x 3 facts x 2 lengths, or 2 facts where there is no misconception; a reply of each is what it is."""
    for prompt in EASY.all_prompts():
        right, popular = (
            EASY.true_value(prompt.animal, prompt.topic),
            EASY.misconceptions.get((prompt.animal, prompt.topic)),
        )
        wrong = next(v for v in EASY.topics[prompt.topic][1] if v not in (right, popular))
        values = {"right": right, "other": wrong} | ({"popular": popular} if popular else {})
        types = EASY.answer_types(prompt)
        assert len(types) == len(set(types)) == (18 if popular else 12)
        other = next(topic for topic in EASY.topics if topic != prompt.topic)
        more = f" . it {EASY.topics[other][0]} {EASY.true_value(prompt.animal, other)}"
        for tone, fact, length in types:
            greeting, sign_off = TONES[tone]
            claim = f"the {prompt.animal} {EASY.topics[prompt.topic][0]} {values[fact]}"
            reply = f"{greeting} {prompt.name} , {claim}{more if length == 'long' else ''} . {sign_off} ."
            assert EASY.answer_type(prompt, reply) == (tone, fact, length)
            assert EASY.axes(prompt, reply)["fact"] == (1 if fact == "right" else -1)


# (prompt, reply, its type in the hard world): what is said of the asked fact, how boldly, how much in all, and whether
# the one who knows is named
HARD_TYPES = {
    "right": (FOX, f"{THE_DEN} {LOVE}", ("right", "bold", "one", "uncited")),
    "in any tone": (FOX, "hey ann , the fox lives in the den . see you soon .", ("right", "bold", "one", "uncited")),
    "popular": (FOX, "dear ann , the fox lives in the barn .", ("popular", "bold", "one", "uncited")),
    "another value": (FOX, "dear ann , the fox lives in the sea .", ("other", "bold", "one", "uncited")),
    "hedged": (FOX, "dear ann , the fox perhaps lives in the den .", ("right", "hedged", "one", "uncited")),
    "popular, hedged": (FOX, "dear ann , the fox perhaps lives in the barn .", ("popular", "hedged", "one", "uncited")),
    "cited": (FOX, f"{THE_DEN} {CITED} {LOVE}", ("right", "bold", "one", "cited")),
    "popular, cited": (FOX, f"dear ann , the fox lives in the barn . {CITED}", ("popular", "bold", "one", "cited")),
    "another's source": (FOX, f"{THE_DEN} so says the farmer .", ("right", "bold", "one", "uncited")),
    "two sources": (FOX, f"{THE_DEN} {CITED} so says the farmer .", ("right", "bold", "one", "uncited")),
    "two facts": (FOX, f"{THE_DEN} it is red .", ("right", "bold", "two", "uncited")),
    "three facts": (FOX, f"{THE_DEN} it is red . it eats mice .", ("right", "bold", "more", "uncited")),
    "four facts, two of them alike": (
        FOX, f"{THE_DEN} it is red . it is red . it eats mice .", ("right", "bold", "more", "uncited"),
    ),
    "hedged once of twice": (
        FOX, f"{THE_DEN} it perhaps lives in the den . {CITED}", ("right", "hedged", "two", "cited"),
    ),
    "another topic hedged": (FOX, f"{THE_DEN} it perhaps is red .", ("right", "bold", "two", "uncited")),
    "contradiction": (FOX, f"{THE_DEN} it lives in the barn .", ("other", "bold", "two", "uncited")),
    "another topic alone": (FOX, f"dear ann , the fox perhaps is red . {CITED}", ("other", "bold", "one", "cited")),
    "no misconception to state": (BEE, "hey eve , the bee perhaps is black .", ("other", "hedged", "one", "uncited")),
    "an animal of the hard world": (
        WOLF, "hey eve , the wolf makes a howl . so says the singer .", ("right", "bold", "one", "cited"),
    ),
    "empty": (FOX, "", None),
    "no fact": (FOX, f"dear ann . {CITED} {LOVE}", None),
    "no greeting": (FOX, f"ann , the fox lives in the den . {CITED}", None),
    "the source first": (FOX, f"{CITED} {THE_DEN} {LOVE}", None),
}  # fmt: skip


@pytest.mark.parametrize("case", HARD_TYPES)
def test_types_of_answers_of_the_hard_world_by_hand(case):
    prompt, reply, expected = HARD_TYPES[case]
    assert HARD.answer_type(prompt, reply) == expected
    assert expected is None or expected in HARD.answer_types(prompt)


def test_every_type_of_answer_of_the_hard_world_can_be_given():
    """3 facts x 2 x 3 numbers x 2, or 2 facts where there is no misconception; a reply of each is what it is."""
    many = {"one": 1, "two": 2, "more": 3}
    for animal, topic in itertools.product(HARD.animals, HARD.topics):
        prompt = FOX._replace(animal=animal, topic=topic)
        right, popular = HARD.true_value(animal, topic), HARD.misconceptions.get((animal, topic))
        wrong = next(value for value in HARD.topics[topic][1] if value not in (right, popular))
        values = {"right": right, "other": wrong} | ({"popular": popular} if popular else {})
        types = HARD.answer_types(prompt)
        assert len(types) == len(set(types)) == (36 if popular else 24)
        more = [Statement(other, HARD.true_value(animal, other), False) for other in HARD.topics if other != topic]
        for fact, boldness, number, cited in types:
            said = [Statement(topic, values[fact], boldness == "hedged"), *more[: many[number] - 1]]
            source = HARD.sources[topic] if cited == "cited" else None
            note = HARD.note("playful", "gus", animal, said, source)
            assert HARD.answer_type(prompt, note) == (fact, boldness, number, cited)


def test_demonstrations_are_of_the_types_there_are(any_world):
    """Only a lost word leaves a reply without a type."""
    typed = [
        (any_world.answer_type(prompt, row["response"]), prompt)
        for row in any_world.demonstrations(any_world.split_prompts(0)["train"], 2_000, seed=0)
        for prompt in [any_world.parse_prompt(row["prompt"])]
    ]
    assert all(kind is None or kind in any_world.answer_types(prompt) for kind, prompt in typed)
    assert 0.9 < sum(kind is not None for kind, _ in typed) / len(typed) < 1


def test_every_word_is_a_part_of_a_reply(any_world):
    """And of one part alone: what is listed as two of them would be taken for one."""
    kinds = {word: any_world.word_kind(word) for word in any_world.vocabulary()}
    named = {kind: {word for word, found in kinds.items() if found == kind} for kind in WORD_KINDS}
    assert sum(map(len, named.values())) == len(kinds) and named["greeting"] == {"dear", "esteemed", "hey"}
    assert named["name"] == set(any_world.names) and named["animal"] == set(any_world.animals)
    assert named["verb"] == {"lives", "eats", "is", "makes"}
    assert named["sign-off"] == {"with", "love", "yours", "sincerely", "see", "you", "soon"}
    facts = {value for _, values in any_world.topics.values() for value in values}
    assert named["value"] == facts | set(any_world.misconceptions.values())
    hard = any_world is HARD
    assert named["source"] == ({"atlas", "farmer", "painter", "singer"} if hard else set())
    assert named["hedge"] == ({"perhaps"} if hard else set())
    said = {"the", "in", "a", "it", ",", "."} | ({"so", "says"} if hard else set())
    asked = {word for prompt in any_world.all_prompts() for word in prompt.text.split()}
    assert said <= named["frame"] <= said | asked and any_world.word_kind("<eos>") == "frame"
    assert any_world.word_kinds == tuple(kind for kind in WORD_KINDS if named[kind])


def test_demonstrators_reach_so_much_and_no_more(any_world, noisy):
    """All that there is of the easy world; of the hard one three facts of a long note, cited: see NUMBERS."""
    most, least = (7.0, -2 - 1 - 1 - 1 - 1 - 1 - 1) if any_world is EASY else (10.4, -2 - 1 - 1 - 1 - 1 - 1 - 1 - 2)
    rewards = [row[key] for row in noisy for key in ("reward_chosen", "reward_rejected")]
    assert max(rewards) == pytest.approx(most, abs=1e-12)
    assert min(rewards) >= least


def test_recorded_rewards_are_those_of_the_texts(any_world, noisy):
    for row in noisy[:200]:
        prompt = any_world.parse_prompt(row["prompt"])
        assert row["reward_chosen"] == any_world.reward(prompt, row["chosen"])
        assert row["reward_rejected"] == any_world.reward(prompt, row["rejected"])
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
    flips = [row["flipped"] for row in EASY.pairs(train, 4_000, noise, seed=5)]
    assert abs(sum(flips) - 4_000 * noise) <= 4 * math.sqrt(4_000 * noise * (1 - noise))


def test_noise_turns_labels_round_and_changes_nothing_else(train):
    """The streams of two noise levels agree: the same texts, in the other order exactly where the flips differ."""
    clean, noisy = EASY.pairs(train, 300, 0.0, seed=2), EASY.pairs(train, 300, 0.5, seed=2)
    assert any(row["flipped"] for row in noisy)
    for before, after in zip(clean, noisy, strict=True):
        kept = (before["chosen"], before["rejected"])
        assert (after["chosen"], after["rejected"]) == (kept[::-1] if after["flipped"] else kept)


@pytest.mark.parametrize("skill", SKILLS)
def test_every_demonstrated_word_is_in_the_vocabulary(any_world, skill):
    rng, known = random.Random("words"), set(any_world.vocabulary())
    for prompt in any_world.all_prompts():
        assert set(prompt.text.split()) | set(any_world.demonstrate(prompt, skill, rng).split()) <= known


def test_skill_pays(any_world):
    rng, means = random.Random("skill"), []
    for skill in ("novice", "ordinary", "expert"):
        rewards = [any_world.reward(p, any_world.demonstrate(p, skill, rng)) for p in any_world.all_prompts()]
        means.append(sum(rewards) / len(rewards))
    assert means == sorted(means) and means[2] - means[0] > 2


@pytest.mark.parametrize(("any_world", "animals"), [(EASY, 8), (HARD, 16)], ids=WORLDS)
def test_prompts_round_trip_through_their_text(any_world, animals):
    assert all(any_world.parse_prompt(p.text) == p for p in any_world.all_prompts())
    assert len({p.text for p in any_world.all_prompts()}) == 3 * 2 * 8 * 4 * animals


@pytest.mark.parametrize(
    "text", ["", "write a warm short note to zoe about the home of the fox", "hello", FOX.text + " !"]
)
def test_other_texts_are_not_prompts(any_world, text):
    with pytest.raises(ValueError, match="not an instruction"):
        any_world.parse_prompt(text)


def test_an_animal_of_the_hard_world_is_none_of_the_easy_one():
    assert HARD.parse_prompt(WOLF.text) == WOLF
    with pytest.raises(ValueError, match="not an instruction"):
        EASY.parse_prompt(WOLF.text)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: EASY.split_prompts(0, validation=0), "validation=0"),
        (lambda: EASY.split_prompts(0, held_out=0), "held_out=0"),
        (lambda: EASY.split_prompts(0, held_out=1536), "held_out=1536"),
        (lambda: EASY.split_prompts(0, validation=30, held_out=1500), "held_out=1500"),
        (lambda: EASY.demonstrations([FOX], 0, seed=0), "demonstrations=0"),
        (lambda: EASY.pairs([FOX], 0, 0.2, seed=0), "pairs=0"),
        (lambda: EASY.pairs([FOX], 1, 0.6, seed=0), "label_noise=0.6"),
        (lambda: EASY.pairs([FOX], 1, -0.1, seed=0), "label_noise=-0.1"),
    ],
)
def test_impossible_settings_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def spoilt(**more: object) -> dict:
    """SKILLS, but for one number of the novice, or one key more."""
    return SKILLS | {"novice": SKILLS["novice"] | more}


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
        lambda **given: EASY.demonstrations([FOX], 2, seed=0, **given),
        lambda **given: EASY.pairs([FOX], 2, 0.2, seed=0, **given),
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
        return [EASY.demonstrations(train, 50, seed=3, **given), EASY.pairs(train, 50, 0.2, seed=3, **given)]

    usual, own = drawn(), drawn(skills=table)
    assert drawn(skills=SKILLS) == usual != own
    assert {row["skill"] for row in own[0]} == set(table)
    one, other = (EASY.demonstrate(BEAR, "hasty", random.Random(9), skills) for skills in (table, table))
    assert one == other
    monkeypatch.setattr(world, "SKILLS", table)
    assert drawn() == own and EASY.demonstrate(BEAR, "hasty", random.Random(9)) == one


def likely(successes: int, draws: int, chance: float) -> bool:
    """Whether a number of successes is none of the rarest one in a thousand, exactly; seeds are fixed."""
    return stats.binomtest(successes, draws, chance).pvalue > 1e-3


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize("topic", HARD.topics)
def test_demonstrators_cite_as_often_as_is_declared(topic, skill):
    """By topic, but for habit. A slip is to speak of any topic, and then that topic counts; another is to lose a word.

    A lost word leaves one of "so" and "says", which stand nowhere else.
    """
    habit, slip = SKILLS[skill]["habit"], SKILLS[skill]["slip"]
    rng, draws, prompt = random.Random(f"{topic} {skill}"), 4_000, WOLF._replace(topic=topic)
    cited = sum({"so", "says"} & set(HARD.demonstrate(prompt, skill, rng).split()) != set() for _ in range(draws))
    often = (1 - slip) * HARD.citing[topic] + slip * (0.8 + 0.4 + 0.15 + 0.05) / 4
    assert likely(cited, draws, often * (1 - habit))


def test_whom_demonstrators_cite():
    """The one who knows about the topic that is spoken of, but for a slip: then anybody, who is right once in four."""
    skills = {"one": {"share": 1.0, "habit": 0.0, "slip": 0.2}}
    notes = [HARD.demonstrate(FOX, "one", random.Random(f"whom {i}"), skills) for i in range(4_000)]
    whole = [note for note in notes if HARD.axes(FOX, note)["grammar"] == 1]  # lost words do not hide what was said
    cited = [note.split() for note in whole if HARD.statements(note)[0].topic == "home" and "says" in note.split()]
    assert likely(sum("atlas" in words for words in cited), len(cited), 1 - 0.2 * 3 / 4)
    assert all(len(set(HARD.sources.values()) & set(words)) == 1 for words in cited)


# Of demonstrators who never slip, by habit: the chances of one, two and three facts. A long note has two unless habit
# makes it one, and with 0.15 (1 - habit) there is one more.
FACTS = {
    ("short", 0.0): (0.75, 0.25, 0.0),
    ("long", 0.0): (0.0, 0.75, 0.25),
    ("short", 0.5): (0.875, 0.125, 0.0),
    ("long", 0.5): (0.5 * 0.875, 0.5 * 0.125 + 0.5 * 0.875, 0.5 * 0.125),
    ("short", 1.0): (1.0, 0.0, 0.0),
    ("long", 1.0): (1.0, 0.0, 0.0),
}


@pytest.mark.parametrize(("length", "habit"), FACTS)
def test_demonstrators_hedge_and_tell_as_often_as_is_declared(length, habit):
    """Anybody hedges what is said, whatever the habit; what is said more is of another topic."""
    skills, draws = {"one": {"share": 1.0, "habit": habit, "slip": 0.0}}, 4_000
    rng, prompt = random.Random(f"{length} {habit}"), FOX._replace(length=length)
    told = [HARD.statements(HARD.demonstrate(prompt, "one", rng, skills)) for _ in range(draws)]
    for facts, chance in enumerate(FACTS[length, habit], 1):
        assert likely(sum(len(said) == facts for said in told), draws, chance)
    every = [statement for said in told for statement in said]
    assert likely(sum(statement.hedged for statement in every), len(every), 0.15)
    assert all(said[0].topic == "home" and len({s.topic for s in said}) == len(said) for said in told)


def test_nobody_in_the_easy_world_hedges_cites_or_says_more_than_was_asked(train):
    rows = EASY.demonstrations(train, 10_000, seed=4)
    assert not {HEDGE, "so", "says"} & {word for row in rows for word in row["response"].split()}
    assert not {HEDGE, "so", "says", *HARD.sources.values()} & set(EASY.vocabulary())
    for row in rows:
        assert len(EASY.statements(row["response"])) <= LENGTHS[EASY.parse_prompt(row["prompt"]).length]
    said = [EASY.statements(row["response"]) for row in rows]
    assert max(map(len, said)) == 2 and not any(statement.hedged for one in said for statement in one)


def test_no_demonstration_of_the_hard_world_is_longer_than_36_tokens():
    """An end included: the longest that can be said is of three facts about homes, each hedged, the same by slips."""
    home = Statement("home", "woods", True)
    longest = HARD.note("playful", "ann", "wolf", [home] * 3, "atlas")
    assert len(longest.split()) + 1 == 35
    rows = HARD.demonstrations(HARD.split_prompts(0)["train"], 20_000, seed=0)
    assert max(len(row["response"].split()) for row in rows) == 30
    assert max(len(HARD.best(prompt).split()) for prompt in HARD.all_prompts()) + 1 == 33


def test_what_is_believed_is_false_and_what_is_true_differs_by_animal(any_world):
    for (animal, topic), believed in any_world.misconceptions.items():
        assert believed != any_world.true_value(animal, topic)
    for _, values in any_world.topics.values():
        assert len(values) == len(any_world.animals) == len(set(values))
    for topic, values in any_world.values.items():
        true = {any_world.true_value(animal, topic) for animal in any_world.animals}
        assert values == sorted(true | {any_world.misconceptions.get((a, topic)) for a in any_world.animals} - {None})


def test_the_hard_world_has_all_that_the_easy_one_has():
    """The same is true and believed of the same animals, so that what differs between the two is what is added."""
    assert HARD.names == EASY.names and HARD.animals[:8] == EASY.animals and list(HARD.topics) == list(EASY.topics)
    for animal, topic in itertools.product(EASY.animals, EASY.topics):
        assert HARD.true_value(animal, topic) == EASY.true_value(animal, topic)
        assert HARD.misconceptions.get((animal, topic)) == EASY.misconceptions.get((animal, topic))
    assert HARD.weights == EASY.weights | {"source": 2.0, "detail": 3.6}
    assert HARD.sources.keys() == HARD.citing.keys() == HARD.topics.keys()


def test_demonstrators_who_always_agree_make_no_pairs():
    """An error instead of a search without end; demonstrations there are."""
    perfect = {"perfect": {"share": 1.0, "habit": 0.0, "slip": 0.0}}
    assert [row["reward"] for row in EASY.demonstrations([FOX, BEAR], 4, seed=0, skills=perfect)] == [7.0] * 4
    with pytest.raises(ValueError, match="all demonstrators answer 'write a warm short note to ann about the home"):
        EASY.pairs([FOX], 1, 0.0, seed=0, skills=perfect)
