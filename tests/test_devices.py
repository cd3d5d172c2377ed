"""Several processes, and a batch in pieces: the same training, and the same end for all."""
import json, os, re, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest
import torch

from finessl.algorithms import FineSSL
from finessl.backbone import load_backbone
from finessl.bench.scaling import main, scaling_table
from finessl.cli.main import main as cli_main
from finessl.data import digits
from finessl.devices import fit_distributed
from finessl.engine.errors import DataError, PeerFailed, PeerLost, TrainingError, UnreadableError
from finessl.engine.launch import EXIT_DISK_FULL, WORKER_SCRIPT, collect_error, launch, pickle_error, worker_main
from finessl.engine.schedule import Schedule
from finessl.peft import trainable_state_dict
from finessl.pseudo_labels import FixMatch, SupervisedOnly
from finessl.training import fit

root = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
CLOSE = 1e-5


def few():
    "Ten labelled digits, two hundred in the pool, twenty for the test."
    ds = digits(1, 0)
    first = {k: getattr(ds, k)[:n] for k, n in {"x_ulb": 200, "y_ulb": 200, "x_test": 20, "y_test": 20}.items()}
    return ds._replace(split=ds.split._replace(idx_lb=torch.zeros(0, dtype=torch.int64)), **first)


class Watched(FineSSL):
    "FineSSL that notes the pace counts and which images pass; to stop itself once, see `watched`."
    def __call__(self, step, state):
        loss, metrics = super().__call__(step, state)
        self.noted.append((loss.item(), state["pace"].counts.tolist(), metrics["mask"].float().mean().item()))
        if len(self.noted) == self.stop_after and os.environ.get("RANK", "0") == self.stop_in:
            signal.raise_signal(signal.SIGINT)
        return loss, metrics
Watched.__name__ = "FineSSL" # in records and checkpoints


def watched(stop_after=0, stop_in="0"):
    algorithm = Watched()
    for k, v in dict(noted=[], stop_after=stop_after, stop_in=stop_in).items(): object.__setattr__(algorithm, k, v)
    return algorithm


def run(algorithm, **changes):
    settings = dict(n_prompts=2, schedule=Schedule(20, reset_pace_every=15), batch=9, mu=2, evals=4, progress=False,
                    device="cpu")
    return fit(few(), load_backbone("pocket"), algorithm, **settings | changes)


def outcome(r): return r.record, {k: v.detach().clone() for k, v in trainable_state_dict(r.model).items()}


PLAIN = {"FixMatch": (FixMatch(tau=.5), {}), "labelled-only": (SupervisedOnly(), {}),
         "dropped, two unlabelled each": (FineSSL(detach_aux=False), dict(labelled="release", mu=1))}


def in_each(folder):
    "What each of two processes does: whole, stopped and resumed, in pieces, with other algorithms."
    out, algorithm = {}, watched()
    out["whole"] = (*outcome(run(algorithm, out=folder / "whole")), algorithm.noted)
    try: run(watched(10, "1"), out=folder / "stopped")         # Ctrl-C reaches the second process only
    except KeyboardInterrupt as e: out["stopped"] = str(e)
    out["resumed"] = outcome(run(watched(), out=folder / "stopped", resume=True))
    out["pieces"] = outcome(run(FineSSL(), accumulate=3))
    out |= {name: outcome(run(algorithm, **changes)) for name, (algorithm, changes) in PLAIN.items()}
    try: run(watched(10, "0"), out=folder / "left")
    except KeyboardInterrupt: pass
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What two processes did, and their folder."
    folder = tmp_path_factory.mktemp("two")
    return launch(2, in_each, folder, threads=1), folder


def same(a, b):
    "Assert that two outcomes are equal to float rounding: losses, weights, and what is counted."
    for x, y in zip(a[0]["evaluations"], b[0]["evaluations"], strict=True):
        assert abs(x["loss"] / y["loss"] - 1) < CLOSE and x["mask_ratio"] == y["mask_ratio"], (x, y)
        assert x.get("pool_pl_counts") == y.get("pool_pl_counts"), (x, y)
    for k, v in a[1].items(): assert (v - b[1][k]).abs().max() < CLOSE, k
    assert a[0]["confusion"] == b[0]["confusion"]


