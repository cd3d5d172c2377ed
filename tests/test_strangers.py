"Input from strangers: names that a terminal or a table would obey, records, weights, and what others can reach."
import contextlib, csv, io, json, os, pickle, random, shutil, subprocess, sys, zipfile
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from finessl.backbone import load_backbone
from finessl.cli.main import format_message, main
from finessl.cli.predict import write_predictions
from finessl.data import Dataset, digits
from finessl.engine.errors import BackboneError
from finessl.engine.launch import launch, loopback
from finessl.engine.processes import ProcessGroup
from finessl.engine.runs import load_run, read_record
from finessl.engine.torchscript import archive_root, read_torchscript
from finessl.engine.weights import read_weights
from finessl.pseudo_labels import SupervisedOnly
from finessl.training import fit

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
posix = pytest.mark.skipif(os.name == "nt", reason="names and pipes as POSIX has them")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A finished run."
    ds, out = digits(1, 0), tmp_path_factory.mktemp("runs") / "run"
    ds = Dataset(ds.x_lb, ds.y_lb, ds.x_ulb[:10], ds.y_ulb[:10], ds.x_test[:4], ds.y_test[:4], ds.classes)
    fit(ds, "pocket", SupervisedOnly(), steps=1, evals=1, batch=4, n_prompts=1, out=out, progress=False)
    return out


# --- tables ----------------------------------------------------------------------------------------------------------

NAMES = ["=1+1.png", "+a.png", "-2+3|cmd.png", "@SUM(A1).png", "\tx.png", "\rx.png", "a\rb.png", "a\nb.png", 'a"b.png',
         "a,b.png", "plain.png", "/abs/=x.png"]


def table(files, classes):
    out = io.StringIO(newline="")
    write_predictions(out, files, torch.full((len(files), len(classes)), .5), classes)
    return out.getvalue(), list(csv.reader(io.StringIO(out.getvalue(), newline="")))


def test_a_table_has_a_row_a_file_and_no_formula():
    text, (head, *rows) = table(NAMES, ("=cmd|' /C calc'!A0", "b"))
    assert [os.path.normpath(row[0]) for row in rows] == NAMES and len(text.splitlines()) >= len(NAMES)
    assert all(len(row) == 5 for row in rows) and text.endswith("\n") and "\r\n" not in text
    assert not [cell for row in (head, *rows) for cell in row if cell[:1] in tuple("=+-@\t\r")]
    assert rows[0][1] == head[3] == "'=cmd|' /C calc'!A0"


def test_columns_stay_apart():
    head = table(["a.png"], ("class", "confidence", "file", "cat"))[1][0]
    assert head == ["file", "class", "confidence", "class class", "class confidence", "class file", "cat"]


# --- terminals -------------------------------------------------------------------------------------------------------

def test_messages_hold_no_commands():
    said = format_message("class '\x1b]0;owned\x07\x9b31m' \u202e is\nwrong")
    assert said == "finessl: error: class '\\x1b]0;owned\\x07\\x9b31m' \\u202e is wrong\n"


