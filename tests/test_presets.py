"The paper's runs by name: their constants, what a run lacks, and how soon a wrong or impossible one is refused."
import contextlib, functools, json, os, subprocess, sys
from pathlib import Path
import pytest
import torch
from torchvision import datasets
from finessl import backbone, gpu, views
from finessl.algorithms import FineSSL
from finessl.cli import bench as cli_bench, main as cli_main, options as cli_options
from finessl.engine import encoders, hub, named
from finessl.engine.batches import labelled_indices
from finessl.engine.catalogue import DEFAULT_FILENAMES, WEIGHTS
from finessl.engine.downloads import ARCHIVES, PATCH, missing_data, missing_weights, require_files
from finessl.engine.errors import DataError, MissingError
from finessl.engine.schedule import PAPER_SCHEDULE, Schedule
from finessl.studies import paper_runs
from finessl.studies.paper_runs import from_preset
from finessl.studies.presets import CHOICES, presets

root = Path(__file__).resolve().parent.parent
clip = "open_clip:ViT-B-16-quickgelu/openai"


def nobody(url): return "no network"


# ---------------------------------------------------------------- constants, compared with where they are used

def test_presets_hold_the_papers_constants():
    assert len(presets) == 13 and paper_runs.presets is presets and json.loads(json.dumps(presets)) == presets
    for name, p in presets.items():
        assert Schedule(**p["fit"]["schedule"]) == PAPER_SCHEDULE == Schedule(15_000, .03, "epoch", 500)
        gamma = 1. if name in ("cifar10-n1", "semi-aves-ood") else 3.
        assert p["algorithm"] == {"zeta": .7, "alpha": 8., "lam": .5, "gamma": gamma}
        assert p["fit"]["batch"] == {"cifar10-n1": 8, "cifar10-n2": 16}.get(name, 32) and p["fit"]["n_prompts"] == 50
        assert p["normalisation"] == (p["data"]["name"] if name.startswith("cifar") else "imagenet")
        assert p["normalisation"] in views.NORMALISATION
        assert p["backbone"] in WEIGHTS and (p["data"]["name"] in ARCHIVES or p["data"]["name"] == "folder")
    assert {p["data"]["n_per_class"] for n, p in presets.items() if n.startswith("cifar100")} == {4, 25, 100}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_torchvisions(name):
    a = ARCHIVES[name]
    kind = getattr(datasets, a.kind)
    if name == "food101":
        assert (a.url, a.md5, a.folder, a.parts) == (kind._URL, kind._MD5, "food-101", ("meta", "images"))
        return
    assert (a.url, a.md5, a.folder, a.file) == (kind.url, kind.tgz_md5, kind.base_folder, kind.filename)
    assert a.parts == (*(f for f, _ in kind.train_list + kind.test_list), kind.meta["filename"])


def test_the_table_of_encoders_says_what_their_libraries_say():
    known = [name for name in hub.hub_names() if name in WEIGHTS]
    assert len(known) > .9 * len(WEIGHTS) > 300
    for name in known:
        source = encoders.encoder_spec(name)
        assert (WEIGHTS[name].repo, WEIGHTS[name].files) == (source.repo, source.files) and not source.objection, name


@pytest.mark.parametrize("name", [
    clip, "timm:vit_tiny_patch16_224", "timm:vit_small_patch14_dinov2.lvd142m", "timm:vit_tiny_r_s16_p8_224",
    "timm:deit_tiny_distilled_patch16_224", "open_clip:ViT-B-32/laion2b_s34b_b79k"])
def test_a_row_of_the_table_is_the_encoders(name):
    w = WEIGHTS[name]
    usual = DEFAULT_FILENAMES[name.partition(":")[0]]
    assert hub.look_up(name) == ("served", [w.repo, w.mb, w.patch, *(w.files if w.files != usual else ())])


