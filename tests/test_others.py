"""Responses beside a pair's own, and what kind of reply each is: by hand, in both worlds, and exhaustively."""

import random

import pytest
from prefdyn.lab import others
from prefdyn.lab.worlds import EASY, HARD

FOX = HARD.parse_prompt("write a warm long note to ann about the home of the fox")
OPENING = "dear ann , the fox lives in the den"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # the asked fact first, and one other order of the further two
        (f"{OPENING} . it is red . it eats berries", {f"{OPENING} . it eats berries . it is red"}),
        # one further fact: the topics left are food and sound
        (f"{OPENING} . it is red", {f"{OPENING} . it eats berries", f"{OPENING} . it makes a bark"}),
        (
            f"{OPENING} . it perhaps is red . so says the atlas",
            {f"{OPENING} . it perhaps {said} . so says the atlas" for said in ("eats berries", "makes a bark")},
        ),
        # a further fact that is false has no true one as poor beside it; told first, it is as false
        (f"{OPENING} . it eats grapes", {"dear ann , the fox eats grapes . it lives in the den"}),
        # not the asked fact at all: another fact than asked is worth as much
        ("dear ann , the fox is red", {"dear ann , the fox eats berries", "dear ann , the fox makes a bark"}),
        (OPENING, {None}),
    ],
)
def test_paraphrases_by_hand(text, expected):
    """All of one type and of one reward; over many seeds each of those that there are comes up."""
    texts = {None if one is None else f"{one} . with love ." for one in expected}
    found = {others.paraphrase(HARD, FOX, f"{text} . with love .", seed) for seed in range(30)}
    assert found == texts
    first = HARD.reward(FOX, f"{text} . with love .")
    for other in texts - {None}:
        assert HARD.reward(FOX, other) == pytest.approx(first)
        assert HARD.answer_type(FOX, other) == HARD.answer_type(FOX, f"{text} . with love .")


@pytest.mark.parametrize("text", ["", "ann", "dear ann the fox lives in the den . with love .", f"{OPENING} . with ."])
def test_what_is_no_whole_note_has_no_paraphrase(text):
    assert others.paraphrase(HARD, FOX, text) is None


@pytest.mark.parametrize("world", [EASY, HARD])
def test_paraphrases_of_demonstrations(world):
    """Of any demonstration: another text of the same type and reward, in the form of a note, the same for a seed."""
    prompts = world.split_prompts(0)["train"][:300]
    made = 0
    for row in world.demonstrations(prompts, 300, seed=1):
        prompt, text = world.parse_prompt(row["prompt"]), row["response"]
        other = others.paraphrase(world, prompt, text, seed=4)
        assert other == others.paraphrase(world, prompt, text, seed=4)
        if other is None:
            continue
        made += 1
        assert other != text and sorted(other) != text
        assert world.answer_type(prompt, other) == world.answer_type(prompt, text)
        assert world.reward(prompt, other) == pytest.approx(row["reward"])
        assert world.axes(prompt, other)["grammar"] == 1
    assert 60 < made < 240


def test_words_in_another_order():
    mixed = others.permuted("a b c d e f", seed=3)
    assert mixed != "a b c d e f" and sorted(mixed.split()) == list("abcdef")
    assert mixed == others.permuted("a b c d e f", seed=3)
    assert len({others.permuted("a b c d e f", seed=seed) for seed in range(20)}) > 10
    assert {others.permuted("a b", seed) for seed in range(10)} == {"b a"}
    assert [others.permuted(text, 0) for text in ("", "a", "a a a")] == [None] * 3


def test_responses_beside_pairs():
    rows = [
        {"prompt": FOX.text, "chosen": f"{OPENING} . it is red . with love .", "rejected": "dear ann . with love ."},
        {"prompt": FOX.text, "chosen": f"{OPENING} . with love .", "rejected": f"{OPENING} . it is red . with love ."},
    ]
    found = others.beside(HARD, rows, seed=2)
    assert tuple(found) == others.SORTS
    assert found["chosen"] == [row["chosen"] for row in rows] and found["rejected"] == [r["rejected"] for r in rows]
    assert found["other prompt"] == [rows[1]["chosen"], rows[0]["chosen"]]
    assert found["paraphrase"] == [others.paraphrase(HARD, FOX, rows[0]["chosen"], 2), None]
    assert found["permuted"] == [others.permuted(row["chosen"], 2) for row in rows]
    assert others.beside(None, rows)["paraphrase"] == [None, None]
    with pytest.raises(ValueError, match="given 1 pairs"):
        others.beside(HARD, rows[:1])


