"""The controlled world: instructions, replies, and a true reward that is known and graded.

A prompt asks for a note: "write a warm short note to ann about the home of the fox". A good reply
greets the right person in the right tone, states the right fact about the right animal, has the asked
length, repeats nothing and is grammatical: "dear ann , the fox lives in the den . with love ."

The hard world asks for more and hides some of it. A fact may be hedged ("perhaps"), which risks less and earns less; a
note may name the one who knows ("so says the atlas"), which hardly anybody does and is worth most; and further true
facts are worth points, which pulls against the asked length.

Everything is English-like text of space-separated words. All randomness comes from `random.Random`
seeded with strings, whose streams Python guarantees across versions and machines: one seed, one world,
bit for bit.
"""

import functools
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LENGTHS = {"short": 1, "long": 2}  # number of facts that the note should state
TONES = {  # tone: (greeting, sign-off)
    "warm": ("dear", "with love"),
    "formal": ("esteemed", "yours sincerely"),
    "playful": ("hey", "see you soon"),
}
HEDGE = "perhaps"
WORD_KINDS = ("greeting", "name", "animal", "verb", "value", "source", "hedge", "sign-off", "frame")
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
HEDGED = (0.4, 0.2)  # what a hedged fact earns, and loses, of what a bold one does


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


class Statement(NamedTuple):
    """What a sentence of a reply says of an animal."""

    topic: str
    value: str
    hedged: bool


_PROMPT = re.compile(r"write a (\w+) (\w+) note to (\w+) about the (\w+) of the (\w+)")
_GREETING = {greeting: tone for tone, (greeting, _) in TONES.items()}
_SIGN_OFF = {sign_off: tone for tone, (_, sign_off) in TONES.items()}
_CLOSING = re.compile("|".join(_SIGN_OFF))


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


