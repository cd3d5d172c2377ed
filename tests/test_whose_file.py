"""Whose is this file? What finessl writes, as its commands and functions write it, over nothing that is not its own."""
import os, stat, threading
from pathlib import Path

import finessl
import pytest
from PIL import Image

from finessl.algorithms import FineSSL
from finessl.backbone import load_backbone
from finessl.bench import scaling
from finessl.cli import demo as cli_demo
from finessl.cli import main as cli_main
from finessl.cli import train as cli_train
from finessl.engine.errors import TrainingError
from finessl.engine.runs import load_run
from finessl.engine.schedule import Schedule
from finessl.engine.storage import MARKER, RUN_FILES, lock_folder, read_marker
from finessl.pocket import __main__ as pocket
from finessl.training import fit
from storage_helpers import files, posix
from test_training import few

TINY = "--per-class 1 --steps 2 --batch 4 --prompts 1 --evals 1 --quiet".split()


def go(out, steps=4, **changes):
    settings = dict(n_prompts=1, schedule=Schedule(steps), batch=4, evals=1, progress=False) | changes
    return fit(few(), "pocket", FineSSL(), out=out, **settings)


class Unfinished(FineSSL):
    "FineSSL that ends the run in its third step."
    def __call__(self, logits, state):
        state["calls"] = state.get("calls", 0) + 1
        if state["calls"] == 3: raise OSError("no power")
        return super().__call__(logits, state)
Unfinished.__name__ = "FineSSL" # the checkpoint compares names and arguments


def unfinished(out, **changes):
    settings = dict(n_prompts=1, schedule=Schedule(4), batch=4, evals=1, progress=False, checkpoint_every=2) | changes
    with pytest.raises(OSError, match="no power"): fit(few(), "pocket", Unfinished(), out=out, **settings)


def everything(folder):
    "Name -> content, of all files below a folder; locks left out."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != ".lock"}


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    "Run a command: exit code, and what it says."
    monkeypatch.chdir(tmp_path)
    def run(*argv):
        code = cli_main.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return code, out + err
    return run


# ---------------------------------------------------------------- the folder of a run

@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("how", [{}, {"resume": True}])
def test_fit_leaves_a_file_that_no_run_made(tmp_path, name, how):
    (tmp_path / name).write_bytes(b"of somebody else"), (tmp_path / ".notes.tmp").write_text("a thesis")
    before = everything(tmp_path)
    with pytest.raises(TrainingError, match=f"holds {name}, which this version of finessl did not make"):
        go(tmp_path, **how)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", RUN_FILES)
def test_train_leaves_a_file_that_no_run_made(said, tmp_path, name):
    (tmp_path / "o").mkdir(), (tmp_path / "o" / name).write_bytes(b"of somebody else")
    for more in ([], ["--resume"]):
        code, text = said("train", "--data", "digits", *TINY, "--out", "o", *more)
        assert code == 2 and f"holds {name}, which this version of finessl did not make" in text
    assert everything(tmp_path / "o") == {name: b"of somebody else"}


def test_the_weights_that_a_run_reads_are_not_replaced_whatever_is_asked(tmp_path):
    weights = tmp_path / "clip/model.safetensors"
    weights.parent.mkdir(), (tmp_path / "other").mkdir()
    weights.write_bytes((Path(finessl.__file__).parent / "weights/pocket.safetensors").read_bytes())
    os.link(weights, tmp_path / "other/checkpoint.pt")            # another name of the same file
    encoder, before = load_backbone("pocket", weights), everything(tmp_path)
    for folder in ("clip", "other"):
        for overwrite in (False, True):
            with pytest.raises((ValueError, TrainingError), match="is read by this command"):
                fit(few(), encoder, FineSSL(), steps=2, progress=False, out=tmp_path / folder, overwrite=overwrite)
    assert everything(tmp_path) == before


def test_an_unfinished_run_is_thrown_away_by_nobody_who_did_not_ask(tmp_path):
    out = tmp_path / "run"
    unfinished(out)
    before = everything(out)
    with pytest.raises(TrainingError, match="holds an unfinished run; go on with resume=True"): go(out)
    with pytest.raises(TrainingError, match="holds an unfinished run"): short_run().save(out)
    assert everything(out) == before
    assert go(out, resume=True).record["resumes"][0]["step"] == 2
    assert files(out) == [MARKER, "model.safetensors", "record.json"]


