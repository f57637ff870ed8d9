"""Output of a program: lines that fit the terminal, and what it does while that takes time."""

import contextlib
import datetime
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

# False with --quiet, and on workers other than the chief; `start_run` sets it.
shown = True
# Texts of the status line, the innermost last. Threads draw it, so each output takes the lock.
_status_lines: list[Callable[[], str]] = []
_lock = threading.RLock()
_CLEAR = "\r\x1b[K"  # Erases the current line of a terminal.


def is_terminal(file: TextIO) -> bool:
    """Returns whether `file` is a terminal that understands control characters."""
    return file.isatty() and os.environ.get("TERM") != "dumb"


def print_line(line: str, file: TextIO | None = None, bold: bool = False) -> None:
    """Prints a line to `file`, by default stdout. Wraps it between words if `file` is a terminal.

    Keeps a line that begins with a space, such as a row of a table or a command to copy. In files, lines stay whole.
    """
    with _lock:
        if is_terminal(file or sys.stdout):
            if not line.startswith(" "):
                line = textwrap.fill(
                    line, columns(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
                )
            line = (_CLEAR if _status_lines else "") + (f"\x1b[1m{line}\x1b[0m" if bold else line)
        print(line, file=file, flush=True)


def say(line: str, bold: bool = False) -> None:
    """Prints a line to stdout, unless `shown` is False; see `print_line`."""
    if shown:
        print_line(line, bold=bold)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Shows what a block of code, or a decorated function, does.

    In a terminal, the status line shows `text` and the elapsed time until the block ends. Otherwise, `text` is printed.
    """
    began = time.monotonic()
    if not is_terminal(sys.stdout):
        say(text)
    with status_line(lambda: f"{text}  {elapsed(began)}"):
        yield


@contextlib.contextmanager
def status_line(text: Callable[[], str], interval: float = 0.5) -> Iterator[None]:
    """Shows `text()` in the last line of the terminal while a block of code runs, updated every `interval` seconds."""
    terminal, ended = sys.stdout, threading.Event()  # The block may redirect stdout.
    if not (shown and is_terminal(terminal)):
        yield
        return

    def draw() -> None:
        while not ended.wait(interval):
            with _lock:
                if _status_lines[-1:] == [text]:
                    # The cursor returns to the first column, so that other output replaces the line.
                    print(f"{text()[: columns()]}\x1b[K", end="\r", file=terminal, flush=True)

    _status_lines.append(text)
    threading.Thread(target=draw, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with _lock:
            if text in _status_lines:
                _status_lines.remove(text)
                print(_CLEAR, end="", file=terminal, flush=True)


def end_status() -> None:
    """Removes the status line before the program exits. A signal handler may call it, so it takes no lock."""
    if _status_lines:
        _status_lines.clear()
        with contextlib.suppress(OSError):
            os.write(1, _CLEAR.encode())


def elapsed(since: float) -> str:
    """Formats the time since `since`, from `time.monotonic`, as minutes and seconds, from an hour on with hours."""
    return str(datetime.timedelta(seconds=int(time.monotonic() - since))).removeprefix("0:")


def columns() -> int:
    """Returns the length of the longest line that the terminal does not wrap."""
    # One column less: a line of full width would move the cursor to the next line.
    return max(20, shutil.get_terminal_size().columns - 1)
