"""How a benchmark ends where it cannot measure: as the commands do, in one line and with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click

from darcnn.runtime.errors import EXIT_UNUSABLE, DarcnnError

__all__ = ["run"]


def run(command: Callable[[], object]) -> None:
    """Run a click command and exit."""
    try:
        command()
    except DarcnnError as err:
        click.echo(str(err), err=True)
        sys.exit(EXIT_UNUSABLE)
