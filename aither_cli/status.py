"""`aither status`: is it well?"""

from __future__ import annotations

import json as jsons
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from aither_cli.options import Config, PortBase, one_node, settings_of
from aither_cli.services import chosen, place_of

if TYPE_CHECKING:
    from aither_cli.survey import Survey

EPILOG = """\b
Examples:
  aither status                    services, the log, the fleet
  aither status --port-base 8400   of another `aither up`
  aither status --json | jq .targets.down
\b
Exit: 0 all is well; 1 something is not (a service not ready or not reached, a target not up,
a log that takes no events); 2 nothing answers at all.
"""
WELL, NOT_WELL, NOT_REACHED = 0, 1, 2


def status(
    port_base: PortBase = None,
    config: Config = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="A,B", help="Only these services.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """Tell how every service, the log and the fleet are."""
    names = chosen(only)
    settings = settings_of(config, port_base)
    from aither_cli.dialing import quiet_logs
    from aither_cli.interrupts import run_interruptible
    from aither_cli.survey import take_survey

    quiet_logs()
    places = [place_of(name, settings) for name in names]
    flux = one_node(settings.flux.address, "flux.address")
    survey = run_interruptible(take_survey(places, flux))
    if json:
        typer.echo(jsons.dumps(survey.as_json(), indent=2))
    else:
        _show(survey)
    if survey.reached:
        return WELL if survey.well else NOT_WELL
    where = ", ".join(place.health_address for place in places)
    sys.stderr.write(
        f"aither: no service answers ({where}); start them with `aither up` "
        "or name their ports with --port-base\n"
    )
    return NOT_REACHED


def _show(survey: Survey) -> None:
    from aither_cli.teller import columns, rich_table

    head, rows = survey.table()
    if sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(rich_table(head, rows))
    else:
        typer.echo("\n".join(columns([head, *rows])))
    for line in survey.lines():
        typer.echo(line)
