"""A finished run is written down, and only a sound one: numbers of any library, any name and size, nothing infinite."""
import io, json, os, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save

from finessl.algorithms import FineSSL
from finessl.backbone import Encoder, load_backbone
from finessl.cli import main as cli_main
from finessl.cli.predict import save_table
from finessl.data import digits
from finessl.engine import evaluation
from finessl.engine.errors import NonFiniteLoss
from finessl.engine.evaluation import DENSE_CLASSES, confusion_of
from finessl.engine.runs import load_run
from finessl.engine.schedule import Schedule
from finessl.pseudo_labels import FixMatch
from finessl.training import fit
from storage_helpers import files, posix
from test_training import few

SHORT = dict(n_prompts=1, schedule=Schedule(2), batch=4, evals=1, progress=False)


def go(out=None, dataset=None, encoder="pocket", algorithm=FineSSL(), **changes):
    return fit(few() if dataset is None else dataset, encoder, algorithm, out=out, **SHORT | changes)


def strict(text): return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


# ---------------------------------------------------------------- numbers

NUMBERS = {"seed": np.int64(3), "init_seed": np.uint8(4), "batch": np.int32(4), "mu": np.int16(1), "evals": np.int8(1),
           "n_prompts": np.int64(2), "momentum": np.float32(.5), "weight_decay": np.float64(1e-4),
           "schedule": Schedule(np.int64(2), np.float32(.01)), "accumulate": np.int64(2),
           "checkpoint_every": np.int64(1), "steps": np.int64(2), "lr": torch.tensor(.01)}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_other_libraries_are_written_as_pythons(tmp_path, name):
    run = go(tmp_path / "run", **{name: NUMBERS[name]})
    assert strict((tmp_path / "run/record.json").read_text()) == json.loads(json.dumps(run.record))
    load_run(tmp_path / "run")


@pytest.mark.parametrize("dataset", [
    lambda: digits(np.int64(1), np.int32(0)), lambda: few()._replace(classes=tuple(np.arange(10))),
    lambda: few()._replace(split=None), lambda: few()._replace(split=few().split._replace(skipped=np.int64(0)))])
def test_so_are_those_of_the_data(tmp_path, dataset):
    go(tmp_path / "run", dataset())
    assert load_run(tmp_path / "run").classes == tuple("0123456789")


def test_and_an_algorithms(tmp_path):
    for k, algorithm in enumerate((FineSSL(gamma=np.float32(1)), FixMatch(tau=np.float64(.5)))):
        go(tmp_path / str(k), algorithm=algorithm)
        load_run(tmp_path / str(k))


@pytest.mark.parametrize("what", ["setting", "command", "path", "data"])
def test_what_cannot_be_written_is_refused_before_the_first_step(tmp_path, monkeypatch, what):
    steps, encoder, how = [], load_backbone("pocket"), {}
    monkeypatch.setattr(FineSSL, "__call__", lambda self, *args: steps.append(1))
    if what == "setting": how = {"momentum": np.complex64(.5)}
    if what == "command": how = {"command": object()}
    if what == "path": encoder.checkpoint = b"clip.pt"
    if what == "data": how = {"dataset": few()._replace(split=few().split._replace(source={1, 2}))}
    with pytest.raises(ValueError, match="cannot be written as JSON: .* is |^momentum must lie in"):
        go(tmp_path / "run", encoder=encoder, **how)
    assert not steps and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- names

