"""Faults while something is written: each call of each scenario fails in turn with each error, or is the last.

Faults are put into the functions of `os` that make system calls. Calls that only look get one of the errors, and no
crash: they leave what the call before them left. Crashes happen in children that this file, run as a script, forks.
"""
import contextlib, errno, json, os, re, stat, subprocess, sys, tempfile, time
from pathlib import Path

import pytest

from finessl.engine import atomic, storage
from finessl.engine.errors import TrainingError, UsageError
from finessl.engine.atomic import append_record
from finessl.engine.storage import HELD, LOCK, MARKER, lock_folder, read_marker, write_atomic
from storage_helpers import ENV, Faults, open_files, posix, quick_folder, records, unsaid

OURS = re.compile(r"\..*\.finessl-([0-9a-f]{8}-)?[0-9a-f]{16}\.tmp", re.DOTALL) # the name of a temporary file
LOOKS = {"stat", "fstat", "lstat", "listdir", "lseek", "read", "readlink"} # change nothing: one error each, in turn
ERRORS = (errno.ENOSPC, errno.EIO, errno.EINTR, errno.ENOSYS, errno.EPERM)


def bystanders(d):
    "Files of a user beside ours."
    (d / ".cache.tmp").mkdir(), (d / ".cache.tmp/x").write_text("a folder")
    (d / ".notes.tmp").write_text("a thesis"), (d / ".notes.tmp").chmod(0o600)
    (d / "photo.png").write_bytes(b"\x89PNG")
    (d / f".record.json.finessl-{'d' * 8}-{'0' * 16}.tmp").write_text("of another run")


def seen(d):
    "Name -> what is there; our temporary files and our lock left out, and the id in a marker."
    found = {}
    for path in sorted(d.rglob("*")):
        name, mode = str(path.relative_to(d)), path.lstat().st_mode
        if (OURS.fullmatch(path.name) and "d" * 8 not in name) or path.name == LOCK: continue
        if stat.S_ISLNK(mode): content = os.readlink(path)
        elif not stat.S_ISREG(mode): content = None
        elif path.name == MARKER: content = {k: v for k, v in json.loads(path.read_bytes()).items() if k != "id"}
        else: content = path.read_bytes()
        found[name] = stat.S_IFMT(mode), mode & 0o777 if stat.S_ISREG(mode) else None, content
    return found


# what is prepared in a folder, and steps in it, parted by `yield`

def a_file(name, content=b"old", mode=0o640):
    def prepare(d):
        (d / name).write_bytes(content), (d / name).chmod(mode)
        if os.name != "nt" and os.geteuid() == 0: os.chown(d / name, 1234, 4321)
    return prepare


def nothing(d): pass


def a_link(d): a_file("real.csv")(d), (d / "new.csv").symlink_to("real.csv")


def a_pipe(d):
    os.mkfifo(d / "new.csv", 0o644)
    readers.append(os.open(d / "new.csv", os.O_RDONLY | os.O_NONBLOCK)) # a writer waits for one


readers = []
LONG = b"file,class\n" * 1000


def writes(content=LONG, **how):
    def act(d):
        write_atomic(d / "new.csv", content, **how)
        yield
    return act


def by_function(tmp): tmp.write_bytes(LONG)


def appends(d):
    append_record(d / "new.jsonl", {"seed": 1, "text": "x" * 500}, say=unsaid)
    yield


def a_run(d):
    with lock_folder(d / "r", command="finessl train", say=unsaid) as run:
        yield
        for step in (1, 2):
            run.write("checkpoint.pt", b"step %d" % step * 100, keep="previous-checkpoint.pt")
            yield
        run.write("model.safetensors", LONG)
        yield
        run.write_json("record.json", {"accuracy": .5})
        yield
        run.remove("checkpoint.pt", "previous-checkpoint.pt")
        yield


def an_empty_run(d):
    with lock_folder(d / "x/r", say=unsaid): yield


def killed_run(d):
    "What a run that was killed leaves."
    with lock_folder(d / "r", command="finessl train") as run:
        run.write("checkpoint.pt", b"step 0", keep="previous-checkpoint.pt")
        (d / "r" / f".checkpoint.pt.finessl-{run.about['id']}-{'1' * 16}.tmp").write_bytes(b"half")
    (d / "r" / LOCK).write_bytes(HELD[:9]), bystanders(d / "r")


