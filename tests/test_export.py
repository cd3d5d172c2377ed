"""A run taken away: ONNX Runtime and torch.export answer as `predict` does, for any number of images; nothing of
somebody else's is written over, and a stranger needs neither finessl nor torch."""
import json, subprocess, sys
from pathlib import Path

import finessl
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from finessl.backbone import Encoder, load_backbone
from finessl.checks.export import check_resize_bytes
from finessl.cli import main as cli_main
from finessl.data import digits
from finessl.engine.export import RUNNERS, ResizeBytes, export_bytes, export_run
from finessl.engine.export_file import ONNX_HEAD, SCRIPT, is_export
from finessl.engine.runs import TrainedRun
from finessl.peft import build_model, trainable_state_dict, weights_sha256
from finessl.views import CLIP_MEAN, CLIP_STD, View

SMALL_CLIP = {"embed_dim": 48, "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 192, "layers": 4},
              "text_cfg": {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}}


def make_run(encoder, read_size, peft="vpt", n_prompts=2, classes="αβγδεζηθικ"):
    model = build_model(encoder, len(classes), peft, n_prompts if peft == "vpt" else 0)
    record = {"backbone": encoder.name, "backbone_hash": encoder.hash, "image_size": encoder.image_size,
              "read_size": read_size, "mean": encoder.mean, "std": encoder.std, "classes": [*classes], "peft": peft,
              "n_prompts": n_prompts if peft == "vpt" else 0, "checkpoint": getattr(encoder, "checkpoint", None),
              "weights_sha256": weights_sha256(model)}
    view = View(encoder.image_size, encoder.mean, encoder.std)
    return TrainedRun(model.eval(), json.loads(json.dumps(record)), view, "cpu")


def agrees(run, format, images): # uint8 (N, 3, S, S)
    content, off = export_bytes(run, format)
    p = torch.cat([RUNNERS[format][1](content, x.permute(0, 2, 3, 1).contiguous()) for x in images.split(64)])
    assert p.shape == (len(images), len(run.classes)) and off < 1e-5
    gap = float((p.detach() - run.predict(images)).abs().max())
    assert gap < 1e-5, gap
    return content


@pytest.fixture(scope="module")
def pocket(): return make_run(load_backbone("pocket"), 40)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    where, g = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(100):
        size = tuple(int(v) for v in g.integers(20, 70, 2))
        kind = ("RGB", "L", "RGBA", "P")[i % 4]
        image = Image.fromarray(g.integers(0, 256, (*size, 4), dtype=np.uint8), "RGBA").convert(kind)
        exif = Image.Exif()
        if i % 5 == 0: exif[0x0112] = 1 + i % 8
        image.save(where / f"{i:03}.png", exif=exif)
    return where


@pytest.fixture(scope="module")
def exported(pocket, tmp_path_factory):
    where = tmp_path_factory.mktemp("exported")
    pocket.save(where / "run")
    assert cli_main.main(["export", "--run", str(where / "run")]) == 0
    return where


def test_the_resize_is_torchs_to_the_bit(): check_resize_bytes(ResizeBytes)


def test_a_torch_program_answers_as_predict_does(pocket):
    agrees(pocket, "torch", torch.randint(0, 256, (100, 3, 40, 40), dtype=torch.uint8))


def test_a_stranger_gets_the_answers_of_predict(pocket, exported, photos):
    "Files of many kinds, by onnxruntime and Pillow alone."
    files = sorted(map(str, photos.iterdir()))
    alone = "\nassert not {'torch', 'finessl', 'onnx'} & {*sys.modules}\n"
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", SCRIPT + alone, exported / "run.onnx", *files],
                          capture_output=True, text=True, encoding="utf-8", check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    conf, best = pocket.predict(files).max(1)
    assert [r[0] for r in rows] == files and [r[1] for r in rows] == [pocket.classes[k] for k in best.tolist()]
    assert max(abs(float(r[2]) - c) for r, c in zip(rows, conf.tolist())) < 1e-5
    assert 13 < sum(bool(line.strip()) for line in SCRIPT.splitlines()) <= 20


def test_the_file_says_what_it_is(pocket, exported):
    import onnx, onnxruntime
    model = onnx.load(exported / "run.onnx")
    onnx.checker.check_model(model, full_check=True)
    said = {p.key: p.value for p in model.metadata_props}
    assert json.loads(said["classes"]) == [*pocket.classes] and said["weights_sha256"] == weights_sha256(pocket.model)
    note = json.loads(said["preprocessing"])
    assert note["size"] == 40 and note["image_size"] == 32 and note["mean"] == list(pocket.record["mean"])
    session = onnxruntime.InferenceSession(exported / "run.onnx", providers=["CPUExecutionProvider"])
    (x,), (p,) = session.get_inputs(), session.get_outputs()
    assert (x.name, x.type, x.shape[1:]) == ("images", "tensor(uint8)", [40, 40, 3]) and isinstance(x.shape[0], str)
    assert (p.name, p.type, p.shape[1]) == ("probabilities", "tensor(float)", 10)
    images = torch.randint(0, 256, (7, 3, 40, 40), dtype=torch.uint8)
    for n in (1, 7):
        got = session.run(None, {"images": images[:n].permute(0, 2, 3, 1).numpy()})[0]
        assert np.abs(got - pocket.predict(images[:n]).numpy()).max() < 1e-5


