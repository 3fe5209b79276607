"""files.py: what a killed write, a bad file and a failing command leave behind."""

import pytest

from files import UserError, atomic, command_line, read_json, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"β": [1, 2.5, None]})
    assert read_json(path) == {"β": [1, 2.5, None]} and "β" in path.read_text(encoding="utf-8")
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write(b"half")
        assert read_json(path) == {"β": [1, 2.5, None]}  # the old one until the new one is whole
        raise RuntimeError
    assert read_json(path) == {"β": [1, 2.5, None]} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("raw", [b"{", b"", b"\xff\xfe"])
def test_json_that_cannot_be_read(tmp_path, raw):
    path = tmp_path / "a.json"
    for wrong, words in ((path, "No such file"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=words):
            read_json(wrong)
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"{path}: not valid JSON"):
        read_json(path)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("x: bad. Mend it."), 2, "error: x: bad. Mend it."),
        (PermissionError(13, "Denied", "x"), 2, "error: x: Denied. Choose another path."),
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
    with pytest.raises(OSError, match="unknown"):  # ours to mend: with its traceback
        command_line(lambda: (_ for _ in ()).throw(OSError("unknown")))
