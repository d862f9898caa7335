"""The `aither` command: its commands and what happens to an error that reaches the top."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from aither_cli import consumers, flux, publish, stalls, status, tail, up
from aither_cli.failures import told_of
from aither_cli.teller import let_go_of_stdout

_EPILOG = """\b
Examples:
  aither up                              start everything here, follow what happens
  aither status                          is it well?
  aither tail 'pulse.>'                  what does the heartbeat say?
  aither publish demo.hello '{"a": 1}'   say something yourself
  aither stalls                          which line held up which loop?
"""

app = typer.Typer(
    name="aither",
    help="Aither: a heartbeat, an event bus and an orchestrator for services and agents.",
    epilog=_EPILOG,
    # Plain help: it reads the same in a pipe, and rich alone would cost as much as all the rest.
    rich_markup_mode=None,
    add_completion=False,
    # A defect of ours is told by Python itself: no frames around it.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(wanted: bool) -> None:
    if wanted:
        from aither_sdk.version import VERSION

        typer.echo(f"aither {VERSION}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_say_version, is_eager=True
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command(epilog=up.EPILOG)(up.up)
app.command(epilog=status.EPILOG)(status.status)
app.command(epilog=tail.EPILOG)(tail.tail)
app.command(epilog=publish.EPILOG)(publish.publish)
app.add_typer(stalls.app, name="stalls")
app.add_typer(flux.app, name="flux")
app.add_typer(consumers.app, name="consumers")


def main() -> NoReturn:
    """Runs the command of `sys.argv` and exits; a user never sees a stack trace for a mistake."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Exit code: 0 well, 1 failed, 2 asked wrongly (or as the command says), 130 interrupted."""
    try:
        result = app(arguments, prog_name="aither", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        let_go_of_stdout()
        return 0
    except KeyboardInterrupt:
        return 130
    except TyperException as error:
        return _refuse_usage(error)
    except Exception as error:
        told = told_of(error)
        if told is None:
            raise
        lines, code = told
        sys.stderr.write("".join(f"aither: {line}\n" for line in lines))
        return code


def _refuse_usage(error: TyperException) -> int:
    """A wrong option or argument: what is wrong, and where the right ones are listed."""
    message = getattr(error, "format_message", lambda: str(error))()
    command = getattr(getattr(error, "ctx", None), "command_path", "aither")
    message = " ".join(message.split()).rstrip(".")
    sys.stderr.write(f"aither: {message}; see `{command} --help`\n")
    return int(getattr(error, "exit_code", 2))
