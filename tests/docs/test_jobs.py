"""The job files of docs/jobs.md and the Dockerfile: options are known, files exist, commands parse.

They are not run: there is no SLURM, cloud account or Docker here.
"""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from toys import ROOT
from toys.pages import Block, blocks_of

from hf_contmerge.commands.main import _parse
from hf_contmerge.run.recipe.json_schema import recipe_schema

JOBS = blocks_of(ROOT / "docs/jobs.md")
SBATCH = {"job-name", "nodes", "ntasks-per-node", "gres", "cpus-per-task", "time", "signal", "requeue", "open-mode",
          "output", "array"}  # fmt: skip
SCRIPTS = [block for block in JOBS if "#SBATCH" in block.text]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
INSTRUCTIONS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("block", SCRIPTS, ids=lambda b: str(b.number))
def test_slurm_reads_its_options(block: Block) -> None:
    """Options come before the first command, else sbatch passes over them."""
    lines = block.text.splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line for line in lines if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command
    assert {re.match(r"#SBATCH --([\w-]+)", line)[1] for line in options} <= SBATCH  # type: ignore[index]
    assert re.search(r"^srun .*mine\.yml", block.text, flags=re.M)


def test_a_stopped_slurm_job_is_asked_by_the_exit_code_of_sigterm() -> None:
    assert "[ $? -eq 143 ]" in SCRIPTS[0].text
    assert "exit code is 143" in (ROOT / "docs/runs.md").read_text()


def test_skypilot_mounts_where_the_run_goes() -> None:
    (job,) = (yaml.safe_load(block.text) for block in JOBS if block.file == "sky.yaml")
    run = shlex.split(job["run"].replace("$SKYPILOT_NUM_GPUS_PER_NODE", "8"))
    args = _parse(run[1:])
    assert Path(args.run).parts[:2] == Path(next(iter(job["file_mounts"]))).parts[:2]


def test_dockerfile_is_well_formed() -> None:
    words = [word for word, _ in INSTRUCTIONS]
    assert set(words) <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}
    assert words[0] == "FROM"
    assert words.count("ENTRYPOINT") == words.count("CMD") == 1
    assert ":latest" not in DOCKERFILE
    assert re.search(r"^FROM \S+:\S+", DOCKERFILE, flags=re.M), "a tag, for the same image tomorrow"


def test_dockerfile_copies_what_the_installation_needs() -> None:
    copied = {source for word, rest in INSTRUCTIONS if word == "COPY" for source in rest.split()[:-1]}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = (ROOT / "pyproject.toml").read_text()
    included = re.findall(r'^"([\w/.]+)" = "hf_contmerge/', project, flags=re.M)
    needed = {"pyproject.toml", "Makefile", "README.md", "LICENSE", "hf_contmerge", *included}
    locks = re.search(r"^\$\(VENV\)/\.installed: (.+)", (ROOT / "Makefile").read_text(), flags=re.M)
    assert locks
    assert needed | set(locks[1].split()) <= copied
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not copied & set(ignored)


def test_dockerfile_starts_the_command() -> None:
    assert ["ENTRYPOINT", '["contmerge"]'] in INSTRUCTIONS
    (default,) = (rest for word, rest in INSTRUCTIONS if word == "CMD")
    with pytest.raises(SystemExit) as stopped:
        _parse(yaml.safe_load(default))
    assert stopped.value.code == 0


def test_the_published_schema_is_the_commands() -> None:
    """The site has contmerge.schema.json, from the same function as `contmerge schema`."""
    schema = recipe_schema(ROOT / "docs/recipe.md")
    assert schema["properties"]["base_model"]["description"]
