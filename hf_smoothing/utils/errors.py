"""Errors that a user can fix, and how programs end."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError

USER_ERRORS = (ImportError, OSError, RuntimeError, TypeError, ValueError, FloatingPointError, StrictDataclassError)
"""The exceptions that become a message. Any other is a bug and keeps its traceback."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as of a shell."""


@contextmanager
def exit_on_error(errors: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """End the program with a message: with exit status 1 for these errors, with 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as error:
        end_interrupted(error)
    except errors as error:
        sys.exit(f"error: {error}")


def end_interrupted(error: KeyboardInterrupt) -> NoReturn:
    """End the program after Ctrl-C. Of several processes that a launcher started, the first says how to resume."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends another
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{error}" if error.args else "\nstopped", file=sys.stderr)
    sys.exit(INTERRUPTED)
