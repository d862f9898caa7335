from __future__ import annotations

from pathlib import Path

import pytest

HERALD = """\
id: herald
at_most: {count: 1, per: 1h}
actions:
  - id: say
    kind: publish
    input: {subject: demo.hello, payload: {from: "${agent}"}}
  - id: slow
    kind: publish
    weight: 0
    effort: 10
    input: {subject: demo.slow, delay: 1500ms}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with one agent in agents/."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "herald.yaml").write_text(HERALD)
    return tmp_path
