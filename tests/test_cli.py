"""The command line as its users meet it: start, help, errors, Ctrl-C, predictions.
Killed and resumed: test_training, test_survive; presets and bench: test_presets, test_gpu; processes: test_devices."""
import csv, dataclasses, functools, io, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_digits

from finessl.cli import demo as cli_demo
from finessl.cli import main as cli_main
from finessl.cli import options as cli_options
from finessl.cli import train as cli_train
from finessl.engine import errors
from finessl import rivals, training
from finessl.algorithms import FineSSL
from finessl.backbone import load_backbone
from finessl.data import digits
from finessl.pseudo_labels import FixMatch, SupervisedOnly
from finessl.engine.runs import load_run

root = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
TINY = ["--per-class", "1", "--steps", "12", "--batch", "4", "--prompts", "2", "--evals", "2"]


@pytest.fixture
def finessl(capsys, monkeypatch, tmp_path):
    "Run a command in this process: exit code, standard output, standard error."
    monkeypatch.chdir(tmp_path)
    def run(*argv):
        code = cli_main.main([str(a) for a in argv])
        return code, *capsys.readouterr()
    return run


@pytest.fixture
def refused(finessl):
    "Run a command that must be refused with one line and exit code 2; its message."
    def run(*argv, code=2):
        got, out, err = finessl(*argv)
        assert (got, err.count("\n"), err[:16]) == (code, 1, "finessl: error: "), (got, out, err)
        return err
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Real digits as PNG files: 3 classes, 6 images for training and 4 for the test each, 5 more without a label."
    where, bunch, numbers = tmp_path_factory.mktemp("photos"), load_digits(), {"train": range(6), "test": range(6, 10)}
    def save(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype("uint8")).save(path)
    for c, name in enumerate(("zero", "one", "two")):
        mine = bunch.images[bunch.target == c]
        for part, ks in numbers.items():
            for k in ks: save(where / part / name / f"{k}.png", mine[k])
    for k in range(5): save(where / "unlabelled" / f"{k}.png", bunch.images[-1 - k])
    return where


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    "A run of `finessl train` on the folder, in a process of its own."
    where = tmp_path_factory.mktemp("trained")
    p = subprocess.run([sys.executable, "-m", "finessl", "train", "--data", str(folder), *TINY, "--out", "run"],
                       cwd=where, env=ENV, text=True, capture_output=True)
    assert p.returncode == 0, p.stderr
    # and nothing else
    assert [line.partition(":")[0] for line in p.stderr.splitlines()] == ["step 6 of 12", "step 12 of 12"]
    return where / "run", p.stdout


# ---------------------------------------------------------------- start and help

QUICK = [["--help"], ["--version"], ["demo", "--help"], ["train", "--help"], ["predict", "--help"], [], ["trian"],
         ["train", "--data", "digits"],
         ["train", "--data", "digits", "--out", "r"], ["train", "--data", "nowhere", "--out", "r"],
         ["train", "--data", "digits", "--per-class", "0", "--out", "r"],
         ["train", "--data", "digits", "--per-class", "1", "--algorithm", "fixmatch", "--gamma", "1", "--out", "r"],
         ["predict", "--run", "nowhere", "x.png"],
         ["train", "--preset", "semi-aves", "--out", "r"], ["train", "--preset", "cifar", "--out", "r"],
         ["train", "--preset", "cifar10-n4", "--image-size", "100", "--out", "r"],
         ["train", "--data", "digits", "--per-class", "1", "--normalisation", "encoder", "--out", "r"],
         ["train", "--data", "digits", "--per-class", "1", "--backbone", "resnet", "--out", "r"],
         ["bench", "--variants", "fast"]]


def test_help_and_argument_errors_import_no_torch(tmp_path):
    code = ("import sys; from finessl.cli.main import main\n"
            f"codes = [main(argv) for argv in {QUICK!r}]\n"
            "heavy = [m for m in ('torch', 'torchvision', 'open_clip', 'timm', 'numpy', 'sklearn', 'matplotlib', "
            "'PIL') if m in sys.modules]\n"
            "print(codes, heavy)")
    begin = time.time()
    p = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, capture_output=True, text=True, check=True)
    assert p.stdout.splitlines()[-1] == f"{[0] * 5 + [2] * 14} []"
    assert time.time() - begin < 20
    assert all(line.startswith("finessl: error: ")
               for line in p.stderr.splitlines()) and len(p.stderr.splitlines()) == 14, p.stderr
    assert not list(tmp_path.iterdir())


