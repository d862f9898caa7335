"""A small stand-in for a service: answers health, drains or does not, as FAKE_<NAME> says.

Words of FAKE_<NAME>: `exits` (at once, with 3), `refuses` (bad settings, exit 2), `unready`,
`deaf` (ignores SIGTERM), `orphan` (writes to the file FAKE_NOTE when its lifeline ends).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

OFFSETS = {"flux": 101, "pulse": 102, "genesis": 104}


def main(name: str) -> int:
    words = os.environ.get(f"FAKE_{name.upper()}", "")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None if words == "deaf" else stop.set())
    print(f"{name} says: here I am, and my data is in {os.environ['AITHER_DATA_DIR']}", flush=True)
    if words == "exits":
        print("my last words", flush=True)
        return 3
    if words == "refuses":
        sys.stderr.write(f"{name}: fleet.yaml:3: targets[0].check: no such kind\n")
        sys.stderr.write(f"{name}: fleet.yaml:9: targets[1].name: stands here twice\n")
        return 2
    servicer = health.HealthServicer()
    serving = health_pb2.HealthCheckResponse.SERVING
    if words != "unready":
        servicer.set("readiness", serving)
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"127.0.0.1:{int(os.environ['AITHER_PORT_BASE']) + OFFSETS[name]}")
    server.start()
    if words == "orphan":
        threading.Thread(target=_watch_lifeline, args=(name, stop), daemon=True).start()
    stop.wait()
    with (Path(os.environ["AITHER_DATA_DIR"]) / "drained").open("a") as file:
        file.write(f"{name}\n")
    server.stop(None)
    return 0


def _watch_lifeline(name: str, stop: threading.Event) -> None:
    while os.read(int(os.environ["AITHER_LIFELINE_FD"]), 1):
        pass
    Path(os.environ["FAKE_NOTE"]).write_text(f"{name} heard it")
    stop.set()
