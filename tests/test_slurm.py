"""A study on a cluster: what its profile says, what is submitted for one run, and that this computes the run.

The Slurm executor is a package that need not be there (its dry run is in tests/test_studies.py). Another one stands in
for it: it gets the same jobs from Snakemake, by the same interface and under the settings of the profile `slurm`, and
where that would hand a job's command to `sbatch`, it writes the command down and calls it.
"""

import itertools
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from prefdyn.book import cli, studies, workflow
from prefdyn.lab.runs import RunStore

PROFILES = Path(__file__).resolve().parents[1] / "data" / "studies" / "profiles"
WAITS = {"latency-wait": 1, "seconds-between-status-checks": 1}
STUDY = """
title: Toy
about: A toy.
base: {profile: smoke, pairs: 24, check: 8, demonstrations: 64, validation: 4, held_out: 4, batch: 8, sft_batch: 8,
  sft_steps: 4, checkpoints: 2, width: 16, probe: 8, method: forward}
axes: {seed: [0]}
rules: [C3a]
tolerances: {default: {relative: 0.1, absolute: 0.01}}
"""
EXECUTOR = '''
import json
import os
import subprocess

from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.settings import CommonSettings

common_settings = CommonSettings(
    non_local_exec=True, implies_no_shared_fs=False, job_deploy_sources=False, pass_envvar_declarations_to_cmd=False,
    auto_deploy_default_storage_provider=False,
)


class Executor(RemoteExecutor):
    """Writes down what would be submitted, and does it as a node would. Then it has failed, and no more follows."""

    def run_job(self, job):
        command, folder = self.format_job_exec(job), self.workflow.workdir_init
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
        submitted = {
            "rule": job.name,
            "output": list(map(str, job.output)),
            "command": command,
            "folder": folder,
            "resources": {name: job.resources.get(name) for name in ("runtime", "mem_mb", "cpus_per_task")},
            "status": done.returncode,
            "said": done.stdout + done.stderr,
        }
        with open(os.environ["SUBMITTED"], "a") as log:
            log.write(json.dumps(submitted) + "\\n")
        info = SubmittedJobInfo(job, external_jobid="1")
        self.report_job_submission(info, register_job=False)

    async def check_active_jobs(self, active_jobs):
        for info in active_jobs:
            self.report_job_error(info)
        return
        yield

    def cancel_jobs(self, active_jobs):
        pass
'''


@pytest.fixture
def submitted(tmp_path, monkeypatch, capfd):
    """The jobs of a study that are submitted at first, from a book of its own."""
    monkeypatch.setenv("SUBMITTED", str(tmp_path / "submitted"))
    monkeypatch.delenv("PREFDYN_RUNS", raising=False)
    package = tmp_path / "executors" / "snakemake_executor_plugin_recorded"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(EXECUTOR)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    (tmp_path / "lib" / "prefdyn").mkdir(parents=True)
    place = tmp_path / "data" / "studies" / "profiles" / "recorded"
    place.mkdir(parents=True)
    given = yaml.safe_load((PROFILES / "slurm" / "config.yaml").read_text())
    # as in the profile, but for waits that outlive a test
    (place / "config.yaml").write_text(yaml.safe_dump(given | {"executor": "recorded"} | WAITS))
    (tmp_path / "data" / "studies" / "toy.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prefdyn", "study", "run", "toy", "--profile", "recorded"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capfd.readouterr()
    assert ended.value.code != 0 and (tmp_path / "submitted").exists(), said.out + said.err
    return [json.loads(line) for line in (tmp_path / "submitted").read_text().splitlines()]


def test_what_is_submitted_for_a_run_computes_it(submitted, tmp_path):
    """Only what needs nothing else is submitted at first: the run that all others start from.

    Its command is Snakemake again, for this run alone, called from the folder of the book; it leaves this run and no
    other in the store.
    """
    store, study = RunStore(), studies.read("toy")
    specs = studies.runs(store.key, studies.specs(study, study.cells[0]))
    [root] = [key for key, spec in specs.items() if not spec.parents()]
    [job] = submitted
    assert [Path(output).name for output in job["output"]] == [root] and len(specs) == 4
    words = shlex.split(job["command"])
    option = dict(itertools.pairwise(words))
    assert words[:3] == [sys.executable, "-m", "snakemake"] and option["--mode"] == "remote"
    assert option["--snakefile"] == str(Path(workflow.__file__).with_name("study.smk"))
    assert option["--allowed-rules"] == job["rule"] == "sft"
    assert option["--target-jobs"] == f"sft:hash={root.rpartition('-')[2]}"
    assert option["--rerun-triggers"] == "mtime" and "--nolock" in words
    assert job["resources"] == {"runtime": 120, "mem_mb": 4000, "cpus_per_task": 1}
    assert Path(job["folder"]).resolve() == tmp_path.resolve()
    assert job["status"] == 0, job["said"]
    assert [path.name for path in store.root.iterdir() if re.fullmatch(r"\w+-[0-9a-f]{16}", path.name)] == [root]
    assert store.find(specs[root]) is not None


def test_the_profile_asks_slurm_for_time_memory_and_one_core():
    """Under the names that its executor reads: minutes, megabytes and cores; a run has one thread."""
    given = yaml.safe_load((PROFILES / "slurm" / "config.yaml").read_text())
    assert given["executor"] == "slurm" and given["jobs"] > 1
    assert given["default-resources"] == {"runtime": 120, "mem_mb": 4000, "cpus_per_task": 1}
    assert "threads: 1" in Path(workflow.__file__).with_name("study.smk").read_text()
