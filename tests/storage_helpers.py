"""What the tests of storage share: system calls that fail, places, permissions."""
import contextlib, errno, os, tempfile
from pathlib import Path

import pytest

from finessl.engine import storage
from finessl.engine.atomic import read_records
from finessl.engine.errors import TrainingError, UsageError

posix = pytest.mark.skipif(os.name == "nt", reason="links, pipes, modes and forks as Unix has them")
as_root = pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root gives files away")
ENV = os.environ | {"PYTHONPATH": str(Path(storage.__file__).parents[2])} # of processes that are started
CALLS = ("open write fsync replace link unlink fchmod fchown close stat fstat lstat mkdir rmdir listdir ftruncate "
         "lseek read dup readlink").split() # of os; beside them flock


class Faults:
    "While active, system calls are counted, and the one of number `at` fails: `fault` is an errno, or a crash."
    def __init__(self, at=None, fault=None, never=()): # never: names of calls that always fail
        self.at, self.fault, self.never, self.log, self.real = at, fault, never, [], {}

    def __enter__(self):
        places = [(os, name) for name in CALLS if hasattr(os, name)]
        with contextlib.suppress(ImportError):
            import fcntl
            places.append((fcntl, "flock"))
        for module, name in places:
            self.real[module, name] = getattr(module, name)
            setattr(module, name, self.counted(name, self.real[module, name]))
        return self

    def __exit__(self, *exc):
        for (module, name), real in self.real.items(): setattr(module, name, real)

    def counted(self, name, real):
        def call(*args, **kwargs):
            self.log.append(name)
            if name in self.never: raise OSError(errno.EPERM, "never")
            if len(self.log) - 1 != self.at: return real(*args, **kwargs)
            try:
                if self.fault == "half": real(args[0], args[1][:len(args[1]) // 2])
                elif self.fault == "after" or name == "close": real(*args, **kwargs) # what cannot be closed is closed
            finally:
                if self.fault in ("half", "after"): os._exit(7)
            raise OSError(self.fault, os.strerror(self.fault))
        return call


@contextlib.contextmanager
def quick_folder(): # in memory, where there is such a place
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as d: yield Path(d)


def unsaid(text): pass


def records(path): return [r["seed"] for r in read_records(path, say=unsaid)]


def files(folder): return sorted(p.name for p in folder.iterdir())


def without_privileges(f, *names):
    "What `f(path)` is refused with where permissions hold, root's child too: files a and b/a, folder b are closed."
    with quick_folder() as where:
        (where / "b").mkdir(), (where / "a").write_text("old"), (where / "b/a").write_text("old")
        for name, mode in (("a", 0o444), ("b/a", 0o444), ("b", 0o555)): (where / name).chmod(mode)
        told, tell = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                if os.geteuid() == 0:
                    for path in (where, *where.rglob("*")): os.chown(path, 65534, 65534)
                    os.setresuid(65534, 65534, 65534)
                for name in names:
                    try: f(where / name)
                    except (UsageError, TrainingError) as e: os.write(tell, f"{e}\n".replace(f"{where}/", "").encode())
            finally: os._exit(0)
        os.close(tell), os.waitpid(pid, 0)
        with os.fdopen(told) as f: return f.read().splitlines()