@posix
def test_names_that_are_not_utf8(tmp_path, monkeypatch, capsysbinary):
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"caf\xe9")
    for c, name in enumerate((odd, "tea")):
        for part in ("train", "test"):
            for k in range(2):
                file = Path("d") / part / name / f"{odd}{k}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(few().x_test[2 * c + k].permute(1, 2, 0).numpy()).save(file)
    (Path("d") / "train" / "tea" / f"{odd} broken.png").write_bytes(b"half")
    argv = "train --data d --out r --steps 4 --batch 2 --prompts 1 --evals 1 --checkpoint-every 1 --skip-unreadable"
    assert cli_main.main(argv.split()) == 0
    assert load_run("r").classes == (odd, "tea")
    strict(Path("r/record.json").read_bytes().decode("utf-8"))
    capsysbinary.readouterr()
    assert cli_main.main(["predict", "--run", "r", "d/test"]) == 0
    out = capsysbinary.readouterr().out
    assert cli_main.main(["predict", "--run", "r", "d/test", "--out", "p.csv"]) == 0
    assert Path("p.csv").read_bytes() == out and out.count(b"caf\\udce9") >= 5
    assert cli_main.main(["predict", "--run", "r", f"d/test/tea/{odd}0.png", "--out", f"{odd}.csv"]) == 0
    assert Path(f"{odd}.csv").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_table_is_printed_in_any_encoding(tmp_path, monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    save_table(SimpleNamespace(out=None), ["猫.png", "a.png"], ("kočka", "pes"), [torch.eye(2)])
    stream.flush()
    lines = stream.buffer.getvalue().decode(encoding).splitlines()
    assert len(lines) == 3 and lines[2] == "a.png,pes,1.000000,0.000000,1.000000"
    assert lines[1].startswith("猫.png" if encoding == "utf-8" else "\\u732b.png")


# ---------------------------------------------------------------- sizes

@pytest.mark.parametrize("C", [2, DENSE_CLASSES, DENSE_CLASSES + 1, 3_000, 20_000])
def test_a_confusion_is_counted_right_and_stays_small(C):
    g = torch.Generator().manual_seed(0)
    y, pl = torch.randint(C, (5_000,), generator=g), torch.randint(C, (5_000,), generator=g)
    pl = torch.where(torch.rand(5_000, generator=g) < .5, y, pl)
    got = confusion_of(y, pl, C)
    pairs = {}
    for pair in zip(y.tolist(), pl.tolist()): pairs[pair] = pairs.get(pair, 0) + 1
    if C <= DENSE_CLASSES:
        found = {(a, b): n for a, row in enumerate(got["confusion"]) for b, n in enumerate(row) if n}
    else:
        p = got["confusion_pairs"]
        found = {(a, b): n for a, b, n in zip(p["truth"], p["predicted"], p["count"], strict=True)}
    assert found == pairs and len(json.dumps(got, indent=1)) < 100 * 5_000 + 20 * C
    for c in range(0, C, max(1, C // 20)):
        n = sum(v for (a, _), v in pairs.items() if a == c)
        want = None if not n else pairs.get((c, c), 0) / n
        assert got["per_class_accuracy"][c] == (want if want is None else pytest.approx(want, abs=1e-6))


def test_a_broken_image_costs_no_other_its_prediction(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    go("r")
    Path("p").mkdir()
    for k in range(5): Image.fromarray(few().x_test[k].permute(1, 2, 0).numpy()).save(f"p/{k}.png")
    Path("p/2.png").write_bytes(b"\x89PNG half"), Path("p/4.png").write_bytes(b"")
    for how in (["--out", "t.csv"], []):
        assert cli_main.main(["predict", "--run", "r", "p", *how]) == 2
        out, err = capsys.readouterr()
        table = Path("t.csv").read_text() if how else out
        assert [line.partition(",")[0] for line in table.splitlines()[1:]] == ["p/0.png", "p/1.png", "p/3.png"]
        assert err.count("\n") == 1 and "p/2.png" in err and "--skip-unreadable" in err


# ---------------------------------------------------------------- an encoder of one's own

def test_an_own_encoder_is_given_back_by_hand(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3,
                            num_classes=0)
    encoder, x = Encoder(vit, "my vit"), few().x_test[:4]
    run = go(tmp_path / "run", encoder=encoder)
    assert torch.equal(load_run(tmp_path / "run", backbone=encoder).predict(x), run.predict(x))
    with pytest.raises(ValueError): load_run(tmp_path / "run")
    with pytest.raises(ValueError, match="other weights"): load_run(tmp_path / "run", backbone=load_backbone("pocket"))


# ---------------------------------------------------------------- only what is finite

@pytest.mark.parametrize("lr", [1e38, 3e38])
def test_an_update_that_makes_weights_infinite_is_no_success(tmp_path, lr):
    with pytest.raises(NonFiniteLoss, match="not finite.*; no checkpoint was written"):
        go(tmp_path / "run", lr=lr, steps=1)
    assert not (tmp_path / "run").exists()


def test_no_checkpoint_holds_infinite_weights(tmp_path):
    class Poisons(FineSSL):
        "The third update is infinite where the loss is not."
        def __call__(self, logits, state):
            loss, metrics = super().__call__(logits, state)
            state["n"] = state.get("n", 0) + 1
            if state["n"] == 3: loss.register_hook(lambda g: g * float("inf"))
            return loss, metrics
    says = "the last update left weights that are not finite.*; the checkpoint of step 2 is kept"
    with pytest.raises(NonFiniteLoss, match=says):
        go(tmp_path / "run", algorithm=Poisons(), steps=6, checkpoint_every=1)
    c = torch.load(io.BytesIO((tmp_path / "run/checkpoint.pt").read_bytes()[32:]), weights_only=True)
    assert c["step"] == 2 and all(v.isfinite().all() for v in c["model"].values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_infinite_weights_are_not_saved_loaded_or_asked(tmp_path, value):
    run = go(tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with torch.no_grad(): run.model.head.weight[0, 0] = value
    with pytest.raises(NonFiniteLoss, match="logits of 4 of 4 images are not finite"): run.predict(few().x_test[:4])
    with pytest.raises(NonFiniteLoss, match="are not written"): run.save(tmp_path / "run", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    weights = load_file(tmp_path / "run/model.safetensors")
    weights["head.weight"][0, 0] = value
    (tmp_path / "run/model.safetensors").write_bytes(save(weights))
    with pytest.raises(ValueError, match="holds weights that are not finite"): load_run(tmp_path / "run")


def test_infinite_logits_end_an_evaluation():
    model = lambda x: torch.full((len(x), 3), float("nan"))
    with pytest.raises(NonFiniteLoss, match="first of image 0"):
        evaluation.predict_logits(model, few().x_test, lambda x: x.float(), "cpu")


# ---------------------------------------------------------------- a record and its weights

def test_weights_that_are_not_the_records_are_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    go("a"), go("b", seed=1)
    Image.fromarray(few().x_test[0].permute(1, 2, 0).numpy()).save("x.png")
    ours, other = (Path(n, "model.safetensors").read_bytes() for n in "ab")
    start = 8 + int.from_bytes(ours[:8], "little")                # of the numbers
    wrong = [other] + [ours[:i] + bytes([ours[i] ^ 1 << k % 8]) + ours[i + 1:]
                       for k, i in enumerate(range(start, len(ours), (len(ours) - start) // 40))]
    for content in wrong:
        Path("a/model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="is not the model of the record beside it|are not finite"): load_run("a")
    assert cli_main.main(["predict", "--run", "a", "x.png"]) == 2
    assert "is not the model of the record beside it" in capsys.readouterr().err
    Path("a/model.safetensors").write_bytes(ours)
    load_run("a")
    record = json.loads(Path("a/record.json").read_text())
    del record["weights_sha256"]                                  # as version 0.1 wrote it
    Path("a/record.json").write_text(json.dumps(record))
    load_run("a")
    assert files(tmp_path) == ["a", "b", "x.png"]


# ---------------------------------------------------------------- damaged files

def test_what_is_damaged_is_read_or_refused_by_name(tmp_path):
    "Records, weights and checkpoints; `python tests/fuzz_runs.py --n 20000` tries more."
    from fuzz_runs import KINDS, Fuzz
    fuzz, seen = Fuzz(tmp_path), {}
    for number in range(120): seen.setdefault(KINDS[number % 3], []).append(fuzz.try_one(number))
    assert None in seen["record"] and "ValueError" in seen["record"]       # an entry that nobody reads does no harm
    assert "ValueError" in seen["weights"] and "TrainingError" in seen["checkpoint"]