def test_defaults_are_those_of_fit_and_of_the_algorithms():
    args = cli_main.make_parser().parse_args(["train", "--data", "digits", "--out", "r"])
    fit = dataclasses.asdict(training.Settings()) | dataclasses.asdict(training.Runtime())
    for key in ("batch", "mu", "seed", "init_seed", "precision", "evals", "device"):
        assert getattr(args, key) == fit[key], key
    assert args.peft is None and cli_options.chosen_peft(args) == fit["peft"] # of a folder: as the device says
    assert (args.steps, args.lr) == training.Settings().schedule[:2] and fit["n_prompts"] is None
    for name, options in cli_options.OPTIONS.items():
        kind = type(cli_options.make_algorithm(algorithm_args(name)))
        fields = dataclasses.asdict(kind())
        assert options == {k: fields[k] if options[k] is not None else None for k in options}
        assert name == "finessl" or set(options) == set(fields) # every argument has an option
        assert cli_options.make_algorithm(algorithm_args(name)) == kind()


def algorithm_args(name, *argv):
    return cli_main.make_parser().parse_args(["train", "--data", "d", "--out", "r", "--algorithm", name, *argv])


def test_help_names_every_default(finessl):
    _, out, _ = finessl("train", "--help")
    for name, options in cli_options.OPTIONS.items():
        for key, value in options.items():
            option = cli_options.FLAGS[key][0]
            text = " ".join(re.search(rf"^  {option} .*?(?=^  --|^\S)", out, re.M | re.S)[0].split())
            assert text.startswith(option) and (name in text or cli_options.owners(key) == ["finessl"])
            if value is True: continue # a switch
            first, *others = re.search(r"\(default: (.*?)\)", text)[1].split("; ")
            said = dict(s.split(" ", 1) for s in others).get(name, first)
            assert said == ("by its form" if value is None else value if isinstance(value, str) else f"{value:g}"), key


def test_options_reach_the_algorithm():
    args = cli_main.make_parser().parse_args("train --data digits --out r --gamma 1 --form paper --alpha 0".split())
    assert cli_options.make_algorithm(args) == FineSSL(gamma=1., form="paper", alpha=0.)
    args = cli_main.make_parser().parse_args("train --data digits --out r --algorithm fixmatch --tau .9".split())
    assert cli_options.make_algorithm(args) == FixMatch(tau=.9)


@pytest.mark.parametrize("line, algorithm", [
    ("pseudo-label --tau .9 --weight 1 --ramp-start 0 --ramp-end 80 --view strong",
     rivals.PseudoLabel(tau=.9, weight=1., ramp_start=0, ramp_end=80, view="strong")),
    ("flexmatch --tau .9 --no-warm-up --mapping linear --strong-views 2",
     rivals.FlexMatch(tau=.9, warm_up=False, mapping="linear", n_strong=2)),
    ("freematch --momentum-stats .9 --fairness -.1 --weight 2",
     rivals.FreeMatch(momentum=.9, fairness=-.1, weight=2.)),
    ("softmatch --momentum-stats .9 --n-sigma 1 --no-alignment", rivals.SoftMatch(.9, 1., alignment=False)),
    ("adamatch --tau .8 --no-alignment", rivals.AdaMatch(tau=.8, alignment=False)),
    ("debiaspl --debias 1 --no-marginal", rivals.DebiasPL(debias=1., marginal=False)),
    ("finessl --form paper --strong-views 2", FineSSL(form="paper", n_strong=2)),
    ("finessl --form paper", FineSSL(form="paper", n_strong=1)),
    ("labelled-only", SupervisedOnly())])
def test_options_reach_every_algorithm(line, algorithm):
    assert cli_options.make_algorithm(algorithm_args(*line.split())) == algorithm


