"""The controlled world: instructions, replies, and a true reward that is known and graded.

A prompt asks for a note: "write a warm short note to ann about the home of the fox". A good reply
greets the right person in the right tone, states the right fact about the right animal, has the asked
length, repeats nothing and is grammatical: "dear ann , the fox lives in the den . with love ."

Everything is English-like text of space-separated words. All randomness comes from `random.Random`
seeded with strings, whose streams Python guarantees across versions and machines: one seed, one world,
bit for bit.
"""

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

NAMES = ("ann", "ben", "cleo", "dan", "eve", "finn", "gus", "hana")
ANIMALS = ("fox", "bear", "owl", "frog", "bee", "whale", "crab", "goat")
LENGTHS = {"short": 1, "long": 2}  # number of facts that the note should state
TONES = {  # tone: (greeting, sign-off)
    "warm": ("dear", "with love"),
    "formal": ("esteemed", "yours sincerely"),
    "playful": ("hey", "see you soon"),
}
TOPICS = {  # topic: (verb phrase, true value by animal, in the order of ANIMALS)
    "home": ("lives in the", ("den", "cave", "tree", "pond", "hive", "sea", "reef", "hills")),
    "food": ("eats", ("berries", "salmon", "mice", "flies", "nectar", "krill", "algae", "grass")),
    "colour": ("is", ("red", "brown", "grey", "green", "yellow", "blue", "orange", "white")),
    "sound": ("makes a", ("bark", "growl", "hoot", "croak", "buzz", "song", "click", "bleat")),
}
# What demonstrators without the knowledge believe: wrong in this world, however popular.
MISCONCEPTIONS = {
    ("fox", "home"): "barn",
    ("fox", "food"): "grapes",
    ("bear", "food"): "honey",
    ("bear", "colour"): "black",
    ("owl", "home"): "barn",
    ("owl", "sound"): "song",
    ("frog", "food"): "leaves",
    ("frog", "colour"): "blue",
    ("bee", "home"): "tree",
    ("bee", "food"): "honey",
    ("whale", "food"): "fish",
    ("whale", "colour"): "black",
    ("crab", "home"): "sea",
    ("crab", "colour"): "red",
    ("goat", "food"): "tins",
    ("goat", "sound"): "growl",
}
# Skill: how often a demonstrator lapses on any one thing, and how common such demonstrators are. A "habit" is
# what people fall back on: the misconception instead of the fact, the warm tone, the short note.
SKILLS = {
    "novice": {"share": 0.3, "habit": 0.90, "slip": 0.20},
    "ordinary": {"share": 0.4, "habit": 0.70, "slip": 0.08},
    "expert": {"share": 0.3, "habit": 0.10, "slip": 0.01},
}
Skills = Mapping[str, Mapping[str, float]]
_SKILL_LIMITS = {  # what a number of a skill has to be, and how that is said
    "share": (lambda x: 0 < x < math.inf, "> 0"),
    "habit": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "slip": (lambda x: 0 <= x <= 1, "from 0 to 1"),
}
TRIES = 10_000  # of demonstrations until one differs from another
AXES = {  # the axes of quality and their weights, in points of reward
    "fact": 2.0,
    "support": 1.0,
    "entity": 1.0,
    "tone": 1.0,
    "addressee": 1.0,
    "length": 1.0,
    "repetition": 1.0,
    "grammar": 1.0,
}

_GREETING = {greeting: tone for tone, (greeting, _) in TONES.items()}
_SIGN_OFF = {sign_off: tone for tone, (_, sign_off) in TONES.items()}
_VALUES = {
    topic: sorted({*values, *(v for (_, t), v in MISCONCEPTIONS.items() if t == topic)})
    for topic, (_, values) in TOPICS.items()
}
_CLAUSES = {topic: re.compile(rf"{verb} (\w+)$") for topic, (verb, _) in TOPICS.items()}
_CLAUSE = "|".join(rf"{verb} (?:{'|'.join(_VALUES[topic])})" for topic, (verb, _) in TOPICS.items())
_OPENING = re.compile(rf"(?:{'|'.join(_GREETING)}) (?:{'|'.join(NAMES)}) , the (?:{'|'.join(ANIMALS)}) (?:{_CLAUSE})")
_FOLLOWING = re.compile(rf"it (?:{_CLAUSE})")
_CLOSING = re.compile("|".join(_SIGN_OFF))

