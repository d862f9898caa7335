"""What a target must be like, said once for the fleet file and for RegisterTarget.

`target_violations` judges one target by itself, `fleet_violations` a set of them together; `filled`
writes the defaults in. Nothing here raises or waits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from aither.pulse.v1.target_pb2 import (
    Check,
    GrpcCheck,
    HeartbeatCheck,
    HttpCheck,
    ProcessCheck,
    Target,
    TcpCheck,
)
from aither_sdk.addresses import split_address
from aither_sdk.errors import InvalidArgument
from aither_sdk.spans import DAY, HOUR, MS, SECOND, spell_span
from pulse_svc.spans import duration_of, to_ns

MAX_TARGETS = 1_000
"""In the whole fleet. At one check a second each that is about what one loop can ask."""
MAX_MESSAGE_BYTES = 512
"""Of a check result or a Beat."""

_MIN_INTERVAL, _MAX_INTERVAL = 100 * MS, HOUR
_MIN_TIMEOUT = 10 * MS
_MIN_GRACE, _MAX_GRACE = 100 * MS, DAY
_DEFAULT_INTERVAL = SECOND
_MAX_DEFAULT_TIMEOUT = 10 * SECOND
_DEFAULT_THRESHOLD = 2
_MAX_THRESHOLD = 100
_MAX_LAYER = 9
_MAX_DEPENDENCIES = 64
_MAX_LABELS, _MAX_LABEL_KEY_BYTES, _MAX_LABEL_BYTES = 32, 63, 255
_MAX_TEXT_BYTES = 2_048
_MAX_STATUSES = 64
_MAX_TARGET_BYTES = 4_096
_MOST_LOOKED_AT_BYTES = 16 * _MAX_TARGET_BYTES
"""Of one that is larger nothing else is told: a request has room for millions of wrong statuses."""
"""Encoded; so that a list of the whole fleet fits into one message."""
_MAX_CIRCLES_TOLD = 100
"""Looking for the way round costs time; nobody reads more."""
_NAME = re.compile(r"[a-z0-9-]{1,63}")

Key = tuple[str | int, ...]
"""Path of a field inside a Target, by the names of the proto: `("check", "http", "url")`."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that is wrong, and what would be right."""

    key: Key
    message: str


def kinds() -> tuple[str, ...]:
    """The kinds of check, in the order of the proto."""
    return tuple(field.name for field in Check.DESCRIPTOR.oneofs_by_name["kind"].fields)


