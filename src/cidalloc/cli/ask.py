"""The commands that send one request to a manager: status, acquire, release, probe."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import click

from ..client.core.transport import DAY_S, parse_url
from ..client.sync.transport import connect
from ..codes import Operation
from ..errors import Exhausted, InvalidArgument, ProtocolError
from ..protocol import MODEL, IDs, Parameter, Request, as_ids

__all__ = [
    "URL_VARIABLE",
    "Manager",
    "acquire",
    "probe",
    "release",
    "status",
    "with_manager",
    "with_managers",
]

URL_VARIABLE = "CIDALLOC_URL"
"""The environment variable with the URL for commands without one."""


class Manager:
    """A connection to a manager. It opens no session and does not retry.

    Args:
        url: address of the server.
        model: name of the manager model.
        timeout: seconds to wait for each answer.
        headers: sent with every request.
        options: further arguments of tritonclient's ``InferenceServerClient``, for TLS.
    """

    def __init__(
        self,
        url: str,
        model: str,
        timeout: float,
        headers: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.url = url
        self.model = model
        self.timeout = timeout
        self.headers = dict(headers or {})
        self.options = dict(options or {})
        self.transport = connect(url, self.headers, self.options)

    def ask(
        self, operation: Operation, ids: Iterable[int] = (), **parameters: Parameter
    ) -> tuple[IDs, str]:
        """Return OUTPUT and DETAIL. Raises the manager's error, or `Unavailable`."""
        request = Request(operation, as_ids(ids), parameters)
        return self.transport.call(self.model, request, self.timeout)

    def status(self) -> dict[str, Any]:
        """Return the answer to STATUS."""
        text = self.ask(Operation.STATUS)[1]
        try:
            found: dict[str, Any] = json.loads(text)
            return {**found, "pool": {**found["pool"]}}
        except (ValueError, TypeError, KeyError):
            raise ProtocolError(
                f"model {self.model} is not a cidalloc manager: it answered without a status"
            ) from None

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *error: object) -> None:
        self.transport.close()


def with_manager(command: Callable[..., None]) -> Callable[..., None]:
    """Add URL and the options of a connection to a command. It gets a `Manager` in their place."""

    @functools.wraps(command)
    def connected(url: str, **rest: Any) -> None:
        if url.isdigit() and "cid" in rest:  # URL was left out before the IDs
            rest["cid"] = (int(url), *rest["cid"])
            url = os.environ.get(URL_VARIABLE) or _missing_url()
        with Manager(url, **_connection(url, **_taken(rest))) as manager:
            command(manager=manager, **rest)

    return _options(click.argument("url", envvar=URL_VARIABLE)(connected))


def with_managers(command: Callable[..., None]) -> Callable[..., None]:
    """Add one or more URLs and the options. The command gets a `Manager` for each server.

    A URL with ``dns:`` before it stands for the servers at all addresses of its name.
    """

    @functools.wraps(command)
    def connected(url: tuple[str, ...], **rest: Any) -> None:
        options = _taken(rest)
        with contextlib.ExitStack() as stack:
            managers = [
                stack.enter_context(Manager(each, **_connection(each, **options)))
                for each in dict.fromkeys(_resolved(url))
            ]
            command(managers=managers, **rest)

    return _options(click.argument("url", envvar=URL_VARIABLE, nargs=-1, required=True)(connected))


def _resolved(urls: Iterable[str]) -> Iterator[str]:
    for url in urls:
        if not url.startswith("dns:") or url.startswith("dns://"):  # gRPC's own names
            yield url
            continue
        from ..client.core.fleet import parse_name
        from ..client.sync.fleet import resolve

        yield from resolve(parse_name(url))


