"Statistics of one's own runs: what the notebooks check, and what goes to and comes from files."
import importlib.util, json, math, os, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest

from finessl.checks.compare import check_compare, toy_run
from finessl.checks.statistics import check_holm, check_paired_bootstrap_interval
from finessl.engine.errors import UsageError
from finessl.studies.compare import compare, comparison_text, latex_table, scalars, write_comparison, write_scalars
from finessl.studies.statistics import holm, paired_bootstrap_interval, paired_p_value

RECORD = {"backbone": "pocket", "backbone_hash": "h", "image_size": 32, "read_size": 32, "mean": [.5] * 3,
          "std": [.5] * 3, "classes": ["0", "1"], "peft": "vpt", "n_prompts": 4} # what else a record of a run holds


def runs():
    "Two methods on three splits, one label a class; a third that gains nothing."
    base = [toy_run(x, s) for s, x in enumerate((.5, .6, .7))]
    return {"base": base, "a_b": [toy_run(x, s) for s, x in enumerate((.61, .70, .81))], "none": base}


@pytest.mark.parametrize("check, f", [(check_holm, holm), (check_compare, compare),
                                      (check_paired_bootstrap_interval, paired_bootstrap_interval)])
def test_it_meets_its_specification(check, f): check(f)


def test_p_values_by_hand():
    "With two degrees of freedom p = 1 - t/√(t² + 2); with one, 1 - 2 arctan(t)/π."
    assert paired_p_value([1., 2., 3.], [0., 0., 0.]) == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired_p_value([1., 3.], [0., 0.]) == pytest.approx(1 - 2 * math.atan(2.) / math.pi)


def test_folders_and_records_give_one_table(tmp_path):
    "Finished runs of `finessl train` are named by their folders."
    folders = {}
    for name, many in runs().items():
        for i, record in enumerate(many):
            folder = tmp_path / f"{name}-{i}"
            folder.mkdir()
            (folder / "record.json").write_text(json.dumps(RECORD | record))
            folders.setdefault(name, []).append(folder)
    assert compare(folders, "base").equals(compare(runs(), "base"))
    with pytest.raises(FileNotFoundError, match="record.json is missing"): compare({"base": [tmp_path]}, "base")


def test_csv_keeps_every_number_and_latex_what_is_read(tmp_path):
    table = compare(runs(), "base")
    write_comparison(table, tmp_path / "v1.0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v1.0.csv", "v1.0.tex"] # an ending of the name stays
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "v1.0.csv", index_col=["N", "method"]), table)
    text = (tmp_path / "v1.0.tex").read_text(encoding="utf-8")
    assert text == latex_table(comparison_text(table)) and text.count(r"\\") == 4
    assert r"1 & a\_b & 70.7 $\pm$ 10.0 & 3 & +10.7 [" in text and "& clear &" in text and "within noise" in text


def test_single_runs_have_no_difference():
    "One run each: means, and nothing that claims to be a difference."
    table = compare({"base": [toy_run(.5, 0)], "other": [toy_run(.9, 0)]}, "base")
    assert table[["difference", "t_low", "p", "p_holm"]].isna().to_numpy().all() and not table.clear.any()
    assert comparison_text(table).loc[(1, "other"), ["accuracy, %", "difference [t]"]].tolist() == ["90.0", ""]


def test_scalars_for_tensorboard(tmp_path):
    "What is written is read back where tensorboard is installed; elsewhere one sentence says what to install."
    record = {"evaluations": [{"step": 5, "loss": 2., "accuracy": .5}, {"step": 10, "loss": 1, "accuracy": None}]}
    (tmp_path / "record.json").write_text(json.dumps(RECORD | record))
    assert scalars(tmp_path) == scalars(record) == [("loss", 2., 5), ("accuracy", .5, 5), ("loss", 1., 10)]
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(UsageError, match="pip install tensorboard"): write_scalars(record, tmp_path / "events")
        assert not (tmp_path / "events").exists()
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert write_scalars(record, tmp_path / "events") == 3
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 2.), (10, 1.)]


def say_and_wait(path): # a job: what its process is called, and then a long run
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_killed_study_takes_its_workers_along(tmp_path):
    code = ("import sys; from test_statistics import say_and_wait; from finessl.studies.runner import run_jobs\n"
            "run_jobs([sys.argv[1]], say_and_wait, sys.argv[1] + '.jsonl', str, 1)")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    study, pid = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], env=env), tmp_path / "pid"
    try:
        until(lambda: pid.exists() and pid.read_text() or study.poll() is not None)
        study.kill()
        until(lambda: not Path(f"/proc/{pid.read_text()}").exists(), 20)
    finally: study.kill(), study.wait()


def until(met, seconds=120):
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(.1)
