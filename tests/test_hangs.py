"""What hangs a process that watches its own memory, if it is done naively.

Each test is a scenario of ``tests/hangs`` in a process of its own, on the embedded
backend. A limit of time only turns a hang into a failure, with everybody's stacks.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from tests.hangs.runner import LIMIT, Child, Outcome, build

if TYPE_CHECKING:
    from pathlib import Path

#: What a notifier says that works, when memory is unmapped.
REPORTED = ["Inval", "Last"]


class Run(Protocol):
    """Runs a scenario, and returns what it has said."""

    def __call__(
        self, name: str, *arguments: str, status: int = 0, nobody: bool = False
    ) -> dict[str, Any]: ...


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("hangs"))


@pytest.fixture
def run(library: Path) -> Run:
    def run(
        name: str, *arguments: str, status: int = 0, nobody: bool = False
    ) -> dict[str, Any]:
        child = Child(library, name, *arguments, limit=LIMIT, nobody=nobody)
        outcome = child.wait()
        assert outcome.status == status, str(outcome)
        assert not outcome.errors, str(outcome)
        return outcome.facts

    return run


# The controls: these do hang.

CONTROLS = [
    "unmapping_with_the_gil",
    "freeing_with_the_gil",
    "unmapping_in_the_loop_that_reads",
    "allocating_before_reading",
    "locking_before_reading",
    "handling_signals_in_the_reader",
    "closing_while_a_child_has_a_copy",
    "reading_no_more",
]

#: Seconds that a control gets to prove that it does not hang.
PATIENCE = 4


@pytest.fixture(scope="module")
def controls(library: Path) -> dict[str, Outcome]:
    """Run all of them, at once because they only wait."""

    def run(name: str) -> Outcome:
        child = Child(library, f"naive.{name}", limit=PATIENCE, nobody=False)
        # The time that it takes to get there does not count.
        child.says("hangs")
        return child.wait()

    with ThreadPoolExecutor(len(CONTROLS)) as executor:
        return dict(zip(CONTROLS, executor.map(run, CONTROLS), strict=True))


@pytest.mark.parametrize("name", CONTROLS)
def test_a_naive_reader_hangs(controls: dict[str, Outcome], name: str) -> None:
    outcome = controls[name]
    # It works, but for what it cannot stand.
    assert outcome.facts == {"events": 1, "hangs": True}, str(outcome)
    assert outcome.status is None, str(outcome)
    assert "userfaultfd" in outcome.waits, str(outcome)


# Threads that hold the GIL.


@pytest.mark.parametrize("readiness", ["poll", "sigio"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_memory_goes_away_with_the_gil_held_while_a_loop_iterates(
    run: Run, loop: str, readiness: str
) -> None:
    # Eight notifiers, four kinds of buffers, in two threads, ten times.
    assert run("gil.in_a_loop", loop, readiness) == {"watched": 640, "reported": 640}


def test_large_buffers_are_freed_in_several_threads(run: Run) -> None:
    assert run("gil.in_threads") == {"missed": 0}


# Locks of malloc().


@pytest.mark.parametrize("heaps", ["one", "many"])
def test_malloc_trim_on_heaps_that_are_watched_and_used(run: Run, heaps: str) -> None:
    assert run("heap.trimming", heaps) == {"lost": 0}


# Signals.


@pytest.mark.parametrize("where", ["c", "c_in_a_thread", "python"])
def test_a_signal_handler_changes_watched_memory(run: Run, where: str) -> None:
    facts = run(f"signals.handler_in_{where}")
    assert facts == {"interrupted": True, "handled": 2000, "generation": 2000}


# Children.


@pytest.mark.parametrize("how", ["fork", "subprocess", "posix_spawn"])
def test_a_storm_of_children_while_memory_changes(run: Run, how: str) -> None:
    assert run("forks.storm", how) == {"statuses": [0], "reported": REPORTED}


CHILDREN = ["fork", "behind the back"]


@pytest.mark.parametrize("how", CHILDREN)
def test_a_child_gets_errors_for_its_parents_notifier(run: Run, how: str) -> None:
    facts = run("forks.use_in_a_child", how)
    opened = facts.pop("opened")
    assert opened == "fine" if how == "fork" else opened != "fine"
    assert facts.pop("status") == 0
    assert facts.pop("reported") == REPORTED
    assert len(facts) == 9
    assert set(facts.values()) == {"ForkedError"}, facts


@pytest.mark.parametrize("how", CHILDREN)
def test_a_child_keeps_copies_of_what_its_parent_closes(run: Run, how: str) -> None:
    assert run("forks.copy_that_outlives_the_notifier", how) == {
        "copies": 1 if how == "behind the back" else 0,
        "reported": REPORTED,
        "ended": 0,
    }


def test_memory_changes_while_a_child_of_vfork_shares_it(run: Run) -> None:
    assert run("forks.vfork") == {"status": 0, "missed": 0}


# Closing.


def test_notifiers_are_closed_while_memory_changes(run: Run) -> None:
    assert run("closing.while_memory_changes") == {"watched": True}


def test_opening_and_closing_by_the_thousand_leaves_nothing_behind(run: Run) -> None:
    assert run("closing.by_the_thousand") == {"grown": False}


def test_notifiers_end_as_garbage_while_memory_changes(run: Run) -> None:
    # One for each.
    assert run("closing.in_a_cycle") == {"warnings": 50}


def test_finalizers_unregister_and_close_during_anything(run: Run) -> None:
    assert run("closing.in_finalizers") == {"left": 0}


# The end of the process, with events pending and threads that go on.


@pytest.mark.parametrize(
    ("how", "status", "last_words"),
    [
        ("return", 0, {"returned": True}),
        ("exec", 0, {"replaced": True}),
        ("sys.exit", 3, {}),
        ("os._exit", 4, {}),
        ("exit in a loop", 5, {}),
        ("exit in a child", 0, {"child": 6, "returned": True}),
        ("os.abort", -6, {}),
    ],
)
def test_the_process_ends_with_events_pending(
    run: Run, how: str, status: int, last_words: dict[str, bool]
) -> None:
    assert run("ends.end", how, status=status) == {"pending": True, **last_words}


def test_a_subinterpreter_is_refused(run: Run) -> None:
    facts = run("ends.subinterpreters")
    # From Python 3.12 on, an interpreter can refuse such extensions by itself.
    assert facts.pop("outcome") in {"SubinterpreterError", "ImportError"}
    assert facts == {"before": REPORTED, "after": REPORTED}


# Descriptors that somebody else closes.


def test_descriptors_are_closed_then_memory_changes(run: Run) -> None:
    assert run("descriptors.changing_memory") == {
        "reported": 10,
        "register": "DeviceError",
        "another": REPORTED,
    }


def test_descriptors_are_closed_then_memory_is_registered(run: Run) -> None:
    assert run("descriptors.registering") == {
        "register": "DeviceError",
        "another": REPORTED,
    }


def test_descriptors_are_closed_then_the_notifier(run: Run) -> None:
    assert run("descriptors.closing") == {"another": REPORTED}


def test_descriptors_are_closed_and_their_numbers_used_again(run: Run) -> None:
    assert run("descriptors.opening_others") == {
        "others untouched": True,
        "another": REPORTED,
    }


# Nobody reads.


def test_a_loop_is_blocked_during_100_000_changes(run: Run) -> None:
    assert run("load.blocked_loop") == {
        "files": 0,
        "grown": False,
        "events": [False, 100_000],
        "left": 0,
    }


def test_200_notifiers_fall_behind(run: Run) -> None:
    assert run("load.many_notifiers") == {"events": [[False, 1000]]}


def test_the_process_is_stopped_and_continued_while_memory_changes(run: Run) -> None:
    assert run("load.stopped") == {"reported": REPORTED}


# Without privileges.


def test_nobody_can_use_it(run: Run) -> None:
    facts = run("contract.in_short", nobody=True)
    knob = facts.pop("unprivileged_userfaultfd")
    message = f"vm.unprivileged_userfaultfd is {knob}"
    assert knob in {0, 1}, message
    assert facts == {
        "root": False,
        "privileged": False,
        "dropped": [REPORTED, False],
        "mapped over": [REPORTED, True],
        "unmapped": [REPORTED, True],
        "generation": 3,
        "changed": False,
    }, message


def test_nobody_trims_heaps(run: Run) -> None:
    assert run("heap.trimming", "many", nobody=True) == {"lost": 0}


def test_a_child_keeps_copies_of_what_nobody_closes(run: Run) -> None:
    facts = run("forks.copy_that_outlives_the_notifier", CHILDREN[1], nobody=True)
    assert facts == {"copies": 1, "reported": REPORTED, "ended": 0}
