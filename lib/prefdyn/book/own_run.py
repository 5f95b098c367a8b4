"""The lens on a run that a trainer saved, as a chapter asks it; by default on a run of the book's own, saved as one."""

import glob
import hashlib
import html
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from IPython.display import display

from ..findings import afterwards, asked
from ..findings.measure import AlignmentRun
from ..lab import folders, layouts, policy, recipes
from ..lab.recipes import PairRun
from ..lab.runs import Run, RunStore
from ..methods import registry
from . import page, plan, plots
from .params import ParameterError, Parameters
from .report_figures import ON_PAGE, Drawn
from .report_folder import Folder

BOOK, FIRST = "book", "first"  # of `saved` and `reference`: what is meant where nothing is given
COMPARED = ("full", "positive", "negative")  # components that do not depend on the order of the pairs
MANY = 64  # rows a pass of the book's own small models
WIDTH = 560  # pixels of a figure on a page, at most


@dataclass(frozen=True)
class OwnRun:
    """Checkpoint folders, the preference file (or its name on the hub) and where the reference is, None for the first.

    out: the folder that tables and report are written to.
    """

    folders: tuple[Path, ...]
    pairs: str
    reference: str | None
    out: Path


# What is measured


def specs(p: Parameters) -> list[PairRun | AlignmentRun]:
    """The book's own run of the first seed and the book's measurement of it; of saved checkpoints, nothing.

    The measurement is towards chosen responses, which have the same tokens however they are given. Raises
    ParameterError for an objective that is not trained with pairs.
    """
    if p.saved != BOOK:
        return []
    if registry.find(p.objective).takes != "pairs":
        raise ParameterError(
            f"objective: given {p.objective!r} (str), and the book's own run is trained on pairs; allowed here: "
            f"{', '.join(registry.names('pairs'))}"
        )
    run = plan.run(p, p.seeds[0], p.objective)
    targets = plan.target_spec(p, responses="chosen")
    return [run, plan.alignment_run(p, run, aware=False).model_copy(update={"targets": targets})]


def own_run(p: Parameters, store: RunStore, place: Path) -> OwnRun:
    """The run that is asked about: saved checkpoints, or the book's own, written into `place` as a trainer would.

    The report on saved checkpoints is kept in lens/ of the store. Raises ParameterError for what is not there.
    """
    if p.saved == BOOK:
        run = specs(p)[0]
        saved = write_checkpoints(store.get(run), run.steps(), place / "run")
        pairs = write_pairs(recipes.dataset(run.data).pairs, place / "pairs.jsonl")
        return OwnRun(tuple(saved), str(pairs), None, place / "lens")
    saved = saved_folders(p.saved)
    there = Path(p.dataset).expanduser()
    pairs = str(there) if there.exists() else p.dataset
    run = saved[0].resolve().parent
    kept = store.root / "lens" / f"{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"
    return OwnRun(tuple(saved), pairs, None if p.reference == FIRST else p.reference, kept)


def saved_folders(given: str) -> list[Path]:
    """The folders of a pattern, or in a folder (checkpoint-*), or that folder. Raises ParameterError if there is none.

    Whether they are checkpoints, and of one run, `folders.read` says.
    """
    named = Path(given).expanduser()
    found = [Path(name) for name in sorted(glob.glob(str(named))) if Path(name).is_dir()]
    if named.is_dir():
        found = sorted(folder for folder in named.glob("checkpoint-*") if folder.is_dir()) or [named]
    if not found:
        raise ParameterError(
            f"saved: given {given!r}, and there is no such folder; allowed: 'book', the folder that a run was saved in "
            f"or a pattern such as RUN/checkpoint-*, relative to the folder of this kernel ({Path.cwd().name!r}) or "
            "absolute"
        )
    return found


def write_checkpoints(run: Run, steps: Iterable[int], folder: Path) -> list[Path]:
    """The checkpoints of a kept run in the layout of Hugging Face: checkpoint-STEP with model, tokenizer and state."""
    found = []
    for step in steps:
        found.append(folder / f"checkpoint-{step}")
        policy.save(*recipes.load_checkpoint(run, step), found[-1])
        (found[-1] / folders.STATE).write_text(json.dumps({"global_step": step}), encoding="utf-8")
    return found


