"""The fleet file: YAML to targets, every mistake told at once with file, line, key and remedy.

The keys are the fields of `aither.pulse.v1.Target`, read by its descriptor; a check is written
flat, `check: {kind: http, url: ...}`, and spans as text (`grace_duration` is called `grace`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from aither.pulse.v1.target_pb2 import Check, Target
from aither_sdk.errors import ConfigError, Fault
from aither_sdk.fault_words import no_such_key, shown
from aither_sdk.spans import parse_span
from aither_sdk.yaml_file import YamlFile, load_yaml
from pulse_svc.fleet import Key, Violation, filled, fleet_violations, kinds, target_violations
from pulse_svc.spans import duration_of

_MAX_FAULTS = 100
"""Told of one file: whoever wrote more of them has another problem than the hundred-and-first."""
_SPAN = Duration.DESCRIPTOR.full_name
_ZERO_MEANS_UNSET = ("rise", "fall")
_INTEGERS = {
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1, "a whole number, 0 or more"),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1, "a whole number"),
}


def load_fleet(path: Path) -> tuple[Target, ...]:
    """The targets of a file, defaults filled in, in its order. Blocking file I/O.

    Raises ConfigError with every fault of the file.
    """
    return read_fleet(load_yaml(path))


def read_fleet(file: YamlFile) -> tuple[Target, ...]:
    """As `load_fleet`, of a parsed file."""
    faults: list[Fault] = []
    items = _items(file, faults)
    targets = [_TargetReader(file, ("targets", i), item) for i, item in enumerate(items)]
    for reader in targets:
        faults += reader.faults
    for i, violation in fleet_violations([reader.target for reader in targets]):
        faults += targets[i].faults_of([violation])
    if faults:
        faults.sort(key=lambda fault: fault.line or 0)
        raise ConfigError(faults[:_MAX_FAULTS])
    return tuple(filled(reader.target) for reader in targets)


def _items(file: YamlFile, faults: list[Fault]) -> list[Any]:
    if file.data is None:
        faults.append(file.fault((), "empty; begin with `targets:` and one `- name: ...` or more"))
        return []
    if not isinstance(file.data, dict):
        faults.append(file.fault((), f"{shown(file.data)} is no mapping; begin with `targets:`"))
        return []
    unknown = (key for key in file.data if key != "targets")
    faults += [file.fault((str(key),), no_such_key(key, ("targets",))) for key in unknown]
    items = file.data.get("targets")
    if not isinstance(items, list):
        what = "missing" if "targets" not in file.data else f"{shown(items)} is not a list"
        faults.append(file.fault(("targets",), f"{what}; write one `- name: ...` or more"))
        return []
    return items


class _TargetReader:
    """One item of the list: its target as far as it can be read, and its faults."""

    def __init__(self, file: YamlFile, at: Key, item: Any) -> None:
        self.target = Target()
        self.faults: list[Fault] = []
        self._file = file
        self._at = at
        self._faulted: set[Key] = set()
        if isinstance(item, dict):
            self._read(self.target, item, ())
            self.faults += self.faults_of(target_violations(self.target))
        else:
            self._fault((), f"{shown(item)} is not a mapping; write `key: value` lines")

    def faults_of(self, violations: Collection[Violation]) -> list[Fault]:
        """Violations as faults of the file; what follows from a fault told already is left out."""
        told = []
        for violation in violations:
            key = _file_key(violation.key)
            if not any(key[: len(k)] == k or k[: len(key)] == key for k in self._faulted):
                told.append(self._file.fault((*self._at, *key), violation.message))
        return told

    def _fault(self, key: Key, message: str) -> None:
        self._faulted.add(key)
        self.faults.append(self._file.fault((*self._at, *key), message))

    def _read(self, into: Message, item: Mapping[Any, Any], at: Key, kind: str = "") -> None:
        """Fills a message from a mapping. `kind` is the key that chose it, already read."""
        fields = _fields(into.DESCRIPTOR)
        for key, value in item.items():
            if kind and key == "kind":
                continue
            if key not in fields:
                known = [*(["kind"] if kind else []), *fields]
                self._fault((*at, str(key)), no_such_key(key, known))
            elif value is not None:
                self._read_field(into, fields[key], value, (*at, key))

    def _read_field(self, into: Message, field: FieldDescriptor, value: Any, at: Key) -> None:
        oneof = field.containing_oneof
        if oneof is not None and (other := into.WhichOneof(oneof.name)) is not None:
            self._fault(at, f"there is `{other}` already; give one of the two")
        elif field.message_type is None and field.is_repeated:
            self._read_list(getattr(into, field.name), field, value, at)
        elif field.message_type is None:
            if self._is_good(field, value, at):
                setattr(into, field.name, value)
        elif field.message_type.GetOptions().map_entry:
            self._read_labels(getattr(into, field.name), value, at)
        elif field.message_type.full_name == _SPAN:
            self._read_span(getattr(into, field.name), value, at)
        else:
            self._read_check(getattr(into, field.name), value, at)

    def _read_check(self, into: Check, value: Any, at: Key) -> None:
        if not isinstance(value, dict):
            self._fault(at, f"{shown(value)} is not a mapping; write {{kind: tcp, address: ...}}")
            return
        kind = value.get("kind")
        if kind not in kinds():
            given = "missing" if kind is None else f"{shown(kind)} is not a kind of check"
            key = at if "kind" not in value else (*at, "kind")
            self._fault(key, f"{given}; use one of {', '.join(kinds())}")
            return
        check = getattr(into, kind)
        check.SetInParent()
        self._read(check, value, at, kind=kind)

    def _read_list(self, into: Any, field: FieldDescriptor, value: Any, at: Key) -> None:
        if not isinstance(value, list):
            self._fault(at, f"{shown(value)} is not a list; put it in [ ]")
            return
        good = [self._is_good(field, item, (*at, i)) for i, item in enumerate(value)]
        if all(good):
            into.extend(value)

    def _read_labels(self, into: Any, value: Any, at: Key) -> None:
        if not isinstance(value, dict):
            self._fault(at, f"{shown(value)} is not a mapping; write `key: value` lines")
            return
        for key, text in value.items():
            if _is_text(key) and _is_text(text):
                into[key] = text
            else:
                told = f"{shown(text)} is not text; put key and value in quotes"
                self._fault((*at, str(key)), told)

    def _read_span(self, into: Duration, value: Any, at: Key) -> None:
        span = parse_span(value) if isinstance(value, str) else None
        if span is None:
            told = f"{shown(value)} is not a span of time; write it like 800ms, 1s, 1.5s, 2m"
            self._fault(at, told)
            return
        into.CopyFrom(duration_of(span))

    def _is_good(self, field: FieldDescriptor, value: Any, at: Key) -> bool:
        """Whether the value has the type of the field; a fault where not."""
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            if _is_text(value):
                return True
            self._fault(at, f"{shown(value)} is not text; put it in quotes")
            return False
        least, most, good = _INTEGERS[field.cpp_type]
        if field.name in _ZERO_MEANS_UNSET:
            least, good = 1, "a whole number, 1 or more"
        if type(value) is int and least <= value <= most:
            return True
        self._fault(at, f"{shown(value)} is not {good}")
        return False


def _fields(descriptor: Any) -> dict[Any, FieldDescriptor]:
    return {_file_name(field.name): field for field in descriptor.fields}


def _file_name(field: str) -> str:
    return field.removesuffix("_duration")


def _file_key(key: Key) -> Key:
    """Where a field of the proto stands in the file: there a check has no level for its kind."""
    if len(key) > 1 and key[0] == "check":
        key = (key[0], *key[2:])
    return tuple(_file_name(part) if isinstance(part, str) else part for part in key)


def _is_text(value: Any) -> bool:
    """Whether protobuf can carry it: YAML can spell half a surrogate pair, UTF-8 cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
