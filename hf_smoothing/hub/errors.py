"""Errors of the Hub and of the connection to it, in one line that names the cause and the fix."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

_RETRY = "what has arrived is not sent again"

_STATUS_MESSAGES = {
    401: "the Hub does not accept the token (401). Log in again with `hf auth login`, or set another HF_TOKEN.",
    403: "the token may not do this (403). Use a token with write access, or a repository of your own.",
    404: "there is no such repository, or the token may not see it (404). Check the name and the token.",
}


class HubError(OSError):
    """An upload failed. The message is one line: what failed, why, and what to do about it."""


def _status_message(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status in _STATUS_MESSAGES:
        return _STATUS_MESSAGES[status]
    if status == 429:
        seconds = error.response.headers.get("Retry-After")
        when = f"in {seconds} seconds" if seconds else "later"
        return f"the Hub received too many requests (429). Run it again {when}; {_RETRY}."
    if status >= 500:
        return f"the Hub failed ({status}). Run it again later; {_RETRY}."
    return f"the Hub refused it ({status}): {' '.join((error.server_message or str(error)).split())}"


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def _connection_message(error: HTTPError) -> str:
    return f"the connection failed ({_first_line(error).rstrip('.')}). Run it again; {_RETRY}."


_MESSAGES: dict[type[Exception], Callable[[Any], str]] = {
    HfHubHTTPError: _status_message,  # a subclass of HTTPError: before it
    OfflineModeIsEnabled: lambda _: "HF_HUB_OFFLINE is set. Unset it.",
    HTTPError: _connection_message,
}
"""The message for an error of the hub library, by its class. The first class that fits the error or a cause of it wins."""


def error_message(error: BaseException) -> str:
    """The cause of an error of the hub library, and the fix."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for kind, message in _MESSAGES.items():
        for cause in causes:
            if isinstance(cause, kind):
                return message(cause)
    return _first_line(error)


@contextmanager
def translate_hub_errors(failure: str) -> Iterator[None]:
    """
    Raise what the hub library raises as a [`HubError`]; show its progress bars on a terminal only.

    Args:
        failure: the beginning of the message: what cannot be done.
    """
    terminal = sys.stderr.isatty()
    disable = not terminal and not are_progress_bars_disabled()
    if disable:
        disable_progress_bars()
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if terminal:
            sys.stderr.write("\n")  # an unfinished progress bar leaves the cursor in its line
        raise HubError(f"{failure}: {error_message(error)}") from error
    finally:
        if disable:
            enable_progress_bars()
