"""The screen of `cidalloc top`: driven by keys, against real managers and recorded statuses."""

from __future__ import annotations

import asyncio
import html
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from command import run
from loopback import Loopback

from cidalloc.cli.ask import Manager
from cidalloc.cli.top.watch import Watch
from cidalloc.client import Client
from cidalloc.errors import CidError, RegistryCorrupt, Unavailable
from cidalloc.manager.settings import Settings

pytest.importorskip("textual", reason="the extra 'top' is not installed")

from textual.pilot import Pilot
from textual.widgets import Footer, Input, Sparkline, Static

from cidalloc.cli.top.app import Items, TopApp

NOWHERE = "127.0.0.1:1"


def loopback(url: str) -> Manager:
    """Return a connection to a manager in this process."""
    manager = Manager(url, "cidmgr", 5.0)
    manager.transport = Loopback(Settings(first=1000, capacity=500, fresh=True))
    return manager


@pytest.fixture
def manager() -> Iterator[Manager]:
    """One with three sessions that hold 10, 30 and 20 IDs."""
    manager = loopback("one:8001")
    clients = [
        Client("loopback:1", transport=manager.transport, label=label, ahead=0)
        for label in ("[b]asr", "tts", "ASR [/]")
    ]
    try:
        for client, count in zip(clients, (10, 30, 20), strict=True):
            client.acquire_many(count)
        yield manager
    finally:
        for client in clients:
            client.close()


Steps = Callable[[TopApp, "Pilot[None]"], Awaitable[None]]


def drive(managers: list[Manager], steps: Steps, size: tuple[int, int] = (80, 24)) -> TopApp:
    """Run the screen without a terminal, and do these steps."""

    async def main() -> TopApp:
        app = TopApp(managers, 0.05)
        async with app.run_test(size=size) as pilot:
            await steps(app, pilot)
        return app

    return asyncio.run(main())


