"""What a prediction is worth: thresholds, temperatures and sets, checked by draws, and through the command line."""
import csv, math, re, shutil

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from finessl.backbone import load_backbone
from finessl.checks.confidence import (check_choose_threshold, check_conformal_sets, check_fit_temperature,
                                       check_sure_above)
from finessl.cli import main as cli_main
from finessl.engine.confidence import (SureAbove, choose_threshold, conformal_sets, fit_temperature, images_needed,
                                       scale_probabilities, sure_above)
from finessl.engine.errors import DataError
from finessl.engine.fingerprint import file_digest
from finessl.engine.runs import TrainedRun, load_run
from finessl.peft import build_model, init_heads_from_means
from finessl.views import View

NAMES = [f"digit {k}" for k in range(10)]


@pytest.mark.parametrize("check, f", [(check_fit_temperature, fit_temperature), (check_conformal_sets, conformal_sets),
                                      (check_choose_threshold, choose_threshold), (check_sure_above, sure_above)])
def test_specifications(check, f): check(f)


def test_how_many_images_are_too_few():
    for accuracy in (.5, .8, .9, .95, .99):
        n = images_needed(accuracy)
        assert accuracy ** n <= .05 < accuracy ** (n - 1)
        p = torch.tensor([[.9, .1]]).repeat(n, 1)
        with pytest.raises(DataError, match=f"{n} would be needed"):
            sure_above(p[1:], torch.zeros(n - 1, dtype=torch.int64), accuracy)
        assert sure_above(p, torch.zeros(n, dtype=torch.int64), accuracy).passed == n


def test_what_is_said_is_what_was_counted():
    low, high = SureAbove(.8, .9, 100, 60, 57).interval()
    assert abs(low - .8608) < 1e-3 and abs(high - .9896) < 1e-3                # Clopper and Pearson, 57 of 60
    assert "too few images to be sure of 90 %" in str(SureAbove(.8, .9, 100, 60, 57))
    assert "too few" not in str(SureAbove(.8, .9, 500, 300, 290))
    hopeless = sure_above(torch.tensor([[.9, .1]]).repeat(40, 1), torch.ones(40, dtype=torch.int64))
    assert "none of 100 held-out images passes" in str(SureAbove(.8, .9, 100, 0, 0))
    assert hopeless.threshold == math.inf and "all predictions are unsure" in str(hopeless)


def test_a_temperature_changes_no_prediction_and_bears_certainty():
    p = torch.tensor([[1., 0., 0.], [.5, .3, .2]])
    for t in (.1, 1., 7.):
        q = scale_probabilities(p, t)
        assert torch.equal(q.argmax(1), p.argmax(1)) and q.isfinite().all() and torch.allclose(q.sum(1), q.new_ones(2))
    assert torch.allclose(scale_probabilities(p, 1.), p.double(), atol=1e-7)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A run whose heads are class means, and digits that it did not see as files: held out, and new."
    where, bunch = tmp_path_factory.mktemp("confidence"), load_digits()
    for part, some in (("held", range(300, 420)), ("new", range(500, 560))):
        for i in some:
            folder = where / part / (NAMES[bunch.target[i]] if part == "held" else "")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((bunch.images[i] * 15.9).astype("uint8")).save(folder / f"{i}.png")
    encoder = load_backbone("pocket")
    model, view = build_model(encoder, 10, n_prompts=1).eval(), View(32, encoder.mean, encoder.std)
    x = torch.from_numpy((bunch.images[:100] * 15.9).astype("uint8")).repeat(3, 1, 1, 1).reshape(3, 100, 8, 8)
    with torch.no_grad(): feat = model.features(view(x.transpose(0, 1).contiguous()))
    init_heads_from_means(model, feat, torch.from_numpy(bunch.target[:100]).long())
    record = {"backbone": "pocket", "backbone_hash": encoder.hash, "image_size": 32, "read_size": 32, "peft": "vpt",
              "mean": list(encoder.mean), "std": list(encoder.std), "classes": NAMES, "n_prompts": 1,
              "checkpoint": None}
    TrainedRun(model, record, view, "cpu").save(where / "run")
    lines = [f"{p.relative_to(where).as_posix()},{p.parent.name}" for p in sorted((where / "held").rglob("*.png"))]
    (where / "held.csv").write_text("\n".join(["file,label", *lines]) + "\n")
    (where / "few.csv").write_text("\n".join(["file,label", *lines[:8]]) + "\n")
    return where


@pytest.fixture
def predict(place, capsys):
    def run(*argv, code=0):
        done = cli_main.main(["predict", "--run", str(place / "run"), str(place / "new"), *map(str, argv)])
        out, err = capsys.readouterr()
        assert done == code, err
        return [*csv.DictReader(out.splitlines())], err
    return run