def short_run():
    return fit(few(), "pocket", FineSSL(), n_prompts=1, steps=1, batch=4, evals=1, progress=False)


def test_overwrite_starts_anew_and_keeps_the_finished_run_until_there_is_another(tmp_path):
    out = tmp_path / "run"
    go(out, seed=1)
    finished = everything(out)
    unfinished(out, overwrite=True)
    now = everything(out)
    assert {k: now[k] for k in finished} == finished and "checkpoint.pt" in now
    with pytest.raises(TrainingError, match="holds a finished run"): go(out, resume=True)
    go(out, overwrite=True, steps=3)                              # a checkpoint of four steps is none of this run
    assert load_run(out).record["schedule"]["steps"] == 3 and files(out) == sorted(finished)
    run = load_run(out)
    with pytest.raises(TrainingError, match="holds a finished run"): run.save(out)
    run.save(out, overwrite=True)


def test_what_comes_between_the_first_look_and_the_lock_is_seen(said, tmp_path, monkeypatch):
    look, real = tmp_path / "run", cli_train.load_dataset
    def meanwhile(args):                                          # when the command has looked, and torch is there
        unfinished(look)
        return real(args)
    monkeypatch.setattr(cli_train, "load_dataset", meanwhile)
    code, text = said("train", "--data", "digits", *TINY, "--out", "run")
    assert code == 1 and "holds an unfinished run" in text
    assert files(look) == [MARKER, "checkpoint.pt"]


@posix
def test_a_folder_that_is_removed_under_a_run_gets_nothing_more_from_it(tmp_path):
    out, real = tmp_path / "run", FineSSL.__call__
    def call(self, logits, state):
        if not (tmp_path / "done").exists():
            (tmp_path / "done").touch()
            for path in out.iterdir(): path.unlink()
            out.rmdir()
            unfinished(out)                                       # a new run of that name, of its own lock
        return real(self, logits, state)
    class Robbed(FineSSL): __call__ = call
    with pytest.raises(TrainingError, match="was removed under a run, which writes no more there"):
        fit(few(), "pocket", Robbed(), n_prompts=1, steps=3, batch=4, evals=1, progress=False, out=out)
    assert files(out) == [MARKER, "checkpoint.pt"]


def test_a_folder_says_by_which_command_it_was_made(said, tmp_path):
    assert said("train", "--data", "digits", *TINY, "--out", "run")[0] == 0
    marker = read_marker(tmp_path / "run")
    assert marker["what"] == "run" and marker["command"].startswith("finessl train --data digits")


# ---------------------------------------------------------------- the demo

def test_a_demo_leaves_a_run_that_no_demo_began(said, tmp_path):
    for where in ("runs", *(f"runs/{name.lower()}" for name in cli_demo.METHODS)):
        unfinished(tmp_path / where)
        before = everything(tmp_path / "runs")
        for more in ([], ["--resume"]):
            code, text = said("demo", "--out", "runs", "--steps", "1", "--quiet", *more)
            assert code == 2 and "holds a run that is no demo's" in text
        assert everything(tmp_path / "runs") == before
        for path in (tmp_path / where).iterdir():
            if path.is_file(): path.unlink()


def test_a_demo_leaves_what_a_user_has_there(said, tmp_path):
    for name in cli_demo.DEMO_FILES:
        mine = tmp_path / "d" / name
        mine.parent.mkdir(exist_ok=True)
        mine.mkdir() if name == "images" else mine.write_text("of a user")
        code, text = said("demo", "--out", "d", "--steps", "1", "--quiet")
        assert code == 1 and f"holds {name}, which this version of finessl did not make" in text
        assert files(tmp_path / "d") == [name]
        mine.rmdir() if name == "images" else mine.unlink()


def test_a_run_that_begins_while_a_demo_is_prepared_is_left(tmp_path):
    with lock_folder(tmp_path, cli_demo.DEMO_FILES, "demo") as held:
        unfinished(tmp_path / "finessl")
        with pytest.raises(ValueError, match="holds a run that is no demo's"): cli_demo.remove_demo(held)
    assert "checkpoint.pt" in files(tmp_path / "finessl")


