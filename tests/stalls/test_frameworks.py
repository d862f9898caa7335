"""The two lines in a FastAPI application, on the standard loop and on uvloop."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

APPLICATION = """
import asyncio, contextlib, logging, sys, time
import fastapi, uvicorn
import aither_sdk
logging.basicConfig(format="%(message)s")

@contextlib.asynccontextmanager
async def lifespan(application):
    with aither_sdk.watch("gateway"):
        yield

application = fastapi.FastAPI(lifespan=lifespan)

@application.get("/slow")
async def slow():
    await asyncio.sleep(0.15)
    time.sleep(0.7)
    await asyncio.sleep(0.15)
    return {"loop": type(asyncio.get_running_loop()).__module__}

async def main():
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(20):
        while not server.started:
            await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /slow HTTP/1.0\\r\\n\\r\\n")
    print((await reader.read()).decode().splitlines()[-1])
    writer.close()
    server.should_exit = True
    await serving

if sys.argv[1] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_fastapi_application_tells_which_handler_stood_still(loop: str) -> None:
    for needed in ("fastapi", "uvicorn", loop):
        pytest.importorskip(needed)
    ended = subprocess.run(
        [sys.executable, "-c", APPLICATION, loop],
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["loop"].startswith(loop)
    line = 1 + APPLICATION.splitlines().index("    time.sleep(0.7)")
    assert f" in __main__.slow (<string>:{line})" in ended.stderr, ended.stderr
    # What another loop than the standard one hides is said once.
    assert ended.stderr.count("stall.foreign_loop") == (loop == "uvloop")
