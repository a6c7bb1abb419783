"""What memtrackd is installed with: systemd units, Prometheus, Grafana.

Everything is checked by the programs that will read it, and the rights that the unit
leaves are tried on the real daemon.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import aioummu
from tests.sandbox import PROJECT

pytest.importorskip("memtrackd")
import memtrackd
from memtrackd import protocol
from memtrackd.config import load_config
from memtrackd.metrics import Metrics
from memtrackd.tracking import Credentials, Tracking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SYSTEMD = PROJECT / "examples" / "memtrackd" / "systemd"
MONITORING = PROJECT / "examples" / "memtrackd" / "monitoring"
INSTALLED = "/opt/memtrackd/bin/memtrackd"
# Seconds after which something has hung.
LIMIT = 60


def run(*command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        **more,
    )


def settings(unit: str) -> dict[str, list[str]]:
    """Return what a unit sets, by its keys."""
    found: dict[str, list[str]] = {}
    for line in (SYSTEMD / unit).read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


# systemd.

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze"
)


@needs_systemd
def test_units_have_no_mistakes(tmp_path: Path) -> None:
    for unit in SYSTEMD.glob("memtrackd*.s*"):
        if unit.suffix in {".service", ".socket"}:
            # It wants the programs to be there.
            text = unit.read_text().replace(INSTALLED, shutil.which("true") or "")
            (tmp_path / unit.name).write_text(text)
    units = sorted(tmp_path.iterdir())
    assert len(units) == 3
    finished = run("systemd-analyze", "verify", "--man=no", *units)
    ours = [line for line in finished.stderr.splitlines() if "memtrackd" in line]
    assert ours == []
    assert finished.returncode == 0


@needs_systemd
def test_mistake_in_a_unit_would_be_seen(tmp_path: Path) -> None:
    unit = tmp_path / "memtrackd.service"
    unit.write_text((SYSTEMD / unit.name).read_text() + "\n[Service]\nNoSuch=yes\n")
    finished = run("systemd-analyze", "verify", "--man=no", unit)
    assert "NoSuch" in finished.stderr


@needs_systemd
def test_service_can_do_little(tmp_path: Path) -> None:
    unit = SYSTEMD / "memtrackd.service"
    command = ("systemd-analyze", "security", "--offline=true", "--threshold=20")
    finished = run(*command, unit)
    assert finished.returncode == 0, finished.stdout
    # The threshold is one.
    weak = tmp_path / unit.name
    weak.write_text("[Service]\nExecStart=/bin/true\n")
    assert run(*command, weak).returncode != 0


@pytest.mark.skipif(
    shutil.which("systemd-sysusers") is None, reason="there is no systemd-sysusers"
)
def test_user_and_group_are_those_of_the_units(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group"):
        (tmp_path / "etc" / name).write_text("")
    path = SYSTEMD / "memtrackd.sysusers.conf"
    finished = run("systemd-sysusers", f"--root={tmp_path}", path)
    assert finished.returncode == 0, finished.stderr
    (user,) = settings("memtrackd.service")["User"]
    assert f"{user}:" in (tmp_path / "etc" / "passwd").read_text()
    (group,) = settings("memtrackd.socket")["SocketGroup"]
    assert settings("memtrackd.service")["Group"] == [group]
    assert f"{group}:" in (tmp_path / "etc" / "group").read_text()


def test_file_of_settings_shows_the_defaults() -> None:
    path = SYSTEMD / "memtrackd.toml"
    load_config(["--config", str(path)], {})
    shown = tomllib.loads(re.sub(r"(?m)^# ([a-z-]+ = )", r"\1", path.read_text()))
    # What systemd's journal and socket unit want is different.
    for key in ("log", "log-file", "socket-group"):
        del shown[key]
    flags = [part for key, value in shown.items() for part in (f"--{key}", str(value))]
    told = load_config(flags, {})
    # On this machine the default can be somewhere else.
    default = load_config(["--socket", shown["socket"]], {})
    assert told == default
    (path_of_unit,) = settings("memtrackd.socket")["ListenSequentialPacket"]
    assert shown["socket"] == path_of_unit


def system_calls() -> dict[str, int]:
    """Return the numbers of this machine, by name."""
    finished = run("cc", "-E", "-dM", "-", input="#include <asm/unistd.h>\n")
    found = re.findall(r"(?m)^#define __NR_(\w+) (\d+)$", finished.stdout)
    return {name: int(number) for name, number in found}


def sets() -> dict[str, set[str]]:
    """Return systemd's sets of system calls, and of other sets."""
    found: dict[str, set[str]] = {}
    for line in run("systemd-analyze", "syscall-filter").stdout.splitlines():
        # A column of its own begins a set.
        if line.startswith("@"):
            members = found.setdefault(line, set())
        elif (entry := line.strip()) and entry[0] != "#":
            members.add(entry)
    return found