def test_what_is_not_served_is_not_in_the_table():
    for name in ("timm:vit_base_patch16_siglip_224", "open_clip:RN50/openai", "open_clip:ViT-B-16/openai"):
        assert name not in WEIGHTS and hub.look_up(name)[0] == "refused"
    with torch.device("meta"): pocket = backbone.Encoder(encoders.encoder_spec("pocket").build(), "pocket")
    assert pocket.patch_size == PATCH["pocket"]


def test_choices_are_those_of_the_algorithm_and_of_fit():
    for form in CHOICES["form"]: FineSSL(form=form)
    with pytest.raises(ValueError): FineSSL(form="zz")
    for labelled in CHOICES["labelled"]: labelled_indices(0, 0, 4, 2, PAPER_SCHEDULE, labelled)
    with pytest.raises(ValueError, match="labelled must be"): labelled_indices(0, 0, 4, 2, PAPER_SCHEDULE, "zz")
    parser = cli_main.make_parser()
    for key, values in CHOICES.items():
        for v in values: parser.parse_args(["train", "--out", "r", f"--{key}", v])
        assert cli_main.main(["train", "--preset", "cifar10-n4", "--out", "r", f"--{key}", "zz"]) == 2
    assert cli_bench.VARIANTS == tuple(gpu.VARIANTS)


# ---------------------------------------------------------------- refused before anything is read

@pytest.mark.parametrize("wrong, says", [
    (dict(name="cifar-4"), "no preset is called 'cifar-4'; there are cifar10-n1"),
    (dict(labelled="zz"), "labelled must be 'all' or 'release', got 'zz'"),
    (dict(form="zz"), "form must be 'code' or 'paper', got 'zz'"),
    (dict(normalisation="clip"), "normalisation must be 'release' or 'encoder', got 'clip'"),
    (dict(image_size=100), "the image size must be a multiple of 16 pixels"),
    (dict(image_size=0), "the image size must be a multiple of 16 pixels"),
    (dict(image_size="224"), "the image size must be a multiple of 16 pixels .* got '224'"),
])
def test_from_preset_refuses_what_cannot_be_meant(monkeypatch, wrong, says):
    monkeypatch.setattr(paper_runs, "require_files", lambda *a, **k: pytest.fail("looked for files"))
    monkeypatch.setattr(paper_runs, "load_named_data", lambda *a, **k: pytest.fail("read images"))
    with pytest.raises(ValueError, match=says): from_preset(**{"name": "cifar10-n4"} | wrong)


def test_from_preset_says_all_that_is_missing(monkeypatch, tmp_path):
    offline = functools.partial(require_files, ask=nobody, cache=tmp_path / "hub")
    monkeypatch.setattr(paper_runs, "require_files", offline)
    says = "2 files are missing: .*bring cifar-10-python.tar.gz .*bring open_clip_model.safetensors"
    with pytest.raises(MissingError, match=says): from_preset("cifar10-n4", tmp_path)
    with pytest.raises(MissingError, match="^cifar10 is not in"): from_preset("cifar10-n4", tmp_path, checkpoint=False)


# ---------------------------------------------------------------- what is there, what is not

def lay(folder, name):
    "A data set that is unpacked in a folder, as far as file names go."
    for part in ARCHIVES[name].parts:
        (folder / ARCHIVES[name].folder).mkdir(exist_ok=True)
        (folder / ARCHIVES[name].folder / part).touch()


@pytest.mark.parametrize("name", ARCHIVES)
def test_data_are_there_or_not(name, tmp_path):
    a = ARCHIVES[name]
    said = missing_data(name, tmp_path).instructions("no network")
    bring = f"bring {a.file} ({a.size // 10**6:,} MB) from {a.url} and put it into {tmp_path}"
    for part in (f"{name} is not in {tmp_path}", "no network", bring): assert part in said
    (tmp_path / a.file).write_bytes(b"half")
    damaged = f"{tmp_path / a.file} is damaged (4 bytes instead of {a.size:,})"
    assert damaged in missing_data(name, tmp_path).instructions("")
    with open(tmp_path / a.file, "r+b") as f: f.truncate(a.size) # takes no room on the disk
    if name == "food101": assert missing_data(name, tmp_path) is None # too large to look into: torchvision does
    else: assert f"{a.file} is damaged (its md5 is not {a.md5})" in missing_data(name, tmp_path).instructions("")
    (tmp_path / a.file).unlink()
    lay(tmp_path, name)
    assert missing_data(name, tmp_path) is None
    (tmp_path / a.folder / a.parts[-1]).unlink()
    assert missing_data(name, tmp_path) is not None


