"""Running the `taskbone` command inside a test, and what its ends must look like."""

from pathlib import Path

from click.testing import CliRunner, Result

from taskbone import cli


def run(*arguments: str | Path, text: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=text)


def succeed(*arguments: str | Path, text: str | None = None) -> str:
    result = run(*arguments, text=text)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fail(*arguments: str | Path, text: str | None = None) -> str:
    """The message of a command that must end with exit status 1 and one error on stderr."""
    result = run(*arguments, text=text)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("Error: ").strip()