def members(name: str, known: dict[str, set[str]]) -> set[str]:
    """Return the system calls of a set, or the one."""
    if name.startswith("@"):
        return set().union(*(members(each, known) for each in known[name]))
    return {name}


def allowed_calls() -> set[str]:
    """Return what the unit's filter allows."""
    allowed: set[str] = set()
    known = sets()
    for line in settings("memtrackd.service")["SystemCallFilter"]:
        names = line.removeprefix("~").split()
        named = set().union(*(members(name, known) for name in names))
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed


# Becomes what systemd makes of the unit, as far as a process can for itself, and then
# the daemon.  Not by exec: another user may not be able to reach Python.
SERVICE = """
import ctypes, os, struct, sys
import memtrackd.__main__
from tests import sandbox

numbers, clients, http, notify = eval(sys.argv[1])
for fd, place in ((clients, 3), (http, 4)):
    os.dup2(fd, place)
os.environ.update(
    LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="clients:http",
    NOTIFY_SOCKET=notify, WATCHDOG_USEC="300000", WATCHDOG_PID=str(os.getpid()),
)
if os.geteuid() == 0:
    sandbox._become("nobody")
# No writable memory becomes executable; from Linux 6.3 on.
sandbox._libc.prctl(65, ctypes.c_ulong(1), 0, 0, 0)
code = struct.pack("=HBBI", 0x20, 0, 0, 0)
for number in numbers:
    code += struct.pack("=HBBI", 0x15, 0, 1, number)
    code += struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
code += struct.pack("=HBBI", 0x06, 0, 0, 0x00050000 | 1)
program = sandbox._Program(len(code) // 8, code)
sandbox._checked(sandbox._libc.prctl(38, 1, 0, 0, 0))
sandbox._checked(
    sandbox._libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(program), 0, 0)
)
# The filter is there.
try:
    os.chroot("/")
except PermissionError:
    sys.argv[1:] = ["--log", "json", "--canary", "0.1"]
    sys.exit(memtrackd.__main__.main())
"""


