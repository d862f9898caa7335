"""One connection to NATS, from its making to its loss.

A connection that is lost is not mended: another one follows it. So nothing that was sent on the old
one can arrive behind what is sent on the next, and what is not answered yet fails at once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg as Message
from nats.aio.subscription import Subscription

from aither_sdk.backoff import FullJitter
from aither_sdk.errors import Unavailable
from flux_svc.logs.jetstream.faults import StreamRefused, unanswered, unreachable

logger = structlog.get_logger()

__all__ = ["ANSWER_S", "Dialler", "Headers", "Message", "Wire", "settle"]

Headers = dict[str, str]

CONNECT_S = 2
PING_S = 1
PINGS = 2
"""A server that does not answer so many pings is gone: a partition is seen in about 3 s."""
ANSWER_S = 5.0
"""How long an answer may take before the connection is given up; a stream without a leader has one
again within that time."""
_INBOX_BYTES = 256 * 2**20
"""Answers that wait for the loop. JetStream's flow control and the bounds of reads and appends keep
far below it; what came beyond would be dropped and asked for again."""
_STATUS, _END, _NOTHING, _NO_RESPONDERS = "Status", "204", "404", "503"


class _Client(Client):
    """The library looks at every character of every header's name: 13 us a message, the largest
    part of hearing one. Should it call this by another name one day, only the speed is lost."""

    @staticmethod
    def _parse_header_lines(raw: bytes) -> Headers:
        """`Name: value` on each line; about 2 us."""
        found: Headers = {}
        for line in raw.decode("utf-8", "replace").split("\r\n"):
            name, colon, value = line.partition(":")
            if colon:
                found[name.strip()] = value.strip()
        return found


class Wire:
    """Answers are told apart by the last token of the inbox that they are sent to."""

    def __init__(self, client: Client, url: str) -> None:
        self.url = url
        """As it may be told to everybody."""
        self.lost = asyncio.Event()
        """Set once, when the connection is gone or was given up."""
        self._client = client
        self._inbox = client.new_inbox()
        self._tokens = itertools.count()
        self._waiting: dict[str, tuple[Callable[[Message], None], asyncio.Future[Any]]] = {}
        """Token -> who takes the answers, and what fails when the connection is lost."""

    @classmethod
    async def dial(cls, url: str, *, name: str, credentials: Path | None = None) -> Self:
        """Raises Unavailable LOG_UNREACHABLE."""
        wire: list[Self] = []

        async def gone() -> None:
            for one in wire:
                one._fail()

        async def leaving() -> None:
            for one in wire:
                one.give_up("the server is about to stop")

        errors: list[Exception] = []

        async def told(error: Exception) -> None:
            logger.debug("nats.error", url=without_secrets(url), error=str(error))
            errors[:] = [error]

        client = _Client()
        try:
            await client.connect(
                url,
                name=name,
                allow_reconnect=False,
                skip_subject_validation=True,  # Flux has validated them
                max_reconnect_attempts=1,  # without a bound the library tries for minutes
                reconnect_time_wait=0,
                connect_timeout=CONNECT_S,
                ping_interval=PING_S,
                max_outstanding_pings=PINGS,
                flush_timeout=ANSWER_S,  # of a socket that takes no more; unset: for ever
                disconnected_cb=gone,
                closed_cb=gone,
                error_cb=told,
                lame_duck_mode_cb=leaving,
                user_credentials=None if credentials is None else str(credentials),
            )
            made = cls(client, without_secrets(url))
            wire.append(made)
            await client.subscribe(
                f"{made._inbox}.*", cb=made._route, pending_bytes_limit=_INBOX_BYTES
            )
        except (OSError, TimeoutError, nats.errors.Error) as error:
            await _close(client)
            why = errors[0] if errors else error
            raise unreachable(without_secrets(url), str(why) or type(why).__name__) from error
        except BaseException:
            await _close(client)
            raise
        return made

    @property
    def max_payload(self) -> int:
        """Bytes of headers and body that the server takes in one message."""
        return self._client.max_payload

    @property
    def server_version(self) -> tuple[int, int, int]:
        """Of the server at the other end; others of its cluster may have another. Zeros: it does
        not say, or not in three numbers."""
        told = self._client.connected_server_version
        try:
            return told.major, told.minor, told.patch
        except ValueError:
            return 0, 0, 0

    @contextmanager
    def answers(self, take: Callable[[Message], None], done: asyncio.Future[Any]) -> Iterator[str]:
        """An inbox, for the time of the block, whose messages go to `take`; `done` fails when the
        connection is lost."""
        if self.lost.is_set():
            raise unreachable(self.url, "the connection is lost")
        token = str(next(self._tokens))
        self._waiting[token] = take, done
        try:
            yield f"{self._inbox}.{token}"
        finally:
            del self._waiting[token]
            if done.done() and not done.cancelled():
                done.exception()  # taken note of, where the block ended before it asked

    async def send(
        self, subject: str, body: bytes = b"", headers: Headers | None = None, reply: str = ""
    ) -> None:
        """Keeps the order of calls. Waits only where the socket takes no more."""
        if self.lost.is_set():
            raise unreachable(self.url, "the connection is lost")
        try:
            await self._client.publish(subject, body, reply=reply, headers=headers)
        except (OSError, TimeoutError, nats.errors.Error) as error:
            self._fail()
            raise unreachable(self.url, str(error)) from error

    async def post(self, subject: str, body: bytes, headers: Headers) -> dict[str, Any]:
        """Sends a message to the stream; its acknowledgement. Raises as `answer`."""
        done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        with self.answers(lambda message: settle(done, message), done) as reply:
            await self.send(subject, body, headers, reply)
            return await self.answer(done)

    async def ask(self, verb: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """A question to JetStream's API, such as `STREAM.INFO.<name>`. Raises as `answer`."""
        done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        with self.answers(lambda message: settle(done, message), done) as reply:
            await self.send(f"$JS.API.{verb}", json.dumps(request).encode(), None, reply)
            return await self.answer(done)

    async def answer(
        self,
        done: asyncio.Future[dict[str, Any]],
        alive: Callable[[], Awaitable[object]] | None = None,
    ) -> dict[str, Any]:
        """Raises StreamRefused (what the server said) or Unavailable LOG_UNREACHABLE. Where nothing
        but the question `alive` is answered, the connection stays and the fault is LOG_IO_ERROR: a
        server that cannot write says nothing."""
        answer: dict[str, Any] = await self._in_time(done, alive)
        if "error" in answer:
            error = answer["error"]
            raise StreamRefused(error.get("err_code", 0), error.get("description", ""))
        return answer

    async def collect(self, stream: str, request: Mapping[str, Any]) -> tuple[list[Message], int]:
        """A batched direct get: the messages, and how many more would match. Raises as `answer`."""
        found: list[Message] = []
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def take(message: Message) -> None:
            status = message.headers.get(_STATUS) if message.headers else None
            if status is None:
                found.append(message)
            elif done.done():
                pass
            elif status == _END:
                done.set_result(int((message.headers or {}).get("Nats-Num-Pending", "0")))
            elif status == _NOTHING:
                done.set_result(0)
            else:
                done.set_exception(StreamRefused(int(status), "direct get"))

        with self.answers(take, done) as reply:
            await self.send(
                f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), None, reply
            )
            return found, await self._in_time(done)

    async def subscribe(
        self, take: Callable[[Message], Awaitable[None]], subject: str = ""
    ) -> tuple[str, Subscription]:
        """A subject (unset: one of its own), whose messages go to `take` in order, until
        unsubscribed."""
        subject = subject or self._client.new_inbox()
        try:
            return subject, await self._client.subscribe(
                subject, cb=take, pending_bytes_limit=_INBOX_BYTES
            )
        except (OSError, nats.errors.Error) as error:
            raise unreachable(self.url, str(error)) from error

    async def close(self) -> None:
        self._fail()
        await _close(self._client)

    def give_up(self, why: str) -> None:
        """The connection is of no use any more, though it may stand."""
        if not self.lost.is_set():
            logger.warning("nats.connection_given_up", url=self.url, why=why)
        self._fail()

    async def _in_time(
        self, done: asyncio.Future[Any], alive: Callable[[], Awaitable[object]] | None = None
    ) -> Any:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await done
        except TimeoutError:
            if alive is not None:
                await alive()
                raise unanswered(self.url) from None
            self.give_up(f"no answer within {ANSWER_S:g} s")
            raise unreachable(self.url, f"no answer within {ANSWER_S:g} s") from None

    async def _route(self, message: Message) -> None:
        waiting = self._waiting.get(message.subject.rpartition(".")[2])
        if waiting is not None:
            waiting[0](message)

    def _fail(self) -> None:
        self.lost.set()
        for _, done in self._waiting.values():
            if not done.done():
                done.set_exception(unreachable(self.url, "the connection is lost"))


