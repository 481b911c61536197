"""Draws docs/collide.svg and docs/top.svg: what the commands show, from real runs.

Run it with the Python of .venv: .venv/bin/python docs/make_pictures.py
"""

import contextlib
import io
import re
import time
from pathlib import Path

from rich import _export_format
from rich.console import Console
from rich.terminal_theme import MONOKAI

from cidalloc.cli.ask import Manager
from cidalloc.cli.demo import show_lanes
from cidalloc.cli.top import View
from cidalloc.client import Client
from cidalloc.devserver.demo import demo_server
from cidalloc.devserver.demo.collide import collide
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings


def terminal() -> Console:
    """Return a console that remembers what it is told."""
    return Console(record=True, width=72, file=io.StringIO(), force_terminal=True, highlight=False)


def save(console: Console, name: str, title: str) -> None:
    """Write what a console was told as a picture."""
    # Without rich's web fonts: the picture needs nothing from elsewhere.
    svg_format = re.sub(
        r"@font-face \{\{.*?\}\}", "", _export_format.CONSOLE_SVG_FORMAT, flags=re.S
    )
    path = Path(__file__).parent / name
    console.save_svg(str(path), title=title, theme=MONOKAI, code_format=svg_format)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def draw_collide(server: TritonServer) -> None:
    """Two clients with one ID, and then with IDs from the manager."""
    console = terminal()
    for managed in (False, True):
        show_lanes(console, collide(server.http_url, managed=managed), managed)
    console.print()
    save(console, "collide.svg", "cidalloc demo --collide")


def draw_top(server: TritonServer) -> None:
    """Some clients at work, as `cidalloc top` shows them."""
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(Client(server.grpc_url, label=f"asr-worker-{n}", ttl=60.0 + 20 * n))
            for n in range(6)
        ]
        view = View(Manager(server.grpc_url, "cidmgr", 10.0), server.grpc_url)
        for turn in range(4):
            for n, client in enumerate(clients):
                cids = client.acquire_many(40 * (n + 1))
                client.release_many(cids[: 30 + 5 * turn], ended=True)
            shown = view.look(40)
            time.sleep(1.0)
    console = terminal()
    console.print(shown)
    save(console, "top.svg", "cidalloc top localhost:8001")


def main() -> None:
    """Run the commands and write the pictures."""
    with demo_server() as server:
        draw_collide(server)
    with demo_server(Settings()) as server:
        draw_top(server)


if __name__ == "__main__":
    main()
