"What a run does not need ends none: git, readers of its log, letters, a terminal; a signal leaves a checkpoint."
import io, os, shlex, signal, subprocess, sys, time
from pathlib import Path
import pytest
import torch
from finessl import training
from finessl.algorithms import FineSSL
from finessl.backbone import load_backbone
from finessl.cli.options import path_type, source_type
from finessl.data import digits
from finessl.engine import checkpoint
from finessl.engine.environment import environment
from finessl.engine.runs import load_run
from finessl.engine.signals import STOP_SIGNALS
from finessl.engine.streams import SafeStream
from finessl.training import fit

WHOLE = digits(1, 0)
DATA = WHOLE._replace(x_ulb=WHOLE.x_ulb[:20], y_ulb=WHOLE.y_ulb[:20], x_test=WHOLE.x_test[:10],
                      y_test=WHOLE.y_test[:10], split=None)
posix = pytest.mark.skipif(os.name == "nt", reason="signals and descriptors of POSIX")
TRAIN = ("train", "--data", "digits", "--per-class", "1", "--batch", "4")


def start(*arguments, **how):
    return subprocess.Popen([sys.executable, *arguments], text=True, **{"stderr": subprocess.PIPE} | how)


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it never came to that: {process.communicate()}")
        time.sleep(.02)


@posix
@pytest.mark.parametrize("name", [pytest.param("SIGHUP", marks=pytest.mark.slow), "SIGXCPU"])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(name, tmp_path):
    number = getattr(signal, name)
    out = tmp_path / "run"
    p = start("-m", "finessl", *TRAIN, "--steps", "100000", "--evals", "1", "--checkpoint-every", "2",
              "--out", str(out), env=os.environ | {"SLURM_JOB_ID": "4711"})
    wait_for((out / "checkpoint.pt").exists, p)
    p.send_signal(number)
    if name == "SIGXCPU": p.send_signal(number) # the kernel sends it once a second
    try: said = p.communicate(timeout=120)[1]
    finally: p.kill()
    assert p.returncode == 130 and "checkpoint written; go on with:" in said and "--resume" in said, said
    assert "scontrol requeue 4711" in said
    assert not (out / ".lock").exists() and (out / "checkpoint.pt").exists()


@pytest.fixture
def signalled(monkeypatch):
    "Let a signal strike in chosen steps of this process's next runs."
    def at(number, steps):
        step = training.train_step
        def struck(state, *args, **kwargs):
            loss = step(state, *args, **kwargs)
            if state.step in steps: signal.raise_signal(number)
            return loss
        monkeypatch.setattr(training, "train_step", struck)
    return at


SHORT = dict(steps=9, batch=4, evals=3, progress=False)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda s: s.name)
def test_a_run_that_signals_stopped_equals_one_that_nobody_stopped(number, tmp_path, signalled):
    want, before = fit(DATA, "pocket", FineSSL(), **SHORT), signal.getsignal(number)
    signalled(number, (2, 3, 7))                               # at 3 there is a checkpoint of 2
    for step in (2, 3, 7):
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step} of 9, checkpoint written"):
            fit(DATA, "pocket", FineSSL(), out=tmp_path / "run", resume=True, **SHORT)
        assert signal.getsignal(number) == before
    run = fit(DATA, "pocket", FineSSL(), out=tmp_path / "run", resume=True, **SHORT)
    assert torch.equal(run.predict(DATA.x_test), want.predict(DATA.x_test))
    assert [r["step"] for r in run.record["resumes"]] == [2, 3, 7]


@posix
@pytest.mark.parametrize("number", [s for s in STOP_SIGNALS if s != signal.SIGINT], ids=lambda s: s.name)
def test_what_a_parent_has_set_to_ignored_stays_ignored(number, tmp_path, signalled):
    signalled(number, (2, 3))
    old = signal.signal(number, signal.SIG_IGN)                # as nohup does to SIGHUP
    try: fit(DATA, "pocket", FineSSL(), out=tmp_path / "run", **SHORT)
    finally: signal.signal(number, old)
    assert (tmp_path / "run/record.json").exists()


