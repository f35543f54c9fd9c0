"""Writes Kubernetes files: a JobSet, its service account and its volume."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import yaml

from dpdist import errors

from ..cli import exit_codes
from . import job as job_lib

TOOL = ("kubectl", "kubectl, and JobSet in the cluster")

_PORT = 8476
_GROUP = "train"
_SECRET_FOLDER = "/run/secrets/dpdist"
# Processes save in less time, and are killed after it.
_GRACE_SECONDS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(job_lib.Job):
  """A job under Kubernetes; a node is a pod of one process."""

  image: str = job_lib.word(
    "",
    "A container image that has dpdist installed, and the config at its path.",
  )
  namespace: str = job_lib.word("default", "The namespace of all objects.")
  service_account: str = job_lib.word(
    "", "An account that exists; without it one is made."
  )
  secret: str = job_lib.word(
    "",
    "The Kubernetes Secret whose key `secret` is the run's; without it"
    " NAME-secret.",
  )
  claim: str = job_lib.word(
    "", "A ReadWriteMany volume claim that exists; without it one is made."
  )
  storage: str = job_lib.word("10Gi", "The size of a claim that is made.")
  storage_class: str = job_lib.word(
    "", "The class of a claim that is made; without it the cluster's."
  )
  cpus: int = job_lib.count(1, "Processors of a process.")
  memory: str = job_lib.word("4Gi", "Memory of a pod, as 16Gi.")
  gpus: int = job_lib.count(0, "GPUs of a process.", at_least=0)
  accelerator: str = job_lib.word(
    "", "The kind of TPU on GKE, as tpu-v6e-slice."
  )
  topology: str = job_lib.word("", "The topology of the TPUs, as 4x4.")
  chips_per_node: int = job_lib.count(0, "TPU chips of a pod.", at_least=0)
  python: str = job_lib.flag("python", "The interpreter on the machines.")

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.image:
      raise errors.ArgumentError("image must be given with --to=jobset")
    tpu = (self.accelerator, self.topology, self.chips_per_node)
    if any(tpu) and not all(tpu):
      raise errors.ArgumentError(
        "accelerator, topology and chips_per_node go together, got"
        f" {self.accelerator!r}, {self.topology!r} and {self.chips_per_node}"
      )


def files(job: Job) -> Mapping[str, str]:
  """Returns all objects in one file, by its name."""
  objects = []
  if not job.service_account:
    objects.append(_service_account(job))
  if not job.claim:
    objects.append(_claim(job))
  objects.append(_jobset(job))
  text = yaml.safe_dump_all(objects, sort_keys=False, allow_unicode=True)
  return {f"{job.name}.yaml": text}


def command(job: Job, folder: str) -> list[str]:
  """Returns the command that submits the files in a folder."""
  return ["kubectl", "apply", f"--filename={folder}/{job.name}.yaml"]


def _metadata(job: Job) -> dict[str, str]:
  return {"name": job.name, "namespace": job.namespace}


def _service_account(job: Job) -> dict[str, Any]:
  """Makes an account without roles: the processes never call Kubernetes."""
  return {
    "apiVersion": "v1",
    "kind": "ServiceAccount",
    "metadata": _metadata(job),
    "automountServiceAccountToken": False,
  }


def _claim(job: Job) -> dict[str, Any]:
  spec: dict[str, Any] = {
    "accessModes": ["ReadWriteMany"],
    "resources": {"requests": {"storage": job.storage}},
  }
  if job.storage_class:
    spec["storageClassName"] = job.storage_class
  return {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": _metadata(job),
    "spec": spec,
  }


def _jobset(job: Job) -> dict[str, Any]:
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": _metadata(job),
    "spec": {
      # The headless service, where the pods find process 0 by a name that
      # exists before it is ready.
      "network": {
        "enableDNSHostnames": True,
        "subdomain": job.name,
        "publishNotReadyAddresses": True,
      },
      # If its settings were refused, the job fails at once; else all of its
      # pods are made anew, up to so many times.
      "failurePolicy": {
        "maxRestarts": job.max_restarts,
        "rules": [
          {
            "name": "refused",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
          }
        ],
      },
      "replicatedJobs": [
        {"name": _GROUP, "replicas": 1, "template": {"spec": _job(job)}}
      ],
    },
  }


def _job(job: Job) -> dict[str, Any]:
  return {
    "completionMode": "Indexed",
    "completions": job.nodes,
    "parallelism": job.nodes,
    # No pod restarts alone after a failure: the others cannot go on.
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        _on_exit(exit_codes.USAGE, "FailJob"),
        # All have saved and stopped together, and are restarted together.
        _on_exit(exit_codes.PREEMPTED, "Ignore"),
      ]
    },
    "template": {
      "spec": {
        "serviceAccountName": job.service_account or job.name,
        "automountServiceAccountToken": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "nodeSelector": _node_selector(job),
        "containers": [_container(job)],
        "volumes": _volumes(job),
      }
    },
  }


def _on_exit(code: int, action: str) -> dict[str, Any]:
  return {
    "action": action,
    "onExitCodes": {
      "containerName": _GROUP,
      "operator": "In",
      "values": [code],
    },
  }


def _node_selector(job: Job) -> dict[str, str]:
  if not job.accelerator:
    return {}
  return {
    "cloud.google.com/gke-tpu-accelerator": job.accelerator,
    "cloud.google.com/gke-tpu-topology": job.topology,
  }


def _container(job: Job) -> dict[str, Any]:
  resources: dict[str, Any] = {"cpu": job.cpus, "memory": job.memory}
  if job.gpus:
    resources["nvidia.com/gpu"] = job.gpus
  if job.chips_per_node:
    resources["google.com/tpu"] = job.chips_per_node
  # The pod of index 0, of the only Job of the group.
  leader = f"{job.name}-{_GROUP}-0-0.{job.name}"
  index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  return {
    "name": _GROUP,
    "image": job.image,
    # Kubernetes would replace $(NAME).
    "command": [
      part.replace("$", "$$")
      for part in job.train(job.python, f"{_SECRET_FOLDER}/secret")
    ],
    "env": [
      {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{leader}:{_PORT}"},
      {"name": "JAX_NUM_PROCESSES", "value": str(job.nodes)},
      {
        "name": "JAX_PROCESS_ID",
        "valueFrom": {"fieldRef": {"fieldPath": index}},
      },
    ],
    "ports": [{"containerPort": _PORT}],
    "resources": {
      "requests": {name: str(value) for name, value in resources.items()},
      "limits": {name: str(value) for name, value in resources.items()},
    },
    "securityContext": {"allowPrivilegeEscalation": False},
    "volumeMounts": [
      {"name": "workdir", "mountPath": job.workdir},
      {"name": "secret", "mountPath": _SECRET_FOLDER, "readOnly": True},
    ],
  }


def _volumes(job: Job) -> list[dict[str, Any]]:
  return [
    {
      "name": "workdir",
      "persistentVolumeClaim": {"claimName": job.claim or job.name},
    },
    {
      "name": "secret",
      "secret": {
        "secretName": job.secret or f"{job.name}-secret",
        "defaultMode": 0o400,
        "items": [{"key": "secret", "path": "secret"}],
      },
    },
  ]
