"""Serves the screen of ``top`` to browsers. Each page is a process of its own."""

from __future__ import annotations

import logging
import shlex
import socket
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from aiohttp import web
from aiohttp.typedefs import Handler
from textual_serve.server import Server

from ...errors import InvalidArgument

__all__ = ["serve"]

_PAGES = 16  # that are open at the same time: each is a process

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
)


class _Pages(Server):
    """The pages of one command line.

    Textual's own page loads a font from elsewhere, and its log shows the command line, which may
    contain a token. This one does neither.
    """

    def __init__(self, arguments: Sequence[str], loopback: bool) -> None:
        command = shlex.join([sys.executable, "-m", "cidalloc", *arguments])
        super().__init__(f"exec {command}")  # no shell stays beside each page
        self._loopback = loopback
        self._open = 0

    async def application(self) -> web.Application:
        """Return the application, guarded from the pages of others."""
        app = await self._make_app()
        app.middlewares.append(self._guard)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse what other web pages send from the browser of somebody who may read this one."""
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise web.HTTPForbidden(text="this page is not for other sites")
        name = urlsplit(f"//{request.host}").hostname or ""
        if self._loopback and not _is_loopback(name):
            raise web.HTTPForbidden(text="the name of this host must be localhost")
        response = await handler(request)
        if not response.prepared:
            response.headers["Content-Security-Policy"] = _POLICY
        return response

    async def on_startup(self, app: web.Application) -> None:
        """Say nothing: `serve` does."""

    async def handle_index(self, request: web.Request) -> web.Response:
        """Return the page."""
        page = Path(__file__).with_name("page.html").read_text()
        return web.Response(text=page, content_type="text/html")

    async def handle_websocket(self, request: web.Request) -> Any:
        """Run the screen for one page."""
        if self._open >= _PAGES:
            raise web.HTTPServiceUnavailable(text=f"{_PAGES} pages are open already")
        self._open += 1
        try:
            return await super().handle_websocket(request)
        finally:
            self._open -= 1


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def serve(where: str, arguments: Sequence[str]) -> None:
    """Serve the screen until SIGINT or SIGTERM.

    Args:
        where: host:port to listen on; port 0 takes a free one.
        arguments: the command line of each page.
    """
    try:
        address = urlsplit(f"//{where}")
        host, port = address.hostname, address.port
    except ValueError:
        host = port = None
    if host is None or port is None:
        raise InvalidArgument(f"--web {where!r} is not HOST:PORT")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of pages that end last
    with socket.create_server((host, port), family=family) as listener:
        loopback = _is_loopback(listener.getsockname()[0])
        shown = f"[{host}]" if ":" in host else host
        readers = "every user of this machine" if loopback else "everybody who reaches it"
        click.echo(
            f"http://{shown}:{listener.getsockname()[1]} shows the status to {readers}: labels,"
            " numbers, the path of the registry's file; no tokens. Ctrl-C stops it."
        )
        pages = _Pages(arguments, loopback)
        web.run_app(
            pages.application(),
            sock=listener,
            print=None,
            access_log=None,
            shutdown_timeout=0.5,  # then the open pages are closed
        )
