"""The commands, scripts and manifests of docs/pods.md, and the Dockerfile, run or parsed."""

import json
import math
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from diffjax.experiment import command_line

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "docs" / "pods.md").read_text(), re.M | re.S)


def block(words):
    (found,) = (text for text in BLOCKS if words in text)
    return found


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("status", [0, 1, 70, 75])
def test_the_slurm_script_ends_as_its_job_and_requeues_one_that_was_stopped(tmp_path, status):
    program(tmp_path / "srun", f"exit {status}")
    program(tmp_path / "scontrol", f'echo "$@" > {tmp_path}/requeued')
    done = subprocess.run(
        ["bash", "-c", block("#SBATCH")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == status
    assert (tmp_path / "requeued").exists() == (status == 75)
    if status == 75:
        assert (tmp_path / "requeued").read_text().split() == ["requeue", "17"]


def test_the_job_set_has_a_pod_for_each_host_and_a_command_that_train_accepts():
    manifest = yaml.safe_load(block("kind: JobSet"))
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # the JobSet starts all pods again, not one of them
    config, workdir, *_ = command_line.parse(container["args"], ROOT / "configs")
    (mount,) = container["volumeMounts"]
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]
    assert all(str(path).startswith(mount["mountPath"]) for path in (workdir, config.data.path))


@pytest.mark.parametrize(
    "words", re.findall(r"python train\.py ([^\n\"]+)", "\n".join(BLOCKS).replace("\\\n", " "))
)
def test_every_training_command_is_one_that_train_accepts(words):
    words = words.replace("train.py ...", "train.py").replace("=...", "=data")
    argv = [word for word in shlex.split(words, comments=True) if word != "..."]
    command_line.parse(argv, ROOT / "configs")


def test_the_image_has_what_training_needs_and_gets_its_signals():
    text = (ROOT / "Dockerfile").read_text()
    steps = re.findall(r"^([A-Z]+) (.*)$", text, re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for chosen in re.findall(r"EXTRAS=(\S+)", text + "\n".join(BLOCKS)):
        assert set(chosen.split(",")) <= set(project["optional-dependencies"])
    copied = {word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]}
    assert copied >= {"pyproject.toml", "constraints.txt", "diffjax", "configs", "train.py"}
    assert all((ROOT / name).exists() for name in copied)
    # A JSON list is executed without a shell, which would keep SIGTERM for itself.
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["python", "train.py"]
