"""Exit codes, and the package's own errors as messages on the terminal."""

import io
import os
import sys
from collections.abc import Callable

from lora_domains.console import quiet_imports
from lora_domains.errors import LoraDomainsError, TrainingInterrupted

EXIT = {"pass": 0, "fail": 1, "inconclusive": 3}
"""Exit codes of the verbs that end in a verdict."""
ERROR, INTERRUPTED = 2, 130


def guarded(run: Callable[[], int]) -> int:
    """Run a command; returns its exit code, and prints an error of this package as a message."""
    from rich.console import Console
    from rich.markup import escape

    quiet_imports()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a log in cp1252 or ASCII has no arrows
    try:
        return run()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has enough (| head). What is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LoraDomainsError as raised:
        error = raised
    # All processes of a launch raise the same error; the first one of each machine prints it.
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    where = f" {escape(error.where)}" if error.where else ""
    console.print(f"[bold red]{type(error).__name__}[/][bold]{where}[/]")
    console.print(f"  expected  {escape(error.expected)}")
    console.print(f"  found     {escape(error.found)}")
    console.print(f"  hint      {escape(error.hint)}")
    return INTERRUPTED if isinstance(error, TrainingInterrupted) else ERROR
