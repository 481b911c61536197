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


def test_kubernetes() -> None:
    parts = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    kinds = ["Service", "PodDisruptionBudget", "StatefulSet"]
    assert [each["kind"] for each in parts] == kinds
    for part in parts:
        kubernetes_validate.validate(part, "1.31", strict=True)
    spec = parts[2]["spec"]
    assert spec["replicas"] == 1, "a session belongs to one manager"
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels
    assert parts[1]["spec"]["selector"]["matchLabels"] == labels
    (container,) = spec["template"]["spec"]["containers"]
    volumes = {each["name"] for each in spec["template"]["spec"]["volumes"]}
    volumes |= {each["metadata"]["name"] for each in spec["volumeClaimTemplates"]}
    assert {each["name"] for each in container["volumeMounts"]} == volumes
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
    assert waits + 20 <= spec["template"]["spec"]["terminationGracePeriodSeconds"]


def takes(arguments: list[str]) -> None:
    """Raise if the command does not take these arguments."""
    name, *rest = arguments
    command = main.get_command(click.Context(main), name)
    assert command is not None
    command.make_context(name, rest)


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
