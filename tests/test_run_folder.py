"""The folder of a run: one holds it, it says whose it is, and what was there before stays."""
import errno, os, stat, subprocess, sys, threading
from pathlib import Path

import pytest

from finessl.engine import storage
from finessl.engine.errors import TrainingError
from finessl.engine.storage import HELD, LOCK, MARKER, RUN_FILES, lock_folder, read_marker
from storage_helpers import ENV, as_root, files, posix, without_privileges


def test_one_run_holds_a_folder(tmp_path):
    with lock_folder(tmp_path / "run") as run:
        with pytest.raises(TrainingError, match="another run is writing to .*run; give this one a folder of its own"):
            with lock_folder(tmp_path / "run"): pass
        found = []
        def elsewhere():
            try:
                with lock_folder(tmp_path / "run"): found.append("held")
            except TrainingError as e: found.append(str(e))
        thread = threading.Thread(target=elsewhere)
        thread.start(), thread.join()
        assert "another run is writing" in found[0]
        assert files(tmp_path / "run") == [LOCK]                  # the refused ones leave the other's
        run.write("checkpoint.pt", b"step 1")                     # and it still holds it


def test_nothing_remains_of_a_run_that_wrote_nothing(tmp_path):
    with lock_folder(tmp_path / "runs/a/b"): pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    with lock_folder(tmp_path / "run"): pass
    assert list((tmp_path / "run").iterdir()) == []               # what was there before stays
    with pytest.raises(KeyError):
        with lock_folder(tmp_path / "runs/a") as run:
            run.mark()
            assert files(tmp_path / "runs/a") == [MARKER, LOCK]
            raise KeyError
    assert files(tmp_path) == ["run"]
    with lock_folder(tmp_path / "runs/a"): (tmp_path / "runs/note").write_text("of a user")
    assert files(tmp_path / "runs") == ["note"]


def test_a_runs_folder_says_what_it_is(tmp_path):
    with lock_folder(tmp_path / "run", command="finessl train --out run") as run:
        assert read_marker(tmp_path / "run") is None              # before the first file
        run.write("checkpoint.pt", b"step 1")
        run.write("checkpoint.pt", b"step 2", keep="previous-checkpoint.pt")
        run.write_json("record.json", {"seed": 0})
    marker = read_marker(tmp_path / "run")
    assert (marker["what"], marker["command"]) == ("run", "finessl train --out run")
    assert set(marker) == {"finessl", "what", "command", "id"}
    assert files(tmp_path / "run") == [MARKER, "checkpoint.pt", "previous-checkpoint.pt", "record.json"]
    with lock_folder(tmp_path / "run", command="fit") as run:
        assert (run.exists("record.json"), run.exists("model.safetensors")) == (True, False)
        assert (run.read("previous-checkpoint.pt"), run.read("model.safetensors")) == (b"step 1", None)
        assert read_marker(tmp_path / "run")["command"] == "finessl train --out run" # nothing is written yet
        run.remove(*RUN_FILES)
        run.write("checkpoint.pt", b"")
    assert read_marker(tmp_path / "run") == marker | {"command": "fit"}
    assert files(tmp_path / "run") == [MARKER, "checkpoint.pt"]
    assert read_marker(tmp_path / "nowhere") is None and read_marker(tmp_path / "run/checkpoint.pt") is None


@pytest.mark.parametrize("name", RUN_FILES)
def test_what_no_run_made_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("600 MB from elsewhere"), (tmp_path / ".notes.tmp").write_text("a thesis")
    with pytest.raises(TrainingError, match=f"holds {name}, which this version of finessl did not make; name another"):
        with lock_folder(tmp_path): pass
    assert files(tmp_path) == sorted([name, ".notes.tmp"]) and (tmp_path / name).read_text() == "600 MB from elsewhere"
    with lock_folder(tmp_path, overwrite=True) as run: run.write(name, b"new")
    assert (tmp_path / name).read_bytes() == b"new"
    with lock_folder(tmp_path): pass                              # from now on it is ours


def test_a_folder_of_another_kind_is_refused(tmp_path):
    with lock_folder(tmp_path / "a", ("demo.json",), what="demo") as demo: demo.write_json("demo.json", {})
    with pytest.raises(TrainingError, match="is the folder of a demo, not of a run"):
        with lock_folder(tmp_path / "a"): pass
    assert files(tmp_path / "a") == [MARKER, "demo.json"]


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"[" * 50_000, b"{}", b'{"what": "run"}', b'{"what": "run", "id": 5}',
    b'{"what": "run", "id": ".*"}', b'{"what": [], "id": "01234567"}', b"\xff\xfe", b" " * 10**6])
def test_a_marker_is_read_as_a_strangers(tmp_path, content):
    (tmp_path / MARKER).write_bytes(content), (tmp_path / ".notes.tmp").write_text("a thesis")
    for f in (read_marker, lambda folder: lock_folder(folder).__enter__()):
        with pytest.raises(TrainingError, match="is no marker of finessl; remove it, or name another"): f(tmp_path)
    assert (tmp_path / MARKER).read_bytes() == content and files(tmp_path) == [MARKER, ".notes.tmp"]


