"""A log's libraries are loaded where the loop does not wait for them."""

from __future__ import annotations

import threading
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import flux_svc.logs
from aither_sdk.settings import FluxSettings
from flux_svc.logs import open_log


async def test_a_logs_libraries_are_imported_off_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: list[tuple[str, int]] = []

    def noting(name: str) -> ModuleType:
        imported.append((name, threading.get_ident()))
        return import_module(name)

    monkeypatch.setattr(flux_svc.logs, "import_module", noting)
    async with open_log(FluxSettings(log="sqlite"), tmp_path):
        pass
    [(name, thread)] = imported
    assert name == "flux_svc.logs.sqlite.log"
    assert thread != threading.get_ident()