def test_checkpoints_come_by_minutes(tmp_path, monkeypatch):
    kept = []
    save = checkpoint.save_checkpoint
    def noted(held, state, *rest): kept.append(state.step), save(held, state, *rest)
    monkeypatch.setattr(checkpoint, "save_checkpoint", noted)
    how = dict(steps=6, batch=4, evals=1, progress=False)
    fit(DATA, "pocket", FineSSL(), out=tmp_path / "a", checkpoint_minutes=1e-9, **how)
    assert kept == [1, 2, 3, 4, 5]
    fit(DATA, "pocket", FineSSL(), out=tmp_path / "b", checkpoint_minutes=60, **how)
    assert len(kept) == 5
    with pytest.raises(ValueError, match="checkpoint_minutes"):
        fit(DATA, "pocket", FineSSL(), checkpoint_minutes=0, **how)


@posix
@pytest.mark.parametrize("log", ["closed", *(pytest.param(log, marks=pytest.mark.slow)
                                             for log in ("gone", "full", "narrow"))])
def test_a_log_that_nobody_takes_ends_no_run(log, tmp_path):
    out = tmp_path / "run"
    asked = ["-m", "finessl", *TRAIN, "--steps", "4", "--evals", "4", "--out", str(out)]
    shell = f"exec {shlex.join([sys.executable, *asked])} "
    env = os.environ | ({"PYTHONIOENCODING": "ascii"} if log == "narrow" else {})
    if log == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        p = start(*asked, stdout=writer, stderr=writer)
        os.close(writer)
        code = p.wait(240)
    else:
        where = {"closed": "<&- >&- 2>&-", "full": ">/dev/full 2>/dev/full", "narrow": ">/dev/null"}[log]
        code = subprocess.run(["bash", "-c", shell + where], env=env, timeout=240).returncode
    assert code == 0 and (out / "record.json").exists()
    load_run(out)


@posix
def test_help_is_written_in_any_encoding():
    for encoding in ("cp1252", "ascii", "utf-8"):
        done = subprocess.run([sys.executable, "-m", "finessl", "train", "--help"], capture_output=True,
                              env=os.environ | {"PYTHONIOENCODING": encoding})
        assert done.returncode == 0 and b"--mu" in done.stdout, done.stderr


@posix
def test_a_table_that_cannot_be_written_is_an_error(tmp_path):
    fit(DATA, "pocket", FineSSL(), steps=1, batch=4, evals=1, out=tmp_path / "run", progress=False)
    from PIL import Image
    Image.fromarray(DATA.x_test[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    line = f"exec {sys.executable} -m finessl predict --run '{tmp_path}/run' '{tmp_path}/a.png' >/dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "no space left" in done.stderr.lower(), done.stderr


def test_a_stream_that_fails_is_asked_no_more():
    class Failing(io.StringIO):
        asked = 0
        def write(self, text):
            self.asked += 1
            raise BrokenPipeError
    stream = Failing()
    safe = SafeStream(stream)
    for _ in range(3): safe.write("x")
    assert stream.asked == 1 and not safe.isatty()


@pytest.mark.parametrize("git", ["none", "hangs", "speaks nonsense", "of a hook"])
def test_git_is_not_needed(git, tmp_path, monkeypatch):
    program = tmp_path / "git"
    if git == "none": monkeypatch.setenv("PATH", str(tmp_path))
    elif git == "of a hook": monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))
    else:
        does = {"hangs": "exec sleep 60", "speaks nonsense": r"printf '\377\376'; exit 1"}[git]
        program.write_text(f"#!/bin/sh\n{does}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        if git == "hangs":
            run = subprocess.run
            monkeypatch.setattr(subprocess, "run", lambda *a, **how: run(*a, **how | {"timeout": .2}))
    before = environment.__globals__["finessl"].__version__
    found = environment("cpu")
    assert found["versions"]["finessl"] == before
    if git in ("none", "hangs"): assert found["commit"] is None and found["dirty"] is None


def test_the_home_folder_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fit(DATA, "pocket", FineSSL(), steps=1, batch=4, evals=1, out="~/run", progress=False)
    assert (tmp_path / "run/record.json").exists() and not (tmp_path / "~").exists()
    run = load_run("~/run")
    run.save("~/copy")
    assert (tmp_path / "copy/record.json").exists()
    from PIL import Image
    Image.fromarray(DATA.x_test[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    assert torch.equal(run.predict("~/a.png"), run.predict([tmp_path / "a.png"]))
    weights = Path(sys.modules["finessl"].__file__).parent / "weights/pocket.safetensors"
    (tmp_path / "pocket.safetensors").write_bytes(weights.read_bytes())
    assert load_backbone("pocket", "~/pocket.safetensors").hash == load_backbone("pocket").hash
    assert path_type("~/x") == tmp_path / "x" and source_type("~/x") == str(tmp_path / "x")
    assert source_type("digits") == "digits"
