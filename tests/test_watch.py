"""A run that goes wrong says so: each symptom provoked in a real run, none raised by a healthy one, stop and resume,
several processes, the same bits with and without."""
import json

import pytest
import torch

from finessl import training
from finessl.algorithms import FineSSL
from finessl.backbone import load_backbone
from finessl.cli import main as cli_main
from finessl.cli import train as cli_train
from finessl.data import Dataset, digits
from finessl.devices import fit_distributed
from finessl.engine.errors import CollapsedRun
from finessl.engine.progress import ProgressBar
from finessl.engine.watch import SAMPLE, Watch, advice, labelled_sample, probe_classes
from finessl.peft import trainable_state_dict
from finessl.pseudo_labels import FixMatch, SupervisedOnly
from finessl.training import Settings, fit


@pytest.fixture(scope="module")
def encoder(): return load_backbone("pocket")


def small(n_per_class=1, pool=200, seed=0):
    "Digits with a small pool and a small test part."
    ds = digits(n_per_class, seed)
    return ds._replace(x_ulb=ds.x_ulb[:pool], y_ulb=ds.y_ulb[:pool], x_test=ds.x_test[:40], y_test=ds.y_test[:40],
                       split=ds.split._replace(idx_lb=torch.zeros(0, dtype=torch.int64)))


def long_tail(n_per_class):
    "Digits, ten times as many of the first class as of the last."
    ds = digits(n_per_class, 0)
    keep = torch.cat([(ds.y_ulb == c).nonzero()[:, 0][:int(100 * 10 ** (-c / 9))] for c in range(10)]).sort().values
    return small(n_per_class)._replace(x_ulb=ds.x_ulb[keep], y_ulb=ds.y_ulb[keep])


def two_classes(n_per_class, a=3, b=8):
    "Two digits, nine times as many of the first as of the second."
    ds, of = digits(n_per_class, 0), {}
    for part in ("lb", "ulb", "test"):
        x, y = getattr(ds, f"x_{part}"), getattr(ds, f"y_{part}")
        rows = [(y == c).nonzero()[:, 0] for c in (a, b)]
        if part == "ulb": rows[1] = rows[1][:len(rows[0]) // 9]
        keep = torch.cat(rows)
        of |= {f"x_{part}": x[keep], f"y_{part}": (y[keep] == b).long()}
    return Dataset(**of, classes=(str(a), str(b)))


ALGORITHMS = SupervisedOnly(), FixMatch(), FineSSL()
BRIEF = dict(batch=8, steps=30, evals=5, n_prompts=2, progress=False)
LINEAR = BRIEF | dict(peft="linear", n_prompts=None)
WRONG = {"collapse": (1, FineSSL(gamma=100.), BRIEF | dict(lr=.3)),
         "minority classes lost": (4, FineSSL(gamma=30.), LINEAR),
         "overconfident": (4, FineSSL(gamma=30.), LINEAR),
         "unstable": (4, FineSSL(), LINEAR | dict(lr=30., batch=4, steps=40, evals=8))}


@pytest.mark.parametrize("name", WRONG)
def test_a_symptom_is_said_noted_and_said_again(encoder, capsys, name):
    n, algorithm, how = WRONG[name]
    record = fit(small(n), encoder, algorithm, **how | dict(progress=None)).record
    found = {s["name"]: s for s in record["symptoms"]}
    assert set(found[name]) == {"name", "first", "last", "said"} and json.loads(json.dumps(record))
    lines, s = capsys.readouterr().err.splitlines(), found[name]
    assert any(line.startswith(f"warning: {name} at step {s['first']}: ") and "try " in line for line in lines), lines
    assert (s["last"] == how["steps"]) == any(line.startswith(f"warning: {name} to the end: ") for line in lines)
    assert len(lines) == len(found) + sum(t["last"] == how["steps"] and t["first"] < t["last"] for t in found.values())


def test_a_collapse_is_what_it_says(encoder):
    e = fit(small(), encoder, WRONG["collapse"][1], **WRONG["collapse"][2]).record["evaluations"][-1]
    assert e["pool_largest_share"] > .9 and e["probe_taken"] > .9 and abs(e["probe_agreement"]) < .1
    assert e["mask_ratio"] > .9 and e["mean_weight"] > 10 and e["labelled_accuracy"] <= .2   # and nothing else tells


def test_the_papers_constants_collapse_on_two_uneven_classes_in_a_short_run(encoder):
    record = fit(two_classes(2), encoder, FineSSL(), batch=16, steps=40, evals=4, n_prompts=4, progress=False).record
    assert [s["name"] for s in record["symptoms"]] == ["collapse"] and record["symptoms"][0]["last"] == 40
    assert record["evaluations"][-1]["mask_ratio"] > .9 and record["evaluations"][-1]["labelled_accuracy"] == .5


SETS = {"N = 1": lambda: small(1, 300), "N = 2": lambda: small(2, 300), "N = 4": lambda: small(4, 300),
        "long tail": lambda: long_tail(2), "two classes": lambda: two_classes(2)}


# those between the ends are marked slow
@pytest.mark.parametrize("what", [pytest.param(s, marks=[pytest.mark.slow] * (s not in ("N = 1", "long tail")))
                                  for s in SETS])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["labelled-only", "FixMatch", "FineSSL"])
