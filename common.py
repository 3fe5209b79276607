"""What every module uses: errors in one line, files written whole, progress, a command's frame."""

import argparse
import errno
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk itself, or the user's share of it
OUT_OF_MEMORY = "can't allocate memory|out of memory"  # in messages of torch
DAY = 86400  # seconds


class UserError(Exception):
    """Bad input. The message says which file, what was found and what to do; exit code 2."""


class Parser(argparse.ArgumentParser):
    """Reports a bad command line in one line, without the usage of every option.

    Options cannot be abbreviated: a later option could change what an abbreviation means.
    """

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> None:
        print(f"error: {message}. See {self.prog} -h.", file=sys.stderr)
        raise SystemExit(2)


# ------------------------------------------------------------------ files


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` for what is still being written.

    It is random, so that two processes that write the same file do not meet.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_stale_files(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`: hidden .tmp entries, a day old."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process may have removed it
            if time.time() - path.stat().st_mtime < DAY:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def writing(path: Path) -> Iterator:
    """Name `path` in any system error while it is written.

    The error of write() on a full disk has no file name, and torch hides it behind a RuntimeError.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        cause.filename = str(path)
        cause.filename2 = None
        raise cause from None


@contextmanager
def atomic(path: Path) -> Iterator:
    """A binary file that appears at `path` complete or not at all."""
    remove_stale_files(path.parent)
    temporary = temporary_path(path)
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with atomic(path) as file:
        file.write(f"{text}\n".encode())


@contextmanager
def reading(path: Path, remedy: str) -> Iterator:
    """Turn whatever is wrong with a file into one UserError: its path, the finding, the remedy."""
    try:
        # Reading a named pipe would wait for ever.
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise UserError(f"not a file. {remedy}.")
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. {remedy}.") from None
    except Exception as error:
        finding = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{path}: damaged ({finding[:200]}). {remedy}.") from None


def read_json(path: Path, parse=lambda content: content, remedy="Repair or replace it"):
    """What `parse` makes of a JSON file. Raises UserError if it is missing or damaged."""
    with reading(path, remedy):
        text = Path(path).read_text(encoding="utf-8")
        return parse(json.loads(text, parse_constant=int))  # int() refuses NaN and Infinity


def of_type(value, types):
    """Return `value` if it is of one of these types; raises TypeError if it is not."""
    if not isinstance(value, types):
        raise TypeError(f"{value!r:.40} in place of {getattr(types, '__name__', types)}")
    return value


# ------------------------------------------------------------------ the frame of a command


def to_stderr(text: str) -> None:
    """Print a line that is not part of a command's result."""
    print(text, file=sys.stderr)


def progress(items: Iterable, name: str, unit: str, total: int | None = None) -> tqdm:
    """A progress bar on a terminal; nothing in a log file, where the results' lines say enough."""
    return tqdm(items, name, total, unit=unit, leave=False, disable=None)


def exit_message(error: BaseException) -> str:
    """The line that says why a command stopped; empty if the fault is in this code."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "stopped; what was finished is kept (train.py --resume or the same search goes on)"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        place = error.filename or "the console"
        remedy = "Make room; the same command (train.py: --resume) goes on"
        return f"error: {place}: the disk is full, {error.strerror}. {remedy}."
    if isinstance(error, OSError) and error.filename:
        return f"error: {error.filename}: {error.strerror}. Choose another path."

    # numpy raises MemoryError; torch a RuntimeError, on the CPU and on a GPU.
    finding = str(error).partition("\n")[0]
    of_torch = isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, finding)
    if isinstance(error, MemoryError) or of_torch:
        remedy = "Use a smaller --patch or --batch-size, or fewer --workers"
        return f"error: out of memory ({finding[:200]}). {remedy}."
    return ""


def command_line(action: Callable[[], None]) -> None:
    """Run a command; whatever stops it ends in one line and an exit code.

    2: bad input, a full disk or no memory left. 130: Ctrl-C. 141, without a word: the reader of
    the output, such as head, closed the pipe. A fault of this code keeps its traceback.
    """
    screens = [screen for screen in (sys.stdout, sys.stderr) if screen]
    for screen in screens:
        screen.reconfigure(errors="replace")  # a locale without Φ and λ must not stop a run

    try:
        try:
            for word in sys.argv[1:]:
                if not word or re.fullmatch("--[a-z-]+=", word):
                    raise UserError(f"{word!r}: an empty string is no value. Leave its option out.")
            action()
        finally:
            for screen in screens:
                screen.flush()
    except (Exception, KeyboardInterrupt) as error:
        message = exit_message(error)
        pipe_closed = isinstance(error, BrokenPipeError) and not message
        if not message and not pipe_closed:
            raise
        with suppress(OSError):  # the console may be what is full
            if message:
                print(message, file=sys.stderr)

        # What a full or closed console did not take is dropped, or Python complains at its end.
        for screen in screens:
            try:
                screen.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), screen.fileno())

        code = 141 if pipe_closed else 130 if isinstance(error, KeyboardInterrupt) else 2
        raise SystemExit(code) from None