@posix
def test_predict_shows_no_commands_of_a_name(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "\x1b[31mred\x07.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(name)
    assert main(["predict", "--run", str(folder), name]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(name) # in a file or a pipe, the name as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["predict", "--run", str(folder), name]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("\\x1b[31mred\\x07.png")
    Path("\x1b[2J.heic").touch()
    assert main(["predict", "--run", str(folder), "."]) == 0
    assert "\x1b" not in capsys.readouterr().err


def test_predict_says_what_it_does_not_read(folder, tmp_path, capsys):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
    for name in ("b.heic", "c", "d.mov", "notes.txt"): (tmp_path / name).touch()
    assert main(["predict", "--run", str(folder), str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err == (f"finessl: note: not read in {tmp_path}: 1 x no ending, 1 x .heic (read where the package "
                   "pillow-heif is installed), 1 x .mov\n")
    assert main(["predict", "--run", str(folder), str(tmp_path), "--max-megapixels", "0.00001"]) == 2
    assert "max_megapixels" in capsys.readouterr().err


# --- records ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    {"checkpoint": 5}, {"checkpoint": ["a"]}, {"std": ["1"] * 3}, {"std": [0, 1, 1]}, {"mean": [None] * 3},
    {"mean": [.5] * 4}, {"mean": [float("nan")] * 3}, {"read_size": 10**30}, {"read_size": 0}, {"image_size": -8},
    {"n_prompts": 10**30}, {"n_prompts": -1}, {"classes": list(range(10))}, {"classes": [None] * 10},
    {"classes": ["a"] * 10}, {"classes": []}, {"classes": [["a"], ["b"]]}], ids=str)
def test_a_record_that_cannot_be(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "copy")
    record = json.loads((copy / "record.json").read_text()) | change
    (copy / "record.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"record.json is no record of a run.*{next(iter(change))}"): load_run(copy)


def test_a_record_of_any_shape(folder, tmp_path):
    "Values of a whole record are replaced by others of any type: it loads, or a ValueError names the file."
    whole = json.loads((folder / "record.json").read_text())
    others = [None, True, False, 0, -1, 1.5, 10**400, "", "x", "\0", [], [1], {}, {"a": 1}, [None] * 3, "../etc/passwd"]
    for i in range(600):
        rng = random.Random(i)
        record = dict(whole)
        for _ in range(rng.choice((1, 1, 2, 5))): record[rng.choice(list(record))] = rng.choice(others)
        (tmp_path / "record.json").write_text(json.dumps(record))
        try: read_record(tmp_path)
        except ValueError as error: assert str(tmp_path) in str(error) and len(str(error)) < 300, (i, error)


@posix
def test_a_record_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "record.json")
    with pytest.raises(FileNotFoundError): read_record(tmp_path)


HUBS = ["timm:hf_hub:stranger/model", "timm:hf-hub:stranger/model", "timm:local-dir:/some/evil", "timm:/some/evil",
        "open_clip:hf-hub:stranger/model", "open_clip:local-dir:/some/evil", "open_clip:ViT-B-32//some/evil.pt",
        "open_clip:ViT-B-32/hf-hub:stranger/model", "timm:vit_tiny_patch16_224.hf_hub:a/b", "open_clip:../../evil/x",
        "hf-hub:stranger/model", "/some/evil", "timm:vit_tiny_patch16_224@hf_hub:a/b", "open_clip:ViT-B-32/../x"]


@pytest.mark.parametrize("name", HUBS)
def test_a_record_names_no_repository(name, monkeypatch):
    import huggingface_hub
    def asked(*args, **kwargs): raise AssertionError("the hub was asked")
    for f in ("hf_hub_download", "snapshot_download"): monkeypatch.setattr(huggingface_hub, f, asked)
    for checkpoint in (None, False):
        with pytest.raises(BackboneError): load_backbone(name, checkpoint)


# --- TorchScript -----------------------------------------------------------------------------------------------------

class Tree(nn.Module):
    "Parameters under the names of a state."
    def forward(self, x): return x


def archive(file, state):
    root = Tree()
    for name, v in state.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part): at.add_module(part, Tree())
            at = getattr(at, part)
        at.register_parameter(last, nn.Parameter(v, requires_grad=False))
    torch.jit.save(torch.jit.trace(root, torch.zeros(1), check_trace=False), file)
    return file


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_from_torchscript(tmp_path, monkeypatch):
    pocket = load_backbone("pocket")
    import finessl
    state = read_weights(Path(finessl.__file__).parent / "weights/pocket.safetensors")
    file = archive(tmp_path / "clip.pt", state)
    monkeypatch.setattr(torch.jit, "load", None) # its program is not run
    assert load_backbone("pocket", file).hash == pocket.hash
    half = archive(tmp_path / "half.pt", {k: v.half() for k, v in state.items()})
    read = read_weights(half)
    assert read.keys() == state.keys() and all(torch.equal(v, state[k].half()) for k, v in read.items())


@pytest.mark.filterwarnings("ignore")
def test_damaged_torchscript_is_an_error(tmp_path):
    whole = archive(tmp_path / "a.pt", {"a.w": torch.arange(6.).view(2, 3), "b": torch.ones(1, dtype=torch.int64)})
    data, file, read = whole.read_bytes(), tmp_path / "b.pt", 0
    for i in range(500):
        rng, bad = random.Random(i), bytearray(data)
        for _ in range(rng.choice((1, 2, 8))): bad[rng.randrange(len(bad))] = rng.randrange(256)
        if rng.random() < .2: del bad[rng.randrange(len(bad)):]
        file.write_bytes(bad)
        try: read += bool(read_weights(file))
        except BackboneError as error: assert str(file) in str(error)
    assert 0 < read < 500


def test_torchscript_with_more_than_weights(tmp_path):
    class Runs:
        def __reduce__(self): return os.system, (f"touch {tmp_path / 'mark'}",)
    class Names:
        def __reduce__(self): return getattr, ("text", "upper")
    for thing in (Runs(), Names(), [1], "text"):
        with zipfile.ZipFile(tmp_path / "evil.pt", "w") as z:
            z.writestr("evil/constants.pkl", b"")
            z.writestr("evil/data.pkl", pickle.dumps(thing))
        assert archive_root(tmp_path / "evil.pt") == "evil"
        with pytest.raises(BackboneError, match="more than weights"): read_torchscript(tmp_path / "evil.pt")
    assert not (tmp_path / "mark").exists()


# --- processes -------------------------------------------------------------------------------------------------------

def listening(): # -> addresses, as /proc writes them, that this process listens on
    mine, out = set(), []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError): mine.add(os.readlink(f"/proc/self/fd/{fd}"))
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{kind}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and f"socket:[{cells[9]}]" in mine: out.append(cells[1].rpartition(":")[0])
    return out


