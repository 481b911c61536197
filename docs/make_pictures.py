"""Draws docs/collide.svg: what `cidalloc demo --collide` shows, from a real run.

Run it with the Python of .venv: .venv/bin/python docs/make_pictures.py
"""

import io
import re
from pathlib import Path

from rich import _export_format
from rich.console import Console
from rich.terminal_theme import MONOKAI

from cidalloc.cli._demo import show_lanes
from cidalloc.demo import demo_server
from cidalloc.demo.collide import collide


def main() -> None:
    """Run the demo and write the picture."""
    console = Console(
        record=True, width=72, file=io.StringIO(), force_terminal=True, highlight=False
    )
    with demo_server() as server:
        for managed in (False, True):
            show_lanes(console, collide(server.http_url, managed=managed), managed)
        console.print()
    # Without rich's web fonts: the picture needs nothing from elsewhere.
    svg_format = re.sub(
        r"@font-face \{\{.*?\}\}", "", _export_format.CONSOLE_SVG_FORMAT, flags=re.S
    )
    path = Path(__file__).parent / "collide.svg"
    console.save_svg(
        str(path), title="cidalloc demo --collide", theme=MONOKAI, code_format=svg_format
    )
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


if __name__ == "__main__":
    main()