def test_two_processes_train_as_one(two):
    algorithm = watched()
    one = outcome(run(algorithm))
    losses, counts, util = zip(*algorithm.noted)
    assert len(set(counts[4])) > 2 and all(.2 < u < .8 for u in util[4:6]), (counts[4], util) # what is compared works
    assert max(counts[14]) > sum(counts[15])                   # the pace table was cleared
    record, state, noted = two[0]["whole"]
    same(one, (record, state))
    for (loss, count, share), mine, theirs, u in zip(noted, losses, counts, util):
        assert abs(loss / mine - 1) < CLOSE and count == theirs and share == u
    assert (record["processes"], record["accumulate"]) == (2, 1)


@pytest.mark.parametrize("name", PLAIN)
def test_any_algorithm_in_parts(two, name):
    "By two processes, and by one in pieces that do not divide the batch."
    algorithm, changes = PLAIN[name]
    one = outcome(run(algorithm, **changes))
    same(two[0][name], one)
    same(outcome(run(algorithm, accumulate=4, **changes)), one)


def test_stopped_in_one_process_and_gone_on_with(two):
    out, folder = two
    assert re.fullmatch(r"stopped after step 11 of 20, checkpoint written", out["stopped"])
    whole, resumed = ((folder / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == resumed                                    # to the bit, with as many processes
    assert out["resumed"][0]["evaluations"] == out["whole"][0]["evaluations"]
    assert out["resumed"][0]["resumes"] == [{"step": 11, "passed_over": [], "changed": []}]


def test_gone_on_with_by_another_number_of_processes(two, capsys):
    out, folder = two
    alone = outcome(run(watched(), out=folder / "left", resume=True, accumulate=2))
    same(alone, out["whole"])
    changed = alone[0]["resumes"][0]["changed"]
    assert "processes: 2 there, 1 here" in changed and "accumulate: 1 there, 2 here" in changed
    assert "processes: 2 there, 1 here" in capsys.readouterr().err


def test_pieces_give_the_same_update(two):
    pieces = outcome(run(FineSSL(), accumulate=4))             # of 2, 2, 2 and 3 labelled images
    same(pieces, two[0]["whole"][:2])
    assert pieces[0]["accumulate"] == 4
    same(two[0]["pieces"], two[0]["whole"][:2])                # and in each of two processes


def test_pieces_in_half_precision():
    runs = [run(FineSSL(), schedule=Schedule(1), evals=1, precision="bf16", accumulate=k) for k in (1, 4)]
    a, b = (r.record["evaluations"][0]["loss"] for r in runs)
    assert abs(a / b - 1) < 1e-2


def test_pieces_take_less_memory():
    "The tensors that a step keeps for its way back: with 4 pieces less than half."
    def kept(accumulate):
        seen, most = {}, [0]
        def pack(t):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            most[0] = max(most[0], sum(seen.values()))
            return t
        def clear(self, step, state):
            loss, metrics = FineSSL.__call__(self, step, state)
            if accumulate > 1: seen.clear()
            return loss, metrics
        kind = type("FineSSL", (FineSSL,), {"__call__": clear})
        real = torch.autograd.backward
        def backward(*args, **kwargs):
            real(*args, **kwargs)
            seen.clear()
        torch.autograd.backward = backward
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                run(kind(), schedule=Schedule(1), evals=1, batch=16, accumulate=accumulate)
        finally: torch.autograd.backward = real
        return most[0]
    assert kept(4) < .5 * kept(1)


# ---------------------------------------------------------------- what ends one ends all

class Dies(FineSSL):
    "The second process is killed in its third step."
    def __call__(self, step, state):
        state["n"] = state.get("n", 0) + 1
        if state["n"] == 3 and os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(step, state)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_one_that_is_killed_ends_all(capfd):
    begin = time.time()
    with pytest.raises(TrainingError, match="process 1 of 2 was killed"):
        fit_distributed(2, few(), load_backbone("pocket"), Dies(), n_prompts=2, batch=4, schedule=Schedule(1000),
                        device="cpu", progress=False)
    assert time.time() - begin < 200 and capfd.readouterr().err == ""


def test_the_worker_script_names_what_is_there():
    "It imports by a string, which no tool follows when a name changes."
    assert f"from {worker_main.__module__} import {worker_main.__name__}\n" in WORKER_SCRIPT


def dies_while_the_other_sleeps():
    "The second process is killed; the first does not notice, and has to be ended."
    if os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_who_is_ended_with_the_others_is_not_taken_for_the_cause():
    begin = time.time()
    with pytest.raises(TrainingError, match="process 1 of 2 was killed"):
        launch(2, dies_while_the_other_sleeps, threads=1, grace=.5)
    assert time.time() - begin < 300


def test_the_first_that_failed_is_named(tmp_path):
    "By the order of their ends, not by their numbers."
    for exits, named in (({2: -9, 0: -9}, 2), ({1: 3, 2: -9, 0: 0}, 1)):
        assert str(collect_error(tmp_path, exits, 3)).startswith(f"process {named} of 3 was killed")
    for rank in (0, 2): (tmp_path / f"error-{rank}").write_bytes(pickle_error(DataError(f"image {rank}"), ""))
    assert str(collect_error(tmp_path, {2: 1, 0: 1}, 3)) == "image 2"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.slow
def test_nothing_stays_of_a_parent_that_is_killed(tmp_path):
    "The children write their checkpoint, clear away what the parent had left for them, and end."
    (folder := tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "finessl", "train", "--data", "digits", "--per-class", "1", "--steps", "100000",
               "--batch", "4", "--prompts", "1", "--checkpoint-every", "2", "--device", "cpu", "--processes", "2",
               "--quiet", "--out", "run"]
    p = subprocess.Popen(command, cwd=tmp_path, env=ENV | {"TMPDIR": str(folder)}, stderr=subprocess.PIPE, text=True)
    end = time.time() + 300
    while not (tmp_path / "run/checkpoint.pt").exists() and time.time() < end: time.sleep(.01)
    assert [f.name for f in folder.glob("finessl-*/call")] == ["call"]
    p.kill()
    assert p.communicate(timeout=240)[1] == ""                  # read until the children, who hold it too, have ended
    assert not list(folder.glob("finessl-*")) and not (tmp_path / "run/.lock").exists()
    assert (tmp_path / "run/checkpoint.pt").exists()


NO_ROOM = """
import resource, sys
from finessl.cli.main import main as cli_main
from finessl.engine.launch import launch
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))        # no file may be larger: the call does not fit
print(cli_main(sys.argv[1:]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))     # a small call does, its result does not
import torch
try: launch(1, torch.ones, 100_000, threads=1)
except RuntimeError as e: print(type(e).__name__, e)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
@pytest.mark.slow
def test_a_full_temporary_folder_is_one_sentence(tmp_path):
    (folder := tmp_path / "temporary").mkdir()
    command = [sys.executable, "-c", NO_ROOM, "train", "--data", "digits", "--per-class", "1", "--steps", "2",
               "--device", "cpu", "--processes", "2", "--out", str(tmp_path / "run")]
    p = subprocess.run(command, env=ENV | {"TMPDIR": str(folder)}, text=True, capture_output=True, timeout=300)
    says = f"no space left in {folder}; set TMPDIR to a folder with room\n"
    assert p.stderr == f"finessl: error: {says}" and p.stdout.endswith(f"1\nTrainingError {says}"), (p.stdout, p.stderr)
    assert not list(folder.glob("finessl-*")) and not (tmp_path / "run").exists()


def test_no_temporary_folder_at_all(monkeypatch):
    def none(): raise FileNotFoundError(2, "No usable temporary directory found in ['a', 'b']")
    monkeypatch.setattr("tempfile.gettempdir", none)
    says = "no temporary folder can be written to .*; set TMPDIR" if os.name != "nt" else "set TEMP"
    with pytest.raises(TrainingError, match=says): launch(1, print)


@pytest.mark.parametrize("error, kind", [
    (DataError("no image"), DataError), (UnreadableError("a.jpg", "cannot read a.jpg"), DataError),
    (TrainingError("full"), TrainingError), (KeyboardInterrupt("stopped"), KeyboardInterrupt)])
def test_what_failed_says_so_and_not_who_ended_with_it(tmp_path, error, kind):
    said = [PeerFailed("process 0 ended because process 2 failed"), PeerLost("gone"), error]
    for rank, e in enumerate(said): (tmp_path / f"error-{rank}").write_bytes(pickle_error(e, "where"))
    def collected(*codes): return collect_error(tmp_path, dict(enumerate(codes)), 3)
    got = collected(1, 1, 1)
    assert isinstance(got, kind) and str(got) == str(error) and got.__notes__ == ["where"]
    (tmp_path / "error-2").unlink()
    assert "process 2 of 3 was killed" in str(collected(1, 1, -9))
    assert collect_error(tmp_path / "none", {0: 0, 1: 0}, 2) is None
    assert "no space left in" in str(collected(1, 1, EXIT_DISK_FULL)) # it had no room to say so


@pytest.mark.slow
def test_torchrun_and_one_message(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "finessl", "train",
               "--data", "digits", "--per-class", "1", "--steps", "12", "--batch", "5", "--prompts", "1",
               "--evals", "1", "--lr", "1e30", "--checkpoint-every", "1", "--device", "cpu", "--out", "run"]
    p = subprocess.run(command, cwd=tmp_path, env=ENV, text=True, capture_output=True, timeout=300)
    said = [line for line in p.stderr.splitlines() if line.startswith("finessl: ")]
    assert len(said) == 1 and "the loss is not finite at step 1" in said[0], p.stderr
    assert p.returncode == 1 and p.stdout.count("10 labelled images") == 1
    assert (tmp_path / "run/checkpoint.pt").exists() and not (tmp_path / "run/record.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows passes Ctrl-C to all by itself")
def test_ctrl_c_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    def press():
        end = time.time() + 300
        while not (tmp_path / "run/checkpoint.pt").exists() and time.time() < end: time.sleep(.01)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=press, daemon=True).start()
    code = cli_main(["train", "--data", "digits", "--per-class", "1", "--steps", "5000", "--batch", "4",
                     "--prompts", "1", "--checkpoint-every", "3", "--device", "cpu", "--processes", "2",
                     "--out", "run"])
    err = capsys.readouterr().err
    says = (r"finessl: stopped after step \d+ of 5000, checkpoint written; "
            r"go on with: finessl train .* --processes 2 .* --resume\n")
    assert code == 130 and re.fullmatch(says, err), (code, err)


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("processes, changes, says", [
    (0, {}, "processes must be >= 1"), (2, dict(batch=3, accumulate=2), "batch must be >= processes x accumulate"),
    (2, dict(device="mps"), "serves one process"), (2, dict(device="cuda:0"), "is one GPU"),
    (2, dict(accumulate=0), "accumulate must be a whole number from 1")])
def test_what_cannot_be_is_refused_before_anything_starts(processes, changes, says):
    with pytest.raises(ValueError, match=says):
        fit_distributed(processes, few(), load_backbone("pocket"), FineSSL(), **dict(batch=4) | changes)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="several GPUs are here")
def test_a_gpu_each():
    with pytest.raises(ValueError, match="2 processes need 2 GPUs"):
        fit_distributed(2, few(), load_backbone("pocket"), FineSSL(), device="cuda")


SCALING = ["--backbone", "timm:test_vit", "--image-size", "32", "--batch", "4", "--steps", "1", "--prompts", "1"]


def test_scaling_record(tmp_path):
    assert main(["--out", str(tmp_path / "s.json"), *SCALING, "--processes", "1"]) == 0
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["decode"]["ms"] > 0 and [r["processes"] for r in scaling_table(record)] == [1]
    assert record["command"].startswith("python -m finessl.devices --out")


@pytest.mark.slow
def test_the_command_of_the_scaling_record(tmp_path):
    "The name in the records still starts it, and the processes that it starts find what they call."
    command = ["-m", "finessl.devices", "--out", "s.json", *SCALING, "--processes", "1,2"]
    subprocess.run([sys.executable, *command], cwd=tmp_path, env=ENV, check=True, timeout=900)
    record = json.loads((tmp_path / "s.json").read_text())
    assert [(r["processes"], r["kind"]) for r in record["runs"]] == [(1, "strong"), (2, "strong"), (2, "weak")]
    assert record["command"] == " ".join(["python", *command])
