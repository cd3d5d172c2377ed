"""Faults that strike a run at a chosen place: SIGKILL while it writes, a full disk, missing memory, images that break.

The faults happen in real processes: this file, run as a script, imports torch once and forks a child for each of them.
"""
import ctypes, json, os, shlex, shutil, signal, subprocess, sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from finessl.cli import demo as cli_demo
from finessl.cli import main as cli_main
from finessl import data, training
from finessl.engine import batches, prefetch, storage
from finessl.algorithms import FineSSL
from finessl.backbone import load_backbone
from finessl.engine.errors import DataError
from finessl.data import digits
from finessl.engine.folders import image_folder
from finessl.engine.folders import image_lists
from finessl.pseudo_labels import FixMatch, SupervisedOnly
from finessl.engine.schedule import Schedule
from finessl.engine.errors import TrainingError
from finessl.training import fit
from finessl.engine.storage import MARKER, lock_folder
from finessl.engine.runs import load_run
from test_training import ENV, few, outcome, same_record

if sys.platform == "linux": import resource
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, signals and limits as Linux has them")

STEPS, EVERY, FEW = 12, 4, few() # of a run; steps between its checkpoints; the digits of a demo


def go(out, resume=False, **changes):
    "A short run of FineSSL."
    settings = dict(n_prompts=2, schedule=Schedule(STEPS, reset_pace_every=5), batch=4, evals=3, checkpoint_every=EVERY,
                    progress=False) | changes
    return fit(few(), "pocket", FineSSL(), out=out, resume=resume, **settings)


def terminal(text): sys.exit(cli_main.main(shlex.split(text)[1:]))


def program(text):
    "A command as a process of its own runs it, on fewer digits; the demo's reference lines are left out."
    sys.argv, cli_demo.references, data.digits = shlex.split(text), lambda *args: {}, lambda *args: FEW
    sys.exit(cli_main.main())


# ---------------------------------------------------------------- faults, put into place in a child

def die(): os.kill(os.getpid(), signal.SIGKILL)


