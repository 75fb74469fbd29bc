"""What LAUNCH.md and Dockerfile say is so."""

import json
import re
import shlex
import subprocess
import sys
import tomllib

import launch_jobset
import launch_settings
import launch_slurm
import launch_tpu
import pytest
import yaml
from launch_settings import ROOT

PAGE = (ROOT / "scripts" / "LAUNCH.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "scripts" / "Dockerfile").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python scripts/(.*?)(?: +#.*)?$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_has_a_dry_run(command: str) -> None:
    words = [sys.executable, *shlex.split(f"scripts/{command}")]
    words.insert(3, "--dry-run")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout, comments=True)


@pytest.mark.parametrize("module", [launch_tpu, launch_slurm, launch_jobset])
def test_the_help_names_every_command(module: object) -> None:
    named = re.findall(r"^(\w+) +\w", module.__doc__.partition("\n\n    python")[2], re.MULTILINE)
    assert [name for name in named if name != "The"] == list(module.VERBS)


def test_the_image_has_what_its_install_needs() -> None:
    for sources in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)).split()
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"], project["project"]["readme"]} <= set(copied)
    devices = set(re.findall(r"DEVICE=(\w+)", DOCKERFILE)) - {"cpu"}
    assert devices == {"cuda", "tpu"} and devices | {"gcs"} <= set(project["project"]["optional-dependencies"])


def test_the_image_and_the_manifest_agree() -> None:
    jobset = yaml.safe_load(launch_jobset.manifest(launch_settings.load()))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    user = re.search(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert user and int(user[1]) == pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"]
    assert f"VOLUME {launch_jobset.VOLUME}\n" in DOCKERFILE
    entrypoint = json.loads(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[1])
    assert pod["containers"][0]["command"][: len(entrypoint)] == entrypoint
