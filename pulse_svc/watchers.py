"""Those who follow the fleet with WatchTargets.

A watcher holds names, not messages: which targets it has not been told of yet. So its memory is
bounded by the fleet, it always gets the newest state, and one that never reads delays nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from aither_sdk.errors import ResourceExhausted, Unavailable

MAX_WATCHERS = 1_000
"""Each costs a stream and, at the worst, the names of the fleet."""


class Watcher:
    """One of them. `Watchers` fills it, its stream empties it."""

    def __init__(self, names: Collection[str]) -> None:
        self._only = frozenset(names)
        self._news: dict[str, None] = {}
        self._left_out = 0
        self._arrived = asyncio.Event()
        self._closed = False

    def wants(self, name: str) -> bool:
        return not self._only or name in self._only

    def changed(self, name: str) -> None:
        """There is something new of this target; never waits."""
        if not self.wants(name):
            return
        if name in self._news:
            self._left_out += 1
        self._news[name] = None
        self._arrived.set()

    def told(self, name: str) -> None:
        """Its newest state is on the way to the watcher: what came before is no news any more."""
        self._news.pop(name, None)

    async def next(self) -> tuple[str, int]:
        """The name of a target that changed, oldest change first, and how many changes were left
        out since the call before. Waits. Raises Unavailable when Pulse drains."""
        while not self._news:
            if self._closed:
                raise Unavailable("Pulse is stopping; watch again in a moment", retry_after_s=1.0)
            self._arrived.clear()
            await self._arrived.wait()
        name = next(iter(self._news))
        del self._news[name]
        left_out, self._left_out = self._left_out, 0
        return name, left_out

    def close(self) -> None:
        self._closed = True
        self._news.clear()
        self._arrived.set()


class Watchers:
    """All of them."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._watchers)

    def join(self, names: Collection[str]) -> Watcher:
        """A watcher of these names, or of all. Raises ResourceExhausted when there are too many."""
        if len(self._watchers) >= MAX_WATCHERS:
            raise ResourceExhausted(
                f"{MAX_WATCHERS} watchers are here already; end one", reason="TOO_MANY_WATCHERS"
            )
        watcher = Watcher(names)
        self._watchers.add(watcher)
        if self._closed:
            watcher.close()
        return watcher

    def leave(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)

    def changed(self, name: str) -> None:
        for watcher in self._watchers:
            watcher.changed(name)

    def close(self) -> None:
        """Ends every watch, so that a drain does not wait for those who follow for ever."""
        self._closed = True
        for watcher in self._watchers:
            watcher.close()
