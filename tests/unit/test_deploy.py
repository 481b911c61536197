"""What `deploy/` holds: it fits the manager, and what reads it takes it."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from cidalloc.cli import main
from cidalloc.client import Client
from cidalloc.manager.recovery import waiting_for
from cidalloc.manager.settings import Settings
from cidalloc.triton_model.metrics import FAMILIES

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
RULES = KUBERNETES / "monitoring" / "rules.yaml"

pytestmark = pytest.mark.skipif(not DEPLOY.is_dir(), reason="a source distribution has none")


def named(text: str) -> set[str]:
    """The metrics that a text names."""
    return set(re.findall(r"\bcidmgr_[a-z_]+", text))


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text())
    return found


def test_metrics_that_are_named_are_there() -> None:
    for path in (RULES, RULES.with_name("rules_test.yaml"), DEPLOY / "grafana.json"):
        assert named(path.read_text()) <= set(FAMILIES), path.name
    assert named((DEPLOY / "grafana.json").read_text()) == set(FAMILIES), "each one is shown"


def test_the_dashboard() -> None:
    board = dashboard()
    assert {each["name"] for each in board["templating"]["list"]} == {"datasource", "model"}
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels), "none lies upon another"
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(named(target["expr"]) for target in panel["targets"])


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not on PATH")
@pytest.mark.parametrize("what", ["check rules alerts.yml", "test rules rules_test.yaml"])
def test_the_alerts(what: str, tmp_path: Path) -> None:
    """Prometheus takes what the command in the head of the file makes of it."""
    for name in ("rules.yaml", "rules_test.yaml"):
        shutil.copy(RULES.with_name(name), tmp_path)
    (command,) = re.findall(r"^#   (sed .*)", RULES.read_text(), re.MULTILINE)
    done = subprocess.run(
        ["sh", "-c", f"{command} && promtool {what}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    alone = yaml.safe_load((tmp_path / "alerts.yml").read_text())
    assert alone == yaml.safe_load(RULES.read_text())["spec"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not on PATH")
def test_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    """Prometheus itself reads each of them."""
    rules = [
        {"record": f"x:y{n}", "expr": target["expr"].replace("$model", "cidmgr")}
        for n, target in enumerate(t for p in dashboard()["panels"] for t in p["targets"])
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


KINDS = {
    "base": ["PodDisruptionBudget", "Service", "StatefulSet"],
    "slices": ["PodDisruptionBudget", "Service", "StatefulSet"],
    "autoscaled": ["Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service"],
    "everything": [
        "NetworkPolicy",
        "PodDisruptionBudget",
        "PrometheusRule",
        "Service",
        "ServiceMonitor",
        "StatefulSet",
    ],
}
KUBECTL = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
rendered = pytest.mark.skipif(not KUBECTL, reason="kubectl is not on PATH")


@cache
def text_of(folder: str) -> str:
    """Return what kubectl makes of a folder."""
    assert KUBECTL
    done = subprocess.run(
        [KUBECTL, "kustomize", KUBERNETES / folder], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def render(folder: str) -> dict[str, dict[str, Any]]:
    """Return the objects of a folder by their kinds, of which there is one each."""
    parts = list(yaml.safe_load_all(text_of(folder)))
    found = {each["kind"]: each for each in parts}
    assert len(found) == len(parts)
    return found


def server_set(folder: str) -> dict[str, Any]:
    parts = render(folder)
    found: dict[str, Any] = (parts.get("StatefulSet") or parts["Deployment"])["spec"]
    return found


def test_each_folder_is_rendered() -> None:
    """Or it is a component, which one of these has."""
    components = yaml.safe_load((KUBERNETES / "everything/kustomization.yaml").read_text())
    names = {Path(each).name for each in components["components"]}
    assert {each.name for each in KUBERNETES.iterdir()} == names | KINDS.keys()
    for path in KUBERNETES.rglob("*.yaml"):
        if path.name not in ("kustomization.yaml", "rules_test.yaml"):
            listed = yaml.safe_load(path.with_name("kustomization.yaml").read_text())["resources"]
            assert path.name in listed


@rendered
@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("folder", KINDS)
def test_kubernetes_takes_it(folder: str, version: str) -> None:
    parts = render(folder)
    assert sorted(parts) == KINDS[folder]
    for part in parts.values():
        if not part["apiVersion"].startswith("monitoring.coreos.com/"):
            kubernetes_validate.validate(part, version, strict=True)


@rendered
def test_service_monitor() -> None:
    """It has the form that the operator's reference gives, and finds the port. It is not run."""
    parts = render("everything")
    monitor, service = parts["ServiceMonitor"], parts["Service"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"].keys() == {"selector", "endpoints"}
    assert monitor["spec"]["selector"] == {"matchLabels": service["metadata"]["labels"]}
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint.keys() == {"port", "interval"}
    assert endpoint["port"] in {each["name"] for each in service["spec"]["ports"]}


@rendered
@pytest.mark.parametrize("folder", KINDS)
def test_kubernetes(folder: str) -> None:
    parts = render(folder)
    service, budget = parts["Service"]["spec"], parts["PodDisruptionBudget"]["spec"]
    servers = server_set(folder)
    pod = servers["template"]["spec"]
    labels = servers["template"]["metadata"]["labels"]
    assert servers["selector"]["matchLabels"] == labels == service["selector"]
    assert budget["selector"]["matchLabels"] == labels
    assert budget["maxUnavailable"] == 1
    assert service["clusterIP"] == "None", "a client reaches one server"
    (container,) = pod["containers"]
    own = servers.get("volumeClaimTemplates", [])
    volumes = [each["name"] for each in pod["volumes"]] + [each["metadata"]["name"] for each in own]
    assert sorted(each["name"] for each in container["volumeMounts"]) == sorted(volumes)
    assert container["livenessProbe"]["httpGet"] == {"path": "/v2/health/live", "port": "http"}
    for name in ("startupProbe", "readinessProbe"):
        command, *arguments = container[name]["exec"]["command"]
        assert command == "cidalloc"
        takes(arguments)
    command, *arguments = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "cidalloc"
    takes(arguments)
    state = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}["state"]
    assert arguments[:2] == ["drain", state]
    waits = int(arguments[arguments.index("--wait") + 1].removesuffix("s"))
    assert waits + 20 <= pod["terminationGracePeriodSeconds"]


