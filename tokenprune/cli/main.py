"""`tokenprune`: the commands together, and how each of them ends."""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from tokenprune.cli import audit, bench, check, doctor, evaluate, fit, flops, ls, new, run, schema, show, table, tune
from tokenprune.cli.terminal import complain, note
from tokenprune.errors import PluginWarning, TokenPruneError, UnstatedCostWarning, did_you_mean

MISTAKE = 2
"""Exit status for anything that the user can put right."""
INTERRUPTED = 130
FAILED = 1
"""Nothing that the user did wrong: no memory left, or nobody reads stdout any more."""
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What the system says where nothing can be written: a full disk, a quota, a folder that is read-only."""

_CHOICE = re.compile(r"Invalid value for '(?P<option>--[\w-]+)': .*?'(?P<given>.*)' is not one of (?P<choices>'.+')")
"""What typer says of a value that is none of an option's choices."""
_QUOTED = re.compile(r"'([^']*)'")

app = typer.Typer(
    name="tokenprune",
    help="Drop the vision tokens of a vision-language model that do not matter, and see what it saves.",
    epilog="\n".join(
        [
            "Start with:",
            "  tokenprune run                         a sample picture, the embedded model",
            "  tokenprune ls                          the recipes",
            "  tokenprune show sparsevlm --keep 64    what one of them does",
            "  tokenprune eval fastv --keep 0.5       how right its answers stay",
        ]
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (run, evaluate, table, tune, bench, audit, fit, ls, show, flops, check, new, schema, doctor):
    # typer keeps the line breaks of docstrings: undo those within a paragraph.
    _paragraphs = inspect.cleandoc(_module.command.__doc__ or "").split("\n\n")
    app.command(
        _module.NAME,
        help="\n\n".join(" ".join(paragraph.split()) for paragraph in _paragraphs),
        epilog="\n".join(["Examples:", *_module.EXAMPLES]),
    )(_module.command)


def _version(wanted: bool) -> None:
    if wanted:
        from tokenprune import __version__

        typer.echo(f"tokenprune {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def call(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (of the process, when not given) and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show … must not end the program
    try:
        with warnings.catch_warnings():
            for ours in (UnstatedCostWarning, PluginWarning):
                warnings.simplefilter("once", ours)
            warnings.showwarning = _warn
            status = typer.main.get_command(app).main(
                args=None if arguments is None else list(arguments), prog_name="tokenprune", standalone_mode=False
            )
        sys.stdout.flush()
    except typer.TyperException as error:
        complain(_in_one_line(error))
        return MISTAKE
    except TokenPruneError as error:
        complain(str(error))
        return MISTAKE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`, a closed pager) has enough. Python would complain once more when it flushes at exit.
        _drop_output()
        return FAILED
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        complain(f"cannot write {error.filename or 'the output'}: {error.strerror}")
        _drop_output()
        return FAILED
    except Exception as error:
        if (told := _explained(error)) is None:
            raise
        complain(told)
        return FAILED
    return status if isinstance(status, int) else 0


def _explained(error: BaseException) -> str | None:
    """What another package's failure means to a user, where that is known."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; it may not even be imported
        return "the device ran out of memory; try --dtype bfloat16, smaller or fewer pictures, or --device cpu"
    below: BaseException | None = error
    while below is not None and "torchvision" not in str(below):
        below = below.__cause__ or below.__context__
    if below is None:
        return None
    from tokenprune.core.machine import torchvision_conflict

    return torchvision_conflict()


def _drop_output() -> None:
    """Send what stdout still holds nowhere, or Python would fail on it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> NoReturn:
    """Entry point of the installed script."""
    sys.exit(call())


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any, **named: Any
) -> None:
    """Ours in one line, without the place in the code; others as Python shows them."""
    if issubclass(category, UnstatedCostWarning | PluginWarning):
        note(str(message))
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def _in_one_line(error: typer.TyperException) -> str:
    """typer's message about wrong usage in the words of our own errors."""
    text = " ".join(error.format_message().split()).rstrip(".")
    if choice := _CHOICE.match(text):
        option, given, choices = choice["option"], choice["given"], _QUOTED.findall(choice["choices"])
        expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
        return f"{option}: expected {expected}, got {given!r}{did_you_mean(given, choices)}"
    near = getattr(error, "possibilities", None)
    if near:
        text = f"{error.message} (did you mean {near[0]}?)"
    text = re.sub(r"\.? Did you mean (.*)\?$", r" (did you mean \1?)", text)
    context = getattr(error, "ctx", None)
    where = f"; see {context.command_path} --help" if context is not None else ""
    return text[:1].lower() + text[1:] + where