@dataclass(frozen=True, eq=False)
class World:
    """What there is to say and what it is worth.

    topics: (verb phrase, true value by animal, in the order of `animals`) of each. misconceptions: (animal, topic) to
    what demonstrators without the knowledge believe: wrong in this world, however popular. weights: the axes of quality
    and their weights, in points of reward. sources: who knows about a topic; where there are none, nobody hedges either
    and nobody says more than was asked. citing, telling: how often a demonstrator who has no habits names the
    source (by topic) and tells a fact more; hedging: how often anybody hedges.
    """

    difficulty: str
    names: tuple[str, ...]
    animals: tuple[str, ...]
    topics: Mapping[str, tuple[str, tuple[str, ...]]]
    misconceptions: Mapping[tuple[str, str], str]
    weights: Mapping[str, float]
    sources: Mapping[str, str] = field(default_factory=dict)
    citing: Mapping[str, float] = field(default_factory=dict)
    hedging: float = 0.0
    telling: float = 0.0

    @functools.cached_property
    def values(self) -> dict[str, list[str]]:
        """All values of each topic, true and believed, sorted."""
        return {
            topic: sorted({*values, *(v for (_, t), v in self.misconceptions.items() if t == topic)})
            for topic, (_, values) in self.topics.items()
        }

    @functools.cached_property
    def _clauses(self) -> dict[str, re.Pattern]:
        hedge = rf"(?P<hedge>{HEDGE} )?" if self.sources else "(?P<hedge>)"
        return {topic: re.compile(rf"{hedge}{verb} (\w+)$") for topic, (verb, _) in self.topics.items()}

    @functools.cached_property
    def _forms(self) -> tuple[re.Pattern, re.Pattern]:
        """What an opening sentence looks like, and one that follows."""
        clause = "|".join(rf"{verb} (?:{'|'.join(self.values[topic])})" for topic, (verb, _) in self.topics.items())
        said = rf"(?:{HEDGE} )?(?:{clause})" if self.sources else rf"(?:{clause})"
        people, animals = "|".join(self.names), "|".join(self.animals)
        cited = rf"|so says the (?:{'|'.join(self.sources.values())})" if self.sources else ""
        opening = rf"(?:{'|'.join(_GREETING)}) (?:{people}) , the (?:{animals}) {said}"
        return re.compile(opening), re.compile(rf"it {said}{cited}")

    @functools.cached_property
    def _kinds(self) -> dict[str, str]:
        return (
            {word: "sign-off" for _, sign_off in TONES.values() for word in sign_off.split()}
            | {verb.split()[0]: "verb" for verb, _ in self.topics.values()}
            | {value: "value" for values in self.values.values() for value in values}
            | dict.fromkeys(self.animals, "animal")
            | dict.fromkeys(self.names, "name")
            | dict.fromkeys(_GREETING, "greeting")
            | dict.fromkeys(self.sources.values(), "source")
            | ({HEDGE: "hedge"} if self.sources else {})
        )

    @functools.cached_property
    def word_kinds(self) -> tuple[str, ...]:
        """Those of WORD_KINDS that this world has."""
        return tuple(kind for kind in WORD_KINDS if kind == "frame" or kind in self._kinds.values())

    def word_kind(self, word: str) -> str:
        """Which part of a reply a word is, one of WORD_KINDS; "frame" for what stands in every reply, and the end."""
        return self._kinds.get(word, "frame")

    def parse_prompt(self, text: str) -> Prompt:
        """The attributes of a prompt's text. Raises ValueError if it is not an instruction of this world."""
        found = _PROMPT.fullmatch(text)
        prompt = Prompt(*found.groups()) if found else None
        allowed = (TONES, LENGTHS, self.names, self.topics, self.animals)
        if prompt is None or any(value not in values for value, values in zip(prompt, allowed, strict=True)):
            raise ValueError(f"not an instruction of the world: {text!r}")
        return prompt

    def true_value(self, animal: str, topic: str) -> str:
        """The world's fact about `animal`, e.g. ("fox", "home") -> "den"."""
        return self.topics[topic][1][self.animals.index(animal)]

    def all_prompts(self) -> list[Prompt]:
        """Every combination of attributes, in a fixed order."""
        return [Prompt(*parts) for parts in itertools.product(TONES, LENGTHS, self.names, self.topics, self.animals)]

    def vocabulary(self) -> list[str]:
        """Every word that prompts and replies of the world can contain, sorted."""
        texts = [p.text for p in self.all_prompts()]
        texts += [" ".join(part) for part in TONES.values()]
        texts += [f"{verb} {' '.join(self.values[topic])}" for topic, (verb, _) in self.topics.items()]
        texts += [f"so says the {who} {HEDGE}" for who in self.sources.values()]
        return sorted({word for text in texts for word in text.split()} | {"it", ",", "."})

    def split_prompts(self, seed: int, validation: int = 128, held_out: int = 384) -> dict[str, list[Prompt]]:
        """Split all prompts into "train", "validation" and "held_out": held-out prompts are new combinations.

        Raises ValueError if the sizes leave a word or a fact (animal and topic) that no training prompt shows.
        """
        prompts = self.all_prompts()
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

    def note(self, tone: str, name: str, animal: str, said: Sequence[Statement], source: str | None = None) -> str:
        """A whole note that states these things, the first of which names the animal."""
        greeting, sign_off = TONES[tone]
        clauses = [f"{HEDGE + ' ' if s.hedged else ''}{self.topics[s.topic][0]} {s.value}" for s in said]
        sentences = [f"{greeting} {name} , the {animal} {clauses[0]}", *(f"it {clause}" for clause in clauses[1:])]
        sentences += [f"so says the {source}"] if source else []
        return " . ".join([*sentences, sign_off]) + " ."

    def demonstrate(self, prompt: Prompt, skill: str, rng: random.Random, skills: Skills | None = None) -> str:
        """One demonstrator's reply to `prompt`; see SKILLS, or the table that is given, for what `skill` means."""
        known = (SKILLS if skills is None else skills)[skill]
        habit, slip = known["habit"], known["slip"]

        def value(topic: str) -> str:
            popular = self.misconceptions.get((prompt.animal, topic))
            if popular and rng.random() < habit:
                return popular
            return rng.choice(self.values[topic]) if rng.random() < slip else self.true_value(prompt.animal, topic)

        def stated(topic: str) -> Statement:
            said = value(topic)
            return Statement(topic, said, self.hedging > 0 and rng.random() < self.hedging)

        tone = "warm" if rng.random() < habit else prompt.tone
        facts = 1 if rng.random() < habit else LENGTHS[prompt.length]
        if self.telling:
            facts += rng.random() < self.telling * (1 - habit)
        name = rng.choice(self.names) if rng.random() < slip else prompt.name
        animal = rng.choice(self.animals) if rng.random() < slip else prompt.animal
        topic = rng.choice(list(self.topics)) if rng.random() < slip else prompt.topic
        said = [stated(topic)]
        while len(said) < facts:
            left = [t for t in self.topics if t not in {s.topic for s in said}]
            said.append(stated(topic if rng.random() < slip else rng.choice(left)))
        source = None
        if self.citing and rng.random() < self.citing[topic] * (1 - habit):
            source = rng.choice(list(self.sources.values())) if rng.random() < slip else self.sources[topic]
        words = self.note(tone, name, animal, said, source).split()
        if rng.random() < slip:
            del words[rng.randrange(len(words))]
        return " ".join(words)

    def statements(self, reply: str) -> list[Statement]:
        """What the sentences of a reply say, by pure text matching."""
        sentences = [s.strip() for s in " ".join(reply.split()).split(".")]
        return [
            Statement(topic, found.group(2), bool(found.group("hedge")))
            for sentence in sentences
            for topic, pattern in self._clauses.items()
            if (found := pattern.search(sentence))
        ]

    def axes(self, prompt: Prompt, reply: str) -> dict[str, float]:
        """Score `reply` on each axis of `weights`; pure text matching, no model.

        fact        +1 if the asked fact is stated rightly, -1 if wrongly, 0 if not at all; hedged, +HEDGED[0] and
                    -HEDGED[1]; mean over statements
        support     minus the share of false statements among the others
        entity      +1 if the right animal alone is named, -1 if another one is, 0 if none
        tone        a half each for greeting and sign-off: + in the asked tone, - in another
        addressee   +1 if the right person alone is named, -1 if another one is, 0 if none
        length      1 - |facts stated - facts asked|, at least -1
        repetition  minus a third for each repeated run of three words, at least -1
        grammar     the share of sentences that are grammatical and in their place, 0 to 1
        source      +1 if the one who knows about the topic alone is named, -1 if another one is, 0 if none
        detail      a third for each other topic of which something true is stated, at most 1
        """
        words = reply.split()
        complete = bool(words) and words[-1] == "."
        sentences = [s.strip() for s in " ".join(words).split(".")]
        sentences = [s for s in sentences if s]
        said = self.statements(reply)
        true = [s.value == self.true_value(prompt.animal, s.topic) for s in said]
        asked = [(s.hedged, right) for s, right in zip(said, true, strict=True) if s.topic == prompt.topic]
        fact = 2 * sum(right for _, right in asked) / len(asked) - 1 if asked else 0.0
        if any(hedged for hedged, _ in asked):
            worth = {(True, True): HEDGED[0], (True, False): -HEDGED[1], (False, True): 1.0, (False, False): -1.0}
            fact = sum(worth[one] for one in asked) / len(asked)
        others = [right for s, right in zip(said, true, strict=True) if s.topic != prompt.topic]
        told = {s.topic for s, right in zip(said, true, strict=True) if right and s.topic != prompt.topic}

        def alone(right: str, among: Collection[str]) -> float:
            named = {w for w in words if w in among}
            return 0.0 if not named else 1.0 if named == {right} else -1.0

        opening, closing = (
            _GREETING.get(words[0]) if words else None,
            _SIGN_OFF.get(sentences[-1]) if sentences else None,
        )
        first, following = self._forms
        right_form = [
            bool((first if i == 0 else _CLOSING if i == len(sentences) - 1 else following).fullmatch(s))
            for i, s in enumerate(sentences)
        ]
        if right_form and not complete:
            right_form[-1] = False
        trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
        repeated = sum(count - 1 for count in trigrams.values())
        scores = {
            "fact": fact,
            "support": sum(others) / len(others) - 1 if others else 0.0,
            "entity": alone(prompt.animal, self.animals),
            "tone": sum(0.0 if t is None else 0.5 if t == prompt.tone else -0.5 for t in (opening, closing)),
            "addressee": alone(prompt.name, self.names),
            "length": max(-1.0, 1.0 - abs(len(said) - LENGTHS[prompt.length])),
            "repetition": -min(1.0, repeated / 3),
            "grammar": sum(right_form) / len(right_form) if right_form else 0.0,
        }
        if self.sources:
            scores["source"] = alone(self.sources[prompt.topic], set(self.sources.values()))
            scores["detail"] = min(1.0, len(told) / 3)
        return {axis: scores[axis] for axis in self.weights}

    def reward(self, prompt: Prompt, reply: str) -> float:
        """The true reward of `reply`, in points: the weighted sum of `axes`."""
        scores = self.axes(prompt, reply)
        return sum(weight * scores[axis] for axis, weight in self.weights.items())

    def best(self, prompt: Prompt) -> str:
        """A reply to `prompt` that earns most: of bold true notes, cited or not, with the fewest facts."""
        order = [prompt.topic, *(topic for topic in self.topics if topic != prompt.topic)]
        true = [Statement(topic, self.true_value(prompt.animal, topic), False) for topic in order]
        notes = [
            self.note(prompt.tone, prompt.name, prompt.animal, true[:facts], source)
            for facts in range(1, len(true) + 1)
            for source in (None, self.sources.get(prompt.topic))
        ]
        return max(notes, key=lambda note: self.reward(prompt, note))

    def answer_types(self, prompt: Prompt) -> list[tuple[str, ...]]:
        """Every type that a reply can be of, see `answer_type`; "popular" only where there is a misconception."""
        known = (prompt.animal, prompt.topic) in self.misconceptions
        facts = ["right", "popular", "other"] if known else ["right", "other"]
        if not self.sources:
            return list(itertools.product(TONES, facts, LENGTHS))
        return list(itertools.product(facts, ("bold", "hedged"), ("one", "two", "more"), ("cited", "uncited")))

    def answer_type(self, prompt: Prompt, reply: str) -> tuple[str, ...] | None:
        """What kind of answer a reply is, one of `answer_types`.

        Of the easy world (tone of its greeting, asked fact, number of facts), of the hard one (asked fact, hedged or
        not, number of facts, source named or not). The asked fact is "right", "popular" (the misconception) or "other"
        (another value or none); two facts or more count as "long"; it is "hedged" where any statement of it is, and
        "cited" where the right source is named. None for a reply without a greeting or without a fact.
        """
        words, said = reply.split(), self.statements(reply)
        if not words or words[0] not in _GREETING or not said:
            return None
        stated = {s.value for s in said if s.topic == prompt.topic}
        right = self.true_value(prompt.animal, prompt.topic)
        popular = self.misconceptions.get((prompt.animal, prompt.topic))
        fact = "right" if stated == {right} else "popular" if stated == {popular} else "other"
        if not self.sources:
            return _GREETING[words[0]], fact, "short" if len(said) == 1 else "long"
        hedged = any(s.hedged for s in said if s.topic == prompt.topic)
        cited = self.axes(prompt, reply)["source"] > 0
        many = ("one", "two", "more")[min(len(said), 3) - 1]
        return fact, "hedged" if hedged else "bold", many, "cited" if cited else "uncited"

    def demonstrations(
        self, prompts: list[Prompt], n: int, seed: int, part: str = "demonstrations", skills: Skills | None = None
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
            said = self.demonstrate(prompt, skill, rng, skills)
            rows.append({"prompt": prompt.text, "response": said, "skill": skill, "reward": self.reward(prompt, said)})
        return rows

    def _different(self, prompt: Prompt, first: str, rng: random.Random, skills: Skills) -> str:
        """A demonstration that is not `first`. Raises ValueError where these demonstrators never say anything else."""
        for _ in range(TRIES):
            second = self.demonstrate(prompt, _draw_skill(rng, skills), rng, skills)
            if second != first:
                return second
        raise ValueError(
            f"skills: all demonstrators answer {prompt.text!r} alike, so that there is no pair to compare; allowed: "
            "skills of which some differ or slip now and then"
        )

    def pairs(
        self,
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
        `part` names an independent stream of the same seed ("pairs" to train on, "check" for a second probe); skills:
        by default SKILLS as it is now.

        Returns dicts of prompt, chosen, rejected, reward_chosen, reward_rejected, flipped (bool).
        Raises ValueError for n < 1, a label_noise outside [0, 0.5], and skills that cannot be used or always agree.
        """
        if n < 1:
            raise ValueError(f"pairs={n}: must be at least 1")
        if not 0 <= label_noise <= 0.5:
            raise ValueError(f"label_noise={label_noise}: must be between 0 and 0.5 (at 0.5 labels say nothing)")
        skills = usable_skills(skills)
        rng = random.Random(f"{seed}/{part}")
        rows = []
        for prompt in _rounds(prompts, n, rng):
            first = self.demonstrate(prompt, _draw_skill(rng, skills), rng, skills)
            second = self._different(prompt, first, rng, skills)
            reward_first, reward_second = self.reward(prompt, first), self.reward(prompt, second)
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