def test_weights_in_the_hubs_cache_are_there(tmp_path):
    w, cache = WEIGHTS[clip], tmp_path / "hub"
    assert missing_weights(clip, cache).file == "open_clip_model.safetensors"
    repo = cache / f"models--{w.repo.replace('/', '--')}"
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert missing_weights(clip, cache) is not None
    (repo / "snapshots" / ("0" * 40) / w.files[1]).touch() # any of its files will do
    assert missing_weights(clip, cache) is None
    lay(tmp_path, "cifar100")
    require_files("cifar100", tmp_path, clip, ask=nobody, cache=cache) # everything is there: nobody is asked


def test_who_answers_lets_the_run_go_on(tmp_path):
    requested, cache = [], tmp_path / "hub"
    def first_is_gone(url):
        requested.append(url)
        return "answer 404" if url.endswith("open_clip_model.safetensors") else ""
    require_files("cifar100", tmp_path, clip, ask=first_is_gone, cache=cache)
    assert len(requested) == 3 and requested.count(ARCHIVES["cifar100"].url) == 1
    import timm # whoever has imported it may have added models to it, and is asked
    require_files("photos", tmp_path, "timm:some_other_vit", ask=nobody, cache=cache) # left to whoever loads them
    require_files(None, None, clip, "clip.safetensors", ask=nobody, cache=cache)
    with pytest.raises(MissingError, match="answer 404"):
        require_files(None, None, clip, ask=lambda url: "answer 404", cache=cache)
    says = r"^the pretrained weights .*answer 403.*--checkpoint FILE \(in Python checkpoint=FILE\)$"
    with pytest.raises(MissingError, match=says):
        require_files("cifar100", tmp_path, clip, ask=lambda url: "" if "toronto" in url else "answer 403", cache=cache)


def test_a_download_that_breaks_off_says_what_to_bring(monkeypatch, tmp_path):
    class Broken(datasets.CIFAR10):
        def download(self): raise ConnectionResetError("connection reset")
    monkeypatch.setattr(datasets, "CIFAR10", Broken)
    says = r"broke off: connection reset\); bring cifar-10-python.tar.gz \(170 MB\) from .* and put it into"
    with pytest.raises(DataError, match=says):
        named.torchvision_dataset("cifar10", 1, folder=tmp_path, ask=lambda url: "")


# ---------------------------------------------------------------- in a process of its own: how soon, and without torch

TIMED = """
import sys, time
begin = time.monotonic()
from finessl.cli.main import main
code = main(sys.argv[1:])
heavy = ("torch", "torchvision", "open_clip", "timm", "numpy")
print(code, round(time.monotonic() - begin, 2), *(m for m in heavy if m in sys.modules))
"""
BOTH = ["bring cifar-100-python.tar.gz (169 MB) from https://www.cs.toronto.edu/", "and put it into data;",
        "bring open_clip_model.safetensors (about 598 MB) from", "--checkpoint FILE"]
PROXIES = ("no_proxy", "http_proxy", "https_proxy", "all_proxy")