@posix
def test_a_pipe_as_marker_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / MARKER)
    with pytest.raises(TrainingError, match="not a plain file"):
        with lock_folder(tmp_path): pass
    assert files(tmp_path) == [MARKER]


@posix
def test_half_files_of_the_folders_own_runs_go_and_no_other(tmp_path):
    folder = tmp_path / "run"
    with lock_folder(folder) as run: run.write("checkpoint.pt", b"step 1")
    own, other = read_marker(folder)["id"], "0" * 8
    half, stays = f".model.safetensors.finessl-{own}-{'a' * 16}.tmp", [
        f".model.safetensors.finessl-{other}-{'a' * 16}.tmp", f".new.csv.finessl-{'a' * 16}.tmp",
        ".notes.tmp", ".checkpoint.pt.99999.tmp",
        f".x.finessl-{own}-{'a' * 15}.tmp", f".x.finessl-{own}-{'A' * 16}.tmp", f"x.finessl-{own}-{'a' * 16}.tmp"]
    for name in (half, *stays): (folder / name).write_text("half")
    (folder / f".link.finessl-{own}-{'a' * 16}.tmp").symlink_to("checkpoint.pt")
    (folder / f".folder.finessl-{own}-{'a' * 16}.tmp").mkdir(), (folder / ".cache.tmp").mkdir()
    before = set(files(folder))
    with lock_folder(folder): pass
    assert before - set(files(folder)) == {half}


@as_root
def test_another_users_file_of_such_a_name_stays(tmp_path):
    with lock_folder(tmp_path) as run: run.write("checkpoint.pt", b"step 1")
    name = f".model.safetensors.finessl-{read_marker(tmp_path)['id']}-{'a' * 16}.tmp"
    (tmp_path / name).write_text("half"), os.chown(tmp_path / name, 1234, 4321)
    with lock_folder(tmp_path): pass
    assert name in files(tmp_path)


def test_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("a file")
    for name, said in (("file", "is a file; a run needs a folder"), ("file/run", "Not a directory")):
        with pytest.raises(TrainingError, match=said):
            with lock_folder(tmp_path / name): pass
    assert files(tmp_path) == ["file"]


@posix
def test_a_folder_that_is_closed_is_one_sentence():
    def hold(path):
        with lock_folder(path): pass
    said = without_privileges(hold, "b", "b/run")
    assert said == ["cannot write to b: Permission denied", "cannot write to b/run: Permission denied"]


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL])
def test_a_file_system_without_locks_is_said_and_the_run_goes_on(tmp_path, monkeypatch, error):
    fcntl, said = pytest.importorskip("fcntl"), []
    def flock(*args): raise OSError(error, os.strerror(error))
    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder(tmp_path / "run", say=said.append) as run: run.write("checkpoint.pt", b"step 1"), run.check()
    assert said == [f"{tmp_path / 'run'} is on a file system without locks: let no second run write there"]
    assert files(tmp_path / "run") == [MARKER, "checkpoint.pt"]


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    def flock(*args): raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(TrainingError, match="cannot write to .*run: "):
        with lock_folder(tmp_path / "run"): pass
    assert not list(tmp_path.iterdir())


@posix
def test_the_lock_of_somebody_else(tmp_path):
    (tmp_path / "keys").write_text("secret")
    for plant in (lambda path: path.symlink_to("keys"), os.mkfifo, Path.mkdir):
        plant(tmp_path / LOCK)
        with pytest.raises(TrainingError, match="is no plain file; remove it, or name another folder"):
            with lock_folder(tmp_path): pass
        assert not stat.S_ISREG((tmp_path / LOCK).lstat().st_mode) and (tmp_path / "keys").read_text() == "secret"
        (tmp_path / LOCK).rmdir() if plant is Path.mkdir else (tmp_path / LOCK).unlink()
    for content, stays in ((b"", False), (HELD[:7], False), (HELD, False), (b"of apt", True), (HELD + b"!", True)):
        (tmp_path / LOCK).write_bytes(content)
        with lock_folder(tmp_path): assert (tmp_path / LOCK).read_bytes() == content
        assert (tmp_path / LOCK).exists() == stays


HOLD = """import sys, time
from finessl.engine.storage import lock_folder
with lock_folder(sys.argv[1]) as run:
    run.write("checkpoint.pt", b"step 1")
    print("held", flush=True)
    time.sleep(60)"""


def test_the_lock_ends_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path / "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENV) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match="another run is writing"):
            with lock_folder(tmp_path / "run"): pass
        child.kill()
    assert LOCK in files(tmp_path / "run")
    with lock_folder(tmp_path / "run") as run: assert run.read("checkpoint.pt") == b"step 1"
    assert files(tmp_path / "run") == [MARKER, "checkpoint.pt"]


