"""common.py: what a killed write, a bad file and a failing command leave behind."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pytest

import common
import plots
import runs
from common import UserError, atomic, command_line, read_json, remove_stale_files, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    content = {"β": [1, 2.5, None]}
    write_json(path, content)
    assert read_json(path) == content
    assert "β" in path.read_text(encoding="utf-8")
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write(b"half")
        assert read_json(path) == content  # the old one until the new one is whole
        raise RuntimeError
    assert read_json(path) == content
    assert list(tmp_path.iterdir()) == [path]
    assert common.temporary_path(path) != common.temporary_path(path)


@pytest.mark.parametrize("raw", [b"{", b"", b"\xff\xfe", b'{"a": NaN}', b"[" * 100000])
def test_json_that_cannot_be_read(tmp_path, raw):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match="No such file"):
        read_json(path)
    with pytest.raises(UserError, match="directory"):
        read_json(tmp_path)
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"{path}: damaged .*Repair or replace it"):
        read_json(path)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("x: bad. Fix it."), 2, "error: x: bad. Fix it."),
        (PermissionError(13, "Denied", "x"), 2, "error: x: Denied. Choose another path."),
        (OSError(errno.ENOSPC, "No", "x"), 2, "error: x: the disk is full, No. Make room"),
        (OSError(errno.EDQUOT, "No", "x"), 2, "error: x: the disk is full, No. Make room"),
        (MemoryError("Unable to allocate 9 TiB"), 2, "error: out of memory (Unable to allocate 9"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "error: out of memory (CUDA out of memory."),
        (RuntimeError("can't allocate memory: 9\nC++"), 2, "error: out of memory (can't allocate"),
        (KeyboardInterrupt(), 130, "stopped; what was finished is kept"),
    ],
)
def test_a_command_ends_with_one_line(error, code, line, capsys):
    def action():
        raise error

    with pytest.raises(SystemExit) as end:
        command_line(action)
    printed = capsys.readouterr()
    assert end.value.code == code
    assert not printed.out
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("error", [OSError("unknown"), RuntimeError("shapes"), KeyError("a")])
def test_a_fault_of_the_code_keeps_its_traceback(error):
    def action():
        raise error

    with pytest.raises(type(error), match=str(error)):
        command_line(action)


def test_what_is_unfinished_for_a_day_is_removed(tmp_path):
    kept = [".a.1f.tmp", "a.1f.tmp", ".a.json"]
    stale = [".b.2f.tmp", ".c.3f.tmp/inside"]
    for name in kept + stale:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    two_days_ago = time.time() - 2 * 86400
    for name in ("a.1f.tmp", ".a.json", ".b.2f.tmp", ".c.3f.tmp"):
        os.utime(tmp_path / name, (two_days_ago, two_days_ago))

    write_json(tmp_path / "new.json", 1)  # cleans up before it writes
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "new.json"}
    remove_stale_files(tmp_path / "nowhere")


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full device")


@needs_full
@pytest.mark.parametrize("name", ["a.json", "a.pt", "a.png", "a.pdf", "metrics.csv"])
def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch, name, capsys):
    link = tmp_path / "link"
    path = tmp_path / name

    def full_disk(path):
        link.symlink_to("/dev/full")
        return link

    def write():
        if name == "a.json":
            write_json(path, 1)
        elif name == "a.pt":
            runs.save_checkpoint(path, {"a": np.ones(9), "b": 1})
        elif name == "metrics.csv":
            runs.write_csv(tmp_path / "metrics.csv", [{"epoch": 1}])
        else:
            figure, axis = plt.subplots()
            axis.imshow(np.random.default_rng(0).random((300, 300)))
            plots.save(figure, path)

    monkeypatch.setattr(common, "temporary_path", full_disk)
    with pytest.raises(SystemExit) as end:
        command_line(write)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.count("\n") == 1
    assert message.startswith(f"error: {path}: the disk is full, No space left on device.")
    assert list(tmp_path.iterdir()) == []


class Console(NamedTuple):
    """A command, where its output goes, its exit code and how its stderr begins."""

    command: str
    redirect: str
    code: int
    message: str


CONSOLES = {
    "full": Console("print(1)", ">/dev/full", 2, "error: the console: the disk is full, No space"),
    "full, long": Console("print('a' * 99999)", ">/dev/full", 2, "error: the console: the disk is"),
    "full, both": Console("print(1)", ">/dev/full 2>&1", 2, ""),
    "full, error": Console("raise UserError('x')", "2>/dev/full", 2, ""),
    "closed": Console("print('a\\n' * 99999)", "| true", 141, ""),
    "closed, at the end": Console("time.sleep(0.2); print(1); sys.exit(0)", "| true", 141, ""),
    "none": Console("print(1)", ">&-", 0, ""),
    "ascii": Console("print('Φ θ'); print('λ', file=sys.stderr)", "", 0, "?\n"),
}


@needs_full
@pytest.mark.parametrize("case", CONSOLES)
def test_consoles_that_take_no_more_or_no_greek(case):
    command, redirect, code, message = CONSOLES[case]
    program = (
        "import sys, time\n"
        "from common import UserError, command_line\n"
        f"command_line(lambda: exec({command!a}))"
    )
    env = {
        **os.environ,
        "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PROGRAM": program,
    }
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; '{sys.executable}' -c \"$PROGRAM\" {redirect}"],
        cwd=Path(common.__file__).parent,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == bool(message)
