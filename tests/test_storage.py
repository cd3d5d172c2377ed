"""Where a file goes: links, pipes, devices and modes stay, and nobody else's file is touched."""
import errno, os, re, secrets, socket, stat, subprocess, sys
from pathlib import Path

import pytest

from finessl.engine.errors import UsageError
from finessl.engine.storage import check_target, refuse_inputs, write_atomic, write_json
from storage_helpers import ENV, as_root, posix, without_privileges


# ---------------------------------------------------------------- whose file

@posix
def test_a_new_file_follows_the_umask_and_one_that_is_replaced_keeps_its_mode(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        old = os.umask(umask)
        try: write_atomic(tmp_path / f"{umask}", "new")
        finally: os.umask(old)
        assert (tmp_path / f"{umask}").stat().st_mode & 0o777 == mode
    for mode in (0o600, 0o640, 0o664, 0o666):
        (tmp_path / "a").write_text("old"), (tmp_path / "a").chmod(mode)
        write_atomic(tmp_path / "a", lambda tmp: tmp.write_text("new"))
        assert (tmp_path / "a").read_text() == "new" and (tmp_path / "a").stat().st_mode & 0o777 == mode


@posix
def test_the_temporary_file_of_a_private_one_is_private(tmp_path):
    (tmp_path / "a").write_text("old"), (tmp_path / "a").chmod(0o600)
    def look(tmp): modes.append(tmp.stat().st_mode & 0o777), tmp.write_text("new")
    modes = []
    write_atomic(tmp_path / "a", look)
    assert modes == [0o600]


@as_root
def test_root_gives_a_file_back_to_its_owner(tmp_path):
    (tmp_path / "a").write_text("old"), os.chown(tmp_path / "a", 1234, 4321), (tmp_path / "a").chmod(0o640)
    write_atomic(tmp_path / "a", "new")
    there = (tmp_path / "a").stat()
    assert (there.st_uid, there.st_gid, there.st_mode & 0o777) == (1234, 4321, 0o640)


@posix
def test_a_mode_that_cannot_be_kept_is_never_looser(tmp_path, monkeypatch):
    def chmod(fd, mode): raise OSError(errno.EPERM, "never")
    monkeypatch.setattr(os, "fchmod", chmod)
    for mode, kept in ((0o644, 0o600), (0o600, 0o600)):          # stricter is no reason to fail
        (tmp_path / "a").write_text("old"), (tmp_path / "a").chmod(mode)
        write_atomic(tmp_path / "a", "new")
        assert (tmp_path / "a").read_text() == "new" and (tmp_path / "a").stat().st_mode & 0o777 == kept
    (tmp_path / "a").write_text("old"), (tmp_path / "a").chmod(0o200)  # it can be written but not read
    with pytest.raises(OSError): write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o200


@posix
def test_links_stay_and_what_they_mean_is_replaced(tmp_path):
    (tmp_path / "far").mkdir(), (tmp_path / "far/real.csv").write_text("old")
    (tmp_path / "two.csv").symlink_to("far/../far/real.csv"), (tmp_path / "one.csv").symlink_to("two.csv")
    (tmp_path / "folder").symlink_to("far"), (tmp_path / "far/dangling.csv").symlink_to("made.csv")
    for name, real in (("one.csv", "real.csv"), ("folder/real.csv", "real.csv"), ("folder/dangling.csv", "made.csv")):
        write_atomic(tmp_path / name, name)
        assert (tmp_path / "far" / real).read_text() == name and not (tmp_path / "far" / real).is_symlink()
    assert all((tmp_path / name).is_symlink() for name in ("one.csv", "two.csv", "folder", "far/dangling.csv"))
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(OSError) as e: write_atomic(tmp_path / "ring", "new")
    assert e.value.errno == errno.ELOOP and (tmp_path / "ring").is_symlink()


@posix
def test_a_second_name_of_a_file_keeps_what_it_was(tmp_path):
    (tmp_path / "a").write_text("old"), os.link(tmp_path / "a", tmp_path / "b")
    write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and (tmp_path / "b").read_text() == "old"


@posix
@pytest.mark.parametrize("content", ["file,class\n", b"file,class\n", lambda tmp: tmp.write_text("file,class\n")])
def test_a_pipe_stays_one_and_its_reader_gets_everything(tmp_path, content):
    os.mkfifo(tmp_path / "pipe"), (tmp_path / "link").symlink_to("pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    write_atomic(tmp_path / "link", content, overwrite=False)
    assert reader.communicate(timeout=20)[0] == "file,class\n" and stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe"]


@posix
def test_a_pipe_gets_nothing_where_its_content_cannot_be_made(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    def half(tmp): tmp.write_text("file,cl"), (tmp / "x").mkdir()
    with pytest.raises(OSError): write_atomic(tmp_path / "pipe", half)
    assert os.read(reader, 99) == b""
    os.close(reader)


@posix
def test_a_terminal_stays_one():
    main, terminal = os.openpty()
    name = os.ttyname(terminal)
    write_atomic(name, "file,class\n", overwrite=False)
    assert os.read(main, 99).split() == [b"file,class"] and stat.S_ISCHR(os.stat(name).st_mode)
    os.close(main), os.close(terminal)


@as_root
def test_devices_stay_devices(tmp_path):
    try: os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError: pytest.skip("no devices may be made here")
    write_atomic(tmp_path / "null", "file,class\n", overwrite=False)
    write_json(tmp_path / "null", {})
    assert stat.S_ISCHR((tmp_path / "null").lstat().st_mode) and len(list(tmp_path.iterdir())) == 1
    os.mknod(tmp_path / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    with pytest.raises(UsageError, match="is a disk"): write_atomic(tmp_path / "disk", "new")
    assert stat.S_ISBLK((tmp_path / "disk").lstat().st_mode)


@posix
def test_a_socket_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                # its name may be 100 letters long
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")
        with pytest.raises(OSError): write_atomic("socket", "new")
        assert stat.S_ISSOCK(os.lstat("socket").st_mode)


PREDICT = ("from finessl.engine.storage import write_atomic; import sys; "
           "write_atomic(sys.argv[1], 'file,class\\n', overwrite=False)")


def shell(command, where):
    "A command of bash, in which `predict NAME` writes a table."
    text = f"predict() {{ {sys.executable} -c \"{PREDICT}\" \"$1\"; }}; {command}"
    return subprocess.run(["bash", "-c", text], cwd=where, text=True, capture_output=True, timeout=60, env=ENV)


@posix
@pytest.mark.parametrize("command", [
    "predict /dev/stdout >> log", "ln -s /proc/self/fd/1 out; predict out >> log",
    "ln -s /dev/stdout out; predict out >> log",
    "predict /dev/fd/3 3>> log", "predict >(cat >> log); wait; sleep .3", "predict /dev/stdout | cat >> log"])
def test_descriptors_are_written_on_with(tmp_path, command):
    needed = "/proc/self/fd" if "/proc" in command else "/dev/fd"
    if not os.path.exists(needed): pytest.skip(f"there is no {needed} here")
    (tmp_path / "log").write_text("what was there\n")
    p = shell(command, tmp_path)
    assert (p.returncode, p.stderr) == (0, "") and (tmp_path / "log").read_text() == "what was there\nfile,class\n"
    assert not (tmp_path / "out").exists() or (tmp_path / "out").is_symlink()


@posix
def test_a_descriptor_that_is_not_open_is_an_error(tmp_path):
    p = shell("predict /dev/fd/77", tmp_path)
    assert p.returncode and "Bad file descriptor: '/dev/fd/77'" in p.stderr


# ---------------------------------------------------------------- over what

def test_what_finessl_did_not_make_is_refused(tmp_path):
    table, photo = tmp_path / "new.csv", tmp_path / "a.png"
    photo.write_bytes(b"\x89PNG"), table.write_text("file,class,confidence\n"), (tmp_path / "empty").touch()
    for overwrite in (False, b"file,class"):
        with pytest.raises(UsageError, match="was not made by finessl; name another file, or add --overwrite"):
            write_atomic(photo, "file,class\n", overwrite=overwrite)
    with pytest.raises(UsageError, match="was not made by finessl"): write_json(table, {}, overwrite=b"{")
    assert photo.read_bytes() == b"\x89PNG"
    may = {table: b"file,class", tmp_path / "empty": False, tmp_path / "new": False, photo: True}
    for path, overwrite in may.items():
        assert check_target(path, overwrite) == path
        write_atomic(path, "file,class\n", overwrite=overwrite)
        assert path.read_text() == "file,class\n"
    (tmp_path / "short").write_text("file")                      # as long as no table of ours
    with pytest.raises(UsageError): check_target(tmp_path / "short", b"file,class")


def test_places_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_text("a file")
    for path, said in ((tmp_path, "is a folder; name a file"),
                       (tmp_path / "no/new.csv", f"folder {tmp_path / 'no'} does not exist"),
                       (tmp_path / "file/new.csv", f"folder {tmp_path / 'file'} does not exist")):
        for f in (check_target, lambda path: write_atomic(path, "new")):
            with pytest.raises(UsageError, match=re.escape(said)): f(path)


@posix
def test_a_file_that_is_closed_to_its_owner_is_not_replaced():
    closed = "cannot be made: folder b cannot be written to"
    assert without_privileges(lambda path: write_atomic(path, "new"), "a", "b/new", "b/a") == [
        "a cannot be written to", f"b/new {closed}", f"b/a {closed}"]


def test_what_a_command_reads_is_not_written_over(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"\x89PNG"), (tmp_path / "other").write_text("x")
    names = [tmp_path / "a.png", f"{tmp_path}/x/../a.png"]
    (tmp_path / "x").mkdir()
    if os.name != "nt":
        (tmp_path / "link").symlink_to("a.png"), os.link(tmp_path / "a.png", tmp_path / "second")
        names += [tmp_path / "link", tmp_path / "second"]
    for path in names:
        for file in names:
            with pytest.raises(UsageError, match="is read by this command"):
                refuse_inputs(path, [tmp_path / "gone", None, file])
    refuse_inputs(tmp_path / "other", names), refuse_inputs(tmp_path / "new", names)
    refuse_inputs(tmp_path, [tmp_path])
    refuse_inputs(os.devnull, [os.devnull])


@posix
def test_where_files_have_no_numbers_their_paths_tell(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a"), (tmp_path / "b").write_text("b")
    def stat(path, real=os.stat, **how): return os.stat_result(real(path, **how)[:1] + (0,) + real(path, **how)[2:])
    monkeypatch.setattr(os, "stat", stat)
    refuse_inputs(tmp_path / "a", [tmp_path / "b"])
    with pytest.raises(UsageError): refuse_inputs(tmp_path / "a", [f"{tmp_path}/../{tmp_path.name}/a"])


# ---------------------------------------------------------------- planted names

@posix
def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0" * 2 * n) # what nobody can guess, guessed
    (tmp_path / "keys").write_text("secret"), (tmp_path / "new.csv").write_text("old")
    planted = tmp_path / f".new.csv.finessl-{'0' * 16}.tmp"
    planted.symlink_to("keys")
    for content in ("new", lambda tmp: tmp.write_text("new")):
        with pytest.raises(FileExistsError): write_atomic(tmp_path / "new.csv", content)
    assert (tmp_path / "keys").read_text() == "secret" and (tmp_path / "new.csv").read_text() == "old"
    assert planted.is_symlink()


@posix
def test_a_temporary_file_that_was_exchanged_is_not_used(tmp_path):
    (tmp_path / "keys").write_text("secret"), (tmp_path / "new.csv").write_text("old")
    def exchanged(tmp): tmp.unlink(), tmp.symlink_to("keys")
    def replaced(tmp): (tmp_path / "mine").write_text("forged"), os.replace(tmp_path / "mine", tmp)
    for content in (exchanged, replaced):
        with pytest.raises(OSError, match="temporary file was exchanged"): write_atomic(tmp_path / "new.csv", content)
        assert ((tmp_path / "keys").read_text(), (tmp_path / "new.csv").read_text()) == ("secret", "old")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keys", "new.csv"]


@posix
def test_a_folder_that_is_exchanged_gets_nothing(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    def exchange(tmp):
        tmp.write_text("new")
        (tmp_path / "a").rename(tmp_path / "c"), (tmp_path / "a").symlink_to("b")
    with pytest.raises(OSError): write_atomic(tmp_path / "a/new.csv", exchange)
    assert not list((tmp_path / "b").iterdir()) and not list((tmp_path / "c").iterdir())


@posix
@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "new\nline.csv", os.fsdecode(b"caf\xe9.csv"), "-rf", " ",
                                  "a" * 250 + ".json"])
def test_every_name_that_a_system_takes(tmp_path, name):
    try: (tmp_path / name).write_text("old")
    except OSError: pytest.skip("this system does not take it")
    write_atomic(tmp_path / name, "new", keep="old")
    assert (tmp_path / name).read_text() == "new" and (tmp_path / "old").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


@posix
def test_a_second_name_that_is_there_already_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").write_text("old")
    os.link(tmp_path / "a", tmp_path / "previous-a")            # as a crash between two steps leaves it
    write_atomic(tmp_path / "a", "new", keep="previous-a")
    assert [(p.name, p.read_text()) for p in sorted(tmp_path.iterdir())] == [("a", "new"), ("previous-a", "old")]