TURNS = """import os, sys, time
from finessl.engine.errors import TrainingError
from finessl.engine.storage import lock_folder
held, end = 0, time.time() + 4
while time.time() < end and held < 150:
    try:
        with lock_folder(sys.argv[1], say=print) as run:
            os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL)) # fails where two hold it
            run.write("checkpoint.pt", b"x", durable=False), run.remove("checkpoint.pt")
            os.unlink(sys.argv[2])
            held += 1
    except TrainingError as e: assert "another run is writing" in str(e), e
print(held)"""


def test_runs_that_begin_and_end_together_take_turns(tmp_path):
    command = [sys.executable, "-c", TURNS, tmp_path / "runs/a", tmp_path / "one"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENV) for _ in range(3)]
    said = [c.communicate(timeout=240)[0].strip() for c in children]
    assert [c.returncode for c in children] == [0, 0, 0] and sum(map(int, said)) > 50, said
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


@posix
def test_a_folder_that_is_removed_under_a_run_gets_nothing_more(tmp_path):
    folder = tmp_path / "run"
    with lock_folder(folder) as old:
        old.write("checkpoint.pt", b"old")
        for path in folder.iterdir(): path.unlink()
        folder.rmdir()
        with lock_folder(folder) as new:
            new.write("checkpoint.pt", b"new")
            for f in (old.check, old.mark, lambda: old.write("record.json", b"{}"),
                      lambda: old.remove("checkpoint.pt")):
                with pytest.raises(TrainingError, match="was removed under a run, which writes no more there"): f()
        assert files(folder) == [MARKER, "checkpoint.pt"]
    assert files(folder) == [MARKER, "checkpoint.pt"] and (folder / "checkpoint.pt").read_bytes() == b"new"


@posix
def test_a_lock_that_is_taken_away_is_noticed(tmp_path):
    with lock_folder(tmp_path) as old:
        (tmp_path / LOCK).unlink()
        with pytest.raises(TrainingError, match="was removed under a run"): old.write("record.json", b"{}")
        with lock_folder(tmp_path) as new:
            with pytest.raises(TrainingError, match="was removed under a run"): old.write("record.json", b"{}")
            new.check()
    one, other = lock_folder(tmp_path), lock_folder(tmp_path)
    one.__enter__()
    (tmp_path / LOCK).unlink()
    new = other.__enter__()
    one.__exit__(None, None, None)                                # the first to end leaves the other's lock
    new.check()
    other.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


@posix
def test_a_folder_that_is_moved_while_it_is_locked_is_left(tmp_path, monkeypatch):
    def move_first(fd, real=storage.lock_descriptor, **how):
        if not (tmp_path / "moved").exists(): (tmp_path / "run").rename(tmp_path / "moved")
        return real(fd, **how)
    monkeypatch.setattr(storage, "lock_descriptor", move_first)
    with lock_folder(tmp_path / "run") as run: run.write("checkpoint.pt", b"step 1")
    assert files(tmp_path / "run") == [MARKER, "checkpoint.pt"] and files(tmp_path / "moved") == []


@posix
def test_a_folder_that_is_moved_keeps_its_run(tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    with lock_folder(folder) as old:
        old.write("checkpoint.pt", b"old")
        folder.rename(moved)
        with lock_folder(folder) as new:
            new.write("checkpoint.pt", b"new"), old.write("checkpoint.pt", b"old 2", keep="previous-checkpoint.pt")
            with pytest.raises(OSError): old.write("picture.png", lambda path: path.write_text("by path"))
            assert files(folder) == [MARKER, LOCK, "checkpoint.pt"]
        assert files(moved) == [MARKER, LOCK, "checkpoint.pt", "previous-checkpoint.pt"]
    assert (folder / "checkpoint.pt").read_bytes() == b"new" and (moved / "checkpoint.pt").read_bytes() == b"old 2"
    assert files(moved) == [MARKER, "checkpoint.pt", "previous-checkpoint.pt"]


@posix
def test_links_and_pipes_in_a_runs_folder_stay(tmp_path):
    with lock_folder(tmp_path / "run") as run:
        run.mark()
        (tmp_path / "run/checkpoint.pt").symlink_to("../large-disk.pt"), os.mkfifo(tmp_path / "run/record.json")
        reader = os.open(tmp_path / "run/record.json", os.O_RDONLY | os.O_NONBLOCK)
        run.write("checkpoint.pt", b"step 1"), run.write("record.json", b"{}")
        assert os.read(reader, 9) == b"{}" and (tmp_path / "large-disk.pt").read_bytes() == b"step 1"
        os.close(reader)
        assert (tmp_path / "run/checkpoint.pt").is_symlink()


def test_a_run_in_the_folder_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (".", "", "run/", "./run/../run"):
        with lock_folder(path) as run: run.write("record.json", b"{}")
        with lock_folder(path) as run: assert run.read("record.json") == b"{}"
    assert files(tmp_path) == [MARKER, "record.json", "run"]


@posix
def test_a_link_to_nothing_and_a_folder_that_went_are_named(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "none")
    with pytest.raises(TrainingError, match="is a link to nothing; a run needs a folder"):
        with lock_folder(tmp_path / "link"): pass
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(TrainingError, match="the current folder, which was removed"):
        with lock_folder("run"): pass