def test_a_paraphrase_is_not_the_rejected_response():
    """Of the two further facts that are left, the rejected response tells one."""
    rows = [
        {"prompt": FOX.text, "chosen": f"{OPENING} . it is red . with love .", "rejected": rejected}
        for rejected in (f"{OPENING} . it eats berries . with love .", "dear ann . with love .")
    ]
    found = {others.beside(HARD, rows, seed)["paraphrase"][0] for seed in range(20)}
    assert found == {f"{OPENING} . it makes a bark . with love ."}


CHOSEN = f"{OPENING} . it is red . with love ."  # right, bold, two facts, uncited
REJECTED = "dear ann , the fox lives in the barn . with love ."  # popular, bold, one fact, uncited


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (CHOSEN, "chosen's kind"),
        ("hey ben , the owl lives in the den . it eats berries . see you soon .", "chosen's kind"),
        (REJECTED, "rejected's kind"),
        (f"{OPENING} . it is red . it eats berries . so says the atlas . with love .", "better than both"),
        (f"{OPENING} . with love .", "between"),
        ("hey ben , the owl lives in the sea . see you soon .", "worse than both"),
        ("dear ann , the fox lives in the den it is red . with love .", "ungrammatical"),  # of the chosen's type
        ("dear ann . with love .", "ungrammatical"),  # nothing said: no type
        ("", "ungrammatical"),
    ],
)
def test_kinds_by_hand(reply, expected):
    """The asked fact earns 2 or -2; animal, tone, person, grammar and length 1 each; one detail a third of 3.6.

    So chosen earns 2 + 5 + 1.2 and rejected, too short for a long note, -2 + 4; between lies the right fact alone.
    """
    assert others.standing(HARD, FOX, CHOSEN).reward == pytest.approx(8.2)
    assert others.standing(HARD, FOX, REJECTED).reward == pytest.approx(2.0)
    assert others.standing(HARD, FOX, f"{OPENING} . with love .").reward == pytest.approx(6.0)
    assert others.kind_of(HARD, FOX, reply, CHOSEN, REJECTED) == expected


def test_a_kind_that_both_share():
    near = REJECTED.replace("ann", "ben")
    assert others.kind_of(HARD, FOX, REJECTED, REJECTED, near) == "both's kind"
    assert others.kind_of(HARD, FOX, CHOSEN, REJECTED, near) == "better than both"
    # as good as the better of two: between, bounds included
    right = f"{OPENING} . it is red . with love ."
    assert (
        others.kind_of(HARD, FOX, right, right.replace("it is red", "it perhaps is red"), REJECTED) == "chosen's kind"
    )
    cited = "dear ann , the fox lives in the den . so says the atlas . with love ."
    same = others.standing(HARD, FOX, cited).reward
    assert others.kind_of(HARD, FOX, cited, "", cited.replace("with love", "with")) != "better than both" or same > 0


@pytest.mark.parametrize("world", [EASY, HARD])
def test_every_reply_is_of_one_kind(world):
    """Random replies, many of them broken, against random pairs: each is of one of KINDS, worked out another way."""
    rng = random.Random(0)
    prompts = world.split_prompts(0)["train"]
    pairs = world.pairs(prompts, 60, 0.2, seed=0)
    seen = set()
    for pair in pairs:
        prompt = world.parse_prompt(pair["prompt"])
        for _ in range(40):
            skill = rng.choice(["novice", "ordinary", "expert"])
            words = world.demonstrate(rng.choice([prompt, rng.choice(prompts)]), skill, rng).split()
            if rng.random() < 0.2:
                rng.shuffle(words)
            reply = " ".join(words[: rng.choice([None, None, None, 4])])
            found = others.kind_of(world, prompt, reply, pair["chosen"], pair["rejected"])
            types = [world.answer_type(prompt, text) for text in (reply, pair["chosen"], pair["rejected"])]
            points = [world.reward(prompt, text) for text in (reply, pair["chosen"], pair["rejected"])]
            sound = types[0] is not None and world.axes(prompt, reply)["grammar"] == 1
            other = sound and types[0] not in types[1:]
            holds = {
                "ungrammatical": not sound,
                "both's kind": sound and types[0] == types[1] == types[2],
                "chosen's kind": sound and types[0] == types[1] != types[2],
                "rejected's kind": sound and types[0] == types[2] != types[1],
                "better than both": other and points[0] > max(points[1:]),
                "worse than both": other and points[0] < min(points[1:]),
                "between": other and min(points[1:]) <= points[0] <= max(points[1:]),
            }
            assert holds.keys() == set(others.KINDS) and [k for k, true in holds.items() if true] == [found]
            seen.add(found)
    assert seen == set(others.KINDS)
