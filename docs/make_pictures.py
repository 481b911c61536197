"""Draws docs/collide.svg and docs/top.svg: what the commands show, from real runs.

Run it with the Python of .venv: .venv/bin/python docs/make_pictures.py
"""

import asyncio
import contextlib
import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from cidalloc.cli.ask import Manager
from cidalloc.cli.demo import show_lanes
from cidalloc.cli.top.app import TopApp
from cidalloc.client import Client
from cidalloc.devserver.demo import demo_server
from cidalloc.devserver.demo.collide import collide
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings


def terminal() -> Console:
    """Return a console that remembers what it is told."""
    return Console(record=True, width=72, file=io.StringIO(), force_terminal=True, highlight=False)


def write(name: str, svg: str) -> None:
    """Write a picture without its web fonts: it needs nothing from elsewhere."""
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S)
    lines = [line.rstrip() for line in svg.splitlines()]
    Path(__file__).with_name(name).write_text("\n".join(lines) + "\n")


def draw_collide(server: TritonServer) -> None:
    """Two clients with one ID, and then with IDs from the manager."""
    console = terminal()
    for managed in (False, True):
        show_lanes(console, collide(server.http_url, managed=managed), managed)
    console.print()
    write("collide.svg", console.export_svg(title="cidalloc demo --collide", theme=MONOKAI))


async def draw_top(server: TritonServer) -> None:
    """Some clients at work, as `cidalloc top` shows them."""
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(Client(server.grpc_url, label=f"asr-worker-{n}", ttl=60.0 + 20 * n))
            for n in range(6)
        ]
        managers = [
            stack.enter_context(Manager(url, "cidmgr", 10.0))
            for url in (server.grpc_url, "127.0.0.1:1")
        ]
        app = TopApp(managers, 0.5)
        app.theme = "textual-dark"
        async with app.run_test(size=(100, 30)) as pilot:
            for turn in range(20):
                for n, client in enumerate(clients):
                    cids = client.acquire_many(40 * (n + 1))
                    client.release_many(cids[: 20 + 9 * (turn % 7)], ended=True)
                await pilot.pause(0.5)
            await pilot.press("tab", "down", "tab", "s", "s", "r", "up", "up", "enter")
            await pilot.pause(1.0)
            title = " ".join(["cidalloc top", *(each.url for each in managers)])
            write("top.svg", app.export_screenshot(title=title))


def main() -> None:
    """Run the commands and write the pictures."""
    with demo_server() as server:
        draw_collide(server)
    with demo_server(Settings()) as server:
        asyncio.run(draw_top(server))


if __name__ == "__main__":
    main()