def said_by(tmp_path, *argv, **env):
    "Run a command: what it says, after asserting that it was refused within 5 seconds and without torch."
    kept = {k: v for k, v in os.environ.items() if k.lower() not in PROXIES and not k.startswith("HF_")}
    env = kept | env | {"PYTHONPATH": str(root), "PYTHONUTF8": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-c", TIMED, *argv]
    p = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    code, seconds, *heavy = p.stdout.split()
    assert code == "2" and heavy == [] and float(seconds) < 5, p.stdout
    assert p.stderr.startswith("finessl: error: ") and p.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
    return p.stderr


@contextlib.contextmanager
def silent():
    "A proxy that takes every call and never answers, as where packets vanish."
    import socket
    with socket.create_server(("127.0.0.1", 0), backlog=50) as s: yield f"http://127.0.0.1:{s.getsockname()[1]}"


PRESET = ["train", "--preset", "cifar100-n4", "--data-dir", "data", "--out", "run"]


def test_offline_everything_is_said_at_once(tmp_path):
    refused = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    said = said_by(tmp_path, *PRESET, **refused)
    assert all(part in said for part in BOTH) and "refused" in said and "https://huggingface.co/" in said
    said = said_by(tmp_path, *PRESET, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://mirror.invalid", **refused)
    assert "HF_HUB_OFFLINE is set" in said and "http://mirror.invalid/timm/" in said
    said = said_by(tmp_path, *PRESET, "--checkpoint", __file__, **refused)
    assert said.startswith("finessl: error: cifar100 is not in data") and "safetensors" not in said
    (tmp_path / "photos").mkdir()
    def train(data, *argv, **env): return said_by(tmp_path, "train", "--data", data, "--out", "run", *argv, **env)
    dino, tiny = "timm:vit_base_patch14_dinov2", "timm:vit_tiny_patch16_224"
    repo = "https://huggingface.co/timm/vit_base_patch14_dinov2.lvd142m/"
    hub_file = f"bring model.safetensors (about 346 MB) from {repo}"
    assert "bring open_clip_model" in train("photos", "--preset", "imagenet-1pct", **refused)
    assert "bring model.safetensors (about 23 MB)" in train("photos", "--backbone", tiny, **refused)
    assert hub_file in train("photos", "--backbone", dino, **refused)
    assert "multiple of 14 pixels" in train("photos", "--backbone", dino, "--image-size", "225")
    food = train("food101", "--per-class", "2", "--data-dir", "data", **refused)
    assert "bring food-101.tar.gz (4,996 MB)" in food


def test_where_packets_vanish_two_files_take_the_time_of_one(tmp_path):
    with silent() as proxy: said = said_by(tmp_path, *PRESET, http_proxy=proxy, https_proxy=proxy)
    assert all(part in said for part in BOTH) and said.count("no answer within 2 s") == 2


def test_one_process_of_a_machine_asks(tmp_path, monkeypatch):
    args = cli_main.make_parser().parse_args(PRESET)
    args.data, args.backbone = "cifar100", clip
    monkeypatch.setattr(cli_options, "require_files", functools.partial(require_files, ask=nobody, cache=tmp_path))
    with pytest.raises(MissingError): cli_options.check_files(args)
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "FINESSL_MEET": "here"}.items():
        monkeypatch.setenv(name, value)
    cli_options.check_files(args)


def test_predict_says_where_the_weights_should_be(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "x.png").touch()
    (tmp_path / "old" / "record.json").write_text(json.dumps({"backbone": clip, "checkpoint": None}))
    argv = ["predict", "--run", "old", "x.png"]
    said = said_by(tmp_path, *argv, HF_HUB_OFFLINE="1")
    assert "bring open_clip_model.safetensors (about 598 MB)" in said
    assert "--checkpoint FILE" in said and "pocket" not in said
    (tmp_path / "old" / "record.json").write_text(json.dumps({"backbone": clip, "checkpoint": "gone.safetensors"}))
    assert "no longer in gone.safetensors; name the file with --checkpoint FILE" in said_by(tmp_path, *argv)


def test_a_device_of_the_environment_that_is_not_here_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINESSL_DEVICE", "nonsense")
    command = ["train", "--data", "digits", "--per-class", "1", "--steps", "1", "--out", "run"]
    assert cli_main.main(command) == 2
    assert "FINESSL_DEVICE=nonsense is not here; cpu is" in capsys.readouterr().err
    assert cli_main.main([*command, "--device", "nope"]) == 2
    assert "--device nope is not here" in capsys.readouterr().err