class Service:
    """The daemon as systemd would start it."""

    def __init__(self, directory: Path) -> None:
        # One that any user can reach.
        self.clients_path = directory / "clients"
        self.clients = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.clients.bind(str(self.clients_path))
        self.clients.listen()
        self.http = socket.create_server(("127.0.0.1", 0))
        self.port = self.http.getsockname()[1]
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.settimeout(LIMIT)
        self.manager.bind(f"\0memtrackd-test-{os.getpid()}")
        numbers = system_calls()
        allowed = sorted(numbers[name] for name in allowed_calls() & numbers.keys())
        # Descriptors beyond those that it gets.
        self.places = [os.dup2(s.fileno(), 100 + i) for i, s in enumerate(self._both)]
        notify = self.manager.getsockname().decode().replace("\0", "@")
        arguments = repr((allowed, *self.places, notify))
        self.log = (directory / "log").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVICE, arguments],
            cwd=PROJECT,
            pass_fds=self.places,
            stderr=self.log,
        )

    @property
    def _both(self) -> tuple[socket.socket, socket.socket]:
        return self.clients, self.http

    def wait_for(self, word: str) -> None:
        """Wait until the daemon says that to systemd."""
        heard: list[str] = []
        while word not in heard:
            try:
                heard += self.manager.recv(4096).decode().splitlines()
            except TimeoutError:
                pytest.fail(f"{heard}\n{self.said()}")

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()

    def scrape(self) -> dict[str, float]:
        """Return the metrics, by name and labels."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=LIMIT) as answer:
            lines = answer.read().decode().splitlines()
        rows = (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        return {name: float(value) for name, value in rows}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for thing in (*self._both, self.manager, self.log):
            thing.close()
        for fd in self.places:
            os.close(fd)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    pytest.importorskip("memtrackd.service")
    service = Service(tmp_path)
    yield service
    service.close()


def wait_until(is_so: Callable[[dict[str, float]], bool], service: Service) -> None:
    """Wait for something that the metrics tell."""
    deadline = time.monotonic() + LIMIT
    while not is_so(service.scrape()):
        assert service.process.poll() is None, service.said()
        assert time.monotonic() < deadline, service.said()
        time.sleep(0.05)


@needs_systemd
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_daemon_works_with_the_rights_of_the_unit(service: Service) -> None:
    service.wait_for("READY=1")
    service.wait_for("WATCHDOG=1")
    buffer = memoryview(bytearray(1 << 20))
    with memtrackd.attach("a client", socket=service.clients_path) as tracker:
        tracker.register(buffer, "buffer")
        wait_until(lambda m: m["memtrackd_clients"] == 1, service)
        canary = 'memtrackd_canary_seconds_count{backend="embedded"}'
        wait_until(lambda m: m.get(canary, 0) > 2, service)
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("RELOADING=1")
    service.process.terminate()
    service.wait_for("STOPPING=1")
    assert service.process.wait(LIMIT) == 0, service.said()
    # It is systemd's.
    assert service.clients_path.is_socket()
    assert "not permitted" not in service.said()


# Prometheus and Grafana.


def find_tool(name: str) -> str | None:
    """Look where "make" has put it as well, without installing it."""
    unpacked = PROJECT / ".cache" / "prometheus" / "usr" / "bin" / name
    return shutil.which(name) or (str(unpacked) if unpacked.exists() else None)


@pytest.fixture(scope="module")
def promtool() -> str:
    tool = find_tool("promtool")
    return tool or pytest.skip("there is no promtool: it is in Debian's prometheus")


def test_prometheus_accepts_its_configuration(promtool: str, tmp_path: Path) -> None:
    copy = shutil.copytree(MONITORING, tmp_path / "copy")
    for arguments in (
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
    ):
        finished = run(promtool, *arguments, cwd=copy)
        assert finished.returncode == 0, finished.stderr
    # Also what is only looked at in use: the nodes.
    for name in ("rules.yml", "nodes.yml"):
        (copy / name).write_text("- no: such\n")
        assert run(promtool, "check", "config", "prometheus.yml", cwd=copy).returncode


def test_alerts_fire_when_they_should(promtool: str) -> None:
    finished = run(promtool, "test", "rules", "rules.test.yml", cwd=MONITORING)
    assert finished.returncode == 0, finished.stdout + finished.stderr


ALERTS = re.findall(r"alert: (\w+)", (MONITORING / "rules.yml").read_text())


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_that_never_fires_would_be_noticed(
    promtool: str, tmp_path: Path, alert: str
) -> None:
    shutil.copytree(MONITORING, tmp_path, dirs_exist_ok=True)
    rules = tmp_path / "rules.yml"
    text = rules.read_text()
    start = text.index(f"alert: {alert}\n")
    broken = re.sub(r"(==|>) [\d.]+\n", "> 1e12\n", text[start:], count=1)
    rules.write_text(text[:start] + broken)
    assert run(promtool, "check", "rules", rules).returncode == 0
    finished = run(promtool, "test", "rules", "rules.test.yml", cwd=tmp_path)
    assert finished.returncode != 0
    assert alert in finished.stdout + finished.stderr


def dashboard() -> Any:  # noqa: ANN401 - JSON
    return json.loads((MONITORING / "grafana-dashboard.json").read_text())


def queries() -> list[str]:
    """Return the queries of the dashboard, with values for its variables."""
    found = [t["expr"] for panel in dashboard()["panels"] for t in panel["targets"]]
    assert len(found) > 10
    for variable, value in (
        ("$__rate_interval", "1m"),
        ("$__range", "1h"),
        ("$instance", ".*"),
        ("$client", ".*"),
    ):
        found = [query.replace(variable, value) for query in found]
    assert not any("$" in query for query in found)
    return found


def test_prometheus_understands_every_query_of_the_dashboard(
    promtool: str, tmp_path: Path
) -> None:
    def check(queries: list[str]) -> int:
        rules = [{"record": f"query{i}", "expr": q} for i, q in enumerate(queries)]
        path = tmp_path / "queries.yml"
        # JSON is YAML.
        path.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
        return run(promtool, "check", "rules", path).returncode

    assert check(queries()) == 0
    assert check([*queries(), "sum by (rate("]) != 0


def exported() -> dict[str, set[str]]:
    """Return the labels of each metric that the daemon has, by name."""
    tracking = Tracking()
    client = tracking.attach("name", "driver", Credentials(1, 2, 3, "u", "p"), 0.0)
    entry = protocol.RegionEntry(1, 4096, 8192, "region")
    tracking.update(client, protocol.Update((entry,)), 0.0)
    flags = aioummu.HINT | aioummu.Cause.UNMAP.value
    tracking.report(client, [(aioummu.INVAL, flags, 4096, 8192, 1)], 0.0)
    collected = Metrics(tracking, {"reason": 1}, {"log": int, "web": int})
    collected.delivered(0.1)
    collected.canary_sang("driver", 0.1)
    text = anyio.run(collected.render).decode()
    found: dict[str, set[str]] = {"up": set()}
    for name, labels in re.findall(r"(?m)^(\w+)(\{.*\})? ", text):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def test_rules_and_dashboard_use_what_the_daemon_exports() -> None:
    found = exported()
    rules = (MONITORING / "rules.yml").read_text()
    # A rule can use what another one records; and labels of the query are no metrics.
    expressions = re.findall(
        r"(?m)expr: (?:>-\n)?((?:.+\n)+?)\s+(?:for|labels|- )", rules
    )
    known = found.keys() | {
        r.replace(":", "_") for r in re.findall(r"record: (\S+)", rules)
    }
    used = {
        name
        for text in (*expressions, *queries())
        for name in re.findall(r"\b((?:memtrackd|process)_\w+|up)\b", text)
        if not re.search(rf":{name}\b|\b{name}:", text)
    }
    assert len(used) > 8
    assert used <= known
    labels = {"job", "instance", "le"}.union(*found.values())
    for query in queries():
        for names in re.findall(r"by \(([^)]*)\)", query):
            assert set(re.split(r",\s*", names)) <= labels
        named = set(re.findall(r"(\w+)=~?\"", query))
        assert named <= labels


def test_dashboard_takes_its_data_from_wherever_the_viewer_says() -> None:
    board = dashboard()
    variables = {v["name"]: v for v in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    identifiers = [panel["id"] for panel in board["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    for panel in board["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"


@pytest.mark.parametrize("with_prometheus", [False, True])
def test_two_nodes_are_seen_together(with_prometheus: bool, tmp_path: Path) -> None:
    pytest.importorskip("memtrackd.service")
    prometheus = find_tool("prometheus") if with_prometheus else ""
    if prometheus is None:
        pytest.skip("there is no prometheus")
    finished = run(
        MONITORING / "two-nodes.sh",
        "50",
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PROMETHEUS": prometheus,
            "TMPDIR": str(tmp_path),
        },
    )
    output = finished.stdout
    assert finished.returncode == 0, output + finished.stderr
    for node in ("node1", "node2"):
        assert f'up{{node="{node}"}} 1\n' in output
        (changes,) = re.findall(
            rf'memtrackd_changes_total{{node="{node}"}} (\d+)', output
        )
        assert int(changes) > 0
    assert output.endswith("two-nodes: ok\n")
    # It leaves nothing behind.
    assert list(tmp_path.iterdir()) == []
