"""The pods of a manifest in launch/kubernetes as processes of this machine: a kubelet of fifty lines.

What a pod's container gets is made as Kubernetes makes it: variables from fields and secrets, `$(NAME)` in arguments.
What this machine has not got is replaced: the first pod's DNS name, the volume, eight GPUs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.jobs import Started
from tests.launch.slow_job import LIMIT_S
from tests.processes.ranks import ROOT, free_port

FOLDER = ROOT / "launch/kubernetes"
MANIFESTS = ("jobset", "trainjob", "pytorchjob")
SECRET = "a secret that kubectl has made, of 16 bytes at least"
PORT = "29400"


def documents(manifest: str) -> dict[str, dict[str, Any]]:
    """kind -> the object of that kind."""
    return {found["kind"]: found for found in yaml.safe_load_all((FOLDER / f"{manifest}.yaml").read_text())}


def pod_template(manifest: str) -> dict[str, Any]:
    """The template of its pods, as the controller completes it."""
    found = documents(manifest)
    match manifest:
        case "jobset":
            return found["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
        case "pytorchjob":
            return found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    template = found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    container, trainer = template["spec"]["containers"][0], found["TrainJob"]["spec"]["trainer"]
    container |= {"env": [*container["env"], *trainer["env"]]}
    container |= {key: trainer[key] for key in ("image", "command", "args")} | {
        "resources": trainer["resourcesPerNode"]
    }
    return template


class Pods:
    """Pods of one job by name; each has an address of its own, and all listen on the same port."""

    def __init__(self, manifest: str, folder: Path) -> None:
        self._template, self._folder, self._port = pod_template(manifest), folder, str(free_port())
        self._spec = self._template["spec"]["containers"][0]

    def start(self, name: str) -> Started:
        """The pod whose name ends in its index."""
        address = f"127.0.0.{int(name[-1]) + 1}"
        environment = {variable["name"]: self._value(variable, address) for variable in self._spec["env"]}
        environment["ELASTIC_LSOPT_NODE"] = name  # its host name
        arguments = [self._here(_expanded(word, environment)) for word in self._spec["command"] + self._spec["args"]]
        variables = [f"{key}={value}" for key, value in environment.items()]
        return Started(["env", *variables, *arguments], self._folder, limit_s=LIMIT_S)

    def _value(self, variable: Mapping[str, Any], address: str) -> str:
        match variable.get("valueFrom"):
            case {"fieldRef": {"fieldPath": "status.podIP"}}:
                return address
            case {"secretKeyRef": {"name": "elastic-lsopt", "key": "secret"}}:
                return SECRET
        assert variable["name"] == "ELASTIC_LSOPT_ENDPOINT"
        return f"127.0.0.1:{self._port}"

    def _here(self, word: str) -> str:
        return (
            {"workers=8": "workers=1"}.get(word, word).replace("/shared", str(self._folder)).replace(PORT, self._port)
        )


def _expanded(word: str, environment: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word)
