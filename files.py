"""What every other file uses: clear errors, files written whole, progress, a command's shell."""

import argparse
import errno
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, or of what one may have on it
NO_MEMORY = "can't allocate memory|out of memory"  # as torch says it
NUMBERS = Path("/proc/self/ns/pid")  # of processes: on Linux each container may have its own
HERE = f"{platform.node()}-{NUMBERS.stat().st_ino if NUMBERS.exists() else 0}"


class UserError(Exception):
    """Bad input: the message says which file, what was found and what to do. Exit code 2."""


def unfinished(path: Path) -> Path:
    """The hidden place of `path` until it is whole, marked with the process that writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}@{HERE}.tmp")


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # else it is another user's
    return True


def sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`: those of this machine whose number
    is free, and, as numbers elsewhere on a shared file system tell nothing, what is a day old."""
    for path in folder.glob(".*.tmp"):
        mark = re.search(r"\.(\d{1,9})@(.+)\.tmp$", path.name)
        with suppress(OSError):
            old = time.time() - path.stat().st_mtime > 86400
            if mark and (old or (mark[2] == HERE and not lives(int(mark[1])))):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def writing(path: Path) -> Iterator:
    """An error of the system in writing `path` names it: that of write() on a full disk has no
    name, and torch raises a RuntimeError after it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        cause.filename, cause.filename2 = str(path), None
        raise cause from None


@contextmanager
def atomic(path: Path) -> Iterator:
    """A binary file that appears at `path` complete or not at all."""
    sweep(path.parent)
    temporary = unfinished(path)
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
    with atomic(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, without the usage of every option."""

    def error(self, message: str) -> None:
        print(f"error: {message}. See {self.prog} -h.", file=sys.stderr)
        raise SystemExit(2)


@contextmanager
def reading(path: Path, remedy: str) -> Iterator:
    """Whatever is wrong with a file becomes one line: its path, what was found, the remedy."""
    try:
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise UserError(f"not a file. {remedy}.")  # reading a pipe would wait for ever
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. {remedy}.") from None
    except Exception as error:
        found = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{path}: damaged ({found[:200]}). {remedy}.") from None


def read_json(path: Path, take=lambda content: content, remedy="Repair or replace it"):
    """What `take` makes of a JSON file. Raises UserError if it is missing or damaged."""
    with reading(path, remedy):
        text = Path(path).read_text(encoding="utf-8")
        return take(json.loads(text, parse_constant=int))  # which takes no NaN and no Infinity


def progress(items, name: str, unit: str, total: int | None = None):
    """A progress bar on a terminal; none in a log file, where lines of results say enough."""
    return tqdm(items, name, total, unit=unit, leave=False, disable=None)


def in_words(error: OSError) -> str:
    name, full = error.filename or "the console", error.errno in FULL
    remedy = "Make room; the same command (train.py: --resume) goes on"
    remedy = remedy if full else "Choose another path"
    return f"error: {name}: {'the disk is full, ' * full}{error.strerror}. {remedy}."


def answer(action: Callable[[], None]) -> None:
    """Run a command and say in one line why it failed."""
    try:
        if empty := [word for word in sys.argv[1:] if not word or re.fullmatch("--[a-z-]+=", word)]:
            raise UserError(f"{empty[0]!r}: an empty string is no value. Leave its option out.")
        return action()
    except UserError as error:
        code, line = 2, f"error: {error}"
    except OSError as error:
        if error.filename is None:
            raise
        code, line = 2, in_words(error)
    except (MemoryError, RuntimeError) as error:  # numpy's, and torch's on the CPU and on a GPU
        found = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, found):
            raise
        remedy = "Use a smaller --patch or --batch-size, or fewer --workers"
        code, line = 2, f"error: out of memory ({found[:200]}). {remedy}."
    except KeyboardInterrupt:
        goes_on = "train.py --resume or the same search goes on"
        code, line = 130, f"stopped; what was finished is kept ({goes_on})"
    print(line, file=sys.stderr)
    raise SystemExit(code)


def command_line(action: Callable[[], None]) -> None:
    """Run a command: bad input and a full disk end with one clear message and exit code 2, Ctrl-C
    with 130, and a pipe that its reader closed, such as head, without a word with 141."""
    screens = [screen for screen in (sys.stdout, sys.stderr) if screen]
    for screen in screens:
        screen.reconfigure(errors="replace")  # Φ and λ in a locale without them must not stop a run
    try:
        try:
            answer(action)
        finally:
            for screen in screens:
                screen.flush()
    except OSError as error:
        if error.filename or error.errno not in (*FULL, errno.EPIPE):
            raise
        with suppress(OSError):
            if error.errno in FULL:
                print(in_words(error), file=sys.stderr)
        for screen in screens:  # lest Python tries again at its end, and complains
            with suppress(OSError):
                screen.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), screen.fileno())
        raise SystemExit(2 if error.errno in FULL else 141) from None