def test_a_healthy_run_says_nothing(encoder, capsys, what, algorithm):
    how = dict(batch=32, steps=100) if what == "two classes" else dict(batch=16, steps=40)
    record = fit(SETS[what](), encoder, algorithm, **how, evals=5, n_prompts=4, progress=None).record
    assert record["symptoms"] == [] and capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["labelled-only", "FixMatch", "FineSSL"])
def test_a_healthy_run_of_full_length_says_nothing(encoder, n, algorithm):
    assert fit(digits(n, 0), encoder, algorithm, progress=False).record["symptoms"] == []


def weights(run): return {k: v.detach().clone() for k, v in trainable_state_dict(run.model).items()}


def same(a, b): return all(torch.equal(v, b[k]) for k, v in a.items())


def test_nothing_but_the_record_changes_by_being_watched(encoder, monkeypatch):
    watched = fit(small(), encoder, FineSSL(), **BRIEF)
    monkeypatch.setattr(Watch, "begin", lambda *a: None)
    monkeypatch.setattr(Watch, "__call__", lambda *a: {})
    monkeypatch.setattr(training, "report_symptoms", lambda *a: None)
    alone = fit(small(), encoder, FineSSL(), **BRIEF)
    assert same(weights(watched), weights(alone))
    for a, b in zip(watched.record["evaluations"], alone.record["evaluations"], strict=True):
        assert b.items() <= a.items() and set(a) > set(b)


def test_no_random_number_is_drawn(encoder):
    setup = training.prepare(small(), encoder, FineSSL(), Settings(batch=8))
    state, before = training.build_state(setup), torch.get_rng_state()
    state.watch.begin(setup)
    assert torch.equal(torch.get_rng_state(), before) and len(state.watch.probe) == 200


def test_stop_ends_a_run_that_collapses_and_warn_goes_on_as_if_nothing_was(encoder, tmp_path):
    n, algorithm, how = WRONG["collapse"]
    call = lambda out, **more: fit(small(n), encoder, algorithm, out=tmp_path / out, checkpoint_every=7, **how, **more)
    whole = call("whole")
    for resume in (False, True):
        with pytest.raises(CollapsedRun, match="^collapse at step 12: .*; the checkpoint of step 7 is kept: go on"):
            call("run", on_collapse="stop", resume=resume)
        assert {f.name for f in (tmp_path / "run").iterdir() if f.name[0] != "."} == {"checkpoint.pt"}
    resumed = call("run", resume=True)
    assert same(weights(whole), weights(resumed)) and resumed.record["symptoms"] == whole.record["symptoms"]
    assert resumed.record["evaluations"] == whole.record["evaluations"]


def test_what_the_probe_said_is_not_asked_again_after_a_resume(encoder, tmp_path, monkeypatch):
    n, algorithm, how = WRONG["collapse"]
    with pytest.raises(CollapsedRun):
        fit(small(n), encoder, algorithm, out=tmp_path, checkpoint_every=7, on_collapse="stop", **how)
    monkeypatch.setattr("finessl.engine.watch.probe_classes", lambda *a: 1 / 0)
    fit(small(n), encoder, algorithm, out=tmp_path, resume=True, **how)


