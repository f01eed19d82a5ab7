"""launch/kubernetes: what the API servers would say of the manifests, what their controllers make of them, and that the
commands in them train a job whose pods come and go."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from elastic_lsopt.config.elastic import ElasticConfig
from tests.jobs import losses
from tests.launch.kubernetes_schemas import schema_of
from tests.launch.pods import MANIFESTS, PORT, Pods, documents, pod_template
from tests.launch.slow_job import ELASTIC, SlowJob

JOBS = {"jobset": "JobSet", "trainjob": "TrainJob", "pytorchjob": "PyTorchJob"}


@pytest.mark.fast
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_the_api_server_takes_it(manifest: str) -> None:
    for kind, found in documents(manifest).items():
        wrong = [
            f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema_of(kind)).iter_errors(found)
        ]
        assert not wrong, wrong


@pytest.mark.fast
def test_the_schemas_refuse_what_the_api_server_does() -> None:
    """A key with a slip, a value of another type, a kind of another group."""
    for wrong in ({"replicatedJob": []}, {"suspend": "no"}):
        found = documents("jobset")["JobSet"]
        found["spec"] |= wrong
        assert list(Draft202012Validator(schema_of("JobSet")).iter_errors(found))
    found = documents("pytorchjob")["PyTorchJob"]
    found["spec"]["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] = "Sometimes"
    assert list(Draft202012Validator(schema_of("PyTorchJob")).iter_errors(found))
    assert list(Draft202012Validator(schema_of("JobSet")).iter_errors(found))


def _nodes(manifest: str) -> int:
    found = documents(manifest)
    match manifest:
        case "jobset":
            job = found["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
            assert job["parallelism"] == job["completions"]
            return job["completions"]
        case "trainjob":
            return found["TrainJob"]["spec"]["trainer"]["numNodes"]
    return found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"]


@pytest.mark.fast
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_the_endpoint_is_the_first_pods_name(manifest: str) -> None:
    """JobSet calls pods JOBSET-REPLICATEDJOB-JOB-POD, in a subdomain of that name; a TrainJob is a JobSet of its
    own name; the training operator labels a pod with its job and its index."""
    found, name = documents(manifest), documents(manifest)[JOBS[manifest]]["metadata"]["name"]
    variables = {v["name"]: v.get("value") for v in pod_template(manifest)["spec"]["containers"][0]["env"]}
    if manifest == "pytorchjob":
        service = found["Service"]
        wanted = service["metadata"]["name"]
        assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
        assert service["spec"]["selector"] == {
            "training.kubeflow.org/job-name": name, "training.kubeflow.org/replica-type": "worker",
            "training.kubeflow.org/replica-index": "0",
        }  # fmt: skip
    else:
        spec = found["JobSet" if manifest == "jobset" else "TrainingRuntime"]["spec"]
        template = spec if manifest == "jobset" else spec["template"]["spec"]
        assert [job["name"] for job in template["replicatedJobs"]] == ["node"]
        assert template["network"]["publishNotReadyAddresses"]
        wanted = f"{name}-node-0-0.{name}"
    assert variables["ELASTIC_LSOPT_ENDPOINT"] == f"{wanted}:{PORT}"


@pytest.mark.fast
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_who_is_told_to_leave_has_the_time_and_is_started_again(manifest: str) -> None:
    found, pod = documents(manifest), pod_template(manifest)["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 2 * ElasticConfig().drain_timeout_s
    container = pod["containers"][0]
    assert container["command"][0] == "elastic-lsopt"  # no shell between, which would keep SIGTERM to itself
    assert "exit_code_when_stopped=143" in container["args"]
    budget = found["PodDisruptionBudget"]["spec"]
    assert _nodes(manifest) / 2 < budget["minAvailable"] < _nodes(manifest)
    name = documents(manifest)[JOBS[manifest]]["metadata"]["name"]
    if manifest == "pytorchjob":
        workers = found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
        assert list(workers) == ["Worker"] and workers["Worker"]["restartPolicy"] == "ExitCode"  # 143 is one of a retry
        assert container["name"] == "pytorch"  # by which the operator finds it
        assert budget["selector"]["matchLabels"] == {"training.kubeflow.org/job-name": name}
        return
    spec = found["JobSet" if manifest == "jobset" else "TrainingRuntime"]["spec"]
    job = (spec if manifest == "jobset" else spec["template"]["spec"])["replicatedJobs"][0]["template"]["spec"]
    actions = {tuple(rule["onExitCodes"]["values"]): rule["action"] for rule in job["podFailurePolicy"]["rules"][:2]}
    assert actions == {(2,): "FailJob", (143,): "Ignore"}
    assert job["completionMode"] == "Indexed" and job["successPolicy"] == {"rules": [{"succeededCount": 1}]}
    assert pod["restartPolicy"] == "Never"  # which a pod failure policy needs
    assert budget["selector"]["matchLabels"] == {"jobset.sigs.k8s.io/jobset-name": name}


@pytest.mark.full  # the manifests' commands are the same; the launchers' tests run such jobs each day
@pytest.mark.timeout(600)
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_two_pods_train_one_is_evicted_and_comes_back(tmp_path: Path, undisturbed: list[float], manifest: str) -> None:
    job, pods, started = SlowJob(tmp_path, elastic=ELASTIC | {"min_nodes": 1}), Pods(manifest, tmp_path), {}
    job.file.rename(tmp_path / "job.yaml")
    try:
        started["node-0"] = pods.start("node-0")
        started["node-0"].until(
            lambda: list(job.folder.glob("elastic/*.address")) != []
        )  # both could listen at its name
        started["node-1"] = pods.start("node-1")
        started["node-0"].until(lambda: job.nodes() == {"node-0", "node-1"} and job.step() >= 4)
        evicted = started.pop("node-1")
        evicted.process.send_signal(signal.SIGTERM)
        assert evicted.wait() == 143, evicted.output
        started["node-0"].until(lambda: job.nodes() == {"node-0"})
        started["node-1"] = pods.start("node-1")
        started["node-0"].until(lambda: job.nodes() == {"node-0", "node-1"})
        job.hurry()
        ended = {name: pod.wait() for name, pod in started.items()}
        assert ended == {"node-0": 0, "node-1": 0}, [pod.output for pod in started.values()]
        assert losses(job.folder) == pytest.approx(undisturbed, rel=1e-5)
    finally:
        for pod in started.values():
            pod.kill()
