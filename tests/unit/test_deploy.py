"""What `deploy/` holds: it fits the manager, and what reads it takes it."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
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

pytestmark = pytest.mark.skipif(not DEPLOY.is_dir(), reason="a source distribution has none")


def named(text: str) -> set[str]:
    """The metrics that a text names."""
    return set(re.findall(r"\bcidmgr_[a-z_]+", text))


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text())
    return found


def test_metrics_that_are_named_are_there() -> None:
    for name in ("alerts.yml", "alerts_test.yml", "grafana.json"):
        assert named((DEPLOY / name).read_text()) <= set(FAMILIES), name
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
@pytest.mark.parametrize("what", ["check rules alerts.yml", "test rules alerts_test.yml"])
def test_the_alerts(what: str) -> None:
    done = subprocess.run(
        ["promtool", *what.split()], cwd=DEPLOY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


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


KINDS = ["Service", "PodDisruptionBudget", "StatefulSet"]


@pytest.mark.parametrize(
    ("file", "kinds"),
    [
        ("kubernetes.yaml", KINDS),
        ("kubernetes-statefulset.yaml", KINDS),
        ("kubernetes-autoscaled.yaml", [*KINDS[:2], "Deployment", "HorizontalPodAutoscaler"]),
    ],
)
def test_kubernetes(file: str, kinds: list[str]) -> None:
    parts = list(yaml.safe_load_all((DEPLOY / file).read_text()))
    assert [each["kind"] for each in parts] == kinds
    for part in parts:
        kubernetes_validate.validate(part, "1.31", strict=True)
    service, budget, servers = (each["spec"] for each in parts[:3])
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


def server_set(file: str) -> dict[str, Any]:
    found: dict[str, Any] = list(yaml.safe_load_all((DEPLOY / file).read_text()))[2]["spec"]
    return found


def test_one_server() -> None:
    spec = server_set("kubernetes.yaml")
    assert spec["replicas"] == 1, "a session belongs to one manager"


def advised(file: str) -> Settings:
    """Return the settings that the head of a file tells to write, with the state of its pods."""
    (line,) = re.findall(r"#   cidalloc (model .*)", (DEPLOY / file).read_text())
    context = takes(line.split())
    mounts = server_set(file)["template"]["spec"]["containers"][0]["volumeMounts"]
    assert context.params["state"] == Path({e["name"]: e["mountPath"] for e in mounts}["state"])
    names = ("slice", "first", "capacity", "max_ttl_ms", "grace_ms")
    return Settings(**{name: context.params[name] for name in names})


def test_three_servers_with_slices() -> None:
    """The pods have the slices of their ordinals, and a volume each."""
    file = "kubernetes-statefulset.yaml"
    spec, name = server_set(file), "triton"
    assert spec["replicas"] == 3 and spec["serviceName"] == name
    assert "hostNetwork" not in spec["template"]["spec"]
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "state"
    settings = advised(file)
    found = [settings.on_host(f"{name}-{ordinal}").slice for ordinal in range(64)]
    assert found == [f"{number}/64" for number in range(64)]
    assert settings.max_ttl_ms >= Client("localhost:1")._session.link.ttl * 1000


def test_autoscaled_servers() -> None:
    """No ordinals, no number of replicas, and a state that ends with its pod."""
    file = "kubernetes-autoscaled.yaml"
    spec = server_set(file)
    assert "replicas" not in spec, "each rollout would undo the autoscaler's number"
    states = [each for each in spec["template"]["spec"]["volumes"] if each["name"] == "state"]
    assert states == [{"name": "state", "emptyDir": {}}]
    scaler = list(yaml.safe_load_all((DEPLOY / file).read_text()))[3]["spec"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": "triton",
    }
    (policy,) = scaler["behavior"]["scaleDown"]["policies"]
    grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert policy["value"] == 1 and policy["periodSeconds"] >= grace
    settings = advised(file)
    assert settings.slice == "random"
    assert waiting_for(settings) == 0, "a new server is of use at once"


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
    takes(line.split())


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
