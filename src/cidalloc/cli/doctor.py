"""The command ``doctor``: check a deployment and recommend actions."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from ..client.core.transport import STRANGE, parse_url
from ..client.sync.transport import Transport
from ..errors import CidError
from .ask import Manager, with_managers
from .compare import compare
from .rules import Facts, Finding, examine
from .screen import progress_line

__all__ = ["doctor"]

_COLORS = {"ok": "green", "note": "blue", "warn": "yellow", "FAIL": "red"}
_NONESUCH = "cidalloc-doctor-asks-for-a-model-that-is-not-there"


@click.command(
    epilog="Examples: cidalloc doctor localhost:8001 --target my_asr_model"
    " · cidalloc doctor dns:triton.default.svc:8001",
)
@with_managers
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Model to check. May be repeated.  [default: all models with sequence batching]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(managers: Sequence[Manager], targets: tuple[str, ...], as_json: bool) -> None:
    """Check the manager at each URL, its Triton server, and the models that use its IDs.

    For several servers it also checks that their pools are disjoint, and that each has a registry
    of its own.

    Each finding has a level, an explanation, and an action if one is needed. The command changes
    nothing on the server. To check whether clients may load models, it requests to load a model
    that does not exist. The exit status is 1 if a finding is a FAIL. A --target is a FAIL if its
    configuration cannot be read, or if the client refuses the model.

    A URL is host:port, or starts with grpc://, grpcs://, http:// or https://. With dns: before it,
    such as dns:triton:8001, the servers at all addresses of the name are checked. If it is left
    out, the environment variable CIDALLOC_URL is used; it may contain several, separated by spaces.
    """
    show = progress_line()
    seen = [_gather(manager, targets, show) for manager in managers]
    show("")
    findings: dict[str | None, list[Finding]] = {each.url: examine(each) for each in seen}
    if len(seen) > 1:
        findings[None] = compare(seen)
    if as_json:
        found = [{"url": url, **each.as_json()} for url in findings for each in findings[url]]
        click.echo(json.dumps(found))
    else:
        for url, of_url in findings.items():
            if len(seen) > 1:
                click.secho(url or "All servers together", bold=True)
            for each in of_url:
                _print(each)
    if any(each.level == "FAIL" for of_url in findings.values() for each in of_url):
        sys.exit(1)


def _print(finding: Finding) -> None:
    click.echo(f"{click.style(f'{finding.level:<4}', _COLORS[finding.level])}  {finding.what}")
    if finding.todo:
        click.echo(f"      → {finding.todo}")


def _gather(manager: Manager, targets: tuple[str, ...], show: Callable[[str], None]) -> Facts:
    facts = Facts(manager=manager.model, url=manager.url)
    show(f"Asking {manager.url}")
    began = time.monotonic()
    try:
        facts.status = manager.status()
    except CidError as error:
        facts.error = f"{error.code.name}: {error}"
        facts.reachable = False
    facts.answered_ms = (time.monotonic() - began) * 1e3
    with _triton(manager) as ask:
        metadata, words = ask("get_server_metadata")
        if metadata is None:
            facts.error = facts.error or words
            return facts
        facts.reachable = True
        facts.server = str(metadata.get("version", ""))
        facts.config, _ = _config(manager.transport, manager.model, manager.timeout)
        index, facts.index_error = ask("get_model_repository_index")
        found = index.get("models", []) if isinstance(index, dict) else index or []
        facts.named = bool(targets)
        names = targets or sorted({each["name"] for each in found} - {manager.model})
        for name in names:
            show(f"Reading the configuration of {name} at {manager.url}")
            config, words = _config(manager.transport, name, manager.timeout)
            if config is None:
                facts.unread[name] = words
            elif targets or "sequence_batching" in config:
                facts.targets[name] = config
        _, words = ask("load_model", _NONESUCH)
        facts.may_load = "failed to load" in words
        shared, _ = ask("get_system_shared_memory_status")
        facts.shared_memory = shared is not None
    return facts


def _config(
    transport: Transport, model: str, timeout: float
) -> tuple[Mapping[str, Any] | None, str]:
    try:
        return transport.model_config(model, timeout), ""
    except CidError as error:
        return None, str(error)


@contextlib.contextmanager
def _triton(manager: Manager) -> Iterator[Any]:
    """Yield a function that calls a method of tritonclient.

    It returns the answer and an empty text, or None and the text of the error.
    """
    address = parse_url(manager.url)
    client: Any
    more: dict[str, Any] = {"headers": manager.headers}
    options = dict(manager.options)
    if address.name and address.kind == "grpc":  # of the certificate
        options["channel_args"] = [("grpc.ssl_target_name_override", address.name)]
    if address.kind == "grpc":
        client = tritonclient.grpc.InferenceServerClient(address.target, ssl=address.tls, **options)
        more["client_timeout"] = manager.timeout
    else:
        client = tritonclient.http.InferenceServerClient(
            address.target + address.path,
            ssl=address.tls,
            connection_timeout=manager.timeout,
            network_timeout=manager.timeout,
            **manager.options,
        )

    def ask(method: str, *arguments: str) -> tuple[Any, str]:
        options = dict(more)
        if address.kind == "grpc" and not arguments:
            options["as_json"] = True
        try:
            return getattr(client, method)(*arguments, **options), ""
        except (InferenceServerException, *STRANGE) as error:
            return None, str(error)

    with contextlib.closing(client):
        yield ask
