"""`taskbone completion`: the script by which a shell completes what is typed.

The script is click's. What is completed besides commands and options stands with each argument.
"""

import click
from click.shell_completion import get_completion_class

PROGRAM = "taskbone"
VARIABLE = "_TASKBONE_COMPLETE"
"""By which the script asks the command for what fits; click makes it of the program's name."""


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the script by which a shell completes commands.

    It completes commands, options, tasks and keys. Tasks and keys are those of the store that is
    named by --store before them, or by TASKBONE_STORE; those in an object store are not completed.
    To have it in every new shell, once:

    \b
    bash (4.4 or newer), in ~/.bashrc:
        eval "$(taskbone completion bash)"
    zsh, in ~/.zshrc, after compinit:
        eval "$(taskbone completion zsh)"
    fish:
        taskbone completion fish > ~/.config/fish/completions/taskbone.fish

    \b
    Example:
        taskbone completion bash
    """
    kind = get_completion_class(shell)
    assert kind is not None, shell
    click.echo(kind(context.find_root().command, {}, PROGRAM, VARIABLE).source())