def write_pairs(rows: Sequence[Mapping], path: Path, **columns: str) -> Path:
    """Rows as JSON lines with the prompt, a text or a list of messages, and other columns by the names of their fields.

    columns: by default chosen and rejected, of fields of these names.
    """
    columns = columns or {"chosen": "chosen", "rejected": "rejected"}
    lines = [
        {"prompt": _messages(row["prompt"])} | {name: row[field] for name, field in columns.items()} for row in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _messages(prompt: layouts.Prompt) -> str | list[dict[str, str]]:
    """A prompt as a preference file has it."""
    return prompt if isinstance(prompt, str) else [{"role": role, "content": text} for role, text in prompt]


# Measuring


def command(p: Parameters, run: OwnRun) -> str:
    """What one types for it, files and folders by their names alone: where they lie is nobody's business."""
    words = ["prefdyn", "lens", f"{run.folders[0].resolve().parent.name}/checkpoint-*", "--pairs", Path(run.pairs).name]
    words += [] if run.reference is None else ["--reference", Path(run.reference).name]
    words += [] if p.objective == "dpo" else ["--method", p.objective]
    for name, value in p.settings_of(p.objective).items():
        words += ["--beta", f"{value:g}"] if name == "beta" else ["-p", f"{name}={value:g}"]
    words += ["--probe", str(p.probe), "--max-prompt", str(p.max_prompt), "--max-response", str(p.max_response)]
    return " ".join(word if word.endswith("*") else shlex.quote(word) for word in words)


def measure(p: Parameters, run: OwnRun, targets: str = "final", tell: Callable[[str], None] = print) -> Path:
    """What `prefdyn lens` does, without the report; returns the lens folder.

    Only the rows of a pass are more for the book's own small models, which is faster and the same but for rounding.
    Raises ParameterError with what the lens says of what does not fit, by the names of a chapter's parameters.
    """
    try:
        question = asked.Question(
            pairs=run.pairs,
            method=p.objective,
            settings=tuple(sorted(p.settings_of(p.objective).items())),
            targets=targets,
            probe=p.probe,
            max_prompt=p.max_prompt,
            max_response=p.max_response,
        )
        series = folders.read(run.folders)
        own = {
            "reference": run.reference,
            "command": command(p, run),
            "tell": tell,
            "rows": MANY if p.saved == BOOK else afterwards.ROWS,
        }
        return afterwards.Follow(series, question, run.out, **own).run()
    except ValueError as error:
        names = {"pairs": "dataset", "method": "objective", "checkpoints": "saved"}
        said = re.sub(r"\b(pairs|method|checkpoints)(?=[=:])", lambda found: names[found[0]], str(error))
        raise ParameterError(said) from error


def compare(p: Parameters, store: RunStore, run: OwnRun, place: Path) -> pd.DataFrame:
    """G of the book's own run by the lens and by the book's measurement, asked the same: same pairs, same responses D'.

    A row a checkpoint and component: step, component, lens, book, size, and apart, their difference as a part of size:
    the sum of the sizes of both halves, since the whole is what is left where they cancel.
    """
    trained, measured = specs(p)
    known = recipes.dataset(trained.data)
    pairs = write_pairs(known.pairs[: measured.size], place / "probe.jsonl")
    targets = write_pairs(known.check[: measured.targets.count], place / "targets.jsonl", response="chosen")
    same = OwnRun(run.folders, str(pairs), run.reference, place / "same")
    out = measure(p, same, targets=str(targets), tell=lambda line: None)
    tables = [pd.read_parquet(out / "alignment.parquet"), store.get(measured).frame("alignment")]
    lens, book = (t[t["component"].isin(COMPARED)].set_index(["step", "component"])["g"] for t in tables)
    found = pd.DataFrame({"lens": lens, "book": book}).reset_index()
    halves = found[found["component"] != "full"]
    found["size"] = found["step"].map(halves["book"].abs().groupby(halves["step"]).sum())
    return found.assign(apart=(found["lens"] - found["book"]).abs() / found["size"])


# Showing


def show(drawn: Sequence[Drawn], titles: Sequence[str], name: str) -> None:
    """Display the first of the report's figures that has one of `titles`, as the book shows figures; else say so.

    The report's colours are those of its own page; here they are the book's.
    """
    found = next((one for title in titles for one in drawn if one.title == title), None)
    if found is None:
        page.say(f"*{titles[0]}*: not drawn, since these checkpoints do not have what it needs.")
        return
    alt = html.unescape(re.search(r'aria-label="([^"]*)"', found.svg)[1])
    display(
        {"image/svg+xml": _alone(found.svg), "text/plain": alt},
        metadata={
            "image/svg+xml": {"width": WIDTH},
            "mystnb": {
                "image": {"alt": alt},
                "figure": {"name": name, "caption": f"**{found.title}.** {found.caption}"},
            },
        },
        raw=True,
    )


def _alone(svg: str) -> str:
    """An element of a report's page as a file of its own: with the book's colours, ground and letters."""
    for colour, name in ON_PAGE.items():
        svg = svg.replace(f"var(--{name})", colour)
    width, height = map(float, re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg).groups())
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{WIDTH * height / width:.0f}" '
    style = f"background:{plots.PAPER};fill:{plots.INK};font-family:system-ui,'DejaVu Sans',Arial,sans-serif"
    return svg.replace("<svg ", f'{head}style="{style}" ', 1)


def contributions(folder: Folder, example: int) -> list[tuple[str, list[str], list[float]]]:
    """Rows for `page.shaded`: what each token of a pair contributes to G, at the first and at the last checkpoint."""
    tokens = folder.table("tokens")
    own = tokens[tokens["example"] == example]
    paired = bool((tokens["side"] == 1).any())
    rows = []
    for step in dict.fromkeys([own["step"].min(), own["step"].max()]):
        for side, one in own[own["step"] == step].groupby("side"):
            name = ("rejected" if side else "chosen") if paired else "response"
            rows.append((f"pair {example}, step {step}, {name}", one["token"].tolist(), (one["w"] * one["a"]).tolist()))
    return rows


def extremes(folder: Folder) -> list[int]:
    """The pairs, of those whose tokens are kept, that speak most against the targets and most for them at the end."""
    tokens = folder.table("tokens")
    last = tokens[tokens["step"] == tokens["step"].max()]
    order = (last["w"] * last["a"]).groupby(last["example"]).sum().sort_values(kind="stable").index
    return list(dict.fromkeys([int(order[0]), int(order[-1])]))
