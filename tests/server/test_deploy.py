"""The deployment files: valid by their schemas, and in step with the server."""

import json
import pathlib
import re
import types

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jllm import EngineStats
from server.admission import Admission
from server.metrics import Metrics

FOLDER = pathlib.Path(__file__).parents[2] / "server" / "deploy"
MANIFESTS = sorted(FOLDER.glob("kubernetes-*.yaml"))


def documents(manifest):
    return list(yaml.safe_load_all(manifest.read_text()))


def deployment(manifest):
    return next(d for d in documents(manifest) if d["kind"] == "Deployment")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_is_valid(manifest):
    for document in documents(manifest):
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_a_misspelt_field_would_be_found():
    document = deployment(MANIFESTS[0])
    document["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(document, "1.31", strict=True)


SETS = [
    *FOLDER.glob("jobset-*.yaml"),
    *FOLDER.glob("leaderworkerset-*.yaml"),
]
assert len(SETS) == 4
SCHEMAS = pathlib.Path(__file__).parent / "schemas"


def pods(node):
    """The specs of all pods below a node."""
    if isinstance(node, dict):
        if "containers" in node:
            return [node]
        return [pod for value in node.values() for pod in pods(value)]
    return [pod for value in node for pod in pods(value)] if type(node) is list else []


def check_set(document):
    """Validates a resource of several hosts, and its pods."""
    schema = json.loads((SCHEMAS / f"{document['kind'].lower()}.json").read_text())
    jsonschema.validate(document, schema)
    for spec in pods(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
        kubernetes_validate.validate(pod | {"spec": spec}, "1.31", strict=True)


@pytest.mark.parametrize("manifest", SETS, ids=lambda path: path.stem)
def test_sets_of_hosts_are_valid(manifest):
    first, *others = documents(manifest)
    check_set(first)
    assert len(pods(first)) in (1, 2)
    for document in others:
        kubernetes_validate.validate(document, "1.31", strict=True)


@pytest.mark.parametrize("manifest", SETS, ids=lambda path: path.stem)
def test_a_misspelt_field_of_a_set_would_be_found(manifest):
    first = documents(manifest)[0]
    pods(first)[0]["containers"][0]["arguments"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="arguments"):
        check_set(first)
    first = documents(manifest)[0]
    first["spec"]["replicaz"] = 1
    with pytest.raises(jsonschema.ValidationError, match="replicaz"):
        check_set(first)


def test_compose_file_is_valid():
    from check_jsonschema.builtin_schemas import get_builtin_schema
    from jsonschema import Draft7Validator

    schema = get_builtin_schema("vendor.compose-spec")
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    assert not list(Draft7Validator(schema).iter_errors(compose))


def test_the_dockerfile_copies_every_package():
    text = (FOLDER / "Dockerfile").read_text()
    for package in ("jllm", "pallas_kernels", "shardings", "server"):
        assert f"COPY {package} {package}" in text


def test_dashboard_asks_for_metrics_that_the_server_has():
    metrics = Metrics("name")
    metrics.set_llm(types.SimpleNamespace(stats=EngineStats), Admission(1, 1))
    exposition = metrics.render().decode()
    known = set(re.findall(r"^# TYPE (\S+)", exposition, re.M))
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            for name in re.findall(r"jllm:[a-z0-9_]+", target["expr"]):
                base = re.sub(r"_(bucket|total)$", "", name)
                assert {base, name, f"{base}_total"} & known, name
