# What depends on what: chapters are executed with papermill, then compiled into the book.
# `make book` calls this; by hand: snakemake --cores all --config profile=reader
#
# A chapter runs again when its source, the library, the profile or the command has changed. Its runs belong to the run store,
# which knows what each depends on: it computes the missing ones side by side, parents first. Two chapters are executed at
# a time, so that cores are busy while one of them draws; a run that both need is computed once, under its lock. What
# `prefdyn execute` writes appears whole or not at all, so an interrupted build needs no repair: call it again and it goes
# on with the chapter that was cut off.
from pathlib import Path

import yaml


def pages(node):
    """Yield the files that a part of the table of contents names, in reading order."""
    if isinstance(node, dict):
        for key in ("root", "file"):
            if key in node:
                yield node[key]
        for key in ("parts", "chapters", "sections"):
            yield from pages(node.get(key))
    elif isinstance(node, list):
        for item in node:
            yield from pages(item)


PROFILE = config.get("profile", "reader")
PAGES = list(pages(yaml.safe_load(Path("book/_toc.yml").read_text(encoding="utf-8"))))
CHAPTERS = [page.removeprefix("notebooks/") for page in PAGES if page.startswith("notebooks/")]
LIBRARY = sorted(str(path) for path in Path("lib/prefdyn").rglob("*.py"))
ASSETS = sorted(str(path) for folder in ("_assets", "_ext") for path in Path("book", folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)


LEDGER = "08-ledger"
STUDIES = sorted(str(path) for path in Path("data/studies").glob("*.*"))


localrules: html, chapters


rule html:
    input:
        expand("book/notebooks/{chapter}.ipynb", chapter=CHAPTERS),
        expand("book/_values/{chapter}.json", chapter=CHAPTERS),
        [f"book/{page}.md" for page in PAGES if not page.startswith("notebooks/")],
        "_config.yml",
        "book/_toc.yml",
        "book/references.bib",
        "data/architectures.csv",
        "data/methods.md",
        "data/peers.csv",
        ASSETS,
    output:
        touch("_build/html/.complete"),
    message:
        "Building the pages"
    # From scratch each time: an incremental build forgets the warnings of pages that it does not read again.
    shell:
        "rm -rf _build/html _build/jupyter_execute && "
        "jupyter-book build book --config _config.yml --path-output . --all -W -n --keep-going -q"


rule chapters:
    input:
        expand("book/notebooks/{chapter}.ipynb", chapter=CHAPTERS),
        expand("book/_values/{chapter}.json", chapter=CHAPTERS),


def before(wildcards):
    """What a chapter waits for: the studies that it reads; the ledger, which judges the runs of all others, for these."""
    others = [chapter for chapter in CHAPTERS if chapter != wildcards.chapter]
    reads = "studies.table(" in Path(f"notebooks/{wildcards.chapter}.ipynb").read_text(encoding="utf-8")
    judged = expand("book/notebooks/{chapter}.ipynb", chapter=others) if wildcards.chapter == LEDGER else []
    return judged + (STUDIES if reads else [])


rule chapter:
    input:
        "notebooks/{chapter}.ipynb",
        LIBRARY,
        before,
    output:
        "book/notebooks/{chapter}.ipynb",
        "book/_values/{chapter}.json",
    params:
        profile=PROFILE,
    threads: (workflow.cores + 1) // 2
    message:
        "Executing chapter {wildcards.chapter} (profile {params.profile})"
    shell:
        "prefdyn execute {wildcards.chapter} -p profile={params.profile}"
