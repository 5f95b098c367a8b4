"""The two worlds: what there is to say in each, and what it is worth."""

from .world import World

_QUALITY = {
    "support": 1.0,
    "entity": 1.0,
    "tone": 1.0,
    "addressee": 1.0,
    "length": 1.0,
    "repetition": 1.0,
    "grammar": 1.0,
}

EASY = World(
    difficulty="easy",
    names=("ann", "ben", "cleo", "dan", "eve", "finn", "gus", "hana"),
    animals=("fox", "bear", "owl", "frog", "bee", "whale", "crab", "goat"),
    topics={
        "home": ("lives in the", ("den", "cave", "tree", "pond", "hive", "sea", "reef", "hills")),
        "food": ("eats", ("berries", "salmon", "mice", "flies", "nectar", "krill", "algae", "grass")),
        "colour": ("is", ("red", "brown", "grey", "green", "yellow", "blue", "orange", "white")),
        "sound": ("makes a", ("bark", "growl", "hoot", "croak", "buzz", "song", "click", "bleat")),
    },
    misconceptions={
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
    },
    weights={"fact": 2.0, **_QUALITY},
)
HARD = World(
    difficulty="hard",
    names=EASY.names,
    animals=(*EASY.animals, "wolf", "hen", "mole", "duck", "seal", "ant", "swan", "hare"),
    topics={
        "home": (
            "lives in the",
            (*EASY.topics["home"][1], "woods", "coop", "burrow", "marsh", "bay", "mound", "lake", "meadow"),
        ),
        "food": (
            "eats",
            (*EASY.topics["food"][1], "deer", "corn", "worms", "snails", "herring", "crumbs", "reeds", "clover"),
        ),
        "colour": (
            "is",
            (*EASY.topics["colour"][1], "silver", "golden", "dusky", "teal", "spotted", "copper", "ivory", "tawny"),
        ),
        "sound": (
            "makes a",
            (*EASY.topics["sound"][1], "howl", "cluck", "squeak", "quack", "honk", "rustle", "trumpet", "thump"),
        ),
    },
    misconceptions={
        **EASY.misconceptions,
        ("wolf", "home"): "cave",
        ("wolf", "food"): "sheep",
        ("hen", "food"): "grass",
        ("mole", "home"): "hills",
        ("mole", "colour"): "black",
        ("duck", "food"): "bread",
        ("seal", "food"): "fish",
        ("seal", "sound"): "bark",
        ("ant", "home"): "woods",
        ("ant", "food"): "sugar",
        ("swan", "sound"): "song",
        ("hare", "food"): "carrots",
    },
    weights={"fact": 2.0, **_QUALITY, "source": 2.0, "detail": 3.6},
    sources={"home": "atlas", "food": "farmer", "colour": "painter", "sound": "singer"},
    citing={"home": 0.8, "food": 0.4, "colour": 0.15, "sound": 0.05},
    hedging=0.15,
    telling=0.25,
)
WORLDS = {world.difficulty: world for world in (EASY, HARD)}