def test_unsure_below_a_number(predict):
    plain, some = predict()[0], predict("--unsure-below", .3)[0]
    assert 0 < sum(row["class"] == "unsure" for row in some) < len(some) == 60
    for a, b in zip(plain, some):
        assert b["class"] == ("unsure" if float(a["confidence"]) < .3 else a["class"])
        assert {k: v for k, v in a.items() if k != "class"} == {k: v for k, v in b.items() if k != "class"}


def test_a_threshold_for_a_wanted_accuracy(predict, place):
    said = {}
    for held in ("held", "held.csv"):
        rows, said[held] = predict("--unsure-below", "auto", "--accuracy", .8, "--held-out", place / held)
        threshold = float(re.search(r"unsure below ([\d.]+), for 80 % right: of 120 held-out", said[held])[1])
        assert "95 % interval" in said[held] and said[held].count("\n") == 1
        for row in rows: assert (row["class"] == "unsure") == (float(row["confidence"]) < threshold)
    assert said["held"] == said["held.csv"]
    assert "120 held-out images are too few" in predict(
        "--unsure-below", "auto", "--accuracy", .99, "--held-out", place / "held", code=2)[1]


def test_calibrated_probabilities_and_sets(predict, place):
    plain = predict()[0]
    rows, said = predict("--calibrate", "--sets", .8, "--held-out", place / "held")
    assert "temperature" in said and "sets hold the true class for 80 %" in said
    run, truth = load_run(place / "run", device="cpu"), load_digits().target
    for a, b in zip(plain, rows):
        assert a["class"] == b["class"] and a["confidence"] != b["confidence"]
        inside = b["set"].split("|")
        assert b["class"] in inside and {*inside} <= {*run.classes}
        assert min(float(b[c]) for c in inside) >= max([float(b[c]) for c in NAMES if c not in inside], default=0)
    right = sum(NAMES[truth[int(re.search(r"(\d+)\.png", b["file"])[1])]] in b["set"].split("|") for b in rows)
    assert .6 < right / 60 <= 1


def test_too_few_labels_are_said_and_nothing_is_written(predict, place, tmp_path):
    few, out = ("--held-out", place / "few.csv"), ("--out", tmp_path / "t.csv")
    assert "8 held-out images are too few to say anything about 90 %" in predict(
        "--unsure-below", "auto", *few, *out, code=2)[1]
    assert "8 held-out images are too few for a temperature" in predict("--calibrate", *few, *out, code=2)[1]
    assert "8 held-out images are too few for sets of 90 %: at least 9" in predict("--sets", .9, *few, *out, code=2)[1]
    assert not [*tmp_path.iterdir()]


def test_half_of_an_option_is_refused(predict, place, tmp_path):
    held = ("--held-out", place / "held")
    assert "--unsure-below auto needs --held-out" in predict("--unsure-below", "auto", code=2)[1]
    assert "--sets needs --held-out" in predict("--sets", .9, code=2)[1]
    assert "--held-out belongs to" in predict(*held, code=2)[1]
    assert "--accuracy belongs to --unsure-below auto" in predict("--accuracy", .9, "--calibrate", *held, code=2)[1]
    assert "must be a number, got 'soon'; or auto" in predict("--unsure-below", "soon", code=2)[1]
    assert "must lie between 0 and 1, got 1" in predict("--sets", 1, *held, code=2)[1]
    assert "does not exist" in predict("--sets", .9, "--held-out", tmp_path / "no", code=2)[1]
    (tmp_path / "t.csv").write_text(f"file,label\n{next((place / 'new').iterdir())},goose\n")
    assert "has class 'goose', which the run does not know" in predict(
        "--sets", .9, "--held-out", tmp_path / "t.csv", code=2)[1]


def test_images_that_were_trained_on_are_left_out(place, capsys, tmp_path):
    "The table of the training may be named: of its lines only those count that training put aside."
    def call(*argv, code=0):
        assert cli_main.main([*map(str, argv)]) == code
        return capsys.readouterr().err
    run, table = tmp_path / "run", place / "held.csv"
    call("train", "--data", place / "held", "--labels", table, "--test-fraction", .5, "--peft", "linear", "--steps", 3,
         "--batch", 8, "--evals", 1, "--out", run, "--quiet")
    record = load_run(run, device="cpu").record
    ask = ("predict", "--run", run, place / "new", "--out", tmp_path / "t.csv", "--calibrate", "--held-out")
    said = call(*ask, table)
    assert f"left out of --held-out: {record['n_lb']} images that the run was trained on" in said
    assert f"; {record['n_test']} are left" in said and f"by {record['n_test']} held-out images" in said
    copies, digests = tmp_path / "copies", {*record["labelled_files"]} # wherever they lie, whatever they are called
    for file in (place / "held").rglob("*.png"):
        if file_digest(file).hex() in digests:
            (copies / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copies / file.parent.name / f"other {file.name}")
    assert f"--held-out {copies}: the run was trained on every image of it" in call(*ask, copies, code=2)
