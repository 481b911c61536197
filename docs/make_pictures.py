"""Draws collide.svg, top.svg and blocks.svg in docs: what commands and pools do, from real runs.

Run it with the Python of .venv: .venv/bin/python docs/make_pictures.py
"""

import asyncio
import contextlib
import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from cidalloc import Allocator, CidError
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


CELL, GAP, TOP = 34, 8, 46
STATES = {
    "held by A": ("#d1242f", "#ffffff"),
    "left to A": ("#f6b8bd", "#1f2328"),
    "pinned: nobody gets it": ("#7d8590", "#ffffff"),
    "free for any owner": ("#2da44e", "#ffffff"),
}
"""Fill and text of an ID in each state."""


def state(cid: int, pool: Allocator) -> str:
    """Return what an owner A can do with an ID, and others."""

    def gets(owner: int) -> bool:
        copy = Allocator.restore(pool.snapshot())
        with contextlib.suppress(CidError):
            while copy.acquire(owner) != cid:
                pass
            return True
        return False

    held, left, pinned, free = STATES
    if cid in pool:
        return held
    return free if gets(2) else left if gets(1) else pinned


def draw_blocks() -> None:
    """The same calls on pools with different widths of blocks."""
    count, rows = 16, (1, 4, 8)
    width = 90 + count * CELL + count * GAP
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + 50 * len(rows) + 4}"'
        ' font-family="sans-serif" font-size="13">'
    ]
    x = 10
    for name, (fill, _) in STATES.items():
        out.append(f'<rect x="{x}" y="8" width="14" height="14" rx="3" fill="{fill}"/>')
        out.append(f'<text x="{x + 20}" y="20" fill="#7d8590">{name}</text>')
        x += 40 + 7 * len(name)
    for row, block in enumerate(rows):
        pool = Allocator(count, block=block)
        pool.acquire_many(5, owner=1)
        pool.release_many([1, 2, 3, 5], owner=1)
        y = TOP + 50 * row
        out.append(f'<text x="10" y="{y + 22}" fill="#7d8590">block={block}</text>')
        for cid in range(1, count + 1):
            x = 90 + (cid - 1) * CELL + (cid - 1) // block * GAP
            fill, ink = STATES[state(cid, pool)]
            out.append(
                f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="34" rx="4" fill="{fill}"/>'
                f'<text x="{x + CELL / 2 - 1}" y="{y + 22}" text-anchor="middle"'
                f' fill="{ink}">{cid}</text>'
            )
    write("blocks.svg", "\n".join([*out, "</svg>"]))


def main() -> None:
    """Run the commands and write the pictures."""
    draw_blocks()
    with demo_server() as server:
        draw_collide(server)
    with demo_server(Settings()) as server:
        asyncio.run(draw_top(server))


if __name__ == "__main__":
    main()