async def until(true: Callable[[], Any]) -> None:
    """Wait until a condition is true, for ten seconds at most."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def column(app: TopApp, table: str, number: int) -> list[str]:
    items = app.query_one(f"#{table}", Items)
    return [str(items.get_row_at(row)[number]) for row in range(items.row_count)]


def text(app: TopApp, widget: str) -> str:
    return str(app.query_one(widget, Static).render())


# ---- Tables


def test_sessions_sort_and_keep_the_cursor(manager: Manager) -> None:
    async def steps(app: TopApp, pilot: Pilot[None]) -> None:
        await until(lambda: column(app, "sessions", 0) == ["ASR [/]", "[b]asr", "tts"])
        await pilot.press("down", "s", "s")
        assert column(app, "sessions", 2) == ["10", "20", "30"]
        await pilot.press("r")
        assert column(app, "sessions", 2) == ["30", "20", "10"]
        items = app.query_one("#sessions", Items)
        assert items.cursor_row == 2 and items.item.status["label"] == "[b]asr"
        await pilot.click("#sessions", offset=(2, 0))  # the header of the labels
        await until(lambda: column(app, "sessions", 0) == ["tts", "[b]asr", "ASR [/]"])
        await pilot.press("s", "s", "S", "S")
        assert column(app, "sessions", 0) == ["tts", "[b]asr", "ASR [/]"]

    drive([manager], steps)


def test_a_filter_by_label(manager: Manager) -> None:
    async def steps(app: TopApp, pilot: Pilot[None]) -> None:
        await until(lambda: len(column(app, "sessions", 0)) == 3)
        await pilot.press("slash", *"ASR", "enter")
        assert column(app, "sessions", 0) == ["ASR [/]", "[b]asr"]
        assert app.query_one("#sessions").has_focus
        await pilot.press("slash", *" q")
        assert column(app, "sessions", 0) == [] and app.is_running, "q is typed"
        await pilot.press("escape")
        assert len(column(app, "sessions", 0)) == 3
        assert not app.query_one("#filter", Input).display

    drive([manager], steps)


def test_a_session_unfolds(manager: Manager) -> None:
    async def steps(app: TopApp, pilot: Pilot[None]) -> None:
        details = app.query_one("#details")
        await until(lambda: len(column(app, "sessions", 0)) == 3)
        assert not details.display
        words = ("tts", "held", "one:8001", "expires in")
        before = [shown(app).count(each) for each in words]
        await pilot.press("down", "down", "enter")
        await until(lambda: [shown(app).count(each) - 1 for each in words] == before)
        assert details.display
        await pilot.press("tab", "enter", "enter")
        await until(lambda: "1000 to 1499, 500 IDs" in shown(app))
        await pilot.press("escape")
        assert not details.display

    drive([manager], steps, (80, 40))


def shown(app: TopApp) -> str:
    """Return the text of the screen."""
    return html.unescape(re.sub("<[^>]*>", "", app.export_screenshot())).replace("\xa0", " ")


def test_what_later_managers_list() -> None:
    """Expired sessions and IDs in use; a manager without them shows a dash."""
    manager = loopback("one:8001")
    with Client("loopback:1", transport=manager.transport, label="a", ahead=0) as client:
        client.acquire()
        status = manager.status()
    for each in (status, *status["sessions"]):
        each.pop("used", None)
    recorded = Recorded(manager, [status])

    async def steps(app: TopApp, pilot: Pilot[None]) -> None:
        await until(lambda: column(app, "sessions", 3) == ["-"])
        status["sessions"][0]["used"] = 1
        status["used"] = 1
        status["expired"] = [{"label": "lost", "held": 5, "used": 2, "ago_s": 61.0}] * 2
        await until(lambda: column(app, "sessions", 0) == ["a", "lost", "lost"])
        assert column(app, "sessions", 1) == ["open", "expired", "expired"]
        assert column(app, "sessions", 3) == ["1", "2", "2"]
        assert column(app, "sessions", 5)[1:] == ["1 min 01 s ago"] * 2
        assert column(app, "servers", 1) == ["ok"]
        status["draining"] = True
        await until(lambda: column(app, "servers", 1) == ["draining"])

    drive([recorded], steps)


class Recorded(Manager):
    """A manager that answers what a test says; the last answer again and again."""

    def __init__(self, manager: Manager, answers: list[dict[str, Any] | CidError]) -> None:
        vars(self).update(vars(manager))
        self.answers = answers

    def status(self) -> dict[str, Any]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, CidError):
            raise answer
        return answer


# ---- Figures


def test_figures(manager: Manager) -> None:
    async def steps(app: TopApp, pilot: Pilot[None]) -> None:
        await until(lambda: text(app, "#held-text") == "held 60")
        with Client("loopback:1", transport=manager.transport, ahead=0) as client:
            client.release_many(client.acquire_many(40))
            await until(lambda: text(app, "#cooling-text") == "cooling 40")
        figures = {each.id: list(each.data or ()) for each in app.query(Sparkline)}
        assert figures["held"][0] == 0 and figures["held"][-1] == 60
        assert max(figures["acquired"]) > 0 and max(figures["requests"]) > 0

    drive([manager], steps)


def test_figures_are_kept_for_minutes() -> None:
    manager = loopback("one:8001")
    watch = Watch(manager, 60.0)
    for _ in range(5):
        time.sleep(0.002)
        watch.take(manager.status())
    assert [len(each) for each in watch.figures.values()] == [3, 3, 3, 3]
    watch.take(RegistryCorrupt("broken"))
    assert (watch.state, watch.rates) == ("REGISTRY_CORRUPT", None)


# ---- Servers


def test_one_of_several_does_not_answer(manager: Manager) -> None:
    with Manager(NOWHERE, "cidmgr", 0.5) as away:

        async def steps(app: TopApp, pilot: Pilot[None]) -> None:
            await until(lambda: "ok" in column(app, "servers", 1))
            await until(lambda: "no answer" in text(app, "#head"))
            assert column(app, "servers", 0) == [NOWHERE, "one:8001"]
            assert column(app, "servers", 1)[0].startswith("no answer ")
            assert "no answer from" in text(app, "#head")
            assert set(column(app, "sessions", 6)) == {"one:8001"}
            await pilot.press("tab", "down")
            assert "no answer" not in text(app, "#head"), "this one answers"
            assert text(app, "#held-text") == "held 60"

        drive([away, manager], steps, (120, 40))


def test_a_manager_that_goes_away_and_comes_back(manager: Manager) -> None:
    status = manager.status()
    recorded = Recorded(manager, [status])

    async def steps(app: TopApp, pilot: Pilot[None]) -> None:
        await until(lambda: text(app, "#held-text") == "held 60")
        recorded.answers[:] = [Unavailable("gone")]
        await until(lambda: text(app, "#head").endswith(": gone"))
        assert len(column(app, "sessions", 0)) == 3, "the last status stays"
        recorded.answers[:] = [{**status, "registry": "another", "sessions": [], "held": 0}]
        await until(lambda: text(app, "#held-text") == "held 0")
        await until(lambda: "gone" not in text(app, "#head"))
        await until(lambda: column(app, "servers", 1) == ["ok"])
        await until(lambda: column(app, "sessions", 0) == [])

    drive([recorded], steps)


def test_a_manager_that_never_answers_does_not_block(manager: Manager) -> None:
    asked, free = threading.Event(), threading.Event()

    class Stuck(Recorded):
        def status(self) -> dict[str, Any]:
            asked.set()
            free.wait(30)
            raise Unavailable("late")

    async def steps(app: TopApp, pilot: Pilot[None]) -> None:
        await until(asked.is_set)
        await pilot.press("d")
        assert app.theme == "textual-light"
        await pilot.press("d")
        assert app.theme == "textual-dark"
        await pilot.press("q")

    began = time.monotonic()
    try:
        app = drive([Stuck(manager, [])], steps)
    finally:
        free.set()
    assert app.return_code == 0
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (40, 12)])
def test_every_key_is_at_the_bottom(manager: Manager, size: tuple[int, int]) -> None:
    async def steps(app: TopApp, pilot: Pilot[None]) -> None:
        await until(lambda: len(column(app, "sessions", 0)) == 3)
        footer = app.query_one(Footer)
        assert footer.region.bottom == size[1]
        if size[0] >= 80:
            keys = ("Unfold", "Sort", "Reverse", "Table", "Filter", "Back", "Colours", "Quit")
            await until(lambda: all(key in shown(app) for key in keys))
        assert app.query_one("#sessions").size.height >= 2

    drive([manager], steps, size)


# ---- The command


@pytest.mark.parametrize("where", ["8080", "host", "host:port", ":8080", "127.0.0.1:99999"])
def test_an_address_that_is_not_valid(where: str) -> None:
    done = run("top", NOWHERE, f"--web={where}")
    assert (done.returncode, "is not HOST:PORT" in done.stderr) == (1, True), done.stderr


def test_one_url_twice_is_one_server() -> None:
    done = run("top", NOWHERE, NOWHERE, "--once", "--timeout", "1")
    assert (done.returncode, done.stdout) == (1, ""), done
