"""`esrl`: every command, and what a user sees when one fails."""

from __future__ import annotations

import logging
import sys

import click

from esrl_ray.cli.config import config_group
from esrl_ray.cli.demo import demo
from esrl_ray.cli.ingest import ingest
from esrl_ray.cli.log import log_group
from esrl_ray.cli.policy import policy_group
from esrl_ray.cli.simulate import simulate
from esrl_ray.cli.train import train
from esrl_ray.errors import EsrlError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("-v", "--verbose", is_flag=True, help="Log one line per change of state.")
def cli(verbose: bool) -> None:
    """Online reinforcement learning for multi-task fusion: decide, log, join, replay, learn, publish."""
    logging.getLogger("kafka").propagate = False
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")


for command in (demo, train, ingest, simulate, policy_group, log_group, config_group):
    cli.add_command(command)


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