def connected():
    "What a process of several listens on, and where it imports from."
    group = ProcessGroup("cpu")
    assert group.gather_union([str(group.rank)]) == ["0", "1"]
    return group.gather_union(listening()), sys.path


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@linux
def test_several_processes_listen_on_the_loopback_alone(tmp_path, monkeypatch):
    assert loopback() == "lo"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"): monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("random.py").write_text("raise SystemExit('a module of the current folder')")
    addresses, path = launch(2, connected, threads=1)
    assert addresses and set(addresses) <= LOOPBACK, addresses
    assert "" not in path and str(tmp_path) not in path


@posix
def test_processes_import_what_their_parent_imports(tmp_path):
    "A program that is run in a folder finds the modules there in every process, as it does itself."
    (tmp_path / "mine.py").write_text("def f(): return 7\n")
    code = "import finessl.engine.launch as l, mine; print(l.launch(1, mine.f))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr


@pytest.mark.parametrize("change", [
    {"checkpoint": ["a"]}, {"checkpoint": 5}, {"checkpoint": "a\0b"}, {"checkpoint": "x" * 5000}, {"n_prompts": True},
    {"read_size": 2**14}, {"mean": [10**400] * 3}, {"std": [1e-320] * 3}, {"peft": "of-tomorrow"},
    {"labelled_files": 5}, {"labelled_files": [{}]}, {"evaluations": 5}, {"evaluations": [1]}, {"dataset": "x"},
    {"symptoms": [1]}, {"symptoms": [{}]}, {"schedule": [1]}, {"versions": 5}], ids=str)
def test_no_key_of_a_record_is_believed(folder, tmp_path, change, capsys):
    shutil.copytree(folder, tmp_path / "run")
    record = json.loads((folder / "record.json").read_text(encoding="utf-8")) | change
    (tmp_path / "run/record.json").write_text(json.dumps(record), encoding="utf-8")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    code = main(["predict", "--run", str(tmp_path / "run"), str(tmp_path / "a.png")])
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and str(tmp_path / "run") in said and "FINESSL_DEBUG" not in said


def test_a_record_that_notepad_has_saved(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    content = (folder / "record.json").read_text(encoding="utf-8")
    (tmp_path / "run/record.json").write_text(content, encoding="utf-8-sig")
    assert load_run(tmp_path / "run").classes == load_run(folder).classes


@posix
@pytest.mark.parametrize("name", ["record.json", "model.safetensors"])
def test_no_command_waits_for_a_pipe_in_a_run(folder, tmp_path, name, capsys):
    shutil.copytree(folder, tmp_path / "run")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        path = tmp_path / "run" / name
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        for command in (["predict", str(tmp_path / "a.png")], ["export", "--format", "torch"], ["report"]):
            code, said = main([*command, "--run", str(tmp_path / "run")]), capsys.readouterr().err
            assert code == 2 and said.count("\n") == 1, said


def test_weights_larger_than_the_model_are_not_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    os.truncate(tmp_path / "run/model.safetensors", 2**36)
    with pytest.raises(ValueError, match="is larger than"): load_run(tmp_path / "run")
