"""ResNets as encoders: the library's features, each way of fine-tuning equal to a plain form, from file to predict."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from clips import small_clip
from safetensors.torch import load_file, save_file

import open_clip
import timm

from finessl.backbone import ResNetEncoder, class_embeddings, load_backbone
from finessl.bench.runner import BenchConfig
from finessl.checks import assert_close
from finessl.checks.convnets import (check_resnet, check_resnet_scales, check_resnet_tuning, library_feature,
                                     tiny_resnet, tiny_resnets)
from finessl.checks.peft import check_peft
from finessl.cli.main import main as finessl
from finessl.data import digits
from finessl.engine import hub
from finessl.engine.adapters import FineTuned
from finessl.engine.catalogue import WEIGHTS
from finessl.engine.convnets import batch_norms
from finessl.engine.errors import BackboneError
from finessl.engine.launch import launch
from finessl.engine.peft_names import CONV_PEFT
from finessl.engine.runs import load_run
from finessl.engine.schedule import Schedule
from finessl.engine.torch_state import as_generator
from finessl.peft import build_model, trainable_state_dict
from finessl.pseudo_labels import FixMatch
from finessl.training import Runtime, Settings, build_state, fit, prepare

FEW = dict(steps=4, batch=6, evals=2, progress=False, checkpoint_every=1, device="cpu")
TUNED = CONV_PEFT[1:]


@pytest.fixture(scope="module")
def ds():
    ds = digits(1, 0)
    return ds._replace(x_ulb=ds.x_ulb[:60], y_ulb=ds.y_ulb[:60], x_test=ds.x_test[:20], y_test=ds.y_test[:20],
                       split=ds.split._replace(idx_lb=torch.zeros(0, dtype=torch.int64)))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "A timm ResNet with random weights and statistics, in a file."
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    model.train()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05 * torch.randn_like(p)) # the last norm of a block starts at zero
        for _ in range(3): model(torch.randn(8, 3, 64, 64))
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "A small CLIP with a ResNet that open_clip knows by name, and its file."
    vision = dict(image_size=64, layers=[1, 1, 1, 1], width=8, head_width=32)
    with small_clip(tmp_path_factory.mktemp("clip"), "finessl-test-rn", vision) as made: yield made


def small(file): return load_backbone("timm:test_resnet", checkpoint=file, image_size=32)


@pytest.mark.parametrize("kind", tiny_resnets())
def test_every_kind(kind):
    encoder = tiny_resnet(kind)
    check_resnet(encoder)
    for name in ("bn", "bitfit", "partial", "partial:3", "full"):
        if name.partition(":")[0] in encoder.peft_methods: check_resnet_tuning(FineTuned, encoder, name)
    check_resnet_scales(FineTuned, encoder)
    for name in encoder.peft_methods[1:]: check_peft(lambda e, seed: FineTuned(e, name, as_generator(seed)), encoder,
                                                 1e-3)


def test_a_file_gives_the_librarys_features(file, tmp_path):
    encoder, model = load_backbone("timm:test_resnet", checkpoint=file), timm.create_model("test_resnet", num_classes=5)
    model.load_state_dict(load_file(file))
    x = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    with torch.no_grad(): assert_close(encoder(x), library_feature(model.eval(), x), atol=1e-4)
    check_resnet(encoder)
    assert encoder.text(["a cat"]) is None and encoder.proj is None
    with pytest.raises(ValueError, match="no projection"): encoder.project(torch.zeros(1, encoder.width))
    old = {f"module.{k}": v for k, v in load_file(file).items() if "num_batches_tracked" not in k} # as torchvision's
    torch.save({"state_dict": old}, tmp_path / "old.pth")
    mine = load_backbone("timm:test_resnet", checkpoint=tmp_path / "old.pth")
    with torch.no_grad(): assert_close(mine(x), encoder(x), atol=0)


def test_a_wrong_file_is_named(file, tmp_path):
    tensors = load_file(file)
    statistics = next(k for k in tensors if k.endswith("running_mean"))
    save_file({k: v for k, v in tensors.items() if k != statistics}, tmp_path / "torn.safetensors")
    for name, path, says in (("timm:resnet18", file, "does not fit timm:resnet18"), ("pocket", file, "missing, first"),
                             ("timm:test_resnet", tmp_path / "torn.safetensors", f"1 missing, first '{statistics}'")):
        with pytest.raises(BackboneError, match=says): load_backbone(name, checkpoint=path)


def test_clips_resnet_from_a_file(clip, tmp_path):
    model, path = clip
    encoder = load_backbone("open_clip:finessl-test-rn", checkpoint=path)
    x, captions = torch.randn(2, 3, 64, 64), ["a photo of a cat", "a dog"]
    with torch.no_grad():
        assert_close(encoder.project(encoder(x)), model.encode_image(x), atol=1e-5)
        tokens = open_clip.get_tokenizer("RN50")(captions)
        assert_close(encoder.text(captions), model.encode_text(tokens, normalize=True), atol=1e-5)
    assert encoder.proj.shape == (256, 24) and class_embeddings(encoder, captions, ["{}"]).shape == (2, 24)
    check_resnet(encoder)
    save_file(model.visual.state_dict(), tmp_path / "tower.safetensors")
    tower = load_backbone("open_clip:finessl-test-rn", checkpoint=tmp_path / "tower.safetensors")
    with torch.no_grad(): assert_close(tower(x), encoder(x), atol=0)
    assert tower.text(captions) is None and tower.proj.shape == (256, 24)


def test_another_image_size(clip, file):
    "CLIP's positions are resized like a picture; timm's ResNets take any size."
    encoder = load_backbone("open_clip:finessl-test-rn", checkpoint=clip[1], image_size=128)
    check_resnet(encoder)
    positions, before = encoder.trunk.attnpool.positional_embedding, clip[0].visual.attnpool.positional_embedding
    assert positions.shape == (17, 256)
    with torch.no_grad(): assert_close(positions[0], before[0], atol=0)
    assert abs(float(positions[1:].detach().mean()) - float(before[1:].detach().mean())) < .01
    check_resnet(load_backbone("timm:test_resnet", checkpoint=file, image_size=50))
    for name, path, size, says in (("open_clip:finessl-test-rn", clip[1], 100, "multiple of 32"),
                                   ("timm:test_resnet", file, 0, "multiple of 1 pix")):
        with pytest.raises(BackboneError, match=says): load_backbone(name, checkpoint=path, image_size=size)


@pytest.mark.parametrize("name", CONV_PEFT)
def test_trained_saved_and_predicted(name, ds, file, tmp_path):
    encoder = small(file)
    before = encoder.hash
    run = fit(ds, encoder, FixMatch(), peft=name, out=tmp_path / "run", **FEW)
    assert encoder.hash == before and run.record["peft"] == name and run.record["checkpoint"] == str(file)
    assert torch.equal(load_run(tmp_path / "run").predict(ds.x_test), run.predict(ds.x_test))
    for mine, theirs in zip(batch_norms(run.model), batch_norms(encoder)):
        assert torch.equal(mine.running_mean, theirs.running_mean) and not mine.training
        assert torch.equal(mine.running_var, theirs.running_var)
    start, end = (trainable_state_dict(m) for m in (build_model(encoder, 10, name, seed=0), run.model))
    still = [k for k in start if torch.equal(start[k], end[k]) and not k.startswith("aux_head")]
    assert start.keys() == end.keys() and not still, still


@pytest.mark.parametrize("name", ["bn", "full"])
def test_resume_is_bit_exact(name, ds, file, tmp_path):
    class Stop(FixMatch):
        def __call__(self, logits, state):
            self.calls.append(0)
            if len(self.calls) == 3: raise RuntimeError("cut")
            return super().__call__(logits, state)
    whole = fit(ds, small(file), FixMatch(), peft=name, out=tmp_path / "whole", **FEW)
    cut = Stop(); object.__setattr__(cut, "calls", [])
    Stop.__name__ = "FixMatch"
    with pytest.raises(RuntimeError, match="cut"): fit(ds, small(file), cut, peft=name, out=tmp_path / "run", **FEW)
    on = fit(ds, small(file), FixMatch(), peft=name, out=tmp_path / "run", resume=True, **FEW)
    a, b = trainable_state_dict(whole.model), trainable_state_dict(on.model)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [e["loss"] for e in whole.record["evaluations"]] == [e["loss"] for e in on.record["evaluations"]]


def test_heads_first_then_the_whole_network(ds, file, tmp_path, monkeypatch):
    monkeypatch.setenv("FINESSL_CACHE", str(tmp_path / "cache"))
    settings, quiet = Settings(Schedule(4), batch=6, evals=1), Runtime("cpu", progress=False)
    heads = fit(ds, small(file), FixMatch(), replace(settings, peft="linear", stored_views=(3, 5)), quiet)
    begun = build_state(prepare(ds, small(file), FixMatch(), replace(settings, peft="full", head_init="trained"),
                                quiet))
    assert torch.equal(begun.model.head.weight, heads.model.head.weight)
    run = fit(ds, small(file), FixMatch(), peft="full", head_init="trained", out=tmp_path / "run", **FEW)
    assert torch.equal(load_run(tmp_path / "run").predict(ds.x_test), run.predict(ds.x_test))
    assert not any(torch.equal(a, b) for a, b in zip(run.model.features.parameters(), small(file).parameters()))


def one_of_two(file, ds):
    run = fit(ds, small(file), FixMatch(tau=.1), peft="bn", **FEW)
    return run.record, {k: v.detach().clone() for k, v in trainable_state_dict(run.model).items()}


def test_two_processes_and_a_batch_in_pieces_train_as_one(ds, file):
    "With statistics of the batch, neither would."
    record, one = one_of_two(file, ds)
    pieces = fit(ds, small(file), FixMatch(tau=.1), peft="bn", accumulate=3, **FEW)
    both = launch(2, one_of_two, file, ds, threads=1)
    for said, state in (both, (pieces.record, trainable_state_dict(pieces.model))):
        assert_close([e["loss"] for e in said["evaluations"]], [e["loss"] for e in record["evaluations"]], atol=1e-4)
        for k, v in state.items(): assert_close(v, one[k], atol=1e-5)
    assert both[0]["processes"] == 2


def test_what_has_no_place_is_said_in_one_sentence(ds, file, clip):
    resnet = small(file)
    for name in ("vpt", "vpt-shallow", "lora", "adapter:8", "adaptformer"):
        with pytest.raises(ValueError, match="no tokens for prompts.*one of linear, bitfit, bn, ssf") as said:
            fit(ds, resnet, FixMatch(), peft=name, **FEW)
        assert "\n" not in str(said.value) and repr(name) in str(said.value)
    with pytest.raises(ValueError, match="pocket has no BatchNorm"): fit(ds, "pocket", FixMatch(), peft="bn", **FEW)
    with pytest.raises(ValueError, match="has 4 blocks"): fit(ds, resnet, FixMatch(), peft="partial:5", **FEW)
    with pytest.raises(ValueError, match="no tokens"): BenchConfig.from_name("timm:test_resnet", 2, "cpu")
    group_norm = tiny_resnet("timm, GroupNorm")
    assert "bn" not in group_norm.peft_methods and "bitfit" in group_norm.peft_methods
    with pytest.raises(BackboneError, match="is a VisionTransformer, not a ResNet"):
        ResNetEncoder(timm.create_model("test_vit", num_classes=0))


def test_heads_start_at_the_names_of_classes(clip, ds):
    encoder = load_backbone("open_clip:finessl-test-rn", checkpoint=clip[1])
    run = fit(ds, encoder, FixMatch(), peft="bn", head_init="text", **FEW | dict(steps=1, evals=1))
    assert run.record["head_init"] == "text" and run.record["evaluations"][-1]["accuracy"] is not None


def test_on_the_command_line(file, tmp_path, capsys):
    here = ["train", "--data", "digits", "--per-class", "1", "--backbone", "timm:test_resnet", "--checkpoint",
            str(file), "--image-size", "32", "--steps", "2", "--batch", "4", "--evals", "1", "--quiet", "--out"]
    assert finessl([*here, str(tmp_path / "run"), "--peft", "bn"]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["peft"], record["backbone"], record["n_prompts"]) == ("bn", "timm:test_resnet", 0)
    capsys.readouterr()
    assert finessl([*here, str(tmp_path / "other")]) != 0
    assert "peft must be one of linear, bitfit, bn, ssf, partial, full; got 'vpt'" in capsys.readouterr().err
    assert finessl(["train", "--help"]) == 0
    assert "bn (BatchNorm" in " ".join(capsys.readouterr().out.split())


def test_the_table_of_encoders_knows_them():
    for name in ("timm:resnet18", "timm:resnet50.a1_in1k", "open_clip:RN50-quickgelu/openai"):
        w = WEIGHTS[name]
        assert hub.look_up(name) == ("served", [w.repo, w.mb, w.patch])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["open_clip:RN50", "timm:resnet50"])
def test_the_real_ones(name):
    "As large as they are, with random weights."
    encoder = load_backbone(name, checkpoint=False)
    check_resnet(encoder)
    assert encoder.width == 2048 and len(encoder.layers) == 16
    check_resnet_tuning(FineTuned, encoder, "bn")
    check_resnet_scales(FineTuned, encoder)