@pytest.mark.parametrize("name", ["run.onnx", "run.pt2"])
def test_the_file_holds_no_more_than_it_needs(pocket, exported, name):
    "No caption tower, no second head, no path of this machine; and the run is as it was."
    before = list(trainable_state_dict(pocket.model))
    if name == "run.pt2": assert export_run(pocket, exported / name, "torch") < 1e-5
    content = (exported / name).read_bytes()
    places = [str(Path(module.__file__).parent) for module in (finessl, torch)]
    for word in ("stack_trace", "token_embedding", *places):
        assert word.encode() not in content, word
    visual = sum(v.numel() for v in pocket.model.features.encoder.trunk.parameters())
    assert 4 * visual < len(content) < 4.1 * visual + 400_000
    assert list(trainable_state_dict(pocket.model)) == before and pocket.model.aux_head is not None


def test_what_is_not_ours_stays(pocket, exported, tmp_path, capsys):
    def refused(*argv):
        code = cli_main.main(["export", *map(str, argv)])
        err = capsys.readouterr().err
        assert code == 2 and err.startswith("finessl: error: ") and err.count("\n") == 1, (code, err)
        return err
    run, mine = exported / "run", tmp_path / "mine.onnx"
    mine.write_bytes(b"\x08\x0a\x12\x07pytorch")
    assert "was not made by finessl" in refused("--run", run, "--out", mine)
    assert mine.read_bytes() == b"\x08\x0a\x12\x07pytorch" and [p.name for p in tmp_path.iterdir()] == ["mine.onnx"]
    assert "holds no finished run" in refused("--run", tmp_path)
    assert "holds no finished run" in refused("--run", tmp_path / "none")
    assert "is a folder; name a file" in refused("--run", run, "--out", tmp_path)
    assert "is read by this command" in refused("--run", run, "--out", run / "model.safetensors", "--overwrite")
    assert "does not exist" in refused("--run", run, "--out", tmp_path / "no" / "x.onnx")
    assert "invalid choice: 'tflite'" in refused("--run", run, "--format", "tflite")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.onnx"]


def test_an_export_replaces_an_export(pocket, tmp_path):
    file = tmp_path / "x.pt2"
    for _ in range(2): assert export_run(pocket, file, "torch") < 1e-5
    assert is_export(file) and [p.name for p in tmp_path.iterdir()] == ["x.pt2"]
    (tmp_path / "y").write_bytes(ONNX_HEAD)
    assert is_export(tmp_path / "y")


def test_packages_that_are_missing_are_named(exported, tmp_path, monkeypatch, capsys):
    from finessl.engine import export_file
    find = lambda name: None if name.startswith("onnx") else object()
    monkeypatch.setattr(export_file.importlib.util, "find_spec", find)
    assert cli_main.main(["export", "--run", str(exported / "run"), "--out", str(tmp_path / "x.onnx")]) == 2
    assert 'needs onnx, onnxscript, onnxruntime, not installed here: pip install "finessl[export]"' \
        in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_wrong_answer_is_not_written(pocket, tmp_path, monkeypatch):
    from finessl.engine import export
    monkeypatch.setitem(export.RUNNERS, "torch", (export.torch_bytes, lambda content, x: torch.zeros(len(x), 10)))
    with pytest.raises(ValueError, match="does not answer as the run does"): export_run(pocket, tmp_path / "x", "torch")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_larger_encoders_agree_too(library, format):
    "Random weights; the seconds are the exporters'."
    torch.manual_seed(0)
    clip = lambda: Encoder(open_clip.CLIP(**SMALL_CLIP, quick_gelu=True), "open_clip:small", CLIP_MEAN, CLIP_STD)
    run = make_run(load_backbone("timm:vit_tiny_patch16_224", False) if library == "timm" else clip(), 256)
    agrees(run, format, torch.randint(0, 256, (100, 3, 256, 256), dtype=torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["linear", "lora", "adapter", "adaptformer", "bitfit", "ssf", "partial", "full"])
def test_whatever_was_fine_tuned(peft):
    agrees(make_run(load_backbone("pocket"), 32, peft), "onnx", digits(1, 0).x_test[:100])


@pytest.mark.slow
def test_a_model_that_cannot_be_followed_is_named(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x): return x.mean((2, 3)) if float(x.sum()) > 0 else x.amax((2, 3))
    from finessl.engine.inputs import as_encoder
    run = make_run(as_encoder(Odd(), 32), 32, "linear")
    with pytest.raises(ValueError, match="Odd cannot be exported: "): export_run(run, tmp_path / "x", "torch")
    assert not [*tmp_path.iterdir()]