@rendered
def test_one_server() -> None:
    assert server_set("base")["replicas"] == 1, "a session belongs to one manager"
    assert render("base")["Service"]["spec"]["publishNotReadyAddresses"]
    assert settings_of("base").slice == ""


def settings_of(folder: str) -> Settings:
    """Return the settings with which the pods of a folder write their manager."""
    pod = server_set(folder)["template"]["spec"]
    (init,), (container,) = pod["initContainers"], pod["containers"]
    command, *arguments = init["command"]
    assert command == "cidalloc" and init["image"] == container["image"]
    assert "--reset" in arguments, "the folder outlives a restart of the pod's containers"
    context = takes(arguments)
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert context.params["state"] == Path(mounts["state"])
    assert context.params["repository"] == Path(mounts["manager"]) == Path("/cidalloc-models")
    assert init["volumeMounts"] == [{"name": "manager", "mountPath": mounts["manager"]}]
    names = ("slice", "first", "capacity", "max_ttl_ms", "grace_ms")
    return Settings(**{name: context.params[name] for name in names})


@rendered
def test_three_servers_with_slices() -> None:
    """The pods have the slices of their ordinals, and a volume each."""
    spec, name = server_set("slices"), "triton"
    assert spec["replicas"] == 3 and spec["serviceName"] == name
    assert spec["podManagementPolicy"] == "Parallel"
    assert "publishNotReadyAddresses" not in render("slices")["Service"]["spec"]
    assert "hostNetwork" not in spec["template"]["spec"]
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "state"
    settings = settings_of("slices")
    found = [settings.on_host(f"{name}-{ordinal}").slice for ordinal in range(64)]
    assert found == [f"{number}/64" for number in range(64)]
    assert settings.max_ttl_ms >= Client("localhost:1")._session.link.ttl * 1000


@rendered
def test_autoscaled_servers() -> None:
    """No ordinals, no number of replicas, and a state that ends with its pod."""
    spec, parts = server_set("autoscaled"), render("autoscaled")
    assert "replicas" not in spec, "each rollout would undo the autoscaler's number"
    states = [each for each in spec["template"]["spec"]["volumes"] if each["name"] == "state"]
    assert states == [{"name": "state", "emptyDir": {}}]
    assert "publishNotReadyAddresses" not in parts["Service"]["spec"]
    scaler = parts["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": "triton",
    }
    (policy,) = scaler["behavior"]["scaleDown"]["policies"]
    grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert policy["value"] == 1 and policy["periodSeconds"] >= grace
    settings = settings_of("autoscaled")
    assert settings.slice == "random"
    assert waiting_for(settings) == 0, "a new server is of use at once"