def test_a_rival_is_trained_resumed_and_used(finessl, tmp_path, monkeypatch):
    "By the command: stopped after a step, gone on with, as a run that nobody stopped; another option is refused."
    argv = ["train", "--data", "digits", "--per-class", "1", "--steps", "6", "--batch", "5", "--prompts", "1",
            "--evals", "2", "--quiet", "--algorithm", "freematch"]
    one, real = "--momentum-stats .9 --fairness .1".split(), rivals.FreeMatch.__call__
    def stops(self, logits, state):
        signal.raise_signal(signal.SIGINT)
        return real(self, logits, state)
    assert finessl(*argv, *one, "--out", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(rivals.FreeMatch, "__call__", stops)
        assert finessl(*argv, *one, "--out", "run")[0] == 130
    code, _, err = finessl(*argv, "--momentum-stats", ".8", "--fairness", ".1", "--out", "run", "--resume")
    assert code == 1 and "algorithm.momentum: 0.9 there, 0.8 here" in err
    assert finessl(*argv, *one, "--out", "run", "--resume") == (0, "", "")
    read = lambda name: json.loads((tmp_path / name / "record.json").read_text())
    run, whole = read("run"), read("whole")
    assert run["algorithm"] == {"name": "FreeMatch", "momentum": .9, "fairness": .1, "weight": 1., "n_strong": 1}
    assert run["resumes"] and [e["loss"] for e in run["evaluations"]] == [e["loss"] for e in whole["evaluations"]]
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    x = digits(1, 0).x_test[0].permute(1, 2, 0).numpy()
    Image.fromarray(x).save(tmp_path / "a.png")
    assert finessl("predict", "--run", "run", "a.png")[1].startswith("file,class,confidence,")


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("argv, says", [
    (["--per-class", "0"], "--per-class: must be >= 1, got 0"),
    (["--per-class", "1.5"], "--per-class: must be a whole number, got '1.5'"),
    (["--zeta", "2"], "--zeta: must be from 0 to 1, got 2"),
    (["--lr", "0"], "--lr: must be > 0, got 0"),
    (["--lr", "nan"], "--lr: must be finite and > 0, got nan"),
                                        (["--gamma", "inf"], "--gamma: must be finite and >= 0, got inf"),
    (["--algorithm", "fixmatch", "--gamma", "1"],
     "--gamma belongs to --algorithm finessl or anchored, not to fixmatch"),
    (["--tau", ".9"],
     "--tau belongs to --algorithm fixmatch, pseudo-label, flexmatch, adamatch or debiaspl, not to finessl"),
    (["--algorithm", "softmatch", "--n-sigma", "0"], "--n-sigma: must be > 0, got 0"),
    (["--algorithm", "freematch", "--mapping", "linear"], "--mapping belongs to --algorithm flexmatch, not to freema"),
    (["--algorithm", "pseudo-label", "--ramp-end", "50"], "--ramp-end must be >= --ramp-start, got 50 and 100"),
    (["--algorithm", "flexmach"], "invalid choice: 'flexmach'"),
    (["--peft", "linear", "--prompts", "3"], "--prompts belongs to --peft vpt"),
    (["--backbone", "resnet"], "resnet"),
    (["--stepz", "3"], "there is no option --stepz; did you mean --steps? (see finessl train --help)"),
    (["--step=3"], "there is no option --step; did you mean --steps?"),
    (["--qqqq"], "there is no option --qqqq (see finessl train --help)"),
    (["more", "-q"], "this has no meaning here: more -q (see finessl train --help)"),
    (["--out", ""], "--out: must name a file or a folder, got nothing"),
    (["--checkpoint", " "], "--checkpoint: must name a file or a folder, got nothing"),
    (["--device", "gpu"], "--device gpu"),
    (["--checkpoint", "none.safetensors"], "none.safetensors"),
    (["--per-class", "1000"], "fewer than the 1000"),
    (["--backbone", "pockets"],
     "--backbone pockets: no such encoder; there are pocket, open_clip:ARCHITECTURE/PRETRAINED and timm:NAME; did you "
     "mean pocket?"),
    (["--backbone", "open_clip:ViT-B-16-quickgelu"], "or a local file with --checkpoint FILE"),
    (["--checkpoint", __file__], "no weights file"),
    (["--image-size", "30"], "the image size must be a multiple of 8 pixels for pocket, got 30"),
    (["--normalisation", "encoder"], "--normalisation belongs to --preset"),
    (["--labelled", "release"],
     "the release (labelled) drops the last incomplete batch: with 10 labelled images the batch must be <= 10, got 32"),
    (["--prompt-init", "tokens", "--prompts", "500"], "(--prompts) must be between 0 and 160"),
])
def test_mistakes_are_named(refused, tmp_path, argv, says):
    assert says in refused("train", "--data", "digits", "--per-class", "1", "--out", "run", *argv)
    assert not list(tmp_path.iterdir())


def damaged(folder, tmp_path, change):
    "A copy of the folder with one thing wrong."
    shutil.copytree(folder, tmp_path / "data")
    change(tmp_path / "data")


def empty(file): file.write_bytes(b"")
def cut(file): file.write_bytes(file.read_bytes()[:60])
def one_class(data):
    for part in ("train", "test"):
        for name in ("one", "two"): shutil.rmtree(data / part / name)


@pytest.mark.parametrize("change, n, says", [
    (lambda d: empty(d / "train/one/2.png"), 2, "train/one/2.png"),
    (lambda d: cut(d / "train/one/3.png"), 2, "train/one/3.png"),
    (lambda d: (d / "train/two/0.png").write_text("no image"), 2, "train/two/0.png"),
    (lambda d: cut(d / "unlabelled/1.png"), 2, "unlabelled/1.png"),
    (one_class, 2, "one class only ('zero')"),
    (lambda d: (d / "test/one").rename(d / "test/seven"), 2, "'seven'"),
    (lambda d: None, 7, "'one') has 6 images, fewer than the 7"),
    (lambda d: (d / "train").rename(d / "photos"), 2, "train/"),
], ids=["empty file", "cut file", "not an image", "cut, unlabelled", "one class", "test class missing in training",
        "too few images", "no train folder"])
def test_bad_images_are_named_and_nothing_is_written(refused, folder, tmp_path, change, n, says):
    damaged(folder, tmp_path, change)
    assert says in refused("train", "--data", "data", *TINY, "--per-class", n, "--out", "run").replace("\\", "/")
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_left_out_when_asked(finessl, folder, tmp_path):
    damaged(folder, tmp_path, lambda d: [empty(d / "train/one/2.png"), cut(d / "unlabelled/1.png")])
    code, out, err = finessl("train", "--data", "data", *TINY, "--skip-unreadable", "--out", "run")
    assert code == 0 and "left out as unreadable: 2" in out
    assert json.loads((tmp_path / "run/record.json").read_text())["dataset"]["skipped"] == 2


def test_a_class_that_loses_its_images_says_so(refused, folder, tmp_path):
    damaged(folder, tmp_path, lambda d: [empty(d / f"train/one/{k}.png") for k in range(5)])
    argv = ["train", "--data", "data", *TINY, "--skip-unreadable", "--out", "run", "--per-class"]
    lost = "5 more were left out as unreadable"
    assert f"class 0 ('one') has 1 image, fewer than the 2 labelled ones asked for; {lost}" in refused(*argv, 2)
    shutil.move(tmp_path / "data/train/one/5.png", tmp_path / "data/other.png")
    lines = [f"train/{c}/{k}.png" for c in ("one", "two") for k in range(5)]
    (tmp_path / "data/labelled.txt").write_text("\n".join(lines))
    assert f"class 0 ('one') has 0 images, fewer than the 1 labelled ones asked for; {lost}" in refused(*argv, 1)
    (tmp_path / "data/other.png").unlink()
    assert not (tmp_path / "run").exists()


def test_named_data_offline(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(cli_options, "require_files",
                        functools.partial(cli_options.require_files, ask=lambda url: "no network"))
    for name, archive in {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz",
                          "food101": "food-101.tar.gz"}.items():
        begin = time.time()
        err = refused("train", "--data", name, "--per-class", "1", "--out", "run", "--data-dir", "data")
        assert f"bring {archive}" in err and "put it into data" in err and time.time() - begin < 5
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(finessl, monkeypatch):
    argv = ["predict", "--run", "nowhere", "x.png"]
    with pytest.raises(errors.UsageError): finessl(*argv, "--debug")
    monkeypatch.setenv("FINESSL_DEBUG", "1")
    with pytest.raises(errors.UsageError): finessl(*argv)


def test_the_unexpected_is_one_line_too(refused, monkeypatch):
    def broken(args): raise RuntimeError("first\nsecond")
    monkeypatch.setattr(cli_train, "load_dataset", broken)
    said = refused("train", "--data", "digits", "--per-class", "1", "--out", "run", code=1)
    assert "RuntimeError: first second (FINESSL_DEBUG=1" in said


# ---------------------------------------------------------------- runs

def test_train_says_what_it_did(trained):
    run, out = trained
    record = json.loads((run / "record.json").read_text())
    assert "3 classes, 3 labelled images, 23 in the pool, 12 for the test" in out and "after 12 steps" in out
    assert record["command"].startswith("finessl train --data ")
    assert record["algorithm"]["name"] == "AnchoredFineSSL"
    assert record["n_prompts"] == 2
    assert {p.name for p in run.iterdir()} - {".lock", ".finessl-run"} == {"record.json", "model.safetensors"}


def test_a_finished_folder_is_refused(refused, trained, folder):
    run, _ = trained
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert "holds a finished run" in refused("train", "--data", folder, *TINY, "--out", run)
    assert "holds a finished run" in refused("train", "--data", folder, *TINY, "--out", run, "--resume")
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_quiet(finessl, folder):
    done = finessl("train", "--data", folder, *TINY, "--algorithm", "labelled-only", "--out", "run", "--quiet")
    assert done == (0, "", "")


def test_a_loss_that_is_not_finite(refused, tmp_path):
    argv = ["train", "--data", "digits", *TINY, "--lr", "1e30", "--checkpoint-every", "1", "--out", "run"]
    assert "not finite at step 1" in refused(*argv, code=1)
    assert (tmp_path / "run/checkpoint.pt").exists() and not (tmp_path / "run/record.json").exists()
    assert "--resume" in refused(*argv)
    assert "; no checkpoint was written" in refused(*argv[:-4], "--out", "other", code=1)
    assert not (tmp_path / "other").exists()


def test_seeds_are_separate(finessl, tmp_path):
    def run(name, *argv):
        assert finessl("train", "--data", "digits", *TINY, "--steps", "1", "--evals", "1", "--out", name, "--quiet",
                       *argv)[0] == 0
        return json.loads((tmp_path / name / "record.json").read_text())
    a, b = run("a", "--seed", "3"), run("b", "--seed", "3", "--split-seed", "4", "--init-seed", "5")
    assert (a["seed"], a["dataset"]["seed"], a["init_seed"]) == (3, 3, 3)
    assert (b["seed"], b["dataset"]["seed"], b["init_seed"]) == (3, 4, 5)


# ---------------------------------------------------------------- predict

def rows(text): return list(csv.reader(io.StringIO(text)))


def test_predict_is_run_predict(finessl, trained, folder, tmp_path):
    run, _ = trained
    code, out, err = finessl("predict", "--run", run, folder / "test", folder / "unlabelled/0.png")
    head, *lines = rows(out)
    assert (code, err) == (0, "") and head == ["file", "class", "confidence", "one", "two", "zero"]
    files = [*sorted((folder / "test").rglob("*.png")), folder / "unlabelled/0.png"]
    assert [line[0] for line in lines] == [str(f) for f in files]
    p = load_run(run, device="cpu").predict(files)
    assert [[f"{v:.6f}" for v in row] for row in p.tolist()] == [line[3:] for line in lines]
    assert [head[3 + k] for k in p.argmax(1).tolist()] == [line[1] for line in lines]
    assert [f"{v:.6f}" for v in p.amax(1).tolist()] == [line[2] for line in lines]
    # the very number of the record: images are read as in training
    right = [line[1] == Path(line[0]).parent.name for line in lines[:12]]
    record = json.loads((run / "record.json").read_text())
    assert sum(right) / 12 == pytest.approx(record["evaluations"][-1]["accuracy"], abs=1e-6)
    done = finessl("predict", "--run", run, folder / "test", folder / "unlabelled/0.png", "--out", "p.csv")
    assert done == (0, "", "")
    assert (tmp_path / "p.csv").read_text() == out


def test_predict_names_what_it_cannot_read(refused, finessl, trained, folder, tmp_path):
    run, _ = trained
    damaged(folder, tmp_path, lambda d: cut(d / "test/one/7.png"))
    said = refused("predict", "--run", run, "data/test", "--out", "p.csv").replace("\\", "/")
    assert "test/one/7.png" in said and "leave such files out with --skip-unreadable" in said
    table = (tmp_path / "p.csv").read_text() # of the others
    code, out, err = finessl("predict", "--run", run, "data/test", "--skip-unreadable")
    assert code == 0 and out == table and len(rows(out)) == 12
    assert err == "finessl: left out as unreadable: 1 of 12 files\n"
    (tmp_path / "nothing").mkdir()
    assert "nothing holds no image files" in refused("predict", "--run", run, "nothing")
    assert "nowhere.png: path does not exist" in refused("predict", "--run", run, "nowhere.png")
    assert "record.json is missing" in refused("predict", "--run", "nothing", "data/test/one/6.png")
    empty(tmp_path / "data/test/one/6.png")
    assert "none of the 1 files can be read" in refused("predict", "--run", run, "data/test/one/6.png",
                                                        "--skip-unreadable")
    assert "does not exist" in refused("predict", "--run", run, "data/test/two", "--out", "no/p.csv")


def less(record, **changes):
    return json.dumps({k: v for k, v in (json.loads(record) | changes).items() if v is not None}).encode()


@pytest.mark.parametrize("name, change, says", [
    ("model.safetensors", lambda b: b[:len(b) // 2], "is torn, or no file of weights"),
    ("model.safetensors", lambda b: b"", "is torn, or no file of weights"),
    ("model.safetensors", lambda b: b"PK" * 99, "is torn, or no file of weights"),
    ("model.safetensors", lambda b: save({"a": torch.zeros(2)}),
     "does not fit the record beside it (a: [2] there, None here; "),
    ("record.json", lambda b: less(b, n_prompts=5),
     "model.safetensors does not fit the record beside it (features.prompts: [4, 2, 128] there, [4, 5, 128] here)"),
    ("record.json", lambda b: b[:len(b) // 2], "is torn, or no record of a run"),
    ("record.json", lambda b: b"\xff\xfe\x00\x80" * 9, "is torn, or no record of a run"),
    ("record.json", lambda b: b"[" * 10**5, "is torn, or no record of a run"),
    ("record.json", lambda b: b"[]", "is no record of a run: backbone, "),
    ("record.json", lambda b: less(b, classes=None), "is no record of a run: classes is missing or wrong"),
    ("record.json", lambda b: less(b, classes=3, mean="x"),
     "is no record of a run: mean, classes are missing or wrong"),
])
def test_a_damaged_run_is_named(refused, trained, folder, tmp_path, name, change, says):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(change((tmp_path / "run" / name).read_bytes()))
    assert (message := refused("predict", "--run", "run",
                               folder / "test")).startswith("finessl: error: run") and says in message
    with pytest.raises(ValueError): load_run(tmp_path / "run")
    (tmp_path / "run/model.safetensors").unlink()
    if name != "record.json":
        assert "model.safetensors is missing" in refused("predict", "--run", "run", folder / "test")


def test_weights_from_a_file(finessl, refused, tmp_path):
    from safetensors.torch import save_file
    torch.manual_seed(0)
    import timm
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    argv = ["--data", "digits", *TINY, "--steps", "2", "--backbone", "timm:test_vit", "--image-size", "32",
            "--checkpoint", "vit.safetensors", "--quiet"]
    assert finessl("train", *argv, "--out", "run")[::2] == (0, "")
    asked = SimpleNamespace(data="digits", labels=None, per_class=1, seed=0, split_seed=None)
    cli_demo.write_samples(cli_train.load_dataset(asked), tmp_path / "images")
    code, out, _ = finessl("predict", "--run", "run", "images")
    assert code == 0 and len(rows(out)) == 11
    (tmp_path / "vit.safetensors").rename(tmp_path / "moved.safetensors")
    assert "vit.safetensors" in refused("predict", "--run", "run", "images")
    assert finessl("predict", "--run", "run", "images", "--checkpoint", "moved.safetensors")[1] == out
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "other.safetensors")
    assert "other weights" in refused("predict", "--run", "run", "images", "--checkpoint", "other.safetensors")


# ---------------------------------------------------------------- demo

def test_demo(finessl, tmp_path):
    code, out, err = finessl("demo", "--steps", "2")
    assert code == 0, err
    for name in ("raw pixels", "zero-shot", "linear probe", "labelled-only", "FixMatch", "FineSSL"):
        assert re.search(rf"^{name} +\d+\.\d% +\d+\.\d$", out, re.M), out
    where = tmp_path / "finessl-demo"
    assert Image.open(where / "demo.png").size > (1000, 400)
    table = json.loads((where / "demo.json").read_text())["rows"]
    for name in ("labelled-only", "fixmatch", "finessl"):
        record = json.loads((where / name / "record.json").read_text())
        assert record["backbone_hash"] == load_backbone("pocket").hash
        [row] = [r for k, r in table.items() if k.lower() == name]
        assert record["evaluations"][-1]["accuracy"] == row["accuracy"]
    code, out, _ = finessl("predict", "--run", where / "finessl", where / "images")
    assert code == 0 and len(rows(out)) == 11
    assert finessl("demo", "--steps", "1", "--quiet") == (0, "", "")       # replaces the first
    assert json.loads((where / "finessl/record.json").read_text())["schedule"]["steps"] == 1


def test_demo_refuses_at_once(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out file: file is a file" in refused("demo", "--out", "file")
    assert "--out file/in: file is a file" in refused("demo", "--out", "file/in")
    assert "--out: must name" in refused("demo", "--out", "")
    (tmp_path / "runs/finessl").mkdir(parents=True)
    (tmp_path / "runs/finessl/record.json").write_text('{"command": "finessl train --out runs/finessl"}')
    assert "runs/finessl holds a run that is no demo's" in refused("demo", "--out", "runs").replace("\\", "/")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "finessl", "record.json", "runs"]


# --- Ctrl-C (during training: test_training.py; in a demo: test_survive.py)

@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
def test_ctrl_c_at_any_early_moment(tmp_path):
    # says when Python itself has started
    code = "import runpy; print(flush=True); runpy.run_module('finessl', run_name='__main__', alter_sys=True)"
    commands = (["train", "--data", "digits", "--per-class", "1", "--steps", "100000", "--batch", "4", "--out", "run"],
                ["demo", "--steps", "10000"])
    started = []
    for k, seconds in enumerate((.2, .4, .7, 1.1, 1.6, 2.3, 3.3, 5.)):
        (tmp_path / str(k)).mkdir()
        p = subprocess.Popen([sys.executable, "-c", code, *commands[k % 2]], cwd=tmp_path / str(k), env=ENV, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        p.stdout.readline()
        started.append((time.monotonic() + seconds, p))
    try:
        for end, p in started:
            time.sleep(max(0, end - time.monotonic()))
            p.send_signal(signal.SIGINT)
        for _, p in started:
            err = p.communicate(timeout=240)[1]
            assert p.returncode == 130 and err.startswith("finessl: ") and err.count("\n") == 1, (p.returncode, err)
    finally:
        for _, p in started: p.kill()


def test_ctrl_c_before_the_first_step(finessl, monkeypatch):
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(cli_train, "load_dataset", stop)
    code, out, err = finessl("train", "--data", "digits", "--per-class", "1", "--out", "run")
    assert code == 130 and err.startswith("finessl: stopped before the first checkpoint; start again with: finessl "
                                          "train --data digits"), err
    code, out, err = finessl("train", "--data", "digits", "--per-class", "1", "--out", "run", "--resume")
    assert code == 130 and err.startswith("finessl: stopped at once; start again with: finessl train --data digits")
    assert err.endswith(" --resume\n"), err


def test_a_folder_of_ones_own_is_learned_with_care_and_everything_else_as_in_the_paper(folder, finessl, tmp_path):
    said = {}
    for out, more in {"own": (), "paper": ("--algorithm", "finessl"), "random": ("--head-init", "random")}.items():
        code, said[out], err = finessl("train", "--data", folder, *TINY, "--out", out, *more)
        assert code == 0, err
    record = {out: json.loads((tmp_path / out / "record.json").read_text()) for out in said}
    assert [(r["algorithm"]["name"], r["head_init"]) for r in record.values()] == [
        ("AnchoredFineSSL", "centred"), ("FineSSL", "random"), ("AnchoredFineSSL", "random")]
    assert "--algorithm finessl is the paper's" in said["own"] and "algorithm:" not in said["paper"]
    ask = lambda *argv: cli_main.make_parser().parse_args(["train", "--out", "run", *argv])
    for argv in (("--data", "digits", "--per-class", "1"), ("--preset", "semi-aves", "--data", str(folder))):
        args = ask(*argv)
        args.command_line = " ".join(argv)
        cli_train.check_train(args)
        assert cli_options.make_algorithm(args) == FineSSL()
