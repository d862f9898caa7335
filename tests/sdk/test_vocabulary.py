from __future__ import annotations

import re
from pathlib import Path

from aither_sdk.vocabulary import register_types

PROTO = Path(__file__).parents[2] / "proto"


def test_every_message_of_every_proto_is_registered() -> None:
    known = set(register_types())
    files = list(PROTO.rglob("*.proto"))
    assert files
    for file in files:
        text = file.read_text()
        package = re.search(r"^package (.+);", text, re.MULTILINE)
        assert package is not None
        for name in re.findall(r"^message (\w+)", text, re.MULTILINE):
            assert f"{package[1]}.{name}" in known
