"""files.py: what a killed write, a bad file and a failing command leave behind."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import files
import plots
import runs
from files import HERE, UserError, atomic, command_line, read_json, sweep, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"β": [1, 2.5, None]})
    assert read_json(path) == {"β": [1, 2.5, None]} and "β" in path.read_text(encoding="utf-8")
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write(b"half")
        assert read_json(path) == {"β": [1, 2.5, None]}  # the old one until the new one is whole
        raise RuntimeError
    assert read_json(path) == {"β": [1, 2.5, None]} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("raw", [b"{", b"", b"\xff\xfe", b'{"a": NaN}', b"[" * 100000])
def test_json_that_cannot_be_read(tmp_path, raw):
    path = tmp_path / "a.json"
    for wrong, words in ((path, "No such file"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=words):
            read_json(wrong)
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"{path}: damaged .*Repair or replace it"):
        read_json(path)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("x: bad. Mend it."), 2, "error: x: bad. Mend it."),
        (PermissionError(13, "Denied", "x"), 2, "error: x: Denied. Choose another path."),
        (MemoryError("Unable to allocate 9 TiB"), 2, "error: out of memory (Unable to allocate 9"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "error: out of memory (CUDA out of memory."),
        (RuntimeError("can't allocate memory: 9\nC++"), 2, "error: out of memory (can't allocate"),
        (KeyboardInterrupt(), 130, "stopped; what was finished is kept"),
    ],
)
def test_a_command_ends_with_one_line(error, code, line, capsys):
    def action():
        raise error

    with pytest.raises(SystemExit) as caught:
        command_line(action)
    printed = capsys.readouterr()
    assert caught.value.code == code and not printed.out
    assert printed.err.startswith(line) and printed.err.count("\n") == 1
    for number in (errno.ENOSPC, errno.EDQUOT):
        error = OSError(number, os.strerror(number), "x")
        with pytest.raises(SystemExit):
            command_line(action)
        assert "error: x: the disk is full, " in capsys.readouterr().err
    with pytest.raises(OSError, match="unknown"):  # ours to mend: with its traceback
        command_line(lambda: (_ for _ in ()).throw(OSError("unknown")))
    with pytest.raises(RuntimeError, match="shapes"):
        command_line(lambda: (_ for _ in ()).throw(RuntimeError("shapes")))


def test_only_what_dead_processes_left_is_swept(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    new = [f".a.{os.getpid()}@{HERE}.tmp", f".a.{gone.pid}@elsewhere.tmp", ".own.tmp", "a.1@b.tmp"]
    old = [".b.1@elsewhere.tmp", f".b.{os.getpid()}@{HERE}.tmp"]  # the number came again
    for name in (*new, *old, f".c.{gone.pid}@{HERE}.tmp", f".d.{gone.pid}@{HERE}.tmp/inside"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in (*old, ".own.tmp"):
        os.utime(tmp_path / name, (0, 0))
    write_json(tmp_path / "a.json", 1)  # sweeps before it writes
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*new, "a.json"])
    sweep(tmp_path / "nowhere")


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full device")


@needs_full
@pytest.mark.parametrize("name", ["a.json", "a.pt", "a.png", "a.pdf", "a.csv"])
def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch, name, capsys):
    link, path = tmp_path / "link", tmp_path / name
    monkeypatch.setattr(files, "unfinished", lambda path: link.symlink_to("/dev/full") or link)
    figure, axis = plt.subplots()
    axis.imshow(np.random.default_rng(0).random((300, 300)))
    write = {
        "a.json": lambda: write_json(path, 1),
        "a.pt": lambda: runs.save_checkpoint(path, {"a": np.ones(9), "b": 1}),
        "a.csv": lambda: runs.write_metrics(tmp_path, [{"epoch": 1}]),
    }.get(name, lambda: plots.save(figure, path))
    with pytest.raises(SystemExit) as end:
        command_line(write)
    name = name.replace("a.csv", "metrics.csv")
    found = capsys.readouterr().err
    assert end.value.code == 2 and found.count("\n") == 1
    assert found.startswith(f"error: {tmp_path / name}: the disk is full, No space left on device.")
    assert list(tmp_path.iterdir()) == []


CONSOLES = {  # a command, its output, its exit code and what it says in stderr
    "full": ("print(1)", ">/dev/full", 2, "error: the console: the disk is full, No space left"),
    "full, long": ("print('a' * 99999)", ">/dev/full", 2, "error: the console: the disk is full"),
    "full, both": ("print(1)", ">/dev/full 2>&1", 2, ""),
    "full, error": ("raise UserError('x')", "2>/dev/full", 2, ""),
    "closed": ("print('a\\n' * 99999)", "| true", 141, ""),
    "closed, at the end": ("time.sleep(0.2); print(1); sys.exit(0)", "| true", 141, ""),
    "none": ("print(1)", ">&-", 0, ""),
    "ascii": ("print('Φ θ'); print('λ', file=sys.stderr)", "", 0, "?\n"),
}  # fmt: skip


@needs_full
@pytest.mark.parametrize("case", CONSOLES)
def test_consoles_that_take_no_more_or_no_greek(case):
    action, into, code, said = CONSOLES[case]
    lines = "import sys, time", "from files import UserError, command_line"
    program = "\n".join((*lines, f"command_line(lambda: exec({action!a}))"))
    env = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "CODE": program,
    }
    shell = f"set -o pipefail; '{sys.executable}' -c \"$CODE\" {into}"
    how = {"cwd": Path(files.__file__).parent, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", shell], **how)
    assert done.returncode == code and done.stderr.startswith(said), done.stderr
    assert done.stderr.count("\n") == bool(said)
