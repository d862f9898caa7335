"""Does it answer with an expected status?"""

from __future__ import annotations

import socket

import aiohttp

from aither.pulse.v1.target_pb2 import CheckResult, HttpCheck
from pulse_svc.checks.base import BAD_ANSWER, INTERNAL, NOT_FOUND, REFUSED, bad, good, told
from pulse_svc.checks.names import ThreadsResolver
from pulse_svc.threads import Threads


def open_session(names: Threads) -> aiohttp.ClientSession:
    """One session for all HTTP checks: no cookies, no connection kept, no proxy, no time limit of
    its own. A connection that was kept would tell of a listener that is long gone."""
    connector = aiohttp.TCPConnector(
        force_close=True, limit=0, use_dns_cache=False, resolver=ThreadsResolver(names)
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
        headers={"User-Agent": "aither-pulse"},
        auto_decompress=False,
        trust_env=False,
    )


class HttpStatusCheck:
    """One request; redirects are not followed, for the redirect is the answer; of the body nothing
    is waited for."""

    def __init__(self, config: HttpCheck, session: aiohttp.ClientSession) -> None:
        self._url = config.url
        self._method = config.method
        self._expect = frozenset(config.expect_status)
        self._session = session

    async def probe(self, timeout_s: float) -> CheckResult:
        try:
            response = await self._session.request(self._method, self._url, allow_redirects=False)
            response.close()
        except aiohttp.ClientConnectorCertificateError as error:
            return bad(BAD_ANSWER, f"certificate: {told(error.certificate_error)}")
        except aiohttp.ClientConnectorDNSError as error:
            return self._unresolved(error)
        except aiohttp.ClientSSLError as error:
            return bad(BAD_ANSWER, f"TLS: {told(error.os_error)}")
        except (aiohttp.ClientConnectorError, ConnectionError) as error:
            return bad(REFUSED, told(error))
        except (aiohttp.ClientError, ValueError) as error:
            return bad(BAD_ANSWER, f"{type(error).__name__}: {told(error)}")
        except Exception as error:
            return bad(INTERNAL, f"{type(error).__name__}: {told(error)}")
        status = f"{self._method} answered {response.status}"
        if response.status in self._expect:
            return good(status)
        expected = ", ".join(map(str, sorted(self._expect)))
        return bad(BAD_ANSWER, f"{status}, expected {expected}")

    async def aclose(self) -> None:
        pass

    def _unresolved(self, error: aiohttp.ClientConnectorDNSError) -> CheckResult:
        known = isinstance(error.os_error, socket.gaierror)
        return bad(NOT_FOUND if known else INTERNAL, told(error))