def kill_in_write(name, n=1):
    "SIGKILL when half of the `n`-th file called `name` is on the disk."
    real, seen = storage.replace_file, []
    def dying(folder, file, content, *args, **how):
        seen.append(file)
        def half(tmp):
            tmp.write_bytes(content[:len(content) // 2])
            die()
        real(folder, file, half if seen.count(name) == n and file == name else content, *args, **how)
    storage.replace_file = dying


def kill_before_rename(n):
    "SIGKILL before the `n`-th renaming of this process."
    real, calls = os.replace, []
    def dying(*args, **folders):
        calls.append(1)
        if len(calls) == n: die()
        real(*args, **folders)
    os.replace = dying


def kill_before_removal(name):
    "SIGKILL before a file of this name is removed."
    real = os.unlink
    def dying(path, **folder):
        if Path(path).name == name: die()
        real(path, **folder)
    os.unlink = dying


def at_step(t, f, algorithm=FineSSL):
    "Call `f` in step `t`, counted from 1."
    real, calls = algorithm.__call__, []
    def call(self, step, state):
        calls.append(1)
        if len(calls) == t: f()
        return real(self, step, state)
    algorithm.__call__ = call


def no_space_for(name):
    "The next `name` that this process writes finds no space left."
    real = storage.replace_file
    def full(folder, file, content, *args, **how):
        if file != name: return real(folder, file, content, *args, **how)
        with open("/dev/full", "wb") as f: f.write(b"0" * 2**20)
    storage.replace_file = full


def limit(what, value): resource.setrlimit(what, (value, value))


def little_memory():
    ("From here on, memory for hardly anything new; and a step that wants 4 GiB, because what was freed before may "
     "serve it else.")
    limit(resource.RLIMIT_AS, int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**20)
    torch.empty(2**30)


def no_privileges():
    "Permissions hold for root, too."
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    libc.capget(head, sets)
    # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; effective, permitted
    for k in (0, 1): sets[k] &= ~0b110
    libc.capset(head, sets)


def read_only(out, after=None):
    "Nobody may write into the folder; from step `after` on."
    no_privileges()
    if after: at_step(after, lambda: out.chmod(0o555))
    else: out.mkdir(mode=0o555)


def small_disk(out, kib):
    "A disk of a few KiB at `out`, seen by this process alone; an exit with 77 where that is not allowed."
    libc, out = ctypes.CDLL(None, use_errno=True), str(out).encode()
    new_mounts, new_user, private = 0x20000, 0x10000000, 0x4000 | 1 << 18
    if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user): sys.exit(77)
    if libc.mount(b"none", b"/", None, private, None): sys.exit(77)
    if libc.mount(b"tmpfs", out, b"tmpfs", 0, f"size={kib}k".encode()): sys.exit(77)
    # mount it again, with another size
    return lambda kib: libc.mount(b"tmpfs", out, b"tmpfs", 32, f"size={kib}k".encode())


def on_a_small_disk(out, text):
    "A command on a disk that is full after its first checkpoint, and once more when it has grown."
    (out.parent / "disk").mkdir()
    grow = small_disk(out.parent / "disk", 128) # marker and lock take a page each
    first = cli_main.main(shlex.split(text)[1:])
    left = sorted(f.name for f in (out.parent / "disk/run").iterdir())
    grow(1000)
    second = cli_main.main(shlex.split(f"{text} --resume")[1:])
    shutil.copytree(out.parent / "disk/run", out)
    print(json.dumps([first, left, second]))


TRAIN = (f"finessl train --data digits --per-class 1 --steps {STEPS} --batch 4 --prompts 2 --evals 1 "
         f"--checkpoint-every {EVERY} --quiet --out")
MUCH = TRAIN.replace("--batch 4", "--batch 32").replace(f"--steps {STEPS}", "--steps 6")
MUCH = MUCH.replace(f"every {EVERY}", "every 2")

FAULTS = {   # name -> what is put into place, what is run, given the folder of the run
    "the first checkpoint half written": (lambda o: kill_in_write("checkpoint.pt"), go),
    "a checkpoint half written": (lambda o: kill_in_write("checkpoint.pt", 2), go),
    "a checkpoint written, nothing renamed": (lambda o: kill_before_rename(3), go),
    "between the two renames": (lambda o: kill_before_rename(4), go),
    "the model half written": (lambda o: kill_in_write("model.safetensors"), go),
    "the model there, the record not": (lambda o: kill_in_write("record.json"), go),
    "the record there, the checkpoints too": (lambda o: kill_before_removal("checkpoint.pt"), go),
    "one run's model over another's": (lambda o: (go(o, seed=1), kill_before_rename(5)), lambda o,
                                       **k: go(o, overwrite=True, **k)),
    "no space for a checkpoint": (lambda o: at_step(8, lambda: limit(resource.RLIMIT_FSIZE, 4096)), lambda o,
                                  resume=False: terminal(f"{TRAIN} {o}" + " --resume" * resume)),
    "no space for the model": (lambda o: at_step(STEPS, lambda: no_space_for("model.safetensors")), go),
    "no space for the record": (lambda o: at_step(STEPS, lambda: no_space_for("record.json")), go),
    "no memory": (lambda o: at_step(6, little_memory), lambda o,
                  resume=False: terminal(f"{MUCH} {o}" + " --resume" * resume)),
    "read-only from a step on": (lambda o: read_only(o, 8), lambda o,
                                 resume=False: (o.chmod(0o755) if resume else None, go(o, resume))),
    "a read-only folder": (read_only, lambda o, resume=False: terminal(f"{TRAIN} {o}")),
    "a folder that is a file": (lambda o: o.write_text("a file"), go),
    "a folder below a file": (lambda o: (o.parent / "file").write_text("a file"), lambda o,
                              resume=False: go(o.parent / "file/run")),
}
DEMO = "finessl demo --steps 2 --quiet --out"
# name -> what Ctrl-C strikes, in which step, what is said
STOPS = {"labelled-only": (SupervisedOnly, 1, "labelled-only stopped after step 1 of 2, checkpoint written"),
         "FixMatch": (FixMatch, 2, "FixMatch stopped after the last step, record and model written"),
         "FineSSL": (FineSSL, 1, "FineSSL stopped after step 1 of 2, checkpoint written")}
WHOLE = {"demo": lambda o: program(f"{DEMO} {o}"), "go": go, "train": lambda o: terminal(f"{TRAIN} {o}"),
         "much": lambda o: terminal(f"{MUCH} {o}")}


def child(out, f, *before):
    ("Run `f(out)` in a forked process: its exit code (or minus the signal), what it printed, and the files in `out` "
     "after it.")
    texts = [out.parent / name for name in ("stdout", "stderr")]
    if (pid := os.fork()) == 0:
        code = 1
        try:
            for number, text in enumerate(texts, 1):
                os.dup2(os.open(text, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            for b in before: b(out)
            f(out)
            code = 0
        except SystemExit as e: code = e.code or 0
        except BaseException as e: print(f"{type(e).__name__}: {e}", file=sys.stderr)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    files = sorted(f.name for f in out.iterdir()) if out.is_dir() else None
    return {"code": code, "files": files} | {t.name: t.read_text() for t in texts}


def every_fault(where: Path) -> dict:
    "Name -> what happened at the fault, and at the resume after it."
    found = {}
    import finessl.studies.comparison, finessl.bias, matplotlib.figure # for the demo
    # what is imported late, is imported before the children are made
    go(None, checkpoint_every=None)
    for k, (name, (fault, f)) in enumerate(FAULTS.items()):
        out = where / str(k) / "run"
        out.parent.mkdir()
        found[name] = {"out": str(out), "first": child(out, f, fault),
                       "second": child(out, lambda o: f(o, resume=True))}
    for name, (algorithm, t, _) in STOPS.items():
        out = where / name / "run"
        out.parent.mkdir()
        first = child(out, lambda o: program(f"{DEMO} {o}"),
                      lambda o: at_step(t, lambda: os.kill(os.getpid(), signal.SIGINT), algorithm))
        found[name] = {"out": str(out), "first": first,
                       "second": child(out, lambda o: program(first["stderr"].partition("go on with: ")[2]))}
    for name, f in WHOLE.items():
        (where / name).mkdir()
        found[name] = {"out": str(where / name / "run"), "first": child(where / name / "run", f)}
    (where / "disk").mkdir()
    found["disk"] = {"out": str(where / "disk/run"),
                     "first": child(where / "disk/run",
                                    lambda o: on_a_small_disk(o, f"{TRAIN} {o.parent / 'disk/run'}"))}
    return found


# ---------------------------------------------------------------- what is left of a run

@pytest.fixture(scope="module")
def happened(tmp_path_factory):
    "What every fault did."
    # where autograd sees a GPU, a process that has gone backward has no children that can
    without = ENV | {"CUDA_VISIBLE_DEVICES": ""}
    p = subprocess.run([sys.executable, __file__, tmp_path_factory.mktemp("faults")], env=without, text=True,
                       capture_output=True, timeout=500)
    assert p.returncode == 0, p.stderr
    return json.loads(p.stdout)


def ends_as(happened, name, whole):
    "The resume after a fault has the weights and the record of the run that nothing struck."
    second = happened[name]["second"]
    assert second["code"] == 0 and second["files"] == [MARKER, "model.safetensors", "record.json"], happened[name]
    a, b = (outcome(Path(happened[n]["out"])) for n in (name, whole))
    assert a[0] == b[0]
    for r in (a[1], b[1]): r.pop("command")
    same_record(a[1], b[1])
    return [r["step"] for r in a[1]["resumes"]]


half = lambda name, f: any(n.startswith(f".{name}.") and n.endswith(".tmp") for n in f["files"])
KILLS = {   # name of the fault -> what is half written, what is whole, the step gone on from
    "the first checkpoint half written": ("checkpoint.pt", set(), []),
    "a checkpoint half written": ("checkpoint.pt", {"checkpoint.pt"}, [4]),
    "a checkpoint written, nothing renamed": ("checkpoint.pt", {"checkpoint.pt"}, [4]),
    "between the two renames": ("checkpoint.pt", {"checkpoint.pt", "previous-checkpoint.pt"}, [4]),
    "the model half written": ("model.safetensors", {"checkpoint.pt", "previous-checkpoint.pt"}, [8]),
    "the model there, the record not": ("record.json", {"checkpoint.pt", "previous-checkpoint.pt", "model.safetensors"},
                                        [8]),
    "one run's model over another's": ("record.json", {"checkpoint.pt", "previous-checkpoint.pt", "model.safetensors"},
                                       [8]),
}


@linux
@pytest.mark.parametrize("name", KILLS)
def test_killed_while_it_writes(happened, name):
    torn, there, steps = KILLS[name]
    first = happened[name]["first"]
    assert first["code"] == -signal.SIGKILL and half(torn, first)
    # no record: nobody takes the run for finished
    assert {f for f in first["files"] if not f.startswith(".")} == there
    assert ends_as(happened, name, "go") == steps


@linux
def test_killed_when_all_is_written(happened):
    f = happened["the record there, the checkpoints too"]
    assert f["first"]["code"] == -signal.SIGKILL and "record.json" in f["first"]["files"]
    assert f["second"]["code"] == 1 and "holds a finished run" in f["second"]["stderr"]
    a, b = (outcome(Path(happened[n]["out"])) for n in ("the record there, the checkpoints too", "go"))
    assert a[0] == b[0] and load_run(f["out"]).record["resumes"] == []
    same_record(a[1], b[1])


@linux
@pytest.mark.parametrize("name, file, step, whole",
                         [("no space for a checkpoint", "checkpoint.pt", 4, "train"),
                          ("no space for the model", "model.safetensors", 8, "go"),
                          ("no space for the record", "record.json", 8, "go")])
def test_no_space_is_one_clear_error_and_keeps_the_last_checkpoint(happened, name, file, step, whole):
    f = happened[name]
    says = (f"no space left while writing {Path(f['out']) / file}; the checkpoint of step {step} is kept: "
            "go on with resume=True (--resume) once there is room\n")
    assert f["first"]["code"] == 1 and f["first"]["stderr"].partition(": ")[2].removeprefix("error: ") == says
    left = f["first"]["files"]
    assert "checkpoint.pt" in left and not {n for n in left if n in ("record.json", ".lock") or n.endswith(".tmp")}
    assert ends_as(happened, name, whole) == [step]


@linux
def test_a_disk_that_is_full_and_then_grows(happened):
    f = happened["disk"]
    if f["first"]["code"] == 77: pytest.skip("no disk may be mounted here; the tests before this one need none")
    assert json.loads(f["first"]["stdout"]) == [1, [MARKER, "checkpoint.pt", "previous-checkpoint.pt"], 0]
    assert f["first"]["stderr"].count("\n") == 1
    assert "no space left while writing" in f["first"]["stderr"]
    weights = lambda out: (Path(out) / "model.safetensors").read_bytes()
    assert weights(f["out"]) == weights(happened["train"]["out"])


@linux
def test_no_memory_is_an_error_that_says_what_needs_less(happened):
    first = happened["no memory"]["first"]
    assert first["code"] == 1 and first["stderr"].count("\n") == 1 and "record.json" not in first["files"]
    for part in ("out of memory with batch=32", "allocate", "accumulate=2 (--accumulate 2)", "batch=16 (--batch 16)",
                 "the checkpoint of step 4 is kept: go on with"):
        assert part in first["stderr"]
    assert ends_as(happened, "no memory", "much") == [4]


@linux
def test_a_folder_that_cannot_be_written_to(happened):
    says = lambda name: happened[name]["first"]["stderr"]
    late = happened["read-only from a step on"]
    assert says("read-only from a step on") == (
        f"TrainingError: permission denied while writing {late['out']}/checkpoint.pt; "
        "the checkpoint of step 4 is kept: go on with resume=True (--resume) once it can be written\n")
    assert ends_as(happened, "read-only from a step on", "go") == [4]
    assert says("a read-only folder").endswith("/run cannot be written to\n")
    assert happened["a read-only folder"]["first"]["code"] == 2
    assert "is a file; a run needs a folder" in says("a folder that is a file")
    assert "Not a directory" in says("a folder below a file")


@pytest.mark.parametrize("error",
                         [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
                          RuntimeError("MPS backend out of memory (…)")])
def test_every_device_says_it_in_its_own_words(tmp_path, error, monkeypatch):
    def fail(): raise error
    monkeypatch.setattr(FineSSL, "__call__", lambda self, step, state: fail())
    with pytest.raises(TrainingError,
                       match="out of memory with batch=4 .*batch=2 .*no checkpoint was written yet") as e:
        go(tmp_path / "run")
    assert e.value.__context__ is None                          # holds no tensor of the failed step


def test_no_memory_in_an_evaluation(tmp_path):
    views, calls = training.default_views(few(), load_backbone("pocket")), []
    def fail(x):
        calls.append(len(x))
        if len(calls) > 2: raise MemoryError                   # the first two: what evaluations are compared with
        return views.eval_view(x)
    with pytest.raises(TrainingError, match="out of memory .*256 images at once.*the checkpoint of step 8 is kept"):
        go(tmp_path / "run", evals=1, views=views._replace(eval_view=fail))
    with pytest.raises(TrainingError, match="out of memory .*256 images at once.*no checkpoint was written yet"):
        go(tmp_path / "other", evals=1, views=views._replace(eval_view=fail)) # before the first step


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    for error in (RuntimeError("shapes do not fit"), OSError("no power"), KeyError("z")):
        def fail(*args): raise error
        monkeypatch.setattr(FineSSL, "__call__", fail)
        with pytest.raises(type(error), match=str(error)): go(tmp_path / "run")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_memory_on_a_gpu(tmp_path):
    try:
        torch.cuda.set_per_process_memory_fraction(.02)
        with pytest.raises(TrainingError, match="out of memory .*accumulate=2"):
            go(tmp_path / "run", batch=65536, schedule=Schedule(1), device="cuda", compile=False)
    finally: torch.cuda.set_per_process_memory_fraction(1.)
    go(tmp_path / "run", device="cuda", compile=False)           # what the failed step held is free again


# ---------------------------------------------------------------- Ctrl-C in the demo

@linux
@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_demo_goes_on_by_the_command_that_it_prints(happened, name):
    stopped, out, whole = happened[name], Path(happened[name]["out"]), Path(happened["demo"]["out"])
    assert stopped["first"]["code"] == 130
    assert stopped["first"]["stderr"] == f"finessl: {STOPS[name][2]}; go on with: {DEMO} {out} --resume\n"
    assert stopped["second"] == happened["demo"]["first"] and stopped["second"]["code"] == 0
    for method in cli_demo.METHODS:
        a, b = (outcome(folder / method.lower()) for folder in (out, whole))
        assert a[0] == b[0]
        assert a[1].pop("command").removesuffix(str(out)) == b[1].pop("command").removesuffix(str(whole))
        same_record(a[1], b[1])
        went_on = method == name and "checkpoint" in STOPS[name][2]
        assert [r["step"] for r in a[1]["resumes"]] == ([STOPS[name][1]] if went_on else [])
    # another demo than the one there
    if name == "FineSSL": assert cli_main.main(shlex.split(f"demo --out {out} --steps 3 --resume")) == 1


# ---------------------------------------------------------------- the lock

def test_the_locks_file_goes_with_the_lock(tmp_path):
    run = tmp_path / "run"
    with lock_folder(run):
        with pytest.raises(TrainingError, match="another run is writing"):
            with lock_folder(run): pass
        assert (run / ".lock").exists()                         # the refused one leaves the other's
    assert not run.exists()                                     # a folder that it made, and that stayed empty
    run.mkdir()
    with lock_folder(run): pass
    assert list(run.iterdir()) == []                            # one that was there before stays
    with lock_folder(tmp_path / "new"): (tmp_path / "new/file").write_text("kept")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["file"]


# ---------------------------------------------------------------- image files that break

@pytest.fixture
def photos(tmp_path):
    ("Real digits in three classes as PNG files, with list files beside them: 2 labelled a class, 24 in the pool, 9 "
     "for the test.")
    ds, root = digits(8, 0), tmp_path / "photos"
    for c in range(3):
        for part, x in (("train", ds.x_lb[ds.y_lb == c]), ("test", ds.x_test[ds.y_test == c][:3])):
            (root / part / str(c)).mkdir(parents=True)
            for k, image in enumerate(x):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / part / str(c) / f"{k}.png")
    lines = lambda part, ks, end: "".join(f"{part}/{c}/{k}.png{end(c)}\n" for c in range(3) for k in ks)
    (root / "labelled.txt").write_text(lines("train", range(2), lambda c: f"\t{c}"))
    (root / "unlabelled.txt").write_text(lines("train", range(8), lambda c: "\t"))
    (root / "test.txt").write_text(lines("test", range(3), lambda c: f"\t{c}"))
    return root


def look(ds, out=None, **changes):
    "A short run on files."
    settings = dict(n_prompts=2, schedule=Schedule(10), batch=4, evals=2, checkpoint_every=2, progress=False) | changes
    return fit(ds, "pocket", FineSSL(), out=out, **settings)


def cut(file): file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "gone"])
def test_a_file_that_breaks_is_named_and_the_checkpoint_stays(photos, tmp_path, damage, monkeypatch):
    lists = lambda: image_lists(photos, image_size=32)
    look(lists(), tmp_path / "whole")
    files = {f: f.read_bytes() for f in photos.glob("train/*/[2-7].png")}
    at = lambda: [damage(f) for f in files]
    real, calls = FineSSL.__call__, []
    monkeypatch.setattr(FineSSL, "__call__", lambda self, step,
                        state: (calls.append(1), len(calls) == 5 and at(), real(self, step, state))[-1])
    with pytest.raises(DataError,
                       match=r"image.* .*train/./[2-7].png.*; the checkpoint of step 4 is kept: go on with "
                             r"resume=True \(--resume\) once the file is mended"):
        look(lists(), tmp_path / "run")
    assert not (tmp_path / "run/record.json").exists()
    monkeypatch.undo()
    for f, content in files.items(): f.write_bytes(content)
    look(lists(), tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run")[0] == outcome(tmp_path / "whole")[0]
    same_record(outcome(tmp_path / "run")[1], outcome(tmp_path / "whole")[1])


def test_when_asked_training_goes_on_bit_for_bit(photos, tmp_path, monkeypatch):
    cut(photos / "train/0/7.png")                               # before the start
    kept = image_lists(photos, image_size=32, unreadable="skip").split.unreadable
    assert kept == ("train/0/7.png",)
    lists = lambda: image_lists(photos, image_size=32, unreadable=kept)
    some = image_lists(photos, image_size=32, unreadable="skip")
    # after it: one of the pool, one labelled, one of the test part
    (photos / "train/1/5.png").unlink()
    cut(photos / "train/2/0.png"), cut(photos / "test/1/2.png")
    whole = look(some, tmp_path / "whole")
    assert whole.record["dataset"]["unreadable"] == ["train/0/7.png"] and whole.record["dataset"]["skipped"] == 1
    assert whole.record["unreadable"] == ["test/1/2.png", "train/1/5.png", "train/2/0.png"]
    assert sum(map(sum, whole.record["confusion"])) == 8        # of 9 test images
    # images made when they are needed: the same
    look(lists(), tmp_path / "run", prefetch_depth=0, **{"checkpoint_every": 3, "schedule": Schedule(10)})
    assert outcome(tmp_path / "run")[0] == outcome(tmp_path / "whole")[0]
    shutil.rmtree(tmp_path / "run")
    real, calls = FineSSL.__call__, []
    monkeypatch.setattr(FineSSL, "__call__", lambda self, step,
                        state: (calls.append(1), len(calls) == 5 and signal.raise_signal(signal.SIGINT),
                                real(self, step, state))[-1])
    with pytest.raises(KeyboardInterrupt): look(lists(), tmp_path / "run")
    look(lists(), tmp_path / "run", resume=True)
    a, b = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert a[0] == b[0] and [r["step"] for r in a[1]["resumes"]] == [5]
    # a labelled file has broken between the two: its content is another one
    assert sum(x != y for x, y in zip(*(r.pop("labelled_files") for r in (a[1], b[1])), strict=True)) == 1
    same_record(a[1], b[1])


def test_a_replacement_keeps_its_class_and_its_place_in_the_pool(photos):
    ds = image_lists(photos, image_size=32, unreadable="skip")
    views = training.default_views(few(), load_backbone("pocket"))
    for f in ("train/0/0.png", "train/1/3.png"): cut(photos / f)
    lb, ulb = (prefetch.make_fetcher(x, "cpu") for x in (ds.x_lb, ds.x_ulb))
    seen, labels = set(), torch.zeros(3, dtype=torch.int64)
    for t in range(6):
        images = batches.make_batch(ds, views, FineSSL(), lb, ulb, 0, t, 6, 2, Schedule(30))
        seen |= set(images["idx_ulb"].tolist())
        labels += images["y_lb"].bincount(minlength=3)
    assert labels.tolist() == [12, 12, 12] and seen == set(range(24)) - {0, 11}
    cut(photos / "train/0/1.png")
    with pytest.raises(DataError, match="none is left to take its place in its class"):
        batches.make_batch(ds, views, FineSSL(), lb, ulb, 0, 0, 6, 2, Schedule(30))


def test_folders_read_at_every_use(photos, tmp_path):
    ds = image_folder(photos, 2, image_size=32, lazy=True, unreadable="skip")
    file = next(f for f in ds.x_ulb.files if f not in ds.x_lb.files)
    cut(Path(file))
    assert look(ds).record["unreadable"] == [Path(file).relative_to(photos).as_posix()]
    again = image_folder(photos, 2, image_size=32, lazy=True, unreadable=ds.split.unreadable)
    assert again.split.hash == ds.split.hash and len(again.x_ulb) == len(ds.x_ulb) == 24


def test_on_the_command_line(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cut(photos / "train/0/7.png")
    argv = shlex.split("train --data photos --out run --skip-unreadable --steps 8 --batch 4 --prompts 2 --evals 1 "
                       "--checkpoint-every 2 --algorithm finessl")
    assert cli_main.main(argv[:5]) == 2 and "train/0/7.png" in capsys.readouterr().err.replace("\\", "/")
    real, calls = FineSSL.__call__, []
    def call(self, step, state):
        calls.append(1)
        if len(calls) == 3: (photos / "train/1/6.png").unlink()
        if len(calls) == 4: cut(photos / "test/0/0.png")
        if len(calls) == 7: signal.raise_signal(signal.SIGINT)
        return real(self, step, state)
    monkeypatch.setattr(FineSSL, "__call__", call)
    assert cli_main.main(argv) == 130
    # the file is gone for good, and the run the same
    assert cli_main.main([*argv, "--resume"]) == 0, capsys.readouterr().err
    out, record = capsys.readouterr().out, json.loads((tmp_path / "run/record.json").read_text())
    assert record["dataset"]["unreadable"] == ["train/0/7.png"]
    assert record["unreadable"] == ["test/0/0.png", "train/1/6.png"] and record["resumes"][0]["step"] == 7
    assert "left out as unreadable: 1" in out
    assert "left out as unreadable while training: 2 (test/0/0.png, …), named in record.json" in out
    n = record["n_test"] - 1
    assert f"of {n} test images right" in out and record["evaluations"][-1]["accuracy"] in [k / n for k in range(n + 1)]
    assert cli_main.main(shlex.split("train --data digits --per-class 1 --out other --skip-unreadable")) == 2
    assert "--skip-unreadable belongs to" in capsys.readouterr().err


if __name__ == "__main__":
    print(json.dumps(every_fault(Path(sys.argv[1]))))
