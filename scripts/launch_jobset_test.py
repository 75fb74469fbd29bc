"""The manifest of launch_jobset.py against the schema of JobSet, which a package of Kubeflow has as types."""

import shlex
import subprocess
import sys
from typing import Any

import launch_jobset
import launch_settings
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from jaxlm.errors import UserError


def manifest(*flags: str) -> dict[str, Any]:
    return yaml.safe_load(launch_jobset.manifest(launch_settings.load(flags)))


def pod(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def check(jobset: dict[str, Any]) -> None:
    """Raise for a wrong type or a missing field; an unknown field, which the types drop, is seen as a difference."""
    model = JobsetV1alpha2JobSet.from_dict(jobset)
    assert model is not None
    assert model.to_dict() == jobset


@pytest.mark.parametrize("kind", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("flags", [[], ["--jobset.claim=", "--checkpoint-dir=gs://bucket/run"]])
def test_manifest_keeps_to_the_schema(kind: str, flags: list[str]) -> None:
    check(manifest(f"--jobset.kind={kind}", *flags))


def test_the_schema_refuses_unknown_fields_and_wrong_types() -> None:
    wrong = manifest()
    pod(wrong)["containers"][0]["enviroment"] = []
    with pytest.raises(AssertionError):
        check(wrong)
    wrong = manifest()
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] = "2"
    with pytest.raises(ValueError, match="parallelism"):
        check(wrong)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("hosts", [1, 4])
def test_pods_find_each_other_by_the_variables_of_torchrun(kind: str, hosts: int) -> None:
    jobset = manifest(f"--jobset.kind={kind}", f"--jobset.hosts={hosts}", "--name=bert")
    variables = {entry["name"]: entry.get("value") for entry in pod(jobset)["containers"][0]["env"]}
    assert variables == {
        # Pod 0 of job 0 of `train`, in the subdomain that has the name of the JobSet.
        "MASTER_ADDR": "bert-train-0-0.bert",
        "MASTER_PORT": "12355",
        "WORLD_SIZE": str(hosts),
        "RANK": None,
    }
    rank = pod(jobset)["containers"][0]["env"][-1]["valueFrom"]["fieldRef"]["fieldPath"]
    assert rank == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert jobset["spec"]["replicatedJobs"][0]["name"] == "train"
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True}
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (hosts, hosts, "Indexed")


def test_chips_are_asked_for_by_kind() -> None:
    gpu, tpu, cpu = (
        pod(manifest(f"--jobset.kind={kind}", "--jobset.chips-per-host=4")) for kind in ("gpu", "tpu", "cpu")
    )
    assert gpu["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": "4"}} and gpu["nodeSelector"] == {}
    assert cpu["containers"][0]["resources"] == {}
    assert tpu["containers"][0]["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert tpu["containers"][0]["env"] == []  # GKE numbers the workers of a slice, and JAX reads it
    assert tpu["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }


def test_bad_input_fails_the_jobset_and_all_else_restarts_it() -> None:
    jobset = manifest("--jobset.max-restarts=7")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    [rule] = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 130])
    assert rule["onExitCodes"]["containerName"] == pod(jobset)["containers"][0]["name"]
    assert job["backoffLimit"] == 0 and pod(jobset)["restartPolicy"] == "Never"


def test_the_run_lies_on_the_claim_or_its_checkpoints_in_a_bucket() -> None:
    claimed = pod(manifest("--jobset.claim=disk"))
    assert claimed["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    assert "--run.dir /checkpoints/runs/gpt_base --resume auto" in shlex.join(claimed["containers"][0]["command"])
    bucket = pod(manifest("--jobset.claim=", "--checkpoint-dir=gs://b/x"))
    assert bucket["volumes"] == [] and "--run.checkpoint-dir gs://b/x" in shlex.join(bucket["containers"][0]["command"])
    with pytest.raises(UserError, match="jobset.claim=''"):
        manifest("--jobset.claim=")


def test_values_cannot_break_out_of_the_yaml() -> None:
    wild = 'a: "b" # $c\n- {d}'
    assert pod(manifest(f"--jobset.image={wild}"))["containers"][0]["image"] == wild


@pytest.mark.parametrize(("verb", "words"), [("submit", "apply"), ("logs", "logs"), ("delete", "delete")])
def test_dry_run(verb: str, words: str) -> None:
    script = launch_settings.ROOT / "scripts" / "launch_jobset.py"
    done = subprocess.run([sys.executable, str(script), verb, "--dry-run"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kubectl ") and words in done.stdout.splitlines()[0]
    if verb == "submit":
        # Typed in, the shell hands the manifest to kubectl.
        shown = subprocess.run(
            ["bash", "-c", f"kubectl() {{ cat; }}\n{done.stdout}"], capture_output=True, text=True, check=True
        )
        check(yaml.safe_load(shown.stdout))