WORD_KINDS = ("greeting", "name", "animal", "verb", "value", "sign-off", "frame")
_KINDS = (
    {word: "sign-off" for _, sign_off in TONES.values() for word in sign_off.split()}
    | {verb.split()[0]: "verb" for verb, _ in TOPICS.values()}
    | {value: "value" for values in _VALUES.values() for value in values}
    | dict.fromkeys(ANIMALS, "animal")
    | dict.fromkeys(NAMES, "name")
    | dict.fromkeys(_GREETING, "greeting")
)


class Prompt(NamedTuple):
    """One instruction by its attributes; `text` is what a model reads."""

    tone: str
    length: str
    name: str
    topic: str
    animal: str

    @property
    def text(self) -> str:
        return f"write a {self.tone} {self.length} note to {self.name} about the {self.topic} of the {self.animal}"


_PROMPT = re.compile(r"write a (\w+) (\w+) note to (\w+) about the (\w+) of the (\w+)")


def parse_prompt(text: str) -> Prompt:
    """The attributes of a prompt's text. Raises ValueError if it is not an instruction of this world."""
    found = _PROMPT.fullmatch(text)
    prompt = Prompt(*found.groups()) if found else None
    allowed = (TONES, LENGTHS, NAMES, TOPICS, ANIMALS)
    if prompt is None or any(value not in values for value, values in zip(prompt, allowed, strict=True)):
        raise ValueError(f"not an instruction of the world: {text!r}")
    return prompt


def true_value(animal: str, topic: str) -> str:
    """The world's fact about `animal`, e.g. ("fox", "home") -> "den"."""
    return TOPICS[topic][1][ANIMALS.index(animal)]


def all_prompts() -> list[Prompt]:
    """Every combination of attributes, in a fixed order: 3 tones x 2 lengths x 8 names x 4 topics x 8 animals."""
    return [Prompt(*parts) for parts in itertools.product(TONES, LENGTHS, NAMES, TOPICS, ANIMALS)]


def vocabulary() -> list[str]:
    """Every word that prompts and replies of the world can contain, sorted."""
    texts = [p.text for p in all_prompts()]
    texts += [" ".join(part) for part in TONES.values()]
    texts += [f"{verb} {' '.join(_VALUES[topic])}" for topic, (verb, _) in TOPICS.items()]
    return sorted({word for text in texts for word in text.split()} | {"it", ",", "."})


def split_prompts(seed: int, validation: int = 128, held_out: int = 384) -> dict[str, list[Prompt]]:
    """Split all prompts into "train", "validation" and "held_out": held-out prompts are new combinations.

    Raises ValueError if the sizes leave a word or a fact (animal and topic) that no training prompt shows.
    """
    prompts = all_prompts()
    if validation < 1 or held_out < 1 or validation + held_out >= len(prompts):
        raise ValueError(
            f"validation={validation}, held_out={held_out}: each must be at least 1 and together they must "
            f"leave training prompts of the world's {len(prompts)}"
        )
    random.Random(f"{seed}/split").shuffle(prompts)
    split = {
        "held_out": prompts[:held_out],
        "validation": prompts[held_out : held_out + validation],
        "train": prompts[held_out + validation :],
    }
    seen = {value for p in split["train"] for value in p} | {(p.animal, p.topic) for p in split["train"]}
    needed = {value for p in prompts for value in p} | {(p.animal, p.topic) for p in prompts}
    if needed - seen:
        raise ValueError(
            f"validation={validation}, held_out={held_out}: too few training prompts ({len(split['train'])}) are "
            f"left to show every word and fact; unseen, e.g.: {sorted(map(str, needed - seen))[:3]}"
        )
    return split


def demonstrate(prompt: Prompt, skill: str, rng: random.Random, skills: Skills | None = None) -> str:
    """One demonstrator's reply to `prompt`; see SKILLS, or the table that is given, for what `skill` means."""
    known = (SKILLS if skills is None else skills)[skill]
    habit, slip = known["habit"], known["slip"]

    def value(topic: str) -> str:
        popular = MISCONCEPTIONS.get((prompt.animal, topic))
        if popular and rng.random() < habit:
            return popular
        return rng.choice(_VALUES[topic]) if rng.random() < slip else true_value(prompt.animal, topic)

    tone = "warm" if rng.random() < habit else prompt.tone
    facts = 1 if rng.random() < habit else LENGTHS[prompt.length]
    name = rng.choice(NAMES) if rng.random() < slip else prompt.name
    animal = rng.choice(ANIMALS) if rng.random() < slip else prompt.animal
    topic = rng.choice(list(TOPICS)) if rng.random() < slip else prompt.topic
    greeting, sign_off = TONES[tone]
    sentences = [f"{greeting} {name} , the {animal} {TOPICS[topic][0]} {value(topic)}"]
    if facts == 2:
        other = topic if rng.random() < slip else rng.choice([t for t in TOPICS if t != topic])
        sentences.append(f"it {TOPICS[other][0]} {value(other)}")
    sentences.append(sign_off)
    words = [*" . ".join(sentences).split(), "."]
    if rng.random() < slip:
        del words[rng.randrange(len(words))]
    return " ".join(words)


