"""A real server in a process of its own: `python peer.py http|tcp|grpc PORT`. Says its port when it
listens, and serves until it is killed."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor


def serve_http(port: int) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = int(self.path.strip("/")) if self.path.strip("/").isdecimal() else 200
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/500")
            body = b"x" * 1_000_000 if self.path == "/large" else b"ok"
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    say(server.server_port)
    server.serve_forever()


def serve_tcp(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as listener:
        say(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            connection.close()


def serve_grpc(port: int) -> None:
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    servicer = health.HealthServicer()
    servicer.set("well", health_pb2.HealthCheckResponse.SERVING)
    servicer.set("ill", health_pb2.HealthCheckResponse.NOT_SERVING)
    server = grpc.server(ThreadPoolExecutor(4), options=(("grpc.so_reuseport", 0),))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    say(bound)
    threading.Event().wait()


def say(port: int) -> None:
    print(port, flush=True)


if __name__ == "__main__":
    {"http": serve_http, "tcp": serve_tcp, "grpc": serve_grpc}[sys.argv[1]](int(sys.argv[2]))