def filled(target: Target) -> Target:
    """A copy with every default written in. The target must be free of violations."""
    full = Target()
    full.CopyFrom(target)
    if not full.HasField("interval"):
        full.interval.CopyFrom(duration_of(_DEFAULT_INTERVAL))
    interval = to_ns(full.interval)
    if not full.HasField("timeout"):
        full.timeout.CopyFrom(duration_of(min(interval * 4 // 5, _MAX_DEFAULT_TIMEOUT)))
    full.rise = full.rise or _DEFAULT_THRESHOLD
    full.fall = full.fall or _DEFAULT_THRESHOLD
    kind = full.check.WhichOneof("kind")
    if kind == "http":
        full.check.http.method = full.check.http.method or "GET"
        if not full.check.http.expect_status:
            full.check.http.expect_status.append(200)
    elif kind == "heartbeat" and not full.check.heartbeat.HasField("grace_duration"):
        full.check.heartbeat.grace_duration.CopyFrom(duration_of(2 * interval))
    return full


def target_violations(target: Target) -> list[Violation]:
    """Everything that is wrong with a target by itself."""
    if target.ByteSize() > _MOST_LOOKED_AT_BYTES:
        return [Violation((), _too_large(target))]
    found = [*_own(target), *_check(target.check), *_texts(target)]
    if not found and target.ByteSize() > _MAX_TARGET_BYTES:
        found.append(Violation((), _too_large(target)))
    return found


def _too_large(target: Target) -> str:
    return f"{target.ByteSize()} bytes; a target has {_MAX_TARGET_BYTES} at most"


def fleet_violations(targets: Sequence[Target]) -> list[tuple[int, Violation]]:
    """What is wrong with targets together, each with the index of the target: names that stand
    twice, dependencies on nobody, dependencies that go in a circle, too many."""
    found: list[tuple[int, Violation]] = []
    if len(targets) > MAX_TARGETS:
        told = f"{len(targets)} targets; a fleet has {MAX_TARGETS} at most"
        found.append((MAX_TARGETS, Violation((), told)))
    first: dict[str, int] = {}
    for i, target in enumerate(targets):
        if target.name and first.setdefault(target.name, i) != i:
            told = f'"{target.name}" is the name of targets[{first[target.name]}], too; rename one'
            found.append((i, Violation(("name",), told)))
    dependencies = {t.name: tuple(t.depends_on) for t in targets}
    entangled = _entangled(dependencies)
    for i, target in enumerate(targets):
        found += [(i, violation) for violation in _unknown(target, dependencies)]
        if target.name in entangled and len(found) < _MAX_CIRCLES_TOLD:
            found += [(i, violation) for violation in _circles(target, dependencies)]
    return found


def dependency_violations(
    target: Target, dependencies: Mapping[str, Sequence[str]]
) -> list[Violation]:
    """What is wrong with `depends_on` of one target that joins a fleet with these dependencies."""
    joined = {**dependencies, target.name: tuple(target.depends_on)}
    return [*_unknown(target, joined), *_circles(target, joined)]


def _unknown(target: Target, dependencies: Mapping[str, Sequence[str]]) -> Iterator[Violation]:
    for i, name in enumerate(target.depends_on):
        if name not in dependencies:
            told = f'"{_short(name)}" is no target of this fleet; name one that is'
            yield Violation(("depends_on", i), told)


def _circles(target: Target, dependencies: Mapping[str, Sequence[str]]) -> Iterator[Violation]:
    circle = _circle(target.name, dependencies)
    if circle:
        way = " -> ".join(circle if len(circle) <= 8 else [*circle[:6], "...", circle[-1]])
        key = ("depends_on", list(target.depends_on).index(circle[1]))
        yield Violation(key, f"goes in a circle: {way}; leave one of these out")


def _circle(start: str, dependencies: Mapping[str, Sequence[str]]) -> list[str]:
    """The shortest way along dependencies from `start` back to itself, or nothing."""
    came_from: dict[str, str] = {}
    frontier = [start]
    while frontier and start not in came_from:
        reached = []
        for name in frontier:
            for further in dependencies.get(name, ()):
                if further not in came_from:
                    came_from[further] = name
                    reached.append(further)
        frontier = reached
    if start not in came_from:
        return []
    way = [start, came_from[start]]
    while way[-1] != start:
        way.append(came_from[way[-1]])
    return way[::-1]


def _entangled(dependencies: Mapping[str, Sequence[str]]) -> set[str]:
    """Names that are left when all that depend on nobody (left) are taken away, again and again:
    the circles and what hangs on them."""
    dependents: dict[str, list[str]] = {}
    needs: dict[str, int] = {}
    for name, wanted in dependencies.items():
        known = [other for other in wanted if other in dependencies]
        needs[name] = len(known)
        for other in known:
            dependents.setdefault(other, []).append(name)
    free = [name for name, n in needs.items() if n == 0]
    while free:
        for name in dependents.get(free.pop(), ()):
            needs[name] -= 1
            if needs[name] == 0:
                free.append(name)
    return {name for name, n in needs.items() if n > 0}


def _own(target: Target) -> Iterator[Violation]:
    if not _NAME.fullmatch(target.name):
        yield Violation(("name",), _wrong(target.name, "a name: 1..63 of a-z 0-9 and -"))
    if target.layer > _MAX_LAYER:
        yield Violation(("layer",), f"{target.layer} is not a layer; use 0..{_MAX_LAYER}")
    interval = to_ns(target.interval) if target.HasField("interval") else _DEFAULT_INTERVAL
    interval_is_good = _MIN_INTERVAL <= interval <= _MAX_INTERVAL
    if not interval_is_good:
        yield Violation(("interval",), _out_of(interval, _MIN_INTERVAL, _MAX_INTERVAL))
    if target.HasField("timeout"):
        timeout = to_ns(target.timeout)
        if timeout < _MIN_TIMEOUT or (interval_is_good and timeout > interval):
            told = f"{spell_span(timeout)}; must be {spell_span(_MIN_TIMEOUT)} up to the interval"
            yield Violation(("timeout",), f"{told}, {spell_span(interval)}")
    for key, value in (("rise", target.rise), ("fall", target.fall)):
        if value > _MAX_THRESHOLD:
            yield Violation((key,), f"{value}; must be 1..{_MAX_THRESHOLD} results in a row")
    yield from _depends_on(target)


def _depends_on(target: Target) -> Iterator[Violation]:
    if len(target.depends_on) > _MAX_DEPENDENCIES:
        told = f"{len(target.depends_on)} names; {_MAX_DEPENDENCIES} at most"
        yield Violation(("depends_on",), told)
    seen: set[str] = set()
    for i, name in enumerate(target.depends_on):
        if name in seen:
            yield Violation(("depends_on", i), f'"{_short(name)}" stands here twice; keep one')
        seen.add(name)


def _texts(target: Target) -> Iterator[Violation]:
    if len(target.labels) > _MAX_LABELS:
        yield Violation(("labels",), f"{len(target.labels)} labels; {_MAX_LABELS} at most")
    for key, value in sorted(target.labels.items())[:_MAX_LABELS]:
        if not 1 <= len(key.encode()) <= _MAX_LABEL_KEY_BYTES:
            told = f'"{_short(key)}" is not a label; use 1..{_MAX_LABEL_KEY_BYTES} bytes'
            yield Violation(("labels",), told)
        elif len(value.encode()) > _MAX_LABEL_BYTES:
            told = f"{len(value.encode())} bytes; {_MAX_LABEL_BYTES} at most"
            yield Violation(("labels", key), told)


def _check(check: Check) -> Iterator[Violation]:
    kind = check.WhichOneof("kind")
    if kind is None:
        yield Violation(("check",), f"missing; use one of {', '.join(kinds())}")
        return
    judged: Iterable[Violation]
    match kind:
        case "grpc":
            judged = _grpc(check.grpc)
        case "http":
            judged = _http(check.http)
        case "tcp":
            judged = _tcp(check.tcp)
        case "process":
            judged = _process(check.process)
        case "heartbeat":
            judged = _heartbeat(check.heartbeat)
    for violation in judged:
        yield Violation(("check", kind, *violation.key), violation.message)


def _grpc(check: GrpcCheck) -> Iterator[Violation]:
    yield from _address(check.address)
    if len(check.service.encode()) > 255:
        yield Violation(("service",), f"{len(check.service.encode())} bytes; 255 at most")


def _tcp(check: TcpCheck) -> Iterator[Violation]:
    yield from _address(check.address)


def _address(address: str) -> Iterator[Violation]:
    if not address:
        yield Violation(("address",), 'missing; use something like "127.0.0.1:7401"')
        return
    try:
        host, _ = split_address(address)
    except InvalidArgument as error:
        yield Violation(("address",), error.violations[0].description)
        return
    if len(address) > 261 or not host.isprintable() or any(c in host for c in " /\\\"'@?#"):
        yield Violation(("address",), _wrong(address, 'host:port, such as "127.0.0.1:7401"'))


def _http(check: HttpCheck) -> Iterator[Violation]:
    if not check.url:
        yield Violation(("url",), 'missing; use something like "http://127.0.0.1:8080/health"')
    elif not _is_http_url(check.url):
        good = 'an http:// or https:// URL, such as "http://127.0.0.1:8080/health"'
        yield Violation(("url",), _wrong(check.url, good))
    if len(check.expect_status) > _MAX_STATUSES:
        told = f"{len(check.expect_status)} statuses; {_MAX_STATUSES} at most"
        yield Violation(("expect_status",), told)
    for i, status in enumerate(check.expect_status):
        if not 100 <= status <= 599:
            told = f"{status} is not an HTTP status; use 100..599"
            yield Violation(("expect_status", i), told)
    if check.method not in ("", "GET", "HEAD"):
        yield Violation(("method",), _wrong(check.method, "a method of a check; use GET or HEAD"))


def _is_http_url(url: str) -> bool:
    if len(url.encode()) > _MAX_TEXT_BYTES or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _process(check: ProcessCheck) -> Iterator[Violation]:
    selector = check.WhichOneof("selector")
    if selector is None:
        yield Violation((), "missing; name the process by one of pid_file, pid, command")
    elif selector == "pid":
        if not 0 < check.pid < 2**31:
            yield Violation(("pid",), f"{check.pid} is not a process id; use 1 and up")
        return
    else:
        text = check.pid_file if selector == "pid_file" else check.command
        if not text.strip():
            yield Violation((selector,), "empty; say which process")
        elif len(text.encode()) > _MAX_TEXT_BYTES or "\0" in text:
            told = f"{len(text.encode())} bytes; use text of {_MAX_TEXT_BYTES} at most"
            yield Violation((selector,), told)


def _heartbeat(check: HeartbeatCheck) -> Iterator[Violation]:
    if check.HasField("grace_duration"):
        grace = to_ns(check.grace_duration)
        if not _MIN_GRACE <= grace <= _MAX_GRACE:
            yield Violation(("grace_duration",), _out_of(grace, _MIN_GRACE, _MAX_GRACE))


def _out_of(span_ns: int, least: int, most: int) -> str:
    return f"{spell_span(span_ns)}; must be {spell_span(least)}..{spell_span(most)}"


def _wrong(text: str, good: str) -> str:
    return f'"{_short(text)}" is not {good}' if text else f"missing; give {good}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
