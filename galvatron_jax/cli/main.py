"""`galvatron-jax`: reads the arguments, runs the command, and turns errors into messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import tyro

from galvatron_jax import errors
from galvatron_jax.cli import arguments
from galvatron_jax.cli.output import Output, configure_logging
from galvatron_jax.errors import GalvatronError, InfeasibleError

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

_COMMANDS = (
    Annotated[arguments.Train, tyro.conf.subcommand("train")]
    | Annotated[arguments.Profile, tyro.conf.subcommand("profile")]
    | Annotated[arguments.Search, tyro.conf.subcommand("search")]
    | Annotated[arguments.Verify, tyro.conf.subcommand("verify")]
    | Annotated[arguments.Show, tyro.conf.subcommand("show")]
)

_MODULES = {
    arguments.Train: "galvatron_jax.cli.train",
    arguments.Profile: "galvatron_jax.cli.profile",
    arguments.Search: "galvatron_jax.cli.search",
    arguments.Verify: "galvatron_jax.cli.verify",
    arguments.Show: "galvatron_jax.cli.show",
}
"""Where each command lives. Imported when it runs, as most of them import JAX."""

_DESCRIPTION = """Automatic hybrid-parallel training for JAX and Flax.

Exit codes: 0 done, 1 infeasible or failed check, 2 wrong input."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        The exit code. (Wrong options and `--help` raise `SystemExit`, with 2 and 0.)
    """
    command = tyro.cli(
        _COMMANDS,
        prog="galvatron-jax",
        description=_DESCRIPTION,
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    output = Output(as_json=command.json)
    configure_logging(output.log)
    try:
        return import_module(_MODULES[type(command)]).run(command, output)
    except GalvatronError as error:
        output.log.print(f"Error: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        output.result({"error": {"type": _public_name(error), "message": str(error)}})
        return FAILED if isinstance(error, InfeasibleError) else WRONG_INPUT
    except KeyboardInterrupt:
        output.say("Interrupted.")
        return INTERRUPTED


def _public_name(error: GalvatronError) -> str:
    """The error's class, or the nearest base of it in `galvatron_jax.errors`."""
    return next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == errors.__name__)


if __name__ == "__main__":
    sys.exit(main())