# ---------------------------------------------------------------- one file

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run, and three images."
    where = tmp_path_factory.mktemp("trained")
    run = go(where / "run")
    (where / "photos").mkdir()
    for k in range(3):
        Image.fromarray(few().x_test[k].permute(1, 2, 0).numpy()).save(where / "photos" / f"{k}.png")
    return where, run


def test_predict_writes_over_nothing_that_it_did_not_make(said, trained, tmp_path):
    where, _ = trained
    (tmp_path / "notes.csv").write_text("date,weight\n"), (tmp_path / "empty.csv").touch()
    before = everything(where)
    outs = [where / "photos/0.png", where / "run/record.json", where / "run/model.safetensors"]
    if os.name != "nt":
        for k, out in enumerate(outs): (tmp_path / f"link{k}").symlink_to(out)
        outs += [tmp_path / f"link{k}" for k in range(3)]
    for out in outs:
        for more in ([], ["--overwrite"]):
            code, text = said("predict", "--run", where / "run", where / "photos", "--out", out, *more)
            assert code == 2 and ("is read by this command" if more else "was not made by finessl") in text
    assert everything(where) == before
    code, text = said("predict", "--run", where / "run", where / "photos", "--out", "notes.csv")
    assert code == 2 and "notes.csv is there already, and was not made by finessl" in text and "--overwrite" in text
    for out, more in (("empty.csv", []), ("notes.csv", ["--overwrite"]), ("notes.csv", [])): # the last: a table of ours
        assert said("predict", "--run", where / "run", where / "photos", "--out", out, *more) == (0, "")
        assert (tmp_path / out).read_text().startswith("file,class,confidence,0,1")


def test_predict_refuses_before_anything_is_loaded(said, trained, tmp_path, monkeypatch):
    where, _ = trained
    monkeypatch.setattr("finessl.engine.runs.load_run", None)
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    for out, says in (("photo.jpg", "was not made by finessl"), (".", "is a folder"), ("no/p.csv", "does not exist")):
        code, text = said("predict", "--run", where / "run", where / "photos", "--out", out)
        assert code == 2 and says in text


@posix
def test_predict_writes_into_pipes_devices_and_descriptors(said, trained, tmp_path):
    where, _ = trained
    table = said("predict", "--run", where / "run", where / "photos")[1]
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    assert said("predict", "--run", where / "run", where / "photos", "--out", "pipe")[0] == 0
    reader.join(30)
    assert got == [table] and stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
    (tmp_path / "null").symlink_to(os.devnull)
    assert said("predict", "--run", where / "run", where / "photos", "--out", "null")[0] == 0
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode) and (tmp_path / "null").is_symlink()
    a, b = os.pipe()
    assert said("predict", "--run", where / "run", where / "photos", "--out", f"/dev/fd/{b}")[0] == 0
    os.close(b)
    with os.fdopen(a) as f: assert f.read() == table


@posix
def test_a_table_keeps_its_mode_and_its_link(said, trained, tmp_path):
    where, _ = trained
    (tmp_path / "real.csv").write_text("file,class,confidence\n"), (tmp_path / "real.csv").chmod(0o600)
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert said("predict", "--run", where / "run", where / "photos", "--out", "link.csv")[0] == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "real.csv").read_text().count("\n") == 4


def test_measurements_are_refused_their_place_before_they_are_made(said, tmp_path, monkeypatch, capsys):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8"), (tmp_path / "pocket.json").write_text("{}")
    monkeypatch.setattr(scaling, "measure_scaling", None), monkeypatch.setattr(pocket, "pretrain", None)
    assert said("bench", "--device", "cpu", "--out", "photo.jpg")[0] == 2
    for main, argv in ((scaling.main, ["--out", "photo.jpg"]), (pocket.main, ["--out", "."])):
        with pytest.raises(SystemExit, match="2"): main(argv)
        assert "was not made by finessl" in capsys.readouterr().err
    assert everything(tmp_path) == {"photo.jpg": b"\xff\xd8", "pocket.json": b"{}"}
