"""The `taskbone` command, and the version.

The commands are in the packages; here they are put together. What a command needs is imported
inside it, so that asking for help loads neither torch nor Ray.
"""

from typing import Any

import click

from localization.commands import evaluate, localize
from localization.errors import LocalizationError
from model_store.commands import store_commands
from model_store.completion import PROGRAM, completion_command
from model_store.errors import ModelStoreError
from serving.commands.bench import bench_command
from serving.commands.keys import key_commands
from serving.commands.predict import predict
from serving.commands.serve import node_command, ray_environment, serve
from serving.commands.status import status_command
from serving.errors import ServingError

__version__ = "0.1.0"

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as shells count it."""


class Commands(click.Group):
    """The top of the command line: here errors become one line, and Ctrl-C its exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except (ModelStoreError, LocalizationError, ServingError) as error:
            raise click.ClickException(str(error)) from error
        except (KeyboardInterrupt, click.Abort):
            click.echo("Interrupted.", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="taskbone")
def cli() -> None:
    """Many text tasks from one frozen encoder.

    A store holds backbones (encoders) and, for each task, the published versions of its overlay:
    the few parts of the network that the task needs. Add a backbone, find overlays for your own
    tasks or publish ready-made ones, and serve them all from one copy of the encoder.

    \b
    Example, from nothing to an answer:
        taskbone store add-backbone sentence-transformers/all-MiniLM-L6-v2
        taskbone localize task.yaml
        taskbone serve
        taskbone predict sst2 "A film to remember."
    """


for command in (
    *(serve, node_command, ray_environment),
    *(predict, status_command, bench_command),
    *(localize, evaluate),
    *(store_commands, key_commands, completion_command),
):
    cli.add_command(command)


def main() -> None:
    """Run the command line of this process."""
    cli.main(prog_name=PROGRAM)


if __name__ == "__main__":
    main()
