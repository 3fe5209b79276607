"""What every other file uses: clear errors, files written whole, progress, a command's shell."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


class UserError(Exception):
    """Bad input: the message says which file, what was found and what to do. Exit code 2."""


@contextmanager
def atomic(path: Path) -> Iterator:
    """A binary file that appears at `path` complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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


def read_json(path: Path):
    """Parse a JSON file. Raises UserError if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Give the path of a JSON file.") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Repair or replace it.") from None


def progress(items, name: str, unit: str, total: int | None = None):
    """A progress bar on a terminal; none in a log file, where lines of results say enough."""
    return tqdm(items, name, total, unit=unit, leave=False, disable=None)


def command_line(action: Callable[[], None]) -> None:
    """Run a command: bad input ends with one clear message and exit code 2, Ctrl-C with 130."""
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}. Choose another path.", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        goes_on = "train.py --resume or the same search goes on"
        print(f"stopped; what was finished is kept ({goes_on})", file=sys.stderr)
        raise SystemExit(130) from None
