"""YAML with positions: every value knows its line, so that faults can name file, line and key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aither_sdk.errors import ConfigError, Fault

_MAX_BYTES = 4 * 2**20
"""A configuration larger than this is a mistake, and would stall whoever parses it."""
_MAX_VALUES = 200_000


@dataclass(frozen=True, slots=True)
class YamlFile:
    """One parsed document: plain Python data beside the line of every key and item."""

    path: Path
    data: Any
    lines: dict[tuple[str | int, ...], int]

    def line(self, key: Sequence[str | int]) -> int | None:
        """Line of the key path, or of its nearest parent that stands in the file."""
        at = tuple(key)
        while at and at not in self.lines:
            at = at[:-1]
        return self.lines.get(at)

    def fault(self, key: Sequence[str | int], message: str) -> Fault:
        """A fault at the key path, e.g. `("targets", 2, "check", "kind")`."""
        return Fault(str(self.path), self.line(key), dotted(key), message)


def dotted(key: Sequence[str | int]) -> str:
    """`("targets", 2, "name")` as people write it: `targets[2].name`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def load_yaml(path: Path) -> YamlFile:
    """Reads one document. Blocking file I/O.

    Raises ConfigError when the file cannot be read, is not UTF-8 or not YAML, or holds the same key
    twice; an empty file is the value None.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        told = f"cannot be read: {error.strerror}; name a readable file"
        raise ConfigError([Fault(str(path), None, "", told)]) from error
    return parse_yaml(path, raw)


def parse_yaml(path: Path, raw: bytes) -> YamlFile:
    """As `load_yaml`, over bytes that were read already; `path` is for messages."""
    if len(raw) > _MAX_BYTES:
        told = f"{len(raw)} bytes; a configuration has {_MAX_BYTES} at most"
        raise ConfigError([Fault(str(path), None, "", told)])
    lines: dict[tuple[str | int, ...], int] = {}
    faults: list[Fault] = []
    try:
        node = yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
        _index(node, (), lines, faults, path, set())
        data = None if node is None or faults else yaml.safe_load(raw)
    except UnicodeDecodeError as error:
        told = f"not UTF-8 at byte {error.start}; save the file as UTF-8"
        raise ConfigError([Fault(str(path), None, "", told)]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        told = f"not YAML: {error.problem or error.context}; mind indentation and quotes"
        raise ConfigError([Fault(str(path), line, "", told)]) from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        told = f"not YAML: {' '.join(str(error).split()) or type(error).__name__}"
        raise ConfigError([Fault(str(path), None, "", told)]) from error
    if faults:
        raise ConfigError(faults)
    return YamlFile(path, data, lines)


def _index(
    node: yaml.Node | None,
    at: tuple[str | int, ...],
    lines: dict[tuple[str | int, ...], int],
    faults: list[Fault],
    path: Path,
    parents: set[int],
) -> None:
    """Fills `lines`; a key that stands twice is a fault, for YAML would silently keep the last."""
    if node is None:
        return
    lines.setdefault(at, node.start_mark.line + 1)
    if len(lines) > _MAX_VALUES:
        # Aliases of aliases unfold to more than any memory holds.
        raise ValueError(f"more than {_MAX_VALUES} values, aliases unfolded; write fewer")
    if id(node) in parents:
        faults.append(Fault(str(path), lines[at], dotted(at), "contains itself; remove the alias"))
        return
    parents = parents | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                told = f'"{key}" stands here a second time (first: line {seen[key]}); keep one'
                faults.append(Fault(str(path), line, dotted((*at, key)), told))
            seen.setdefault(key, line)
            lines[(*at, key)] = line
            _index(value_node, (*at, key), lines, faults, path, parents)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*at, i)] = item.start_mark.line + 1
            _index(item, (*at, i), lines, faults, path, parents)