def test_the_command_line_stops_with_one_sentence_and_says_at_the_end_what_was_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_train, "load_dataset", lambda args: small())
    argv = "train --data digits --per-class 1 --gamma 100 --lr .3 --batch 8 --steps 30 --evals 5 --prompts 2".split()
    assert cli_main.main([*argv, "--checkpoint-every", "7", "--out", "stopped", "--on-collapse", "stop"]) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]
    assert len(err) == 1 and err[0].startswith("finessl: error: collapse at step 12: ")
    assert "--gamma 1" in err[0] and "--prompt-init tokens" in err[0] and "--on-collapse warn" in err[0]
    assert cli_main.main([*argv, "--out", "warned"]) == 0
    out, err = capsys.readouterr()
    assert err.count("warning: collapse") == 2 and "beware of collapse" in out.splitlines()[-1]
    assert json.loads((tmp_path / "warned/record.json").read_text())["symptoms"][0]["name"] == "collapse"
    assert cli_main.main([*argv, "--out", "quiet", "--quiet"]) == 0 and capsys.readouterr() == ("", "")


def test_other_words_than_warn_and_stop_are_refused(encoder):
    with pytest.raises(ValueError, match=r"on_collapse must be one of \('warn', 'stop'\), got 'ask'"):
        fit(small(), encoder, FineSSL(), on_collapse="ask", **BRIEF)
    for name, wrong in (("compile", "nonsense"), ("progress", "loud")):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{wrong}'"):
            fit(small(), encoder, FineSSL(), **BRIEF | {name: wrong})


def test_two_processes_see_what_one_sees(encoder):
    n, algorithm, how = WRONG["collapse"]
    one = fit(small(n), encoder, algorithm, **how | dict(steps=12, evals=2)).record
    two = fit_distributed(2, small(n), "pocket", algorithm, device="cpu", **how | dict(steps=12, evals=2)).record
    assert two["processes"] == 2 and two["symptoms"] == one["symptoms"] != []


def test_advice_fits_the_run():
    given = {"peft": "vpt", "prompt_init": "random", "head_init": "random", "batch": 32,
             "schedule": {"steps": 200, "lr": .03}}
    of = lambda name, a, **more: advice(name, a, given | {"algorithm": vars(a)} | more)
    assert "--gamma 1" in of("collapse", FineSSL()) and "gamma" not in of("collapse", FineSSL(gamma=1.))
    assert "--prompt-init" not in of("collapse", FineSSL(), prompt_init="tokens")
    assert "--prompt-init" not in of("collapse", FineSSL(), peft="linear")
    assert "--tau 0.95" in of("collapse", FixMatch()) and "--tau" not in of("collapse", FixMatch(tau=.95))
    assert "labelled-only" in of("collapse", FixMatch()) and "labelled-only" not in of("collapse", SupervisedOnly())
    assert "--lr 0.003" in of("unstable", FineSSL()) and "--lr" not in of("overconfident", FineSSL())
    for name in WRONG: # something is left to try for everybody
        long = {"steps": 15000, "lr": .03}
        assert not of(name, SupervisedOnly(), prompt_init="tokens", schedule=long).endswith("try ")


def test_many_labelled_images_are_looked_at_in_part():
    y = torch.arange(20_000) % 7
    some = labelled_sample(y)
    counts = y[some].bincount()
    assert len(some) == SAMPLE and counts.max() - counts.min() <= 1 and torch.equal(some, some.unique())
    assert len(labelled_sample(torch.arange(1500))) == 1500 and torch.equal(labelled_sample(y[:50]), torch.arange(50))


def test_the_probe_of_a_class_with_one_image_has_no_accuracy():
    feat = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    assert probe_classes(feat, torch.arange(12) % 3, feat)[1] is not None
    assert probe_classes(feat, (torch.arange(12) > 0).long(), feat)[1] is None


def test_only_the_first_process_warns_and_never_where_nothing_shall_be_said(capsys):
    state = type("State", (), {"step": 0})()
    shown = {(None, True): True, ("lines", True): True, (False, True): False, (None, False): False}
    for (progress, is_main), says in shown.items():
        with ProgressBar(state, 3, "x", progress, is_main) as bar: bar.warn("collapse")
        assert ("warning: collapse" in capsys.readouterr().err) == says
