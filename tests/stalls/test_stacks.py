"""Whose code is to blame, and what faulthandler writes."""

from __future__ import annotations

import faulthandler
import os
import sysconfig
import tempfile

from hypothesis import given
from hypothesis import strategies as st

from aither_sdk.stalls.stacks import (
    Frame,
    Territory,
    find_culprit,
    find_culprit_in_dump,
    heaviest,
    parse_dump,
    spell_stack,
    survey,
)

STDLIB = sysconfig.get_paths()["stdlib"]
USER = Frame("app.handler", "/srv/app/handler.py", 12)
SUBPROCESS = Frame("subprocess.run", f"{STDLIB}/subprocess.py", 500)
LIBRARY = Frame("requests.get", "/venv/lib/python3.11/site-packages/requests/api.py", 70)
SDK = Frame("sdk", str(survey().machinery[0]) + "tasks.py", 1)
TERRITORY = survey()


def test_the_innermost_user_frame_is_the_culprit() -> None:
    stack = (SDK, Frame("app.main", "/srv/app/main.py", 1), USER, LIBRARY, SUBPROCESS)
    assert find_culprit(stack, TERRITORY) == USER


def test_without_user_code_a_library_is_blamed_before_python_itself() -> None:
    assert find_culprit((SDK, LIBRARY, SUBPROCESS), TERRITORY) == LIBRARY
    assert find_culprit((SDK, SUBPROCESS), TERRITORY) == SUBPROCESS
    assert find_culprit((), TERRITORY) is None


def test_installed_code_may_be_called_ones_own() -> None:
    own = survey(user=["/venv/lib/python3.11/site-packages/requests/"])
    assert find_culprit((USER, LIBRARY, SUBPROCESS), own) == LIBRARY


def test_the_heaviest_function_wins_and_then_its_heaviest_line() -> None:
    other = Frame("app.other", "/srv/app/other.py", 3)
    later = Frame("app.handler", "/srv/app/handler.py", 13)
    assert heaviest([(USER, 10), (other, 15), (later, 20)]) == later
    assert heaviest([(USER, 10), (other, 10)]) == USER
    assert heaviest([]) is None


def test_what_faulthandler_writes_is_read_back() -> None:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=False)
        file.seek(0)
        stack = parse_dump(file.read().decode())
    assert stack[-1].function == "test_what_faulthandler_writes_is_read_back"
    assert os.path.samefile(stack[-1].file, __file__)
    assert stack[-1].line > 0
    assert len(stack) > 5


def test_of_several_threads_the_first_stack_is_read() -> None:
    text = 'Current thread 0x1 (most recent call first):\n  File "a.py", line 1 in f\n'
    assert parse_dump(text + text.replace("a.py", "b.py")) == (Frame("f", "a.py", 1),)


NAMES = st.text("abcdé/_.", min_size=1, max_size=20)
FRAMES = st.builds(Frame, NAMES, NAMES, st.integers(1, 10**6))


@given(st.lists(FRAMES, min_size=1, max_size=30), st.integers(0, 3_000))
def test_a_dump_that_is_cut_off_is_read_as_far_as_it_goes(frames: list[Frame], at: int) -> None:
    lines = [f'  File "{one.file}", line {one.line} in {one.function}' for one in frames]
    whole = "Current thread 0x1 (most recent call first):\n" + "\n".join(lines)
    assert parse_dump(whole) == tuple(reversed(frames))
    cut = parse_dump(whole[:at])
    assert len(cut) <= len(frames)
    assert cut[1:] == tuple(reversed(frames))[len(frames) - len(cut) + 1 :]


def test_who_runs_the_loop_is_blamed_for_nothing_that_runs_in_it() -> None:
    runs = Frame("<module>", "/srv/app/main.py", 21)
    once = Frame("_run_once", "/usr/lib/python3.11/asyncio/base_events.py", 1898)
    run = Frame("_run", "/usr/lib/python3.11/asyncio/events.py", 80)
    machinery = Frame("select", "/usr/lib/python3.11/selectors.py", 468)
    handler = Frame("handler", "/srv/app/handlers.py", 3)
    of = Territory(user=(), library=(), machinery=("/usr/lib/python3.11/",))
    assert find_culprit_in_dump((runs, once, machinery), of) is None
    assert find_culprit_in_dump((runs, once, handler, machinery), of) == handler
    assert find_culprit_in_dump((runs, once, run, machinery), of) == machinery
    assert find_culprit_in_dump((runs, once, run, handler, machinery), of) == handler
    assert find_culprit_in_dump((runs, machinery), of) == runs


def test_a_stack_is_spelled_as_python_does() -> None:
    assert spell_stack((USER,)) == (
        'Traceback (most recent call last):\n  File "/srv/app/handler.py", line 12, in app.handler'
    )
