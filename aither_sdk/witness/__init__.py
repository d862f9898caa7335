"""The witness: a child process that answers for a service's health when the service cannot, and
brings its stack to light while something holds the GIL.

`verdict.py` decides from a beat, `serving.py` answers `grpc.health.v1`, `inquiry.py` asks the
service's threads for their stacks, `exits.py` learns how the service ended, `__main__.py` is the
process; `parent.py` is the service's side: starts the child and starts it again.

The child imports little: it exists once for each service, and memory is its price.
"""

from __future__ import annotations

FAREWELL = b"farewell"
"""On the child's stdin, before that is closed by a service that lives on."""
