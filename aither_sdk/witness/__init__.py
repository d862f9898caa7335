"""The witness: a child process that answers for a service's health when the service cannot.

`verdict.py` decides from a beat, `__main__.py` serves `grpc.health.v1` from it, `parent.py` is the
service's side: starts the child and starts it again.
"""
