"""The page of all commands, from their help texts.

Table:   every command with its arguments, options and examples; docs/commands.md, whole file
Command: python reproduce/commands.py commands
Time:    seconds
Needs:   nothing
Result:  a section a command; a test holds the page to the code
"""

from __future__ import annotations

import html

import click
import typer
from common import Entry, main
from typer.cli import get_docs_for_click

from fedtune.cli.main import app

INTRO = """\
# Commands

<!-- Made by reproduce/commands.py from the help texts. Do not edit. -->

What `fedtune COMMAND --help` says, all on one page. A configuration is a file, or the name of one that
comes with fedtune (`fedtune ls configs`); its settings are in [configuration.md](configuration.md).
"""


def page() -> str:
    """The whole page."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    context = typer.Context(group, info_name="fedtune")
    parts = [INTRO]
    rows = ["| command | |", "| --- | --- |"]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None and command.help is not None
        first = " ".join(command.help.split("\n\n")[0].split())
        rows.append(f"| [`{name}`](#fedtune-{name}) | {first} |")
        said = get_docs_for_click(obj=command, ctx=context, name=name, indent=1, call_prefix="fedtune")
        parts.append(html.unescape(said))
    parts.insert(1, "\n".join(rows) + "\n")
    return "\n".join(parts)


ENTRIES = {"commands": Entry(page)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