@rendered
def test_components() -> None:
    """Each adds what it is for, and changes nothing else of the servers."""
    spec, plain = server_set("everything"), server_set("slices")
    pod, (container,) = spec["template"]["spec"], spec["template"]["spec"]["containers"]
    assert container["resources"].pop("limits") == {"nvidia.com/gpu": "1"}
    assert [each["key"] for each in pod.pop("tolerations")] == ["nvidia.com/gpu"]
    for each in (container, *pod["initContainers"]):
        assert each["image"].startswith("registry.example.com/triton-cidalloc:")
        each["image"] = plain["template"]["spec"]["containers"][0]["image"]
    assert spec == plain
    policy = render("everything")["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    ports = [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
    assert ports == [each["name"] for each in container["ports"]]
    assert all(rule["from"] for rule in policy["ingress"]), "nobody comes in unnamed"


def takes(arguments: list[str]) -> click.Context:
    """Return what the command makes of these arguments; raise if it does not take them."""
    name, *rest = arguments
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return command.make_context(name, rest)


def test_the_image() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert "not built in the tests" in text
    (line,) = re.findall(r"cidalloc (model .*?) &&", text)
    repository = takes(line.split()).params["repository"]
    assert f"--model-repository={repository}" in text
    assert '.whl)[client]"' in text, "all that the command needs"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of that package
def test_envoy() -> None:
    """Envoy's own schema takes it. It is not run."""
    text = (DEPLOY / "envoy.yaml").read_text()
    assert "NEVER RUN" in text
    bootstrap = pytest.importorskip("envoy_data_plane.envoy.config.bootstrap.v3").Bootstrap
    for name in (
        *("filters.network.http_connection_manager.v3", "filters.http.router.v3"),
        "upstreams.http.v3",  # these are named in the file by their types
    ):
        importlib.import_module(f"envoy_data_plane.envoy.extensions.{name}")
    bootstrap.from_dict(yaml.safe_load(text))
    with pytest.raises(KeyError, match="conect_timeout"):
        bootstrap.from_dict(yaml.safe_load(text.replace("connect_timeout", "conect_timeout", 1)))
    assert "retry_policy" not in text
    parts = yaml.safe_load(text)["static_resources"]
    filters = parts["listeners"][0]["filter_chains"][0]["filters"]
    routes = filters[0]["typed_config"]["route_config"]["virtual_hosts"][0]["routes"]
    targets = [each["route"]["cluster"] for each in routes if "route" in each]
    clusters = {each["name"]: each for each in parts["clusters"]}
    assert sorted(targets) == sorted(clusters)
    for name, cluster in clusters.items():
        assert cluster["load_assignment"]["cluster_name"] == name
        (group,) = cluster["load_assignment"]["endpoints"]
        assert len(group["lb_endpoints"]) == (2 if name.startswith("any") else 1)
    kinds = [next(iter({"route", "direct_response"} & each.keys())) for each in routes]
    assert kinds == ["route"] * 4 + ["direct_response"] + ["route"] * 2, "an unknown slice stops"


def test_istio() -> None:
    """It has the form that Istio's reference gives. It is not run."""
    text = (DEPLOY / "istio.yaml").read_text()
    assert "NEVER RUN" in text
    service, virtual = yaml.safe_load_all(text)
    kubernetes_validate.validate(service, "1.31", strict=True)
    assert (virtual["apiVersion"], virtual["kind"]) == ("networking.istio.io/v1", "VirtualService")
    assert virtual["spec"].keys() == {"hosts", "http"}
    assert virtual["spec"]["hosts"] == [service["metadata"]["name"]]
    places = []
    for rule in virtual["spec"]["http"]:
        (match,) = rule.pop("match")
        header = match.get("headers", {}).get("cid-slice", {})
        if "directResponse" in rule:
            assert header == {"regex": ".*"} and rule["directResponse"].keys() == {"status", "body"}
            places.append(None)
            continue
        assert rule.keys() == {"route", "retries"} and rule["retries"] == {"attempts": 0}
        (route,) = rule["route"]
        assert route["destination"]["port"] == {"number": match["port"]}
        number = header.get("exact")
        host = "triton" if number is None else f"triton-{number}"
        assert route["destination"]["host"] == host
        places.append((number, match["port"]))
    slices = [(number, port) for number in ("0", "1") for port in (8000, 8001)]
    assert places == [*slices, None, (None, 8000), (None, 8001)], "an unknown slice stops"
