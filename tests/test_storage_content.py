"""What is written: encoded first, on the disk before its name is there, line by line where it is a study."""
import errno, json, os, re, subprocess, sys, threading

import numpy as np
import pytest
from filelock import lock_descriptor, unlock_descriptor

from finessl.engine.atomic import append_record, encode_json, read_records, say_once
from finessl.engine.storage import lock_folder, write_atomic, write_json
from storage_helpers import ENV, Faults, posix, records, unsaid

LONG, WHOLE, HALF = b"file,class\n" * 1000, b'{"seed": 0}\n', b'{"seed": 7, "x": "'


# ---------------------------------------------------------------- what is encoded

def nested(depth):
    value = {1, 2}                                               # no JSON
    for _ in range(depth): value = [value]
    return value


@pytest.mark.parametrize("value, said", [
    ({"a": {"b": [0., float("nan")]}}, "a.b[1] is float nan"), ({"loss": float("inf")}, "loss is float inf"),
    (float("-inf"), "it is float -inf"), ({"views": 1j}, "views is complex 1j"), ({"data": b"x"}, "data is bytes b'x'"),
    ({(0, 1): 2}, "keys must be"), (nested(200), "nested more than 100 deep"),
    (nested(5000), "nested more than 100 deep")])
def test_json_says_where_a_value_lies_that_it_does_not_know(tmp_path, value, said):
    with pytest.raises(ValueError) as e: write_json(tmp_path / "a.json", value)
    assert "this cannot be written as JSON: " in str(e.value) and said in str(e.value) and len(str(e.value)) < 300
    assert not list(tmp_path.iterdir())


def test_a_ring_ends():
    ring = {}
    ring["again"] = ring
    with pytest.raises(ValueError, match="again.again.*nested more than 100 deep"): encode_json(ring)


def test_numbers_of_numpy_are_numbers():
    value = {"a": np.float32(.5), "b": [np.int64(3), np.bool_(True), np.float64(.25)], "c": np.array(7)}
    assert json.loads(encode_json(value)) == {"a": .5, "b": [3, True, .25], "c": 7}
    for wrong in (np.float32("nan"), np.array([1, 2]), np.datetime64("2026-01-01")):
        with pytest.raises(ValueError, match="x is "): encode_json({"x": wrong})