WHOLE, HALF = b'{"seed": 0}\n', b'{"seed": 7, "te'
SCENARIOS = { # name -> what is prepared, what is done, whether Windows is pretended, calls that are not there
    "a new file": (nothing, writes(), False, ()),
    "a file replaced": (a_file("new.csv"), writes(), False, ()),
    "a file that stays under another name": (a_file("new.csv"), writes(keep="old.csv"), False, ()),
    "the same without hard links": (a_file("new.csv"), writes(keep="old.csv"), False, ("link",)),
    "through a link": (a_link, writes(), False, ()),
    "by a function": (a_file("new.csv"), writes(by_function), False, ()),
    "a table in place of a table": (a_file("new.csv", b"file,class\n"), writes(overwrite=b"file,class"), False, ()),
    "not durable": (a_file("new.csv"), writes(durable=False), False, ()),
    "into a pipe": (a_pipe, writes(), False, ()),
    "into a pipe by a function": (a_pipe, writes(by_function), False, ()),
    "a first line": (nothing, appends, False, ()),
    "a further line": (a_file("new.jsonl", WHOLE), appends, False, ()),
    "behind half a line": (a_file("new.jsonl", WHOLE + HALF), appends, False, ()),
    "behind a line without an end": (a_file("new.jsonl", WHOLE[:-1]), appends, False, ()),
    "a run": (nothing, a_run, False, ()),
    "a run where one was killed": (killed_run, a_run, False, ()),
    "a run without locks": (nothing, a_run, False, ("flock",)),
    "a run that writes nothing": (nothing, an_empty_run, False, ()),
    "as on Windows: a file replaced": (a_file("new.csv"), writes(keep="old.csv"), True, ()),
    "as on Windows: a further line": (a_file("new.jsonl", WHOLE), appends, True, ()),
    "as on Windows: a run": (killed_run, a_run, True, ()),
    "as on Windows: a run that writes nothing": (nothing, an_empty_run, True, ()),
}


