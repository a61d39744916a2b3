"""`esrl`: every command, and what a user sees when one fails."""

from __future__ import annotations

import importlib
import logging
import sys

import click

from esrl_ray.errors import EsrlError

COMMANDS = {
    "chaos": "chaos.command:chaos",
    "config": "config:config_group",
    "demo": "demo:demo",
    "dlq": "dlq:dlq_group",
    "evaluate": "evaluate:evaluate",
    "ingest": "ingest:ingest",
    "log": "log:log_group",
    "policy": "policy:policy_group",
    "simulate": "simulate:simulate",
    "status": "status:status",
    "train": "train:train",
}
"""Name -> module below `esrl_ray.cli` and its command. Imported when it is called: Ray takes seconds, and reads its environment then."""


class Commands(click.Group):
    """Imports a command when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(f"esrl_ray.cli.{module}"), name)
        return command


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("-v", "--verbose", is_flag=True, help="Log one line per change of state.")
def cli(verbose: bool) -> None:
    """Online reinforcement learning for multi-task fusion: decide, log, join, replay, learn, publish."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    kafka = logging.getLogger("kafka")  # it tells every attempt at a broker that is down; our own parts say so once
    kafka.propagate = False
    kafka.addHandler(logging.NullHandler())


def main() -> None:
    """Entry point: a known error is one clear line and exit code 2, Ctrl-C is 130."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except EsrlError as error:
        click.echo(f"esrl: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("esrl: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
