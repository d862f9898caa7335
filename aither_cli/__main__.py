"""`python -m aither_cli` is the same as `aither`."""

from __future__ import annotations

from aither_cli.main import main

if __name__ == "__main__":
    main()