class Scenario:
    "One of SCENARIOS, in a folder of its own each time: at first undisturbed, then with a fault at every call."
    def __init__(self, name, where: Path):
        self.prepare, self.act, self.windows, self.never = SCENARIOS[name]
        self.name, self.where, self.points, self.wrong = name, where, 0, []

    def __enter__(self):
        self.real = os.fsync, atomic.WINDOWS, storage.WINDOWS
        atomic.WINDOWS = storage.WINDOWS = self.windows or os.name == "nt"
        os.fsync = lambda fd: None                             # nothing waits for the disk
        with self.fresh() as d: self.states = [seen(d), *(seen(d) for _ in self.act(d)), seen(d)]
        with self.fresh() as d, Faults(never=self.never) as undisturbed:
            for _ in self.act(d): pass
        self.calls = undisturbed.log
        return self

    def __exit__(self, *exc): os.fsync, atomic.WINDOWS, storage.WINDOWS = self.real

    @contextlib.contextmanager
    def fresh(self):
        d = Path(tempfile.mkdtemp(dir=self.where))
        bystanders(d), self.prepare(d)
        yield d
        while readers: os.close(readers.pop())

    def errors(self, n): return (ERRORS[n % 5],) if self.calls[n] in LOOKS else ERRORS

    def fail(self, n, error):
        "The n-th call fails."
        what = f"{self.name}, call {n} ({self.calls[n]}) fails with {errno.errorcode[error]}"
        with self.fresh() as d:
            done, raised, files = 0, None, open_files()
            with Faults(n, error, self.never):
                try:
                    for _ in self.act(d): done += 1
                except (OSError, TrainingError, UsageError) as e: raised = e
            until = time.monotonic() + 1 # another thread may be reading a file just now; what stays open stays
            while open_files() != files and time.monotonic() < until: time.sleep(.02)
            self.note(open_files() == files, f"{what}: a file stays open")
            if raised is None: self.note(done == len(self.states) - 2, f"{what}: steps left out")
            temporary = [name for name in self.temporary(d) if "1" * 16 not in name]
            self.note(not temporary or self.calls[n] == "unlink", f"{what}: {temporary} stays")
            self.judge(what, d, done, exact=True)

    def crash(self, n, when):
        "The n-th call is the last of its process."
        what = f"{self.name}, the last call is {n} ({self.calls[n]}), {when}"
        with self.fresh() as d:
            steps, told = os.pipe()
            if (pid := os.fork()) == 0:
                with Faults(n, when, self.never) as faults:
                    for _ in self.act(d): faults.real[os, "write"](told, b".")
                os._exit(0)
            os.close(told)
            self.note(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7, f"{what}: it went on")
            done = len(os.read(steps, 99))
            os.close(steps)
            self.judge(what, d, done, exact=False)

    def judge(self, what, d, done, exact):
        "All that is there is as it was, or whole and new; and the next one gets through."
        self.points += 1
        now, old, new = seen(d), self.states[done], self.states[done + 1]
        for name in sorted({*now, *old, *new}):
            fits = any(self.fits(now.get(name), want.get(name)) for want in (old, new))
            fits = fits or name in ("r", "x", "x/r") and name not in now # made, empty and removed
            fits = fits or name == "new.csv" and "link" in self.never and not exact # for a moment only old.csv is there
            if name == "new.jsonl" and not fits: fits = self.lines(d / name, now[name][2], exact)
            self.note(fits, f"{what}: {name} is {str(now.get(name))[:90]}")
        if (d / "new.jsonl").exists():
            before = records(d / "new.jsonl")
            for _ in self.act(d): pass
            self.note(records(d / "new.jsonl") == [*before, 1], f"{what}: the next line is lost")
            return
        for _ in self.act(d): pass
        self.note(self.fits_all(seen(d), self.states[-1]), f"{what}: the next one does not get through")
        self.note(not [*d.rglob(LOCK)], f"{what}: the lock's file stays")
        if (marker := read_marker(d / "r")) is not None:
            mine = [name for name in self.temporary(d) if marker["id"] in name]
            self.note(not mine, f"{what}: {mine} stays")

    def lines(self, path, content, exact):
        "Whole lines, and perhaps a part of one at the end; in a process that lives on, only what is torn may be gone."
        return content in (b"", WHOLE) if exact else records(path) in ([], [0])

    @staticmethod
    def fits(here, want): # here: perhaps of a stricter mode
        return here == want or None not in (here, want) and here[::2] == want[::2] and not here[1] & ~want[1]

    def fits_all(self, here, want): # old.csv is what was there last; x and x/r stay where their lock's file had to
        names = {*here, *want} - {"old.csv", "x", "x/r"}
        if "link" in self.never: names -= {"new.csv"}          # whose mode is lost if it was killed between two names
        return all(self.fits(here.get(name), want.get(name)) for name in names)

    def temporary(self, d): return [p.name for p in d.rglob("*") if OURS.fullmatch(p.name) and "d" * 8 not in p.name]

    def note(self, right, text):
        if not right: self.wrong.append(text)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_call_that_fails(name):
    if "pipe" in name and os.name == "nt": pytest.skip("named pipes as Unix has them")
    with quick_folder() as where, Scenario(name, where) as scenario:
        for n in range(len(scenario.calls)):
            for error in scenario.errors(n): scenario.fail(n, error)
    assert not scenario.wrong, "\n".join(scenario.wrong[:20])
    assert scenario.points >= len(scenario.calls) >= 5     # fewer would mean that calls are not counted


def every_crash(where: Path) -> dict: # name of a scenario -> points, what was wrong
    found = {}
    for name in SCENARIOS:
        with Scenario(name, where) as scenario:
            for n, call in enumerate(scenario.calls):
                if call in LOOKS or call in scenario.never: continue
                for when in ("half", "after") if call == "write" else ("after",): scenario.crash(n, when)
        found[name] = {"points": scenario.points, "calls": len(scenario.calls), "wrong": scenario.wrong}
    return found


@pytest.fixture(scope="module")
def crashes():
    "Children are forked by a process without threads."
    with quick_folder() as d:
        p = subprocess.run([sys.executable, __file__, d], text=True, capture_output=True, timeout=300, env=ENV)
    assert p.returncode == 0, p.stderr
    return json.loads(p.stdout)


@posix
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_call_that_is_the_last(crashes, name):
    found = crashes[name]
    assert not found["wrong"], "\n".join(found["wrong"][:20])
    assert found["points"] >= 4


@posix
def test_the_points_are_many(crashes):
    failing = 0
    with quick_folder() as where:
        for name in SCENARIOS:
            with Scenario(name, where) as scenario:
                failing += sum(len(scenario.errors(n)) for n in range(len(scenario.calls)))
    assert failing > 1500 and sum(found["points"] for found in crashes.values()) > 300


if __name__ == "__main__": print(json.dumps(every_crash(Path(sys.argv[1]))))