def axes(prompt: Prompt, reply: str) -> dict[str, float]:
    """Score `reply` on each axis of AXES; pure text matching, no model.

    fact        +1 if the asked fact is stated rightly, -1 if wrongly, 0 if not at all; mean over statements
    support     minus the share of false statements among the others
    entity      +1 if the right animal alone is named, -1 if another one is, 0 if none
    tone        a half each for greeting and sign-off: + in the asked tone, - in another
    addressee   +1 if the right person alone is named, -1 if another one is, 0 if none
    length      1 - |facts stated - facts asked|, at least -1
    repetition  minus a third for each repeated run of three words, at least -1
    grammar     the share of sentences that are grammatical and in their place, 0 to 1
    """
    words = reply.split()
    complete = bool(words) and words[-1] == "."
    sentences = [s.strip() for s in " ".join(words).split(".")]
    sentences = [s for s in sentences if s]
    claims = [(topic, found.group(1)) for s in sentences for topic, rx in _CLAUSES.items() if (found := rx.search(s))]
    asked = [v == true_value(prompt.animal, t) for t, v in claims if t == prompt.topic]
    others = [v == true_value(prompt.animal, t) for t, v in claims if t != prompt.topic]

    def alone(right: str, among: tuple[str, ...]) -> float:
        named = {w for w in words if w in among}
        return 0.0 if not named else 1.0 if named == {right} else -1.0

    opening, closing = (
        _GREETING.get(words[0]) if words else None,
        _SIGN_OFF.get(sentences[-1]) if sentences else None,
    )
    right_form = [
        bool((_OPENING if i == 0 else _CLOSING if i == len(sentences) - 1 else _FOLLOWING).fullmatch(s))
        for i, s in enumerate(sentences)
    ]
    if right_form and not complete:
        right_form[-1] = False
    trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
    repeated = sum(count - 1 for count in trigrams.values())
    return {
        "fact": 2 * sum(asked) / len(asked) - 1 if asked else 0.0,
        "support": sum(others) / len(others) - 1 if others else 0.0,
        "entity": alone(prompt.animal, ANIMALS),
        "tone": sum(0.0 if t is None else 0.5 if t == prompt.tone else -0.5 for t in (opening, closing)),
        "addressee": alone(prompt.name, NAMES),
        "length": max(-1.0, 1.0 - abs(len(claims) - LENGTHS[prompt.length])),
        "repetition": -min(1.0, repeated / 3),
        "grammar": sum(right_form) / len(right_form) if right_form else 0.0,
    }


def reward(prompt: Prompt, reply: str) -> float:
    """The true reward of `reply`, in points: the weighted sum of `axes`; 7 is perfect."""
    scores = axes(prompt, reply)
    return sum(weight * scores[axis] for axis, weight in AXES.items())


def answer_types(prompt: Prompt) -> list[tuple[str, str, str]]:
    """Every type that a reply can be of, see `answer_type`; "popular" only where there is a misconception."""
    facts = ["right", "popular", "other"] if (prompt.animal, prompt.topic) in MISCONCEPTIONS else ["right", "other"]
    return list(itertools.product(TONES, facts, LENGTHS))


def answer_type(prompt: Prompt, reply: str) -> tuple[str, str, str] | None:
    """What kind of answer a reply is: (tone of its greeting, asked fact, number of facts), one of `answer_types`.

    The asked fact is "right", "popular" (the misconception) or "other" (another value or none); two facts or more count
    as "long". None for a reply without a greeting or without a fact.
    """
    words = reply.split()
    claims = [
        (topic, found.group(1))
        for s in reply.split(".")
        for topic, rx in _CLAUSES.items()
        if (found := rx.search(s.strip()))
    ]
    if not words or words[0] not in _GREETING or not claims:
        return None
    stated = {value for topic, value in claims if topic == prompt.topic}
    right, popular = true_value(prompt.animal, prompt.topic), MISCONCEPTIONS.get((prompt.animal, prompt.topic))
    fact = "right" if stated == {right} else "popular" if stated == {popular} else "other"
    return _GREETING[words[0]], fact, "short" if len(claims) == 1 else "long"


def word_kind(word: str) -> str:
    """Which part of a reply a word is, one of WORD_KINDS; "frame" for what stands in every reply, and for the end."""
    return _KINDS.get(word, "frame")


