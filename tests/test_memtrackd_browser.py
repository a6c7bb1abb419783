"""The page of memtrackd in a real browser: Chromium, without a window.

The screenshots go to .cache/screenshots, or to $MEMTRACKD_SCREENSHOTS.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from memtrackd import web
from memtrackd.metrics import Metrics
from memtrackd.protocol import RegionEntry, Update
from memtrackd.tracking import Client, Credentials, Tracking
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import aioummu
from tests.sandbox import PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="there is no Chromium: apt-get install chromium chromium-driver",
)

# Seconds after which something has hung.
LIMIT = 30
PAGE = 4096
BASE = 0x7F3A_4000_0000
HOSTILE = (
    "<img src=x onerror=document.title='owned'>",
    "\u05d0\u05d1\u05d2 \u0645\u0631\u062d\u0628\u0627",  # right to left
    "w" * 128,
    "&lt;b&gt;\"'`${1}",
)

T = TypeVar("T")


class Site:
    """The page, served by a thread with an event loop of its own."""

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.listener = socket.create_server(address)
        self.origin = "http://127.0.0.1:{}".format(*self.listener.getsockname()[1:])
        self.tracking = Tracking()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(LIMIT)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        feed = web.Feed(self.tracking)
        self.tracking.listen(feed)
        metrics = Metrics(self.tracking, {}, {"web": lambda: feed.dropped})
        app = web.make_app(self.tracking, feed, metrics.render)
        async with web.serve(app, [self.listener]):
            self._ready.set()
            await self._end.wait()

    def do(self, call: Callable[..., T], *arguments: Any) -> T:  # noqa: ANN401
        """Call it where the tracking lives."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call(*arguments))
            except BaseException as error:  # noqa: BLE001 - raised over there
                future.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return future.result(LIMIT)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()

    # What programs do.

    def attach(self, name: str = "train.py", backend: str = "driver") -> Client:
        who = Credentials(4242, 1000, 1000, "ada", "python3")
        return self.do(self.tracking.attach, name, backend, who, time.time())

    def register(
        self, client: Client, *regions: tuple[int, int, int, str], at: float = 0
    ) -> None:
        entries = tuple(RegionEntry(*region) for region in regions)
        update = Update(register=entries)
        self.do(self.tracking.update, client, update, at or time.time())

    def invalidate(
        self,
        client: Client,
        cookie: int,
        *,
        first: int = 0,
        pages: int = 0,
        cause: aioummu.Cause | None = None,
        at: float = 0,
    ) -> None:
        """Report that pages of a region changed; 0: somewhere in it."""
        region = client.regions[cookie]
        start, end = region.start, region.end
        if pages:
            start += first * PAGE
            end = start + pages * PAGE
        flags = (aioummu.HINT if pages else 0) | (cause.value if cause else 0)
        generation = client.generation + 1
        records = [
            (aioummu.INVAL, flags, start, end, cookie),
            (aioummu.LAST, 0, 0, 0, generation),
        ]
        self.do(self.tracking.report, client, records, at or time.time())


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@contextmanager
def chromium(profile: Path) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    driver = Chrome(options=options, service=ChromeService(executable_path=DRIVER))
    try:
        driver.set_page_load_timeout(LIMIT)
        driver.set_script_timeout(LIMIT)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def browser(running: Chrome, site: Site) -> Iterator[Chrome]:
    """A browser that has seen nothing; afterwards, there is nothing to complain of."""
    for kind in ("browser", "performance"):
        logged(running, kind)
    resize(running, 1200)
    emulate(running)
    yield running
    complaints = [entry["message"] for entry in logged(running, "browser")]
    # It has left before the server ends, and asked nobody else.
    running.get("about:blank")
    requests = [
        message["params"]["request"]["url"]
        for entry in logged(running, "performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert complaints == []
    assert site.origin + "/events" in requests
    # The browser has the icons of its own controls with it.
    own = (site.origin + "/", "data:", "about:", "chrome:")
    foreign = [url for url in requests if not url.startswith(own)]
    assert foreign == []


def logged(browser: Chrome, kind: str) -> list[dict[str, Any]]:
    """Return what was logged since the last time."""
    entries: list[dict[str, Any]] = browser.get_log(kind)  # type: ignore[no-untyped-call]
    return entries


def resize(browser: Chrome, width: int, height: int = 900, ratio: float = 1) -> None:
    """Set the size of the page; a window could not be as narrow as a telephone."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {
            "width": width,
            "height": height,
            "deviceScaleFactor": ratio,
            "mobile": False,
        },
    )


def emulate(browser: Chrome, scheme: str = "light", motion: str = "") -> None:
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": motion},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def until(browser: Chrome, script: str, *arguments: Any) -> Any:  # noqa: ANN401
    """Wait until the script returns something true, and return that."""
    return WebDriverWait(browser, LIMIT, poll_frequency=0.05).until(
        lambda _: browser.execute_script(script, *arguments),
        f"never true: {script}",
    )


def run(browser: Chrome, script: str, *arguments: Any) -> Any:  # noqa: ANN401
    return browser.execute_script(script, *arguments)


def opened(browser: Chrome, site: Site) -> None:
    browser.get(site.origin)
    until(browser, "return document.documentElement.dataset.state === 'live'")


# Pixels of a map that have, about, the colour of a kind of change.
COLOURED = """
    const canvas = document.querySelector(`[data-client="${arguments[0]}"] canvas`);
    // Read from copies: the page's own canvases may stay with the graphics card.
    const often = {willReadFrequently: true};
    const pen = new OffscreenCanvas(1, 1).getContext("2d", often);
    const style = getComputedStyle(document.documentElement);
    pen.fillStyle = style.getPropertyValue("--" + arguments[1]);
    pen.fillRect(0, 0, 1, 1);
    const want = pen.getImageData(0, 0, 1, 1).data;
    const {width, height} = canvas;
    const copy = new OffscreenCanvas(width, height).getContext("2d", often);
    copy.drawImage(canvas, 0, 0);
    const {data} = copy.getImageData(0, 0, width, height);
    const rows = [];
    let count = 0;
    for (let i = 0; i < data.length; i += 4) {
        if ([0, 1, 2].every((j) => Math.abs(data[i + j] - want[j]) < 12)) {
            count += 1;
            rows.push(Math.floor(i / 4 / width));
        }
    }
    return {count, top: Math.min(...rows), bottom: Math.max(...rows), height};
"""


def wait_for_colour(browser: Chrome, client: Client, name: str) -> dict[str, float]:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        seen: dict[str, float] = run(browser, COLOURED, client.id, name)
        if seen["count"] > 5:
            return seen
        time.sleep(0.05)
    raise AssertionError(f"nothing on the map has the colour of {name}")


def test_change_is_drawn_where_it_was_and_only_there(
    browser: Chrome, site: Site
) -> None:
    client = site.attach()
    site.register(client, (1, BASE, BASE + 100 * PAGE, "weights"))
    opened(browser, site)
    selector = f'[data-client="{client.id}"] canvas'
    until(
        browser,
        "return document.querySelector(arguments[0])?.dataset.regions === '1'",
        selector,
    )
    assert run(browser, COLOURED, client.id, "unmap")["count"] == 0

    site.invalidate(client, 1, first=75, pages=25, cause=aioummu.Cause.UNMAP)

    seen = wait_for_colour(browser, client, "unmap")
    # The last quarter of the region, which has all the height but the time axis's.
    usable = seen["height"] - 16
    assert abs(seen["top"] - 0.75 * usable) < 4
    assert abs(seen["bottom"] - usable) < 4
    assert run(browser, COLOURED, client.id, "clear")["count"] == 0
    drawn = "return document.querySelector(arguments[0]).dataset.drawn"
    assert run(browser, drawn, selector) == "1"


def test_changes_of_before_are_in_the_snapshot(browser: Chrome, site: Site) -> None:
    client = site.attach()
    site.register(client, (1, BASE, BASE + 8 * PAGE, "weights"))
    site.invalidate(client, 1, pages=8, cause=aioummu.Cause.CLEAR)
    opened(browser, site)
    wait_for_colour(browser, client, "clear")
    latest = browser.find_element(By.ID, "latest").text
    assert "weights" in latest
    assert "clear" in latest
    assert f"{BASE:#x}" in latest


def test_page_follows_without_a_reload(browser: Chrome, site: Site) -> None:
    opened(browser, site)
    run(browser, "window.unloaded = false")
    assert "No program" in browser.find_element(By.ID, "empty").text
    client = site.attach("later.py")
    until(browser, "return document.querySelectorAll('.card').length === 1")
    site.register(client, (1, BASE, BASE + PAGE, "late"), (2, 1 << 20, 2 << 20, "low"))
    until(browser, "return document.querySelector('.regions').textContent === '2'")
    for _ in range(3):
        site.invalidate(client, 2, cause=aioummu.Cause.MOVE)
    until(browser, "return document.querySelector('.changes').textContent === '3'")
    until(browser, "return document.querySelector('.generation').textContent === '3'")
    until(browser, "return document.querySelectorAll('#latest li').length === 3")
    update = Update(unregister=(1,))
    site.do(site.tracking.update, client, update, time.time())
    until(browser, "return document.querySelector('.regions').textContent === '1'")
    assert run(browser, "return window.unloaded") is False


def test_ended_client_is_shown_with_the_reason(browser: Chrome, site: Site) -> None:
    site.tracking.keep_ended = 1
    stays, goes = site.attach("stays"), site.attach("goes")
    site.register(goes, (1, BASE, BASE + PAGE, "weights"))
    opened(browser, site)
    site.do(site.tracking.end, goes, "process ended", time.time())
    until(browser, "return document.querySelectorAll('#ended .card.gone').length === 1")
    card = browser.find_element(By.CSS_SELECTOR, "#ended .card")
    assert "goes" in card.text
    assert "process ended" in card.text
    assert card.find_element(By.CLASS_NAME, "regions").text == "0"
    site.do(site.tracking.end, stays, "left", time.time())
    # The first one is forgotten now.
    until(
        browser,
        "return [...document.querySelectorAll('.card .name')]"
        ".map((e) => e.textContent).join() === 'stays'",
    )


def test_hostile_names_are_text(browser: Chrome, site: Site) -> None:
    for number, name in enumerate(HOSTILE):
        client = site.attach(name)
        site.register(client, (1, BASE, BASE + PAGE, HOSTILE[number - 1]))
        site.invalidate(client, 1)
    resize(browser, 320)
    opened(browser, site)
    names = [element.text for element in browser.find_elements(By.CLASS_NAME, "name")]
    assert [name for name in HOSTILE if name not in names] == []
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert browser.title == "memtrackd"
    assert overflow(browser) == 0


def overflow(browser: Chrome) -> int:
    pixels: int = run(
        browser,
        "return document.documentElement.scrollWidth - innerWidth",
    )
    return max(pixels, 0)


@pytest.mark.parametrize("width", [320, 768, 1440])
def test_no_sideways_scrolling(browser: Chrome, site: Site, width: int) -> None:
    client = populate(site)
    resize(browser, width)
    opened(browser, site)
    wait_for_colour(browser, client, "unmap")
    assert run(browser, "return innerWidth") == width
    assert overflow(browser) == 0
    wide = """
        return [...document.querySelectorAll('body *')].filter((e) =>
            e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML)
    """
    assert run(browser, wide) == []


def test_dark_differs_from_light(browser: Chrome, site: Site) -> None:
    client = populate(site)
    opened(browser, site)
    look = """
        const canvas = document.querySelector('canvas.map');
        const copy = new OffscreenCanvas(1, 1).getContext('2d');
        copy.drawImage(canvas, 1 - canvas.width, 0);
        return [getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.body).color,
            [...copy.getImageData(0, 0, 1, 1).data].join()]
    """
    looks = []
    for scheme in ("light", "dark"):
        emulate(browser, scheme)
        until(
            browser, "return matchMedia(`(prefers-color-scheme: ${arguments[0]})`)"
            ".matches", scheme,
        )  # fmt: skip
        wait_for_colour(browser, client, "unmap")
        looks.append(run(browser, look))
    assert [a for a, b in zip(*looks, strict=True) if a == b] == []


def contrast(browser: Chrome, selector: str) -> float:
    ratio: float = run(
        browser,
        """
        const luminance = (text) => {
            const [r, g, b] = text.match(/[\\d.]+/g).map((n) => {
                const c = n / 255;
                return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const element = document.querySelector(arguments[0]);
        let under = element;
        const clear = 'rgba(0, 0, 0, 0)';
        while (getComputedStyle(under).backgroundColor === clear)
            under = under.parentElement;
        const [low, high] = [getComputedStyle(element).color,
            getComputedStyle(under).backgroundColor].map(luminance).sort(
            (a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
        """,
        selector,
    )
    return ratio


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser: Chrome, site: Site, scheme: str) -> None:
    populate(site)
    emulate(browser, scheme)
    opened(browser, site)
    until(browser, "return document.querySelector('#ended .card .badge')")
    until(browser, "return document.querySelector('#latest .where')")
    texts = (
        "h1", ".state", "dt", "dd", "#pause", ".window input:checked + span", ".who",
        ".badge", "#ended .badge", "#ended .name", ".legend li", ".details",
        ".latest .when", ".latest .where", ".latest .cause",
    )  # fmt: skip
    low = {s: c for s in texts if (c := contrast(browser, s)) < 4.5}
    assert low == {}


def test_keyboard_finds_the_details_of_changes(browser: Chrome, site: Site) -> None:
    client = site.attach()
    site.register(client, (1, BASE, BASE + 8 * PAGE, "weights"))
    site.invalidate(client, 1, first=1, pages=2, cause=aioummu.Cause.UNMAP)
    site.invalidate(client, 1)
    opened(browser, site)
    until(browser, "return document.querySelectorAll('#latest li').length === 2")
    canvas = browser.find_element(By.CLASS_NAME, "map")
    details = browser.find_element(By.CLASS_NAME, "details")
    canvas.send_keys(Keys.END)
    assert "somewhere in 8 pages" in details.text
    assert "changed" in details.text
    canvas.send_keys(Keys.ARROW_LEFT)
    assert "weights" in details.text
    assert "unmap" in details.text
    assert f"{BASE + PAGE:#x}\u2013{BASE + 3 * PAGE:#x}, 2 pages" in details.text
    canvas.send_keys(Keys.ESCAPE)
    assert "weights" not in details.text


def test_filter_and_pause(browser: Chrome, site: Site) -> None:
    client, other = site.attach("train.py"), site.attach("serve.py")
    site.register(client, (1, BASE, BASE + PAGE, "weights"))
    site.register(other, (1, BASE, BASE + PAGE, "requests"))
    opened(browser, site)
    box = browser.find_element(By.ID, "filter")
    names = (
        "return [...document.querySelectorAll('.card .name')]"
        ".map((e) => e.textContent).join()"
    )
    box.send_keys("reques")
    assert run(browser, names) == "serve.py"
    box.send_keys("no such")
    assert run(browser, names) == ""
    assert "No client" in browser.find_element(By.ID, "empty").text
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE)
    assert run(browser, names) == "train.py,serve.py"

    pause = browser.find_element(By.ID, "pause")
    pause.click()
    site.invalidate(client, 1, cause=aioummu.Cause.UNMAP)
    until(browser, "return document.querySelector('.changes').textContent === '1'")
    # It is known, but the picture stands still.
    assert run(browser, COLOURED, client.id, "unmap")["count"] == 0
    assert run(browser, "return document.querySelectorAll('#latest li').length") == 0
    pause.click()
    wait_for_colour(browser, client, "unmap")
    until(browser, "return document.querySelectorAll('#latest li').length === 1")


def test_kinds_of_changes_can_be_left_out(browser: Chrome, site: Site) -> None:
    client = site.attach()
    site.register(client, (1, BASE, BASE + 100 * PAGE, "weights"))
    opened(browser, site)
    both = aioummu.Cause.UNMAP | aioummu.Cause.CLEAR
    site.invalidate(client, 1, first=0, pages=10, cause=aioummu.Cause.CLEAR)
    site.invalidate(client, 1, first=50, pages=10, cause=both)
    wait_for_colour(browser, client, "unmap")
    wait_for_colour(browser, client, "clear")
    shown = (
        "return [...document.querySelectorAll('#latest .cause')]"
        ".map((e) => e.textContent).join()"
    )
    until(browser, shown + " === 'unmap + clear,clear'")
    button = browser.find_element(By.XPATH, "//*[@id='legend']//button[.='clear']")

    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    # What is also something else stays.
    until(browser, shown + " === 'unmap + clear'")
    until(browser, "return document.querySelector('canvas.map').dataset.drawn === '1'")
    assert run(browser, COLOURED, client.id, "clear")["count"] == 0
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-pressed") == "true"
    until(browser, shown + " === 'unmap + clear,clear'")
    wait_for_colour(browser, client, "clear")


def test_thousands_of_regions_do_not_hang_the_page(browser: Chrome, site: Site) -> None:
    clients = [site.attach(f"worker-{n}") for n in range(20)]
    for client in clients:
        regions = [
            (n, BASE + 4 * n * PAGE, BASE + (4 * n + 2) * PAGE, f"buffer {n}")
            for n in range(500)
        ]
        site.register(client, *regions)
    opened(browser, site)
    for n in range(100):
        for client in clients:
            site.invalidate(client, 5 * n, pages=1, cause=aioummu.Cause.CLEAR)
    until(
        browser,
        "return document.getElementById('total-changes').textContent === '2,000'",
    )
    until(
        browser,
        "return document.getElementById('total-regions').textContent === '10,000'",
    )
    wait_for_colour(browser, clients[0], "clear")
    # What is out of sight is not drawn; lists have their limits.
    drawn = run(browser, "return document.querySelectorAll('[data-drawn]').length")
    assert 0 < drawn < 20
    assert run(browser, "return document.querySelectorAll('#latest li').length") <= 40


def populate(site: Site) -> Client:
    """Show what a machine could look like; return a client that unmapped things."""
    causes = aioummu.Cause
    moment = time.time()
    train = site.attach("train.py")
    since = moment - 57
    site.register(
        train,
        (1, BASE, BASE + 4096 * PAGE, "weights"),
        (2, BASE + 4100 * PAGE, BASE + 6000 * PAGE, "optimizer state"),
        (3, BASE + (1 << 30), BASE + (1 << 30) + 512 * PAGE, "batch 0"),
        (4, BASE + (1 << 30) + 512 * PAGE, BASE + (1 << 30) + 1024 * PAGE, "batch 1"),
        at=since,
    )
    for step in range(13):
        at = since + 2 + 4.2 * step
        site.invalidate(train, 3 + step % 2, pages=512, cause=causes.CLEAR, at=at)
        if step % 3 == 2:
            site.invalidate(
                train, 1, first=300 * step, pages=400, cause=causes.PROTECT_MAPPING,
                at=at + 1,
            )  # fmt: skip
        if step % 5 == 1:
            site.invalidate(train, 2, cause=causes.PROTECT_PAGE, at=at + 2)
    site.invalidate(train, 2, first=900, pages=900, cause=causes.UNMAP, at=moment - 3)
    serve = site.attach("inference server", "embedded")
    arenas = [
        (n, (2 * n + 1) << 28, ((2 * n + 1) << 28) + 64 * PAGE, f"arena {n}")
        for n in range(1, 9)
    ]
    site.register(serve, *arenas, at=moment - 50)
    for n in range(40):
        site.invalidate(
            serve, n * 5 % 8 + 1, first=n, pages=20,
            cause=(causes.UNMAP, causes.CLEAR, causes.MOVE)[n % 3],
            at=moment - 48 + 1.17 * n,
        )  # fmt: skip
    cache = site.attach("registration cache")
    site.register(
        cache, (1, 1 << 40, (1 << 40) + 2000 * PAGE, "RDMA pool"), at=moment - 40
    )
    for n in range(20):
        site.invalidate(cache, 1, first=90 * n, pages=80, at=moment - 39 + 1.9 * n)
    pool = site.attach("buffer pool", "embedded")
    buffers = [
        (n, BASE + 3 * n * PAGE, BASE + (3 * n + 2) * PAGE, f"buffer {n}")
        for n in range(60)
    ]
    site.register(pool, *buffers, at=moment - 58)
    for n in range(150):
        site.invalidate(
            pool, n * n * 7 % 60, pages=2,
            cause=(causes.CLEAR, causes.MOVE, causes.UNMAP)[n // 5 % 3],
            at=moment - 56 + 0.36 * n,
        )  # fmt: skip
    done = site.attach("import.py", "embedded")
    site.register(done, (1, BASE, BASE + 200 * PAGE, "rows"), at=moment - 55)
    site.invalidate(done, 1, first=40, pages=100, cause=causes.UNMAP, at=moment - 22)
    site.do(site.tracking.end, done, "it left", moment - 20)
    return train


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot_for_the_readme(browser: Chrome, site: Site, scheme: str) -> None:
    client = populate(site)
    resize(browser, 1280, 1120)
    emulate(browser, scheme)
    opened(browser, site)
    wait_for_colour(browser, client, "unmap")
    until(browser, "return document.querySelectorAll('#latest li').length > 10")
    kept = os.environ.get("MEMTRACKD_SCREENSHOTS")
    folder = Path(kept) if kept else PROJECT / ".cache" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "-dark" if scheme == "dark" else ""
    picture = browser.get_screenshot_as_png()
    (folder / f"memtrackd-page{suffix}.png").write_bytes(picture)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_page_comes_back_when_the_daemon_does(running: Chrome) -> None:
    resize(running, 800)
    emulate(running)
    first = Site()
    address = first.listener.getsockname()
    try:
        before = first.attach("before")
        opened(running, first)
        until(
            running, "return document.querySelector('.name').textContent === 'before'"
        )
    finally:
        first.close()
    until(running, "return document.documentElement.dataset.state === 'lost'")
    state = running.find_element(By.ID, "state").text
    assert "reconnecting" in state
    assert before.ended is None
    # The page kept trying at this address.
    second = Site(address)
    try:
        second.attach("after")
        until(running, "return document.documentElement.dataset.state === 'live'")
        until(running, "return document.querySelector('.name').textContent === 'after'")
        running.get("about:blank")
    finally:
        second.close()
