"""The screen of ``top``, made with Textual: servers, figures and sessions."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from rich.console import RenderableType
from rich.table import Table as Grid
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.coordinate import Coordinate
from textual.message import Message
from textual.widgets import DataTable, Footer, Input, Sparkline, Static

from ..ask import Manager
from ..screen import duration
from .watch import FIGURES, Answer, Watch, ask

__all__ = ["TopApp"]

_PICTURE_S = 0.2  # between two pictures, if there are answers
_LEAVING_S = 1.0  # how long to wait for answers that are under way when the screen closes


class Column(NamedTuple):
    """One column of a table: its name, and what of an item to show and sort by."""

    name: str
    value: Callable[[Any], Any]
    shown: Callable[[Any], str] = "{:,}".format


class Session(NamedTuple):
    """A session as a manager lists it in its status."""

    key: str
    url: str
    status: dict[str, Any]
    expired: bool


def _of_status(name: str) -> Callable[[Watch], Any]:
    return lambda watch: watch.status and watch.status.get(name)


def _of_rates(name: str) -> Callable[[Watch], Any]:
    return lambda watch: watch.rates and watch.rates[name]


def _of_session(name: str) -> Callable[[Session], Any]:
    return lambda session: session.status.get(name)


def _expiry(session: Session) -> Any:
    return -session.status["ago_s"] if session.expired else session.status["expires_in_s"]


def _until(seconds: float) -> str:
    return f"{duration(-seconds)} ago" if seconds < 0 else duration(seconds)


SERVERS = (
    Column("server", lambda watch: watch.manager.url, str),
    Column("state", lambda watch: watch.state, str),
    Column("held", _of_status("held")),
    Column("in use", _of_status("used")),
    Column("cooling", _of_status("cooling")),
    Column(
        "free",
        lambda watch: watch.status and watch.status["free"] / watch.status["pool"]["capacity"],
        "{:.1%}".format,
    ),
    Column("sessions", _of_status("sessions_total")),
    Column("acq/s", _of_rates("acquired"), "{:,.0f}".format),
    Column("req/s", _of_rates("requests"), "{:,.0f}".format),
    Column("err/s", _of_rates("errors"), "{:,.0f}".format),
    Column("waiting", _of_status("waiting")),
    Column("expired", _of_status("sessions_expired")),
    Column("up for", _of_status("uptime_s"), duration),
)

SESSIONS = (
    Column("session", lambda session: session.status["label"] or "–", str),
    Column("state", lambda session: "expired" if session.expired else "open", str),
    Column("held", _of_session("held")),
    Column("in use", _of_session("used")),
    Column("age", _of_session("age_s"), duration),
    Column("expires in", _expiry, _until),
    Column("server", lambda session: session.url, str),
)


class Items(DataTable[Text]):
    """A table of items that sorts, and keeps its cursor on the same item."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select_cursor", "Unfold"),
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(-1)", "Sort by the column before", show=False),
        Binding("r", "reverse", "Reverse"),
        Binding("tab", "app.focus_next", "Table"),
    ]

    def __init__(self, columns: Sequence[Column], name: str) -> None:
        super().__init__(cursor_type="row", fixed_columns=1, id=name)
        self._columns = columns
        self._sort = 0
        self._reverse = False
        self._items: dict[str, Any] = {}
        self._heads: list[str] = []

    @property
    def item(self) -> Any:
        """The item under the cursor; None if there is none."""
        return self._items.get(self._key() or "")

    def show(self, items: dict[str, Any]) -> None:
        """Show these items, each under a key of its own."""
        self._items = items
        by = self._columns[self._sort].value

        def place(key: str) -> tuple[bool, Any]:  # an item without a value comes last
            value = by(items[key])
            return (value is None) != self._reverse, 0 if value is None else value

        keys = sorted(sorted(items), key=place, reverse=self._reverse)
        cells = [[_cell(each, items[key]) for each in self._columns] for key in keys]
        heads = [
            _head(each, "▼" if self._reverse else "▲") if n == self._sort else _head(each, " ")
            for n, each in enumerate(self._columns)
        ]
        if heads == self._heads and keys == [each.key.value for each in self.ordered_rows]:
            widths = [each.content_width for each in self.ordered_columns]
            for row, texts in enumerate(cells):
                for column, text in enumerate(texts):
                    where = Coordinate(row, column)
                    if self.get_cell_at(where) != text:
                        # To update a width measures the whole column.
                        wider = text.cell_len > widths[column]
                        self.update_cell_at(where, text, update_width=wider)
            return
        kept, scrolled = self._key(), self.scroll_offset
        self.clear(columns=True)
        self._heads = heads
        for number, head in enumerate(heads):
            self.add_column(Text(head, justify=_side(self._columns[number])))
        for key, texts in zip(keys, cells, strict=True):
            self.add_row(*texts, key=key)
        if kept in keys:
            self.move_cursor(row=keys.index(kept), animate=False, scroll=False)
        self.scroll_to(scrolled.x, scrolled.y, animate=False)

    def _key(self) -> str | None:
        if not self.is_valid_row_index(self.cursor_row):
            return None
        return self.ordered_rows[self.cursor_row].key.value

    def action_sort(self, step: int) -> None:
        """Sort by the next column, or by the one before."""
        self._sort = (self._sort + step) % len(self._columns)
        self.show(self._items)

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self._reverse = not self._reverse
        self.show(self._items)

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """Sort by the column that was clicked; a second click reverses."""
        if event.column_index == self._sort:
            self.action_reverse()
        else:
            self._sort = event.column_index
            self.show(self._items)


