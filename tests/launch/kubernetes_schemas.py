"""What the API server takes of the kinds in launch/kubernetes, as JSON schemas; a key that nobody knows is an error.

TrainJob, TrainingRuntime, JobSet and Kubernetes' own kinds: the models that Kubeflow Trainer publishes, made from the
CRDs (PyPI's kubeflow-trainer-api 2.3.0, with JobSet v1alpha2). PyTorchJob: the names and types of kubeflow.org/v1 as in
PyPI's kubeflow-training 1.9.4; PodDisruptionBudget: those of policy/v1.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from kubeflow_trainer_api import models

INTEGER, TEXT, FLAG = {"type": "integer"}, {"type": "string"}, {"type": "boolean"}
QUANTITY = {"type": ["integer", "string"]}
QUANTITIES = ("IoK8sApimachineryPkgApiResourceQuantity", "IoK8sApimachineryPkgUtilIntstrIntOrString")
"""Models of what is a number or a string in YAML."""
MODELS = {
    "JobSet": models.JobsetV1alpha2JobSet, "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime, "Service": models.IoK8sApiCoreV1Service,
}  # fmt: skip
API = {
    "JobSet": "jobset.x-k8s.io/v1alpha2", "TrainJob": "trainer.kubeflow.org/v1alpha1", "Service": "v1",
    "TrainingRuntime": "trainer.kubeflow.org/v1alpha1", "PyTorchJob": "kubeflow.org/v1",
    "PodDisruptionBudget": "policy/v1",
}  # fmt: skip


@cache
def schema_of(kind: str) -> dict[str, Any]:
    """The schema of a whole object of this kind."""
    if kind in MODELS:
        made = MODELS[kind].model_json_schema(by_alias=True)
    else:
        pod = models.IoK8sApiCoreV1PodTemplateSpec.model_json_schema(by_alias=True)
        selector = models.IoK8sApimachineryPkgApisMetaV1LabelSelector.model_json_schema(by_alias=True)
        spec = _pytorch_job() if kind == "PyTorchJob" else _disruption_budget()
        made = _object(
            apiVersion=TEXT, kind=TEXT, metadata={"$ref": "#/$defs/IoK8sApimachineryPkgApisMetaV1ObjectMeta"}, spec=spec
        )
        made["$defs"] = {**pod.pop("$defs"), **selector.pop("$defs", {}), "Pod": pod, "Selector": selector}
    made["$defs"] |= {name: QUANTITY for name in QUANTITIES if name in made["$defs"]}
    made["required"] = ["apiVersion", "kind", "metadata", "spec"]
    made["properties"] |= {"apiVersion": {"const": API[kind]}, "kind": {"const": kind}}
    return _strict(made)


def _pytorch_job() -> dict[str, Any]:
    policy = _object(
        minReplicas=INTEGER, maxReplicas=INTEGER, maxRestarts=INTEGER, nProcPerNode=INTEGER, rdzvBackend=TEXT,
        rdzvHost=TEXT, rdzvId=TEXT, rdzvPort=INTEGER, standalone=FLAG,
    )  # fmt: skip
    replicas = _object(
        replicas=INTEGER, restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
        template={"$ref": "#/$defs/Pod"},
    )  # fmt: skip
    run = _object(backoffLimit=INTEGER, activeDeadlineSeconds=INTEGER, suspend=FLAG, ttlSecondsAfterFinished=INTEGER)
    job = _object(
        elasticPolicy=policy,
        nprocPerNode=TEXT,
        runPolicy=run,
        pytorchReplicaSpecs=_object(Master=replicas, Worker=replicas),
    )
    return job | {"required": ["pytorchReplicaSpecs"]}


def _disruption_budget() -> dict[str, Any]:
    return _object(
        minAvailable=QUANTITY, maxUnavailable=QUANTITY, selector={"$ref": "#/$defs/Selector"},
        unhealthyPodEvictionPolicy={"enum": ["IfHealthyBudget", "AlwaysAllow"]},
    )  # fmt: skip


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _strict(schema: Any) -> Any:
    """The same, where an object has no other keys than its properties."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(value) for key, value in schema.items()}
    if "properties" in found and found.get("type") == "object":
        found["additionalProperties"] = False
    return found