def test_names_that_are_not_utf8_survive(tmp_path):
    name = os.fsdecode(b"caf\xe9\xff.png")
    value = {"unreadable": [name, "café", "line\u2028end", "\x1b[2J", "😀"], name: 1}
    write_json(tmp_path / "a.json", value), append_record(tmp_path / "a.jsonl", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value
    assert read_records(tmp_path / "a.jsonl") == [value]
    write_atomic(tmp_path / "a.csv", f"file\n{name}\n")
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "file\ncaf\\udce9\\udcff.png\n"


def test_a_record_is_written_as_it_always_was():
    value = {"seed": 0, "classes": ["zéro"], "evaluations": [{"step": 1, "accuracy": .5}], "split": None}
    assert encode_json(value).decode() == json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    assert encode_json(value, None).decode() == json.dumps(value, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------- in which order

def test_the_content_is_on_the_disk_before_its_name_and_the_name_before_it_returns(tmp_path):
    (tmp_path / "new.csv").write_text("old")
    with Faults() as calls: write_atomic(tmp_path / "new.csv", "new", keep="old.csv")
    order = [name for name in calls.log if name in ("write", "fsync", "link", "replace")]
    assert order == ["write", "fsync", "link", "replace", "replace", "fsync"] # link and replace: under old.csv
    with Faults() as calls: write_atomic(tmp_path / "new.csv", "new", durable=False)
    assert "fsync" not in calls.log
    with Faults() as calls: append_record(tmp_path / "new.jsonl", {})
    assert [name for name in calls.log if name in ("write", "fsync")] == ["write", "fsync", "fsync"]


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_one(tmp_path, monkeypatch, error):
    def fsync(fd): raise OSError(error, os.strerror(error))
    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "new.csv", "new"), append_record(tmp_path / "new.jsonl", {"seed": 1})
    assert (tmp_path / "new.csv").read_text() == "new" and records(tmp_path / "new.jsonl") == [1]


def test_a_disk_that_fails_is_not_a_file_system_without_fsync(tmp_path, monkeypatch):
    def fsync(fd): raise OSError(errno.EIO, os.strerror(errno.EIO))
    (tmp_path / "new.jsonl").write_bytes(WHOLE), (tmp_path / "new.csv").write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    for f in (lambda: write_atomic(tmp_path / "new.csv", "new"),
              lambda: append_record(tmp_path / "new.jsonl", {"seed": 1})):
        with pytest.raises(OSError) as e: f()
        assert e.value.errno == errno.EIO
    assert (tmp_path / "new.csv").read_text() == "old" and records(tmp_path / "new.jsonl") == [0]


def test_a_call_that_takes_only_some_bytes_is_called_again(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: real(fd, content[:7]))
    write_atomic(tmp_path / "new.csv", LONG), append_record(tmp_path / "new.jsonl", {"seed": 1})
    assert (tmp_path / "new.csv").read_bytes() == LONG and records(tmp_path / "new.jsonl") == [1]


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    def full(tmp): raise OSError(errno.ENOSPC, "No space left on device", str(tmp))
    with pytest.raises(OSError) as e: write_atomic(tmp_path / "new.csv", full)
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(tmp_path / "new.csv")
    assert not list(tmp_path.iterdir())
    with lock_folder(tmp_path / "run") as run, pytest.raises(OSError) as e: run.write("checkpoint.pt", full)
    assert e.value.filename == str(tmp_path / "run/checkpoint.pt")
    def other(tmp): raise KeyError("not of the system")
    with pytest.raises(KeyError): write_atomic(tmp_path / "new.csv", other)
    assert not list(tmp_path.iterdir())                         # a marker without files goes, too


# ---------------------------------------------------------------- lines

def test_a_torn_last_line_is_said_and_left_out(tmp_path):
    path, said = tmp_path / "a.jsonl", []
    for torn in (b'{"seed": 7, "te', b"{", b"\0\0\0\0", b'{"a": "caf\xc3'):
        path.write_bytes(WHOLE + torn)
        assert [r["seed"] for r in read_records(path, said.append)] == [0]
        assert said.pop() == f"{path}: line 2 is half a record, as a killed process leaves it; it is left out"
        append_record(path, {"seed": 1}, said.append)
        assert "was removed" in said.pop() and path.read_bytes() == WHOLE + b'{"seed": 1}\n'
    path.write_bytes(WHOLE[:-1])                                  # whole, as an editor may leave it
    append_record(path, {"seed": 1}, said.append)
    assert path.read_bytes() == WHOLE + b'{"seed": 1}\n' and not said
    path.write_bytes(b"\n" + WHOLE + b"\n")
    assert records(path) == [0] and read_records(tmp_path / "none.jsonl") == []


def test_half_a_line_longer_than_a_piece_is_found(tmp_path):
    path = tmp_path / "a.jsonl"
    for size in (2**16 - 1, 2**16, 2**16 + 1, 200_000):
        path.write_bytes(WHOLE * 3 + b"{" + b"x" * size)
        append_record(path, {"seed": 1}, unsaid)
        assert path.read_bytes() == WHOLE * 3 + b'{"seed": 1}\n'
        path.write_bytes(b"{" + b"x" * size)
        append_record(path, {"seed": 1}, unsaid)
        assert path.read_bytes() == b'{"seed": 1}\n'


def test_other_files_get_no_line(tmp_path):
    path = tmp_path / "letter"
    path.write_text("Dear Sir")
    with pytest.raises(ValueError, match="is no file of records"): append_record(path, {})
    assert path.read_text() == "Dear Sir"
    with pytest.raises(ValueError, match="line 1 is no record"): read_records(path)
    path.write_bytes(WHOLE + b'{"seed": 1\n' + WHOLE)
    with pytest.raises(ValueError, match="line 2 is no record"): read_records(path)
    with pytest.raises(ValueError, match="loss is float nan"): append_record(tmp_path / "a.jsonl", {"loss": np.nan})
    assert not (tmp_path / "a.jsonl").exists()
    if os.name != "nt":
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="is no plain file"): append_record(tmp_path / "pipe", {})


APPEND = """import sys
from finessl.engine.atomic import append_record
for i in range(40): append_record(sys.argv[1], {"seed": i, "x": "x" * 999})"""


@posix
def test_who_appends_waits_for_who_appends_already(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(HALF)                                       # not torn: it is being written
    with open(path, "ab") as other:
        lock_descriptor(other.fileno())
        thread = threading.Thread(target=append_record, args=(path, {"seed": 1}))
        thread.start(), thread.join(.3)
        other.write(b'"}\n'), other.flush(), unlock_descriptor(other.fileno())
        thread.join(20)
    assert records(path) == [7, 1]


def test_processes_that_append_at_once_lose_no_line(tmp_path):
    children = [subprocess.Popen([sys.executable, "-c", APPEND, tmp_path / "new/a.jsonl"], env=ENV) for _ in range(3)]
    assert [c.wait(60) for c in children] == [0, 0, 0]
    assert sorted(records(tmp_path / "new/a.jsonl")) == sorted([*range(40)] * 3)


# ---------------------------------------------------------------- notes, and what is not imported

def test_a_note_is_said_once_and_never_in_the_way(capsys, monkeypatch):
    for _ in range(2): say_once("a file system without locks \x1b[2J\nfinessl: error")
    assert capsys.readouterr().err == "finessl: note: a file system without locks \\x1b[2J\\nfinessl: error\n"
    monkeypatch.setattr(sys, "stderr", None)
    say_once("nobody listens")
    assert capsys.readouterr().out == ""
    class Gone:
        def write(self, text): raise BrokenPipeError
        def flush(self): pass
    monkeypatch.setattr(sys, "stderr", Gone())
    say_once("whose reader is gone")


def test_neither_torch_nor_numpy_is_imported():
    code = "import finessl.engine.storage, sys; print(sorted({'torch', 'numpy', 'fcntl', 'msvcrt'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=ENV, check=True).stdout
    assert said in ("[]\n", "['fcntl']\n", "['msvcrt']\n")        # filelock's