def settle(done: asyncio.Future[dict[str, Any]], message: Message) -> None:
    """Takes the one answer to a question. An empty message says that more is awaited."""
    if done.done():
        return
    if message.headers and message.headers.get(_STATUS) == _NO_RESPONDERS:
        done.set_exception(StreamRefused(int(_NO_RESPONDERS), "nobody answers for the stream"))
    elif message.data:
        done.set_result(json.loads(message.data))


class Dialler:
    """Tries the servers one after the other."""

    def __init__(self, urls: Sequence[str], credentials: Path | None = None) -> None:
        self.urls = list(urls)
        self._credentials = credentials
        self._next = 0
        self.why = ""
        """What the last attempt failed with."""

    @property
    def shown(self) -> str:
        """The servers as they may be told to everybody."""
        return ", ".join(map(without_secrets, self.urls))

    async def dial(self) -> Wire:
        """The next server. Raises Unavailable LOG_UNREACHABLE."""
        url = self.urls[self._next % len(self.urls)]
        self._next += 1
        try:
            wire = await Wire.dial(url, name="aither-flux", credentials=self._credentials)
        except Unavailable as error:
            why = error.metadata.get("why", error.message)
            if why != self.why:  # once for each cause: a refused password, a dead server
                logger.warning("nats.not_there", reason=error.message)
            self.why = why
            raise
        self.why = ""
        return wire

    async def until_connected(self) -> Wire:
        """Whichever answers, however long it takes."""
        backoff = FullJitter(first_s=0.02, most_s=1.0)
        while True:
            for _ in self.urls:
                with suppress(Unavailable):
                    return await self.dial()
            await asyncio.sleep(backoff.next_s())


async def _close(client: Client) -> None:
    try:
        async with asyncio.timeout(1.0):
            await client.close()
    except Exception as error:  # it is gone either way
        logger.debug("nats.close_failed", error=str(error))


def without_secrets(url: str) -> str:
    """Without the name and the password that may stand in it: what fails is told to publishers."""
    scheme, sep, rest = url.partition("://") if "://" in url else ("", "", url)
    return scheme + sep + rest.rpartition("@")[2]