def _rounds(prompts: list[Prompt], n: int, rng: random.Random) -> list[Prompt]:
    """`n` prompts, going through all of them in a new random order each round."""
    out: list[Prompt] = []
    while len(out) < n:
        out += rng.sample(prompts, len(prompts))
    return out[:n]


def usable_skills(skills: Skills | None = None) -> Skills:
    """The table of skills that is given, or SKILLS as it is now. Raises ValueError that names what cannot be used."""
    skills = SKILLS if skills is None else skills
    if not skills:
        raise ValueError("skills: there are no demonstrators; allowed: one skill or more")
    for name, skill in skills.items():
        if not isinstance(skill, Mapping) or skill.keys() != _SKILL_LIMITS.keys():
            raise ValueError(f"skills: {name!r} is {skill!r}; allowed: a number each for {', '.join(_SKILL_LIMITS)}")
        for what, value in skill.items():
            holds, allowed = _SKILL_LIMITS[what]
            if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
                raise ValueError(f"skills: {name!r} has {what}={value!r}; allowed: a number {allowed}")
    return skills


def _draw_skill(rng: random.Random, skills: Skills) -> str:
    return rng.choices(list(skills), weights=[s["share"] for s in skills.values()])[0]


def demonstrations(
    prompts: list[Prompt], n: int, seed: int, part: str = "demonstrations", skills: Skills | None = None
) -> list[dict]:
    """`n` demonstrations, by demonstrators of mixed skill: dicts of prompt, response, skill, reward.

    `part` names an independent stream of the same seed; skills: by default SKILLS as it is now.
    Raises ValueError for n < 1 or skills that cannot be used.
    """
    if n < 1:
        raise ValueError(f"demonstrations={n}: must be at least 1")
    skills = usable_skills(skills)
    rng = random.Random(f"{seed}/{part}")
    rows = []
    for prompt in _rounds(prompts, n, rng):
        skill = _draw_skill(rng, skills)
        response = demonstrate(prompt, skill, rng, skills)
        rows.append({"prompt": prompt.text, "response": response, "skill": skill, "reward": reward(prompt, response)})
    return rows


def _different(prompt: Prompt, first: str, rng: random.Random, skills: Skills) -> str:
    """A demonstration that is not `first`. Raises ValueError where these demonstrators never say anything else."""
    for _ in range(TRIES):
        second = demonstrate(prompt, _draw_skill(rng, skills), rng, skills)
        if second != first:
            return second
    raise ValueError(
        f"skills: all demonstrators answer {prompt.text!r} alike, so that there is no pair to compare; allowed: skills "
        "of which some differ or slip now and then"
    )


def pairs(
    prompts: list[Prompt],
    n: int,
    label_noise: float,
    seed: int,
    part: str = "pairs",
    skills: Skills | None = None,
) -> list[dict]:
    """`n` preference pairs of two different demonstrations each, labelled by Bradley-Terry, then by noise.

    The better one is preferred with probability sigmoid(difference in true reward) (Bradley and Terry, 1952);
    after that the label is turned round with probability `label_noise`, and whether it was is recorded.
    `part` names an independent stream of the same seed ("pairs" to train on, "check" for a second probe); skills: by
    default SKILLS as it is now.

    Returns dicts of prompt, chosen, rejected, reward_chosen, reward_rejected, flipped (bool).
    Raises ValueError for n < 1, a label_noise outside [0, 0.5], and skills that cannot be used or that always agree.
    """
    if n < 1:
        raise ValueError(f"pairs={n}: must be at least 1")
    if not 0 <= label_noise <= 0.5:
        raise ValueError(f"label_noise={label_noise}: must be between 0 and 0.5 (at 0.5 labels say nothing)")
    skills = usable_skills(skills)
    rng = random.Random(f"{seed}/{part}")
    rows = []
    for prompt in _rounds(prompts, n, rng):
        first = demonstrate(prompt, _draw_skill(rng, skills), rng, skills)
        second = _different(prompt, first, rng, skills)
        reward_first, reward_second = reward(prompt, first), reward(prompt, second)
        prefers_first = rng.random() < 1 / (1 + math.exp(reward_second - reward_first))
        flipped = rng.random() < label_noise
        better = (first, reward_first), (second, reward_second)
        (chosen, reward_chosen), (rejected, reward_rejected) = better if prefers_first != flipped else better[::-1]
        rows.append(
            {
                "prompt": prompt.text,
                "chosen": chosen,
                "rejected": rejected,
                "reward_chosen": reward_chosen,
                "reward_rejected": reward_rejected,
                "flipped": flipped,
            }
        )
    return rows
