"""Runs that do next to nothing and leave a trace of it; in a module of their own, because workers import them."""

import json
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

PATIENCE = 120  # seconds that a run waits for another process before it gives up


def wait_for(paths: list[Path]) -> None:
    """Return when all files are there; TimeoutError if they do not come."""
    for _ in range(PATIENCE * 100):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.01)
    raise TimeoutError(f"missing: {[path.name for path in paths if not path.exists()]}")


class Toy(BaseModel):
    """A run that notes its name in `traces`, waits for the files that it is told to, and sums its parents' values.

    It fails half-way while the file `NAME.stop` is among the traces.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["toy"] = "toy"
    name: str
    traces: str
    value: int = 1
    needs: tuple["Toy", ...] = ()
    waits_for: tuple[str, ...] = ()
    cost: float = 1e9  # worth a process of its own

    def parents(self) -> list["Toy"]:
        return list(self.needs)

    def work(self) -> float:
        return self.cost

    def compute(self, folder: Path, store, tick) -> None:
        traces = Path(self.traces)
        with (traces / "computed").open("a") as log:
            log.write(f"{self.name}\n")
        (traces / f"{self.name}.started").touch()
        wait_for([traces / name for name in self.waits_for])
        continued = (folder / "half.json").exists()
        (folder / "half.json").write_text("{}")
        if (traces / f"{self.name}.stop").exists():
            raise RuntimeError(f"{self.name} was told to stop")
        total = self.value + sum(store.get(parent).json("result")["total"] for parent in self.needs)
        (folder / "result.json").write_text(json.dumps({"total": total, "continued": continued}))
        (folder / "deeper").mkdir(exist_ok=True)
        (folder / "deeper" / "more.txt").write_text(self.name)
        tick(self.work())


def arrive_and_get(root: str, spec: Toy, name: str) -> None:
    """What a process does in a test: say that it is there, then ask for the run."""
    from prefdyn.lab.runs import RunStore

    store = RunStore(root)
    store.key(spec)  # everything is imported and hashed
    (Path(spec.traces) / name).touch()
    assert store.get(spec).json("result")["total"] == spec.value