def _side(column: Column) -> Literal["left", "right"]:
    return "left" if column.shown is str else "right"


def _head(column: Column, mark: str) -> str:
    return f"{column.name} {mark}" if _side(column) == "left" else f"{mark} {column.name}"


def _cell(column: Column, item: Any) -> Text:
    """Return what a table shows; a label comes from a client, so no markup is read in it."""
    value = column.value(item)
    style = ""
    if column.name == "state":
        style = {"ok": "green", "draining": "bold", "open": "", "…": ""}.get(value, "bold red")
    shown = "-" if value is None else column.shown(value)
    return Text(shown, style, justify=_side(column))


class TopApp(App[None]):
    """The managers as a screen.

    Args:
        managers: each is read in a thread of its own, with the manager's time limit.
        interval: seconds between an answer and the next request.
    """

    TITLE = "cidalloc top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #head { height: 1; text-style: bold; padding: 0 1; }
    #head { text-wrap: nowrap; text-overflow: ellipsis; }
    #head.-error { color: $text-error; }
    Items { scrollbar-size-horizontal: 0; }
    Items > .datatable--fixed { background: $surface; color: $foreground; }
    #servers { height: auto; max-height: 35%; }
    #figures { height: 4; margin: 1 0 0 0; }
    .figure { width: 1fr; padding: 0 1; }
    .figure Static { height: 1; }
    .figure Sparkline { height: 2; }
    #filter { height: 1; border: none; display: none; background: $boost; }
    #filter.-open { display: block; }
    #sessions { height: 1fr; min-height: 3; }
    #details { height: auto; max-height: 60%; padding: 0 1; border-top: solid $primary; }
    #details { display: none; }
    #details.-open { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("escape", "fold", "Back"),
        Binding("d", "dark", "Colours"),
        Binding("q,Q", "quit", "Quit", key_display="q"),
        Binding("ctrl+c", "quit", "Quit", show=False, priority=True),
    ]

    class Answered(Message):
        """A manager answered, or did not in time."""

        def __init__(self, watch: Watch, answer: Answer) -> None:
            super().__init__()
            self.watch = watch
            self.answer = answer

    def __init__(self, managers: Sequence[Manager], interval: float) -> None:
        super().__init__()
        self._watches = {each.url: Watch(each, interval) for each in managers}
        self._stale = False
        self._leaving = threading.Event()
        self._started_by = os.getppid()
        self._readers = [
            threading.Thread(target=self._read, args=(each, interval), daemon=True)
            for each in self._watches.values()
        ]

    def compose(self) -> ComposeResult:
        """Return the parts of the screen, from top to bottom."""
        yield Static(id="head", markup=False)
        yield Items(SERVERS, "servers")
        with Horizontal(id="figures"):
            for name in FIGURES:
                with Vertical(classes="figure"):
                    yield Static(id=f"{name}-text", markup=False)
                    yield Sparkline(id=name)
        yield Input(placeholder="part of a label", id="filter", select_on_focus=False)
        yield Items(SESSIONS if len(self._watches) > 1 else SESSIONS[:-1], "sessions")
        with VerticalScroll(id="details", can_focus=False):
            yield Static(markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Start to read."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.exit, None, 128 + number)
        self.query_one("#sessions").focus()
        self._draw()
        self.set_interval(_PICTURE_S, self._draw_answers)
        for each in self._readers:
            each.start()

    async def on_unmount(self) -> None:
        """Let answers that are under way arrive: a cancelled request can crash an old server."""
        self._leaving.set()
        until = time.monotonic() + _LEAVING_S
        for each in self._readers:
            await asyncio.to_thread(each.join, max(until - time.monotonic(), 0.0))

    def _read(self, watch: Watch, interval: float) -> None:
        """Request the status again and again, in a thread."""
        while not self._leaving.is_set():
            self.post_message(self.Answered(watch, ask(watch.manager)))
            self._leaving.wait(interval)
            if self.is_web and os.getppid() != self._started_by:
                os._exit(1)  # the web server was killed: nobody reads this page, or can end it

    def on_top_app_answered(self, message: Answered) -> None:
        """Keep an answer for the next picture."""
        message.watch.take(message.answer)
        self._stale = True

    def _draw_answers(self) -> None:
        """Show the answers since the last picture, if there are any."""
        if self._stale and self.is_running:
            self._stale = False
            self._draw()

    def _draw(self) -> None:
        """Show the last answers of all managers."""
        self.query_one("#servers", Items).show(self._watches)
        part = self.query_one("#filter", Input).value.casefold()
        sessions = [
            each
            for watch in self._watches.values()
            for each in _sessions(watch)
            if part in (each.status["label"] or "").casefold()
        ]
        self.query_one("#sessions", Items).show({each.key: each for each in sessions})
        self._draw_selected()

    def _draw_selected(self) -> None:
        """Show what belongs to the rows under the cursors."""
        if not self.is_running:  # parts of the screen are gone
            return
        watches = self._watches
        watch: Watch = self.query_one("#servers", Items).item or next(iter(watches.values()))
        what = watch.manager.url if len(watches) == 1 else f"{len(watches)} servers"
        head = f"{watch.manager.model} at {what}  {time.strftime('%H:%M:%S')}"
        if watch.error is not None:
            head += f"  {watch.state}: {watch.error}"
        self.query_one("#head", Static).update(head)
        self.query_one("#head").set_class(watch.error is not None, "-error")
        for name in FIGURES:
            figures = watch.figures[name]
            unit = "" if name in FIGURES[:2] else "/s"
            now = f"{figures[-1]:,.0f}" if figures else "-"
            self.query_one(f"#{name}-text", Static).update(f"{name}{unit} {now}")
            # The lowest number is drawn as the lowest bar, so that one has to be 0.
            self.query_one(f"#{name}", Sparkline).data = [0.0, *figures] if figures else []
        self.query_one("#details Static", Static).update(self._details())

    def _details(self) -> RenderableType:
        """Return all that is known of the server or session under the cursor."""
        table = "#servers" if self.query_one("#servers").has_focus else "#sessions"
        item = self.query_one(table, Items).item
        if isinstance(item, Watch):
            return item.details()
        if isinstance(item, Session):
            grid = Grid.grid(padding=(0, 2))
            for name, value in {**item.status, "server": item.url}.items():
                text = str(value)
                if isinstance(value, (int, float)):
                    text = duration(value) if name.endswith("_s") else f"{value:,}"
                title = name.removesuffix("_s").replace("_", " ")
                grid.add_row(Text(title, "bold"), Text(text))
            return grid
        return ""

    def action_filter(self) -> None:
        """Type a part of a label."""
        self.query_one("#filter").add_class("-open").focus()

    def action_fold(self) -> None:
        """Close the details; if they are closed, drop the filter."""
        if self.query_one("#details").has_class("-open"):
            self.query_one("#details").remove_class("-open")
            return
        box = self.query_one("#filter", Input)
        box.value = ""
        box.remove_class("-open")
        self.query_one("#sessions").focus()

    def action_dark(self) -> None:
        """Change between dark and light colours."""
        dark = self.current_theme.dark
        self.theme = "textual-light" if dark else "textual-dark"

    def on_input_changed(self) -> None:
        """Filter while a label is typed."""
        self._draw()

    def on_input_submitted(self) -> None:
        """Go to the sessions that were found."""
        self.query_one("#sessions").focus()

    def on_data_table_row_selected(self) -> None:
        """Unfold the server or session under the cursor, or fold it."""
        self.query_one("#details").toggle_class("-open")

    def on_data_table_row_highlighted(self) -> None:
        """Show the figures and details of another row."""
        self._draw_selected()

    def on_descendant_focus(self) -> None:
        """Show the details of the table that has the focus."""
        self._draw_selected()


def _sessions(watch: Watch) -> list[Session]:
    """Return the sessions that a manager listed, each with a key that stays the same."""
    if watch.status is None:
        return []
    found = []
    seen: Counter[str] = Counter()
    for name in ("sessions", "expired"):
        for each in watch.status.get(name, ()):
            # What has no ID of its own is known by its label and the time at which it began.
            age = each["ago_s"] if name == "expired" else each["age_s"]
            began = round((watch.status["uptime_s"] - age) * 1000)
            key = f"{watch.manager.url} {name} {each['label']} {began}"
            seen[key] += 1
            found.append(Session(f"{key} {seen[key]}", watch.manager.url, each, name == "expired"))
    return found
