"""`python -m aither_cli` is the same as `aither`."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """The command of `sys.argv`. Until it begins, and after it, Ctrl-C ends the process at once and
    without a word: nothing is under way then, and Python would print where its imports stood."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from aither_cli.main import main as run_command

    run_command()


if __name__ == "__main__":
    main()
