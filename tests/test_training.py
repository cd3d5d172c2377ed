"""What happens to a run: interrupted, killed, torn, foreign, twice at once, not finite; saved and loaded again."""
import io, json, os, random, re, signal, subprocess, sys, time
from pathlib import Path

import finessl
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from finessl.algorithms import FineSSL
from finessl.backbone import load_backbone
from finessl.data import digits
from finessl.engine.checkpoint import DIGEST
from finessl.pseudo_labels import FixMatch, SupervisedOnly
from finessl.engine.schedule import Schedule
from finessl.engine.errors import TrainingError
from finessl.training import Runtime, Settings, fit, prepare
from finessl.engine.storage import MARKER, lock_folder
from finessl.engine.runs import load_run

root = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
COMMAND = ["train", "--data", "digits", "--per-class", "1", "--steps", "150", "--batch", "4", "--prompts", "1",
           "--evals", "3", "--checkpoint-every", "3", "--out", "run"]


posix = pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")


def start(cwd, *more):
    return subprocess.Popen([sys.executable, "-m", "finessl", *COMMAND, *more], cwd=cwd, env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def newer_checkpoint(folder: Path, process, than=0., seconds=240):
    "Wait for a checkpoint younger than a time; the process must live on."
    end, path = time.time() + seconds, folder / "checkpoint.pt"
    while True:
        assert process.poll() is None and time.time() < end, process.communicate()
        try:
            if path.stat().st_mtime_ns > than: return
        except FileNotFoundError: pass
        time.sleep(.005)


def same_record(a: dict, b: dict):
    "Assert that two records are equal but for times, the list of resumes and where the checkout stood meanwhile."
    other = ("seconds", "eval_seconds", "resumes", "commit", "dirty")
    assert {k: v for k, v in a.items() if k not in other} == {k: v for k, v in b.items() if k not in other}


def outcome(folder: Path):
    return (folder / "model.safetensors").read_bytes(), json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "Weights and record of the command when nothing happens to it."
    where = tmp_path_factory.mktemp("unbroken")
    p = start(where)
    assert p.wait(300) == 0, p.communicate()
    return outcome(where / "run")


@posix
@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_stopped_once_and_killed_ends_as_an_unbroken_run(kills, tmp_path, unbroken):
    chance, young = random.Random(), 0
    for k, s in enumerate((signal.SIGINT, *[signal.SIGKILL] * kills)):
        p = start(tmp_path, *["--resume"] * (k > 0))
        newer_checkpoint(tmp_path / "run", p, young)
        time.sleep(chance.uniform(0, .2))
        p.send_signal(s)
        out, err = p.communicate(timeout=240)
        if s == signal.SIGINT:
            assert p.returncode == 130 and out.count("\n") == 1, (out, err)
            assert re.fullmatch(r"finessl: stopped after step \d+ of 150, checkpoint written; go on with: python -m "
                                r"finessl (train .*) --resume\n", err), err
        else: assert p.returncode == -s, (out, err)
        young = max(f.stat().st_mtime_ns for f in (tmp_path / "run").glob("*checkpoint.pt"))
    p = start(tmp_path, "--resume")
    assert p.wait(300) == 0, p.communicate()
    weights, record = outcome(tmp_path / "run")
    assert weights == unbroken[0]
    same_record(record, unbroken[1])
    steps = [r["step"] for r in record["resumes"]]
    assert len(steps) == 1 + kills and steps == sorted(set(steps)) and 0 < steps[0] and steps[-1] < 150
    assert {f.name for f in (tmp_path / "run").iterdir()} == {MARKER, "model.safetensors", "record.json"}


@posix
@pytest.mark.slow
def test_a_second_run_into_a_folder_is_refused_while_the_first_lives(tmp_path):
    p = start(tmp_path)
    try:
        newer_checkpoint(tmp_path / "run", p)
        with pytest.raises(TrainingError, match="another run is writing to"):
            with lock_folder(tmp_path / "run"): pass
        second = start(tmp_path, "--resume")
        out, err = second.communicate(timeout=240)
        if p.poll() is None:                       # the first was still at work
            assert second.returncode == 1 and err.startswith("finessl: error: another run is writing to run"), err
    finally:
        p.kill()
        p.wait()
    with lock_folder(tmp_path / "run"): pass       # the lock died with its process
    assert not (tmp_path / "run/.lock").exists()


# ---------------------------------------------------------------- in one process

@pytest.fixture(scope="module")
def encoder(): return load_backbone("pocket")


def few():
    "Fewer digits, so that evaluations cost little: 10 labelled, 60 in the pool, 40 for the test."
    ds = digits(1, 0)
    return ds._replace(x_ulb=ds.x_ulb[:60], y_ulb=ds.y_ulb[:60], x_test=ds.x_test[:40], y_test=ds.y_test[:40],
                       split=ds.split._replace(idx_lb=torch.zeros(0, dtype=torch.int64)))


def run(encoder, algorithm=FineSSL(), out=None, **changes):
    settings = dict(peft="vpt", n_prompts=2, schedule=Schedule(12, reset_pace_every=5), batch=4, evals=3,
                    progress=False) | changes
    return fit(few(), encoder, algorithm, out=out, **settings)


def interrupted(encoder, out, after, algorithm=FineSSL(), **changes):
    "Ctrl-C during step `after`."
    kind = type(algorithm)
    real, calls = kind.__call__, []
    def call(self, step, state):
        calls.append(1)
        if len(calls) == after: signal.raise_signal(signal.SIGINT)
        return real(self, step, state)
    kind.__call__ = call
    try:
        with pytest.raises(KeyboardInterrupt, match=f"after step {after}"): run(encoder, algorithm, out, **changes)
    finally: kind.__call__ = real


CASES = {"FineSSL": {}, "FineSSL, paper's form": dict(algorithm=FineSSL(form="paper")),
         "FixMatch": dict(algorithm=FixMatch()), "labelled-only": dict(algorithm=SupervisedOnly()),
         "heads alone": dict(peft="linear"), "heads from means": dict(head_init="means"),
         "heads centred": dict(head_init="centred"),
         "bf16": dict(precision="bf16"),
         "labelled images dropped": dict(labelled="release"), "per epoch": dict(schedule=Schedule(12, decay="epoch"))}


@pytest.mark.parametrize("case, after", [
    pytest.param(c, n, marks=[pytest.mark.slow] * (c == "bf16" and n != 7)) for c in CASES for n in (1, 7, 11)])
def test_a_resume_is_exact(encoder, tmp_path, case, after):
    run(encoder, out=tmp_path / "whole", **CASES[case])
    interrupted(encoder, tmp_path / "run", after, **CASES[case])
    assert not (tmp_path / "run/record.json").exists()
    run(encoder, out=tmp_path / "run", resume=True, **CASES[case])
    a, b = outcome(tmp_path / "whole"), outcome(tmp_path / "run")
    assert a[0] == b[0] and b[1]["resumes"][0]["step"] == after
    same_record(a[1], b[1])


@pytest.mark.parametrize("left", [0, 100, .5, .99, "flipped"],
                         ids=["empty", "100 bytes", "half", "all but the end", "one byte flipped"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(encoder, tmp_path, left):
    run(encoder, out=tmp_path / "whole")
    interrupted(encoder, tmp_path / "run", 10, checkpoint_every=4)
    path = tmp_path / "run/checkpoint.pt"
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
    path.write_bytes(flipped if left == "flipped"
                     else content[:left if isinstance(left, int) else int(left * len(content))])
    resumed = run(encoder, out=tmp_path / "run", resume=True)
    (r,) = resumed.record["resumes"]
    assert r["step"] == 8 and "checkpoint.pt is torn" in r["passed_over"][0]
    a, b = outcome(tmp_path / "whole"), outcome(tmp_path / "run")
    assert a[0] == b[0]
    same_record(a[1], b[1])


def test_a_resume_under_other_conditions_goes_on_and_says_so(encoder, tmp_path, capsys):
    interrupted(encoder, tmp_path / "run", 5)
    n = torch.get_num_threads()
    torch.set_num_threads(n + 1)
    try: r = run(encoder, out=tmp_path / "run", resume=True)
    finally: torch.set_num_threads(n)
    says = f"threads: {n} there, {n + 1} here"
    assert r.record["resumes"][0]["changed"] == [says] and f"resumed from step 5: {says}" in capsys.readouterr().err


def test_no_readable_checkpoint_is_an_error(encoder, tmp_path):
    interrupted(encoder, tmp_path / "run", 10, checkpoint_every=4)
    for name in ("checkpoint.pt", "previous-checkpoint.pt"): (tmp_path / "run" / name).write_bytes(b"PK")
    with pytest.raises(TrainingError, match="no checkpoint .* can be read.*checkpoint.pt.*previous-checkpoint.pt"):
        run(encoder, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("changes, names", [
    (dict(batch=5), "batch: 4 there, 5 here"),
                                            (dict(algorithm=FixMatch()),
                                             "algorithm.name: 'FineSSL' there, 'FixMatch' here"),
                                            (dict(algorithm=FineSSL(gamma=1.)), "algorithm.gamma: 3.0 there, 1.0 here"),
                                            (dict(seed=1), "seed: 0 there, 1 here"),
    (dict(schedule=Schedule(12, lr=.1, reset_pace_every=5)), "schedule.lr: 0.03 there, 0.1 here"),
                                            (dict(n_prompts=3), "n_prompts: 2 there, 3 here")])
def test_a_foreign_checkpoint_is_refused(encoder, tmp_path, changes, names):
    interrupted(encoder, tmp_path / "run", 3)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    with pytest.raises(TrainingError, match="belongs to another run") as error:
        run(encoder, out=tmp_path / "run", resume=True, **changes)
    assert names in str(error.value) and any(names in d for d in error.value.differences)
    more = len(error.value.differences) - 3
    assert str(error.value).endswith(f"; and {more} more)" if more > 0
                                     else " here)") and str(error.value).count(" there, ") <= 3
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


def test_a_foreign_checkpoint_is_passed_over_for_an_own_one_before_it(encoder, tmp_path):
    run(encoder, out=tmp_path / "whole")
    for name, seed in (("run", 0), ("other", 1)):
        interrupted(encoder, tmp_path / name, 8, checkpoint_every=4, seed=seed)
    (tmp_path / "run/checkpoint.pt").replace(tmp_path / "run/previous-checkpoint.pt")
    (tmp_path / "other/checkpoint.pt").replace(tmp_path / "run/checkpoint.pt")
    r = run(encoder, out=tmp_path / "run", resume=True).record
    assert "checkpoint.pt belongs to another run (seed: 1 there, 0 here" in r["resumes"][0]["passed_over"][0]
    assert outcome(tmp_path / "run")[0] == outcome(tmp_path / "whole")[0]


def test_a_log_gets_a_line_at_each_evaluation(encoder, capsys):
    run(encoder, evals=3, progress="lines")
    lines = capsys.readouterr().err.splitlines()
    assert [re.fullmatch(r"step (\d+) of 12: loss \d+\.\d{3}, kept \d+%, accuracy \d+\.\d%; \d+ s left", line).group(1)
            for line in lines] == ["4", "8", "12"]


def test_a_checkpoint_of_something_else_is_refused(encoder, tmp_path):
    (tmp_path / "other").mkdir()
    with lock_folder(tmp_path / "run") as held: held.mark(), held.write("checkpoint.pt", b"")
    for name, says in (("run", "not a checkpoint of finessl"), ("other", "which this version of finessl did not make")):
        torch.save({"weights": torch.zeros(3)}, tmp_path / name / "checkpoint.pt")
        with pytest.raises(TrainingError, match=says): run(encoder, out=tmp_path / name, resume=True)


def test_ctrl_c_in_the_last_step_ends_a_loop_over_runs_and_keeps_the_run(encoder, tmp_path, monkeypatch):
    run(encoder, out=tmp_path / "whole")
    real, calls = FineSSL.__call__, []
    monkeypatch.setattr(FineSSL, "__call__", lambda self, step,
                        state: (calls.append(1), len(calls) % 12 or signal.raise_signal(signal.SIGINT),
                                real(self, step, state))[-1])
    with pytest.raises(KeyboardInterrupt, match="after the last step, record and model written"):
        run(encoder, out=tmp_path / "run")
    assert outcome(tmp_path / "run")[0] == outcome(tmp_path / "whole")[0]
    with pytest.raises(KeyboardInterrupt, match="after the last step"): run(encoder)


def test_resume_without_a_checkpoint_starts_from_the_beginning(encoder, tmp_path):
    run(encoder, out=tmp_path / "a")
    b = run(encoder, out=tmp_path / "b", resume=True)
    assert outcome(tmp_path / "a")[0] == outcome(tmp_path / "b")[0] and b.record["resumes"] == []


def test_a_finished_folder_is_refused(encoder, tmp_path):
    run(encoder, out=tmp_path / "run")
    before = outcome(tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(TrainingError, match="holds a finished run"):
            run(encoder, out=tmp_path / "run", seed=1, resume=resume)
    assert outcome(tmp_path / "run") == before
    run(encoder, out=tmp_path / "run", seed=1, overwrite=True)
    assert outcome(tmp_path / "run")[1]["seed"] == 1


@pytest.mark.parametrize("every", [1, 4, None])
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(encoder, tmp_path, what, every,
                                                                                   monkeypatch):
    real, calls = FineSSL.__call__, []
    def call(self, step, state):
        loss, metrics = real(self, step, state)
        calls.append(1)
        return (loss * what if len(calls) == 7 else loss), metrics      # step 6, counted from 0
    monkeypatch.setattr(FineSSL, "__call__", call)
    kept = "no checkpoint was written" if every is None else f"the checkpoint of step {6 // every * every} is kept"
    with pytest.raises(TrainingError, match=f"not finite at step 6: .*; {kept}$"):
        run(encoder, out=tmp_path / "run", checkpoint_every=every, evals=1)
    assert not (tmp_path / "run/record.json").exists() and not (tmp_path / "run/model.safetensors").exists()
    assert (tmp_path / "run").exists() == (every is not None)             # an empty folder is not left
    if every is None: return
    c = torch.load(io.BytesIO((tmp_path / "run/checkpoint.pt").read_bytes()[DIGEST:]), weights_only=True)
    assert c["step"] == 6 // every * every and all(v.isfinite().all() for v in c["model"].values())
    monkeypatch.undo()                                                    # the fault is mended, and the run goes on
    run(encoder, out=tmp_path / "whole", evals=1)
    run(encoder, out=tmp_path / "run", resume=True, evals=1)
    assert outcome(tmp_path / "run")[0] == outcome(tmp_path / "whole")[0]


def test_saved_and_loaded_again(encoder, tmp_path):
    a = run(encoder, out=tmp_path / "run")
    b, x = load_run(tmp_path / "run", device=a.device), few().x_test
    assert torch.equal(a.predict(x),
                       b.predict(x)) and b.record == json.loads(json.dumps(a.record)) and a.classes == b.classes
    accuracy = (b.predict(x).argmax(1) == few().y_test).float().mean()
    assert abs(float(accuracy) - a.record["evaluations"][-1]["accuracy"]) < 1e-6
    c = load_run(tmp_path / "run")
    c.save(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "run/model.safetensors").read_bytes()


def test_the_encoder_is_left_as_it_was(encoder):
    before = encoder.hash
    run(encoder)
    assert encoder.hash == before


def test_another_encoder_is_not_taken_for_the_runs(tmp_path):
    random_encoder = load_backbone("pocket", checkpoint=False)
    run(random_encoder, out=tmp_path / "run")
    with pytest.raises(ValueError, match="other weights"): load_run(tmp_path / "run")


def test_a_hidden_file_of_somebody_else_stays(encoder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.checkpoint.pt.99999.tmp").write_bytes(b"half")
    run(encoder, out=tmp_path / "run")
    there = {f.name for f in (tmp_path / "run").iterdir()}
    assert there == {MARKER, ".checkpoint.pt.99999.tmp", "model.safetensors", "record.json"}


@pytest.mark.parametrize("changes, says",
                         [(dict(batch=0), "batch must be a whole number from 1 to 1048576, got 0"),
                          (dict(batch="a"), "batch must be a whole number from 1 to 1048576, got 'a'"),
                          (dict(evals=0), "evals"),
                          (dict(schedule=Schedule(0)), "steps"), (dict(mu=0), "mu"), (dict(peft="lara"), "peft"),
                                           (dict(precision="fp8"), "precision"),
                          (dict(schedule=Schedule(5, decay="week")), "decay"), (dict(labelled="some"), "labelled"),
                          (dict(checkpoint_every=0), "checkpoint_every"),
                                           (dict(schedule=Schedule(5, lr=float("inf"))),
                                            "lr must be finite and > 0, got inf"),
                          (dict(seed=1.5), "^seed must be a whole number from .*, got 1.5"),
                          (dict(init_seed="a"), "init_seed must be a whole number from .*, got 'a'")])
def test_bad_values_are_named_and_nothing_is_written(encoder, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says): run(encoder, out=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", [FineSSL, FixMatch])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), "a", None])
def test_settings_of_algorithms_are_finite_numbers(algorithm, value):
    for name in {FineSSL: ("gamma", "alpha", "zeta", "lam"), FixMatch: ("weight", "tau", "n_strong")}[algorithm]:
        with pytest.raises(ValueError, match=f"^{name} must .*, got {value!r}"): algorithm(**{name: value})


@pytest.mark.parametrize("algorithm, shows",
                         [(FineSSL(), ("loss", "kept", "accuracy")), (SupervisedOnly(), ("loss", "accuracy"))])
def test_the_progress_bar_ends_with_what_the_record_says(encoder, capsys, algorithm, shows):
    last = run(encoder, algorithm, progress=True).record["evaluations"][-1]
    line = capsys.readouterr().err.split("\r")[-1]
    assert "12/12" in line and dict(re.findall(r"(\w+)=([\d.%]+)", line)) == \
        {k: v for k,
         v in {"loss": f"{last['loss']:.3f}", "kept": f"{last['mask_ratio'] or 0:.0%}",
               "accuracy": f"{last['accuracy']:.1%}"}.items() if k in shows}


@pytest.mark.parametrize("widgets", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_notebook_shows_the_bar(monkeypatch, widgets):
    "In a Jupyter kernel, with ipywidgets or without; and no bar where TQDM_DISABLE asks for none."
    for name, value in ENV.items(): monkeypatch.setenv(name, value)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    call = ("fit(ds, 'pocket', FixMatch(), schedule=Schedule(3), batch=4, n_prompts=1, "
            "evals=1).record['evaluations'][-1]['accuracy']")
    cells = ["import os, sys" + ("" if widgets else "; sys.modules['ipywidgets'] = None"),
             "from finessl.data import digits\nfrom finessl.training import fit\nfrom finessl.engine.schedule import "
             "Schedule\nfrom finessl.pseudo_labels import FixMatch\nds = digits(1, 0)\nds = "
             "ds._replace(x_test=ds.x_test[:40], y_test=ds.y_test[:40])",
             call, f"os.environ['TQDM_DISABLE'] = '1'\n{call}"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(nb, timeout=300, kernel_name="python3").execute()
    assert not nb.cells[0].outputs and not nb.cells[1].outputs            # no warning either
    accuracy = f"{float(nb.cells[3].outputs[-1].data['text/plain']):.1%}"
    shown = json.dumps([nb.cells[2].outputs, nb.metadata.get("widgets")], ensure_ascii=False).replace("\u2007", " ")
    assert re.search(rf"3/3 \[.*loss=\d+\.\d+, kept=\d+%, accuracy={accuracy}", shown)
    assert [o.output_type for o in nb.cells[3].outputs] == ["execute_result"]


def test_no_bar_where_nobody_looks(encoder, capsys):
    run(encoder, progress=None, evals=1)
    assert capsys.readouterr().err == ""


def test_the_record_names_split_and_versions(encoder):
    ds = few()
    fits = lambda ds: fit(ds, encoder, SupervisedOnly(), schedule=Schedule(1), batch=4, n_prompts=1, evals=1,
                          progress=False).record
    record = fits(ds)
    assert record["split"] == {"seed": 0, "n_per_class": 1,
                               "hash": ds.split.hash} and fits(ds._replace(split=None))["split"] is None
    assert set(record["versions"]) == {"python", "finessl", "torch", "torchvision", "open_clip_torch", "timm", "numpy",
                                       "scikit-learn"} and all(record["versions"].values())
    assert (record["versions"]["finessl"], record["versions"]["torch"]) == (finessl.__version__, torch.__version__)


def test_seeds_do_what_they_say(encoder):
    a = run(encoder, evals=1)
    assert run(encoder, evals=1).record["evaluations"] == a.record["evaluations"]
    assert run(encoder, evals=1, seed=1).record["evaluations"][0]["loss"] != a.record["evaluations"][0]["loss"]
    assert run(encoder, evals=1, init_seed=1).record["evaluations"][0]["loss"] != a.record["evaluations"][0]["loss"]
    torch.manual_seed(123)
    torch.rand(7)
    assert run(encoder, evals=1).record["evaluations"] == a.record["evaluations"]      # whatever was drawn before


def test_evaluations_are_ten_or_one_in_ten_steps_and_what_is_asked_for():
    given = [(2, None), (19, None), (40, None), (1000, None), (2, 2), (1000, 7)]
    chosen = [prepare(digits(1, 0), "pocket", FixMatch(), Settings(Schedule(steps), evals=evals),
                      Runtime("cpu", progress=False)).settings.evals for steps, evals in given]
    assert chosen == [1, 1, 4, 10, 2, 7]
