"""Trains on a Kubernetes cluster that has JobSet, one pod a host, on CPUs, GPUs or a TPU slice.

    python scripts/launch_jobset.py COMMAND [--dry-run] [--section.key VALUE ...] [-- SETTINGS OF jaxlm.train]

submit   make the JobSet; where a pod is preempted or lost, all start again and go on
logs     follow process 0
delete   end it: SIGTERM, so that it saves a checkpoint

The settings are in launch.toml; LAUNCH.md is the page. --dry-run prints every command and the manifest, and runs none.
"""

import json
import string
import sys
from pathlib import PurePosixPath
from typing import Any

from launch_settings import ROOT, Settings, Shell, main

from jaxlm.errors import UserError

VOLUME = PurePosixPath("/checkpoints")
RESOURCES = {"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}
PORT = 12355


def submit(settings: Settings, shell: Shell) -> int:
    return shell.status(["kubectl", "apply", "--filename=-"], manifest(settings))


def logs(settings: Settings, shell: Shell) -> int:
    pods = f"jobset.sigs.k8s.io/jobset-name={settings.name},batch.kubernetes.io/job-completion-index=0"
    return shell.status([*kubectl(settings), "logs", "--follow", "--tail=-1", f"--selector={pods}"])


def delete(settings: Settings, shell: Shell) -> int:
    return shell.status([*kubectl(settings), "delete", "jobset", settings.name])


def kubectl(settings: Settings) -> list[str]:
    return ["kubectl", f"--namespace={settings.jobset.namespace}"]


def manifest(settings: Settings) -> str:
    """Return the manifest as YAML. Raises UserError where a new pod would not find the checkpoints."""
    jobset = settings.jobset
    if not jobset.claim and not settings.checkpoint_dir.startswith("gs://"):
        raise UserError(
            "jobset.claim='': a pod takes its disk along; give the name of a PersistentVolumeClaim, "
            "or checkpoint_dir=gs://BUCKET/FOLDER"
        )
    resource = RESOURCES.get(jobset.kind)
    selector = {}
    if jobset.kind == "tpu":
        selector["cloud.google.com/gke-tpu-accelerator"] = jobset.tpu_accelerator
        selector["cloud.google.com/gke-tpu-topology"] = jobset.tpu_topology
    mounts, volumes, run_dir = [], [], settings.run_dir
    if jobset.claim:
        mounts.append({"name": "checkpoints", "mountPath": str(VOLUME)})
        volumes.append({"name": "checkpoints", "persistentVolumeClaim": {"claimName": jobset.claim}})
        run_dir = str(VOLUME / settings.run_dir)
    values: dict[str, Any] = {
        "name": settings.name,
        "namespace": jobset.namespace,
        "max_restarts": jobset.max_restarts,
        "hosts": jobset.hosts,
        "image": jobset.image,
        # Pods start when their nodes and images are there, and have a name in DNS only then.
        "command": [*settings.training("python", run_dir), "--distributed.timeout-s", "600"],
        "env": environment(settings),
        "resources": {"limits": {resource: str(jobset.chips_per_host)}} if resource else {},
        "node_selector": selector,
        "mounts": mounts,
        "volumes": volumes,
    }
    template = string.Template((ROOT / "scripts" / "jobset.yaml").read_text(encoding="utf-8"))
    return template.substitute({name: json.dumps(value) for name, value in values.items()})


def environment(settings: Settings) -> list[dict[str, Any]]:
    """Return what the processes find each other by. Those of a TPU have it from GKE, which numbers them as it wires."""
    if settings.jobset.kind == "tpu":
        return []
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    return [
        {"name": "MASTER_ADDR", "value": f"{settings.name}-train-0-0.{settings.name}"},
        {"name": "MASTER_PORT", "value": str(PORT)},
        {"name": "WORLD_SIZE", "value": str(settings.jobset.hosts)},
        {"name": "RANK", "valueFrom": index},
    ]


VERBS = {f.__name__: f for f in (submit, logs, delete)}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__, VERBS))
