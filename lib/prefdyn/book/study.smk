# The runs of a study and the rows of its table: a rule for each kind of run, a job for each run, after those that it reads.
# `prefdyn study run NAME` plans and calls this, with what it has planned as the configuration (`studies.prepare`).
#
# The output of a run is its folder in the run store. It appears whole, in one move, and its name says what is in it: what
# is there is done, and neither its age nor an interruption says anything about it. Where machines share no files, such
# folders are what Snakemake carries from one to the other.
import re
import shlex
import sys
from pathlib import Path

RUNS, ROWS, STORE = config["runs"], config["rows"], config["store"]
PLAN = workflow.configfiles[0]
STUDY = shlex.join([str(Path(sys.executable).with_name("prefdyn")), "study"])


def folders(keys):
    """Where these runs are."""
    return [ancient(f"{STORE}/{key}") for key in keys]


DEPTHS = {}  # of a run, by its key: how many stand before it, one after the other; parents come first in the plan
for key in RUNS:
    DEPTHS[key] = 1 + max((DEPTHS[parent] for parent in RUNS[key]["parents"]), default=0)
DEEPEST = max(DEPTHS.values())


localrules: rows, row


rule rows:
    input:
        [local(f"{config['marks']}/{number}") for number in ROWS],


# Before any run, since it needs seconds and is to be seen as soon as it can be.
rule row:
    input:
        lambda wildcards: folders(ROWS[wildcards.number]),
    output:
        local(touch(f"{config['marks']}/{{number}}")),
    wildcard_constraints:
        number="[0-9]+",
    priority: 1 + DEEPEST
    message:
        "row {wildcards.number}"
    shell:
        STUDY + " row {PLAN} {wildcards.number} $(dirname {input[0]})"


# What comes late in a cell has priority, so that cells are finished one by one.
for kind in sorted({key.rpartition("-")[0] for key in RUNS}):

    rule:
        name:
            re.sub("[^a-z0-9]", "_", kind)
        input:
            lambda wildcards, kind=kind: folders(RUNS[f"{kind}-{wildcards.hash}"]["parents"]),
        output:
            directory(f"{STORE}/{kind}-{{hash}}"),
        wildcard_constraints:
            hash="[0-9a-f]{16}",
        params:
            kind=kind,
        threads: 1
        priority: max(DEPTHS[key] for key in RUNS if key.rpartition("-")[0] == kind)
        message:
            "{params.kind}-{wildcards.hash}"
        shell:
            STUDY + " compute {PLAN} {output}"
