"""How much there is of data, known without making them again: what a plan asks, some thousand times, before any run."""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import fingerprint, recipes


class Sizes(NamedTuple):
    """Numbers of examples to train on and of prompts, under the limits on lengths."""

    pairs: int
    demonstrations: int
    prompts: int


@functools.lru_cache(maxsize=512)
def sizes(spec: recipes.DataSpec, root: Path) -> Sizes:
    """Sizes of the data of `spec`; those of a world are kept in the folder `root`/sizes, by the data and the code.

    A world takes seconds a seed to make. Where the library is not loaded as it is written nothing is kept or read.
    Raises what `recipes.dataset` does.
    """
    if spec.path is not None or not fingerprint.as_written(recipes.__name__, {"world.SKILLS"}):
        return _counted(spec)
    identity = [spec.model_dump(mode="json", context="identity"), fingerprint.code_fingerprint(recipes.__name__)]
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = root / "sizes" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Sizes(**json.loads(path.read_text(encoding="utf-8")))
    found = _counted(spec)
    with contextlib.suppress(OSError):  # without room, or a store to keep it beside, it is counted again
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(found._asdict(), file)
        os.replace(file.name, path)
    return found


def _counted(spec: recipes.DataSpec) -> Sizes:
    known = recipes.dataset(spec)
    return Sizes(len(known.pairs), len(known.demonstrations), len(known.prompts["train"]))
