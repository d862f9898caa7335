"""Asked before something is lost for good."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aither_cli.failures import FAILED, USAGE, Failure

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; for scripts.")]


def agree(lost: str, *, yes: bool) -> None:
    """Says what will be lost and returns when that is wanted: by `yes`, or by whoever sits at the
    terminal. Raises Failure otherwise, and where there is nobody to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        told = f"{lost}; there is no terminal to ask at, so say --yes if that is wanted"
        raise Failure(told, exit_code=USAGE)
    typer.echo(f"{lost}. Go on? [y/N] ", nl=False, err=True)
    answer = sys.stdin.readline().strip().lower()
    if answer not in ("y", "yes"):
        raise Failure("nothing was changed", exit_code=FAILED)