def _taken(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a connection out of a command's."""
    names = ("model", "timeout", "header", "ca", "cert", "key")
    return {name: options.pop(name) for name in names}


def _connection(
    url: str,
    model: str,
    timeout: float,
    header: tuple[str, ...],
    ca: str | None,
    cert: str | None,
    key: str | None,
) -> dict[str, Any]:
    """Return the arguments of a `Manager` for these options."""
    return {
        "model": model,
        "timeout": timeout,
        "headers": dict(map(_header, header)),
        "options": _tls_options(url, ca, cert, key),
    }


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a connection to a command."""
    file = click.Path(exists=True, dir_okay=False)
    for option in (
        click.option("--key", type=file, help="File with the private key of --cert."),
        click.option("--cert", type=file, help="File with the client's certificate, for TLS."),
        click.option("--ca", type=file, help="File with the certificates to trust, for TLS."),
        click.option(
            "--header",
            multiple=True,
            metavar="'NAME: VALUE'",
            help="Header to send with each request. May be repeated.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(0.0, min_open=True),
            default=10.0,
            show_default=True,
            help="Seconds to wait for the manager's answer.",
        ),
        click.option(
            "--model", default=MODEL, show_default=True, help="Name of the manager model."
        ),
    ):
        command = option(command)
    return command


def _missing_url() -> str:
    raise click.UsageError(f"Missing argument 'URL': give it, or set {URL_VARIABLE}.")


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise InvalidArgument(f"--header {text!r} is not 'NAME: VALUE'")
    return name.strip(), value.strip()


def _tls_options(url: str, ca: str | None, cert: str | None, key: str | None) -> dict[str, Any]:
    """Return tritonclient's options for these files; its clients have different names for them."""
    files = {name: file for name, file in (("ca", ca), ("cert", cert), ("key", key)) if file}
    if not files:
        return {}
    address = parse_url(url)
    if not address.tls:
        raise InvalidArgument(f"--{next(iter(files))} needs a URL that begins with grpcs or https")
    if ("cert" in files) != ("key" in files):
        raise InvalidArgument("--cert and --key belong together: give both")
    if address.kind == "http":
        names = {"ca": "ca_certs", "cert": "certfile", "key": "keyfile"}
        return {"ssl_options": {names[name]: file for name, file in files.items()}}
    names = {"ca": "root_certificates", "cert": "certificate_chain", "key": "private_key"}
    return {names[name]: file for name, file in files.items()}


@click.command(
    epilog="Example: cidalloc status localhost:8001",
)
@with_manager
@click.option("--json", "as_json", is_flag=True, help="Print the manager's status as JSON.")
def status(manager: Manager, as_json: bool) -> None:
    """Print the status of the manager at URL: its pool, its sessions, and its error counts.

    URL is host:port, or starts with grpc://, grpcs://, http:// or https://. If it is left out, the
    environment variable CIDALLOC_URL is used.
    """
    found = manager.status()
    if as_json:
        click.echo(json.dumps(found))
        return
    from rich.console import Console  # a tenth of a second that other commands do not need

    from .screen import status_view

    Console(highlight=False).print(status_view(found))


@click.command(
    epilog="Example: cid=$(cidalloc acquire localhost:8001)",
)
@with_manager
@click.option(
    "--count",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Number of IDs to acquire. They are printed one per line.",
)
@click.option(
    "--wait",
    type=click.FloatRange(0.0, DAY_S),
    default=0.0,
    help="Seconds to wait for IDs if the pool is exhausted. Clients that wait come first.",
)
def acquire(manager: Manager, count: int, wait: float) -> None:
    """Acquire a correlation ID that no live sequence uses, and print it.

    The ID is held without a session, so the manager cannot see when the script dies. It takes the
    ID back after a day (setting anonymous_age_ms). Release the ID with 'cidalloc release'. In
    programs, use the client: its IDs are released soon after the program dies.

    URL is host:port, or starts with grpc://, grpcs://, http:// or https://. If it is left out, the
    environment variable CIDALLOC_URL is used.
    """
    until = time.monotonic() + wait
    while True:
        try:
            ids, _ = manager.ask(Operation.NEW, count=count)
            break
        except Exhausted as error:
            left = until - time.monotonic()
            if left <= 0:
                raise
            time.sleep(min(max(error.due_s or 1.0, 0.05), 1.0, left))
    click.echo("\n".join(map(str, ids.tolist())))
    if sys.stderr.isatty():
        click.echo(
            "The IDs are held without a session until they are released, for a day at most.",
            err=True,
        )


@click.command(
    epilog="Example: cidalloc release localhost:8001 --ended 1073741824",
)
@with_manager
@click.argument("cid", nargs=-1, type=int)
@click.option(
    "--ended",
    is_flag=True,
    help="END was answered with success. The IDs cool for the minimum cooldown.",
)
@click.option(
    "--cooldown",
    type=click.FloatRange(0.0),
    help="Seconds until an ID may be issued again. Use at least the idle time of the model."
    "  [default: the manager's unended_cooldown_ms]",
)
def release(manager: Manager, cid: tuple[int, ...], ended: bool, cooldown: float | None) -> None:
    """Release IDs that 'cidalloc acquire' printed.

    If one of the IDs is not held, the command releases none of them.

    URL is host:port, or starts with grpc://, grpcs://, http:// or https://. If it is left out, the
    environment variable CIDALLOC_URL is used.
    """
    if not cid:
        raise click.UsageError("Missing argument 'CID...'.")
    if ended and cooldown is not None:
        raise InvalidArgument("--ended and --cooldown cannot be combined: give one of them")
    parameters: dict[str, Parameter] = {"ended": ended}
    if cooldown is not None:
        parameters["cooldown_ms"] = round(cooldown * 1000)
    manager.ask(Operation.DELETE, cid, **parameters)


@click.command(
    epilog="Example: cidalloc probe localhost:8001 --timeout 2",
)
@with_manager
def probe(manager: Manager) -> None:
    """Exit with status 0 if the manager at URL answers, and with 1 if it does not.

    The probe is a real inference. Before version 26.01, Triton reports a Python model as ready even
    if its process is dead.

    URL is host:port, or starts with grpc://, grpcs://, http:// or https://. If it is left out, the
    environment variable CIDALLOC_URL is used.
    """
    began = time.monotonic()
    held, _ = manager.ask(Operation.ACTIVE)
    if held.shape != (1,):
        raise ProtocolError(
            f"model {manager.model} is not a cidalloc manager: its answer has another shape"
        )
    took = (time.monotonic() - began) * 1e3
    click.echo(f"{manager.model} answers: {held[0]:,} held ({took:.0f} ms)")
