"""The manifests, the chart and KServe's examples: right by Kubernetes' schemas, and right for this server.

Manifests are checked by the schemas of `kubernetes-validate`, and the chart is rendered by Helm itself, which
`helm-python-sdk` brings as a library. Where these are not installed, that part is skipped. Kinds of others (KServe's,
the Prometheus operator's) have no schema there: their containers are checked as those of a pod, and the rest as below.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from bdh_batch import cli, settings
from bdh_batch.http.endpoints import ENDPOINTS
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "bdh-batch"
KUBERNETES = "1.37"
OF_OTHERS = {"monitoring.coreos.com", "serving.kserve.io"}  # API groups without a schema here
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
# Values of the chart: its own, all that can be switched on, and all that can be switched off.
VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": {
        "image": {"repository": "registry.example/bdh-batch", "tag": "cuda"},
        "config": {"server": {"drain_seconds": 300}, "limits": {"max_body_bytes": 4000000}, "model": {"name": "large"}},
        "modelClaim": "bdh-models",
        "keysSecret": "bdh-keys",
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "nodeSelector": {"gpu": "h200"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "env": [{"name": "OTEL_SERVICE_NAME", "value": "bdh"}],
        "autoscaling": {"enabled": True, "maxReplicas": 20},
        "serviceMonitor": {"enabled": True},
        "networkPolicy": {"egress": [{"to": [{"podSelector": {"matchLabels": {"app": "redis"}}}]}]},
    },
    "little": {"networkPolicy": {"enabled": False}, "preStopSeconds": 0},
}
RENDER = """
import json, sys
import helm_python
with helm_python.Chart.load(sys.argv[1]) as chart:
    cases = json.load(sys.stdin)
    print(json.dumps({name: chart.render(values, name="mine", namespace="there") for name, values in cases.items()}))
"""
Document = dict[str, Any]


def documents(text: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(text) if document]


def kustomized() -> list[Document]:
    """What `kubectl apply -k deploy/kubernetes` applies."""
    folder = DEPLOY / "kubernetes"
    named = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert {file.name for file in folder.glob("*.yaml")} == {*named, "kustomization.yaml"}
    return [document for name in named for document in documents((folder / name).read_text())]


@pytest.fixture(scope="session")
def rendered() -> Mapping[str, list[Document]]:
    """What the chart makes of VALUES, by Helm's own templates."""
    if find_spec("helm_python") is None:
        pytest.skip("Helm is not installed: pip install helm-python-sdk")
    done = subprocess.run(
        [sys.executable, "-c", RENDER, CHART], input=json.dumps(VALUES), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {
        name: [each for file, text in files.items() if file.endswith(".yaml") for each in documents(text)]
        for name, files in json.loads(done.stdout).items()
    }


@pytest.fixture(params=["manifests", *VALUES])
def installed(request: pytest.FixtureRequest) -> list[Document]:
    """All that is applied to a cluster, by the manifests, or by the chart with some values."""
    if request.param == "manifests":
        return kustomized()
    found: list[Document] = request.getfixturevalue("rendered")[request.param]
    return found


def only(found: Sequence[Document], kind: str) -> Document:
    (document,) = [document for document in found if document["kind"] == kind]
    return document


def of_kind(found: Sequence[Document], *kinds: str) -> Iterator[Document]:
    return (document for document in found if document["kind"] in kinds)


def check_by_schema(document: Document) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    validate(document, KUBERNETES, strict=True)


def check_probes(container: Document, port: int) -> None:
    """A server answers there: what is restarted by lives, what is routed by is ready."""
    paths = {each.path for each in ENDPOINTS}
    ports = {each.get("name", each["containerPort"]): each["containerPort"] for each in container["ports"]}
    assert port in ports.values()
    for name in PROBES:
        probe = container[name]["httpGet"]
        assert probe["path"] in paths
        assert probe["path"] == ("/readyz" if name == "readinessProbe" else "/livez")
        assert ports.get(probe["port"], probe["port"]) == port
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 60


def check_ends_in_time(pod: Document, container: Document, drain_seconds: float) -> None:
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {"command": ["sleep", "0"]})["command"]
    assert hook[0] == "sleep"
    assert pod["terminationGracePeriodSeconds"] >= int(hook[1]) + drain_seconds + 10


def served_with(words: Sequence[str], config: Path | None = None) -> settings.Settings:
    """The settings of a container's command; an option that does not exist is refused."""
    program, *arguments = words
    assert program == "bdh-batch"
    options = cli._parser().parse_args(arguments)
    return settings.load(config or options.config, cli._overrides(options)).settings


def test_every_object_is_right_by_its_schema(installed: list[Document]) -> None:
    assert len(installed) >= 4
    for document in installed:
        if document["apiVersion"].partition("/")[0] not in OF_OTHERS:
            check_by_schema(document)


