"""What worker processes find done: they are copies of the one process that imports this, named in `runs`.

Each of them would make the same data sets and read the same code anew, which takes as long as some runs do. A process
that is started in another way imports nothing of this, and makes what it needs when it needs it.
"""

import contextlib
import json
import os
from collections.abc import Iterable

from pydantic import BaseModel

from . import fingerprint, recipes

ASKED = "PREFDYN_WARM"  # the environment variable that says what to make
MOST = 32  # data sets, as many as `recipes.dataset` keeps


def asked(specs: Iterable[BaseModel]) -> str:
    """What to make for these runs, as text: the data sets that they name, the first MOST of them, and their modules."""
    specs = list(specs)
    data = dict.fromkeys(
        model for spec in specs for model in fingerprint.parts(spec) if type(model) is recipes.DataSpec
    )
    modules = dict.fromkeys(tuple(fingerprint.modules_of(spec)) for spec in specs)
    return json.dumps({"data": [one.model_dump(mode="json") for one in [*data][:MOST]], "modules": [*modules]})


def make(text: str) -> None:
    """Make what `asked` says. What fails here fails again, and is said, in the run that needs it."""
    wanted = json.loads(text)
    for modules in wanted["modules"]:
        fingerprint.code_fingerprint(*modules)
    for one in wanted["data"]:
        with contextlib.suppress(Exception):
            recipes.dataset(recipes.DataSpec.model_validate_json(json.dumps(one)))


if ASKED in os.environ:
    make(os.environ[ASKED])
