"""Encoders from real files: right, wrong, cut short, of another library; and no network."""
import os
import pickle
import random
import subprocess
import sys

import pytest
import torch
from clips import small_clip
from safetensors.torch import load_file, save_file

import open_clip
import timm

from finessl import backbone
from finessl.backbone import load_backbone
from finessl.checks import assert_close
from finessl.checks.backbone import check_encoder, tiny_encoder, tiny_kinds
from finessl.checks.peft import check_peft, check_vpt
from finessl.engine import downloads, encoders, weights
from finessl.engine.encoders import byte_tokens
from finessl.engine.errors import BackboneError, MissingError
from finessl.engine.weights import read_weights
from finessl.peft import VPT, CosineHead, NoPEFT, ReferenceVPT, TwoHeadModel


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    "A timm ViT with random weights, and its file."
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5).eval()
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(model.state_dict(), path)
    return model, path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "A small CLIP that open_clip knows by name, and its file."
    vision = dict(image_size=32, patch_size=8, width=48, layers=2, head_width=16)
    with small_clip(tmp_path_factory.mktemp("clip"), "finessl-test-clip", vision) as made: yield made


def failure(*args, **kwargs):
    "The message of the error, which must be one sentence."
    with pytest.raises(BackboneError) as error: load_backbone(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and ". " not in message.replace("e.g. ", "")
    return message


def test_timm_file_gives_timm_features(vit):
    model, path = vit
    encoder = load_backbone("timm:test_vit", checkpoint=path)
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad(): assert_close(encoder(x), model.forward_features(x)[:, 0], atol=1e-5)
    check_encoder(encoder)
    assert encoder.text(["a cat"]) is None and encoder.proj is None
    with pytest.raises(ValueError, match="no projection"): encoder.project(torch.zeros(1, encoder.width))


def test_open_clip_file_gives_open_clip_features_and_captions(clip):
    model, path = clip
    encoder = load_backbone("open_clip:finessl-test-clip", checkpoint=path)
    x, captions = torch.randn(2, 3, 32, 32), ["a photo of a cat", "a dog"]
    tokens = open_clip.get_tokenizer("ViT-B-16")(captions)
    with torch.no_grad():
        assert_close(encoder.project(encoder(x)), model.encode_image(x), atol=1e-5)
        assert_close(encoder.text(captions), model.encode_text(tokens, normalize=True), atol=1e-5)
    assert encoder.mean == open_clip.OPENAI_DATASET_MEAN and encoder.proj.shape == (48, 24)
    check_encoder(encoder)


@pytest.mark.parametrize("wrap", [
    lambda d: d, lambda d: {"state_dict": d}, lambda d: {f"model.{k}": v for k, v in d.items()},
    lambda d: {"epoch": 3, "model": {f"module.{k}": v for k, v in d.items()}}])
def test_wrappings_of_a_training_checkpoint(vit, tmp_path, wrap):
    model, path = vit
    torch.save(wrap(model.state_dict()), tmp_path / "mine.pth")
    mine, theirs = (load_backbone("timm:test_vit", checkpoint=p) for p in (tmp_path / "mine.pth", str(path)))
    assert mine.hash == theirs.hash


def test_image_tower_alone_has_no_captions(clip, tmp_path):
    model, path = clip
    save_file(model.visual.state_dict(), tmp_path / "tower.safetensors")
    files = tmp_path / "tower.safetensors", path
    encoder, whole = (load_backbone("open_clip:finessl-test-clip", checkpoint=p) for p in files)
    x = torch.randn(2, 3, 32, 32)
    assert_close(encoder(x), whole(x), atol=0)
    assert encoder.text(["a cat"]) is None and encoder.proj.shape == (48, 24)


def test_open_clip_names_in_a_timm_model(tmp_path):
    "OpenAI's image tower under timm's name gives the same feature."
    torch.manual_seed(0)
    vision = dict(image_size=224, patch_size=32, width=768, layers=12, head_width=64)
    tower = open_clip.CLIP(16, vision, dict(width=8, heads=1, layers=1, vocab_size=9), quick_gelu=True).visual.eval()
    save_file({f"visual.{k}": v.contiguous() for k, v in tower.state_dict().items()}, tmp_path / "b32.safetensors")
    encoder = load_backbone("timm:vit_base_patch32_clip_quickgelu_224", checkpoint=tmp_path / "b32.safetensors")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad(): assert_close(encoder(x) @ tower.proj, tower(x), atol=1e-4)


def test_wrong_files_are_named(vit, clip, tmp_path):
    (model, path), (_, clip_path) = vit, clip
    for name, file in (("timm:test_vit", clip_path), ("timm:deit_tiny_distilled_patch16_224", path),
                       ("open_clip:finessl-test-clip", path), ("timm:vit_tiny_patch16_224", path)):
        message = failure(name, checkpoint=file)
        assert str(file) in message and name in message and ("missing, first '" in message or "has shape" in message)
    tensors, shape = model.state_dict(), tmp_path / "shape.safetensors"
    tensors["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 4)
    save_file(tensors, shape)
    assert "'blocks.0.mlp.fc1.weight' has shape (3, 4) instead of" in failure("timm:test_vit", checkpoint=shape)
    del tensors["blocks.0.mlp.fc1.weight"]
    save_file(tensors | {"surprise": torch.zeros(1)}, tmp_path / "keys.safetensors")
    message = failure("timm:test_vit", checkpoint=tmp_path / "keys.safetensors")
    assert "1 missing, first 'blocks.0.mlp.fc1.weight'" in message and "1 not expected, first 'surprise'" in message


@pytest.mark.parametrize("keep", [0, 4, 9, 200, .5, .999])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_truncated_file_is_named(vit, tmp_path, keep, kind):
    model, path = vit
    whole = tmp_path / f"whole.{kind}"
    save_file(model.state_dict(), whole) if kind == "safetensors" else torch.save(model.state_dict(), whole)
    cut = tmp_path / f"cut.{kind}"
    data = whole.read_bytes()
    cut.write_bytes(data[:keep if isinstance(keep, int) else int(len(data) * keep)])
    assert str(cut) in failure("timm:test_vit", checkpoint=cut)


class Evil:
    def __reduce__(self): return os.system, ("echo ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_code_in_a_file_is_run(tmp_path, capfd):
    for name, write in (("evil.pth", lambda p: torch.save({"w": Evil()}, p)),
                        ("evil.pkl", lambda p: p.write_bytes(pickle.dumps(Evil()))),
                        ("evil.safetensors", lambda p: torch.save({"w": Evil()}, p))):
        write(tmp_path / name)
        with pytest.raises(BackboneError, match=name): read_weights(tmp_path / name)
    assert "ran" not in capfd.readouterr().out


def test_other_files_and_folders(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    torch.save([1, 2], tmp_path / "list.pth")
    for path in (tmp_path / "picture.png", tmp_path / "list.pth", tmp_path / "none.pth", tmp_path):
        assert str(path) in failure("pocket", checkpoint=path)
    assert "checkpoint" in failure("pocket", checkpoint=True)


@pytest.mark.filterwarnings("ignore")
def test_noise_is_no_weights_file(tmp_path):
    "Whatever torch's reader makes of it."
    draw = random.Random(0)
    for i in range(200):
        letters = range(256) if i % 2 else b"train --data \n(]}.01acelpt"
        length = draw.randrange(1, 60)
        (tmp_path / "noise").write_bytes(bytes(draw.choices(letters, k=length)))
        with pytest.raises(BackboneError, match="noise"): read_weights(tmp_path / "noise")


@pytest.mark.parametrize("name, says", [
    ("poket", "did you mean 'pocket'"), ("vit_tiny_patch16_224", "timm:NAME"), ("", "names are"),
    ("timm:vit_tiny_patch16_244", "'vit_tiny_patch16_224'"), ("timm:vit_tiny_patch16_224.openai", "has no weights"),
    ("open_clip:ViT-B-16-quikgelu/openai", "'ViT-B-16-quickgelu'"), ("open_clip:ViT-B-16-quickgelu/opnai", "'openai'"),
    ("open_clip:ViT-B-16/openai", "use 'open_clip:ViT-B-16-quickgelu/openai'"),
    ("open_clip:RN50/openai", "use 'open_clip:RN50-quickgelu/openai'"),
    ("open_clip:ViT-B-16-quickgelu/laion2b_s34b_b88k", "no weights"),
    ("timm:vit_base_patch16_clip_224.openai", "use 'timm:vit_base_patch16_clip_quickgelu_224.openai'"),
    ("timm:eva02_tiny_patch14_224", "eva models"), ("timm:beit_base_patch16_224", "beit models"),
    ("timm:vgg16", "vgg models"), ("timm:vit_relpos_small_patch16_224", "relpos models"),
    ("timm:vit_base_patch16_xp_224", "ParallelScalingBlock"),
    ("timm:vit_medium_patch16_gap_256", "no class token"), ("timm:beit3_base_patch16_224", "pools by 'avg'"),
    ("open_clip:convnext_base/laion400m_s13b_b51k", "is a ConvNeXt"),
    ("open_clip:EVA02-B-16/merged2b_s8b_b131k", "is an Eva,"),
    ("open_clip:coca_ViT-B-32/laion2b_s13b_b90k", "attention"),
    ("open_clip:ViT-L-14-CLIPA/datacomp1b", "pools by 'avg'"),
    ("open_clip:ViT-B-16-SigLIP/webli", "no class token"), ("open_clip:ViT-B-16", "pretrained weights"),
])
def test_names_that_are_unknown_or_not_served(name, says):
    assert says in failure(name)


@pytest.mark.parametrize("size", [0, -32, 33, 4, 32., True, "32"])
def test_image_size_must_fit_the_patch(size):
    assert "multiple of 8" in failure("pocket", image_size=size)


@pytest.mark.parametrize("name", ["timm:test_vit", "open_clip:finessl-test-clip"])
def test_another_image_size(vit, clip, name):
    path = vit[1] if name.startswith("timm") else clip[1]
    native = load_backbone(name, checkpoint=path)
    size = native.image_size * 2
    large = load_backbone(name, checkpoint=path, image_size=size)
    assert large.image_size == size
    check_encoder(large)
    check_vpt(VPT, large)
    same = load_backbone(name, checkpoint=path, image_size=native.image_size)
    assert same.hash == native.hash != large.hash


def test_positions_keep_their_place(clip):
    "Resized positions of a smooth grid are the smooth grid again, and the class token's is untouched."
    model, path = clip
    tensors, file = load_file(path), path.parent / "ramp.safetensors"
    ramp = torch.linspace(0, 1, 4)
    tensors["visual.positional_embedding"][1:] = (ramp[:, None] + ramp)[..., None].expand(4, 4, 48).reshape(16, 48)
    save_file(tensors, file)
    large = load_backbone("open_clip:finessl-test-clip", checkpoint=file, image_size=64).trunk.positional_embedding
    grid = large[1:].view(8, 8, 48)[..., 0]
    assert_close(large[0], tensors["visual.positional_embedding"][0], atol=0)
    assert (grid.diff(dim=0) > -.05).all() and (grid.diff(dim=1) > -.05).all() and abs(float(grid.mean()) - 1) < .02


ASK = """
import sys, time
from finessl.backbone import BackboneError, load_backbone
for name in sys.argv[1:]:
    start = time.time()
    try: print(f"hash|{load_backbone(name).hash}|")
    except BackboneError as error:
        print(f"{time.time() - start:.2f}|{error}|{' '.join({'timm', 'open_clip'} & set(sys.modules))}")
"""


def ask(names, **env):
    "Load encoders in a process with an empty cache and a hub of our own; what it says of each."
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")} | env
    env |= dict(OMP_NUM_THREADS="1", no_proxy="*")
    out = subprocess.run([sys.executable, "-c", ASK, *names], env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    return [line.split("|") for line in out.stdout.strip().splitlines()]


@pytest.mark.parametrize("env, why", [
    (dict(HF_ENDPOINT="http://127.0.0.1:9"), "refused"), (dict(HF_ENDPOINT="http://10.255.255.1"), ""),
    (dict(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")])
def test_no_network_is_said_within_five_seconds(tmp_path, env, why):
    dino = "vit_base_patch14_dinov2.lvd142m"
    files = {"timm:vit_tiny_patch16_224": "model.safetensors",
             f"timm:{dino}": f"timm/{dino}/resolve/main/model.safetensors",
             "open_clip:ViT-B-16-quickgelu/openai": "open_clip_model.safetensors",
             "open_clip:ViT-L-14/laion2b_s32b_b82k": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"}
    said = ask(files, HF_HOME=str(tmp_path), **env)
    for (seconds, message, imported), (name, file) in zip(said, files.items(), strict=True):
        assert float(seconds) < 5 and imported == ""           # the libraries, slow to import, were not asked
        for part in (name, file, env.get("HF_ENDPOINT", "https://"), "checkpoint=", why): assert part in message


@pytest.fixture
def hub(vit):
    "A hub on this machine that holds one file."
    import http.server, threading
    files = {"/timm/test_vit.r160_in1k/resolve/main/model.safetensors": vit[1].read_bytes()}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            headers = {"ETag": '"abc"', "X-Repo-Commit": "0" * 40, "Content-Length": str(len(data or b""))}
            for k, v in headers.items(): self.send_header(k, v)
            self.end_headers()
            return data
        def do_GET(self):
            if data := self.do_HEAD(): self.wfile.write(data)
        def log_message(self, *args): pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_download_then_cache(vit, hub, tmp_path):
    "Weights come from the hub once, then from the cache without a network; a file that the hub lacks is said to lack."
    first, lacking = ask(["timm:test_vit", "timm:vit_tiny_patch16_224"], HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    assert first == ["hash", load_backbone("timm:test_vit", checkpoint=vit[1]).hash, ""]
    assert "404" in lacking[1]
    assert ask(["timm:test_vit"], HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path)) == [first]


def test_a_name_that_the_table_lacks_is_the_librarys_to_explain(vit, monkeypatch, tmp_path):
    "As with encoders newer than the table: the same sentence, found out more slowly."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    nobody = lambda url: "no network"
    with pytest.raises(MissingError) as known: downloads.require_files(None, None, "timm:test_vit", ask=nobody)
    spec = encoders.encoder_spec("timm:test_vit")
    with pytest.raises(BackboneError) as looked_up:
        weights.fetch_weights(spec, spec.build(num_classes=None), ask=nobody)
    assert str(known.value) == str(looked_up.value)
    assert "MB) from https://huggingface.co/timm/test_vit.r160_in1k/" in str(known.value)
    monkeypatch.setattr(downloads, "WEIGHTS", {})
    downloads.require_files(None, None, "timm:test_vit", ask=nobody)     # left to load_backbone, which looks it up
    monkeypatch.setattr(backbone, "fetch_weights", lambda spec, plan: vit[1])
    assert load_backbone("timm:test_vit").hash == load_backbone("timm:test_vit", checkpoint=vit[1]).hash


def test_a_download_that_breaks_off_says_what_to_bring(monkeypatch, tmp_path):
    import huggingface_hub
    def broken(repo, file): raise ConnectionResetError(f"{repo}/{file}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    spec = encoders.encoder_spec("timm:test_vit")
    with pytest.raises(BackboneError, match="broke off: ConnectionResetError.*bring model.safetensors"):
        weights.fetch_weights(spec, spec.build(), ask=lambda url: "")


def test_importing_the_module_imports_neither_library():
    code = ("import sys, finessl.backbone, finessl.peft; "
            "print([m for m in ('timm', 'open_clip', 'torchvision', 'transformers') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_an_encoder_never_trains():
    encoder = load_backbone("pocket")
    assert not any(m.training for m in encoder.modules()) and not any(m.training for m in encoder.train().modules())


def test_random_weights_follow_the_seed():
    hashes = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        hashes.append(load_backbone("pocket", checkpoint=False).hash)
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("kind", tiny_kinds())
def test_every_kind(kind):
    encoder = tiny_encoder(kind)
    check_encoder(encoder)
    check_vpt(VPT, encoder)
    check_vpt(ReferenceVPT, encoder)
    check_peft(lambda e, seed: VPT(e, 3, seed=seed), encoder)
    check_peft(lambda e, seed: NoPEFT(e), encoder)


def test_encoder_is_unchanged_by_training_and_survives_a_copy():
    import copy
    encoder = tiny_encoder("open_clip, LayerScale")
    model = TwoHeadModel(VPT(encoder, 4, seed=0), CosineHead(encoder.width, 3, seed=0)).train()
    before, prompts = encoder.hash, model.features.prompts.detach().clone()
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.1, momentum=.9, weight_decay=.01)
    for _ in range(5):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        sgd.step()
    assert encoder.hash == before and not torch.equal(model.features.prompts, prompts)
    twin.features.prompts.data.copy_(model.features.prompts.data)
    twin.head.load_state_dict(model.head.state_dict())
    assert_close(twin(x), model(x), atol=1e-5)                 # the copy's blocks belong to the copy
    twin.features.encoder.model.visual.transformer.resblocks[0].mlp.c_fc.weight.data.zero_()
    assert encoder.hash == before and float((twin(x) - model(x)).detach().abs().max()) > 1e-3


def test_half_precision_keeps_up():
    "Under bf16 autocast, features stay within bf16's precision of the float32 ones."
    encoder = load_backbone("pocket")
    x = torch.randn(4, 3, 32, 32)
    vpt = VPT(encoder, 8, seed=0)
    with torch.no_grad():
        exact = vpt(x)
        with torch.autocast("cpu", torch.bfloat16): rough = vpt(x)
    assert float((rough.float() - exact).abs().max() / exact.abs().max()) < .05


def test_byte_tokens_reach_the_text_tower():
    pocket = load_backbone("pocket")
    text = pocket.text(["a seven", "an eight", "a seven"])
    assert text.shape == (3, 64)
    assert_close(text.norm(dim=1), [1., 1., 1.])
    assert_close(text[0], text[2], atol=1e-6)
    assert float(text[0] @ text[1]) < .999
    assert byte_tokens(["a seven"]).shape == (1, 32)