def test_what_belongs_together_names_each_other(installed: list[Document]) -> None:
    deployment, service = only(installed, "Deployment"), only(installed, "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        *(each["spec"]["selector"]["matchLabels"] for each in of_kind(installed, "PodDisruptionBudget")),
        *(each["spec"]["podSelector"]["matchLabels"] for each in of_kind(installed, "NetworkPolicy")),
    ):
        assert selector
        assert selector.items() <= labels.items()
    for monitor in of_kind(installed, "ServiceMonitor"):
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["path"] in {each.path for each in ENDPOINTS}
        assert endpoint["port"] in [each["name"] for each in service["spec"]["ports"]]
    assert {each["targetPort"] for each in service["spec"]["ports"]} <= {each["name"] for each in container["ports"]}
    for policy in of_kind(installed, "NetworkPolicy"):
        (ingress,) = policy["spec"]["ingress"]
        assert {each["port"] for each in ingress["ports"]} == {each["containerPort"] for each in container["ports"]}
    for scaler in of_kind(installed, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
        assert "replicas" not in deployment["spec"]
        page = (ROOT / "docs" / "operations.md").read_text()
        assert all(f"| `{each['pods']['metric']['name']}` |" in page for each in scaler["spec"]["metrics"])


def test_the_server_understands_its_options_and_ends_in_time(installed: list[Document], tmp_path: Path) -> None:
    pod = only(installed, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    config = tmp_path / "config.yaml"
    config.write_text(only(installed, "ConfigMap")["data"]["config.yaml"])
    chosen = served_with(container["args"], config)
    assert chosen.server.host == "0.0.0.0"
    assert chosen.server.log_format == "json"
    assert chosen.telemetry.vllm_metrics
    check_probes(container, chosen.server.port)
    check_ends_in_time(pod, container, chosen.server.drain_seconds)


def test_files_are_where_the_options_have_them(installed: list[Document]) -> None:
    pod = only(installed, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    mounted = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    config = container["args"][container["args"].index("--config") + 1]
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert (
        volumes[mounted[str(Path(config).parent)]]["configMap"]["name"]
        == only(installed, "ConfigMap")["metadata"]["name"]
    )
    written = yaml.safe_load(only(installed, "ConfigMap")["data"][Path(config).name])
    if "auth" in written:
        keys = Path(written["auth"]["api_keys_file"])
        assert "secret" in volumes[mounted[str(keys.parent)]]
    # The file system is read-only: what is written has a volume.
    assert {"/tmp", "/home/bdh"} <= mounted.keys()
    caches = {each["name"]: each.get("value", "") for each in container["env"]}
    assert caches["NUMBA_CACHE_DIR"].startswith("/home/bdh/")


def test_the_user_is_the_images(installed: list[Document]) -> None:
    pod = only(installed, "Deployment")["spec"]["template"]["spec"]
    (uid,) = re.findall(r"useradd .*--uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert pod["securityContext"]["runAsUser"] == int(uid)
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_chart_has_every_value_that_its_templates_use() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert values.keys() == schema["properties"].keys() - {"global"}
    used = {name for file in CHART.glob("templates/*") for name in re.findall(r"\.Values\.([\w.]+)", file.read_text())}
    assert {name.partition(".")[0] for name in used} == values.keys()
    for name in used:
        found: Any = values
        for part in name.split("."):
            assert part in found, name
            found = found[part]


def test_the_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert chart["appVersion"] == version
    images = re.findall(r"image: (bdh-batch:\S+)", "".join(file.read_text() for file in DEPLOY.rglob("*.yaml")))
    assert set(images) == {f"bdh-batch:{version}"}


@pytest.mark.parametrize(
    "values",
    [{"config": {"server": {"drain_seconds": 5, "host": "127.0.0.1"}}}, {"replica": 3}, {"preStopSeconds": "10"}],
    ids=["host", "unknown", "text"],
)
def test_the_chart_refuses_values_that_it_would_not_follow(values: dict[str, Any]) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    given = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(given, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(given | values, schema)


def containers_of_kserve() -> dict[str, tuple[Document, Document]]:
    """The pod of each example, and the server's container."""
    runtime, service = documents((DEPLOY / "kserve" / "inference-service.yaml").read_text())
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    assert predictor["model"]["modelFormat"]["name"] in [
        each["name"] for each in runtime["spec"]["supportedModelFormats"]
    ]
    assert predictor["model"]["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (llm,) = documents((DEPLOY / "kserve" / "llm-inference-service.yaml").read_text())
    (first,), (second,) = runtime["spec"]["containers"], llm["spec"]["template"]["containers"]
    assert first["name"] == "kserve-container"  # the names that KServe knows the server by
    assert second["name"] == "main"
    assert f"--set=model.name={llm['spec']['model']['name']}" in second["args"]
    return {"InferenceService": (predictor, first), "LLMInferenceService": (llm["spec"]["template"], second)}


@pytest.mark.parametrize("kind", ["InferenceService", "LLMInferenceService"])
def test_kserve_finds_the_server_at_its_port_and_the_server_its_model(kind: str) -> None:
    pod, container = containers_of_kserve()[kind]
    chosen = served_with([*container.get("command", ()), *container["args"]])
    assert (chosen.server.host, chosen.server.port) == ("0.0.0.0", 8000)
    assert chosen.model.path == Path("/mnt/models")
    assert chosen.model.name
    check_probes(container, 8000)
    check_ends_in_time(pod, container, chosen.server.drain_seconds)
    check_by_schema({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [container]}})
