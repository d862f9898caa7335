"""Who gives a name or takes it away: one at a time for each; nobody waits for another name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Naming:
    """A lock for each name that somebody holds or waits for, and none for any other."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        """With how many hold it or wait."""

    @asynccontextmanager
    async def held(self, name: str) -> AsyncIterator[None]:
        lock, holders = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = lock, holders + 1
        try:
            async with lock:
                yield
        finally:
            lock, holders = self._locks.pop(name)
            if holders > 1:
                self._locks[name] = lock, holders - 1
