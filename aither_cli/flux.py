"""`aither flux verify | repair | backup`: tools for the files of the log.

They run as a process of Flux's own package: the command line knows services by their ports only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from aither_cli.options import Config, settings_of

EPILOG = """\b
Examples:
  aither flux verify                    read every record of the log, also while Flux runs
  aither flux backup /backup/monday     a copy that can be used, while Flux runs
  aither flux repair                    take damaged records out; stop Flux first
\b
Exit: 0 well; 1 damage was found or it could not be done; 2 asked wrongly.
"""
app = typer.Typer(
    help="Look after the log of Flux: verify, repair, backup.",
    epilog=EPILOG,
    rich_markup_mode=None,
)
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where flux.db is. Unset: as the settings say."),
]


@app.command()
def verify(data_dir: DataDir = None, config: Config = None) -> int:
    """Read every record: checksums, order, totals, subjects. Changes nothing; Flux may run."""
    return _run(["verify"], data_dir, config)


@app.command()
def repair(
    data_dir: DataDir = None,
    config: Config = None,
    no_backup: Annotated[
        bool, typer.Option("--no-backup", help="Do not keep the damaged file afterwards.")
    ] = False,
) -> int:
    """Save what can be read into a fresh file; keep the damaged one beside it. Stop Flux first.

    Readers are told a gap for what was taken out.
    """
    return _run(["repair", *(["--no-backup"] if no_backup else [])], data_dir, config)


@app.command()
def backup(
    target: Annotated[Path, typer.Argument(help="Folder for the copy; it is made.")],
    data_dir: DataDir = None,
    config: Config = None,
) -> int:
    """Copy the log and the consumer groups, consistent and read back, while Flux runs.

    To restore, start Flux with this folder as its data_dir.
    """
    return _run(["backup", str(target)], data_dir, config)


def _run(arguments: list[str], data_dir: Path | None, config: Path | None) -> int:
    folder = data_dir or settings_of(config, None).data_dir
    command = [sys.executable, "-m", "flux_svc.tools", *arguments, "--data-dir", str(folder)]
    # Ctrl-C reaches both; what it was doing it tells itself.
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
