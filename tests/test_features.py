"Features are computed once, kept, and found again; heads on them are a run like any other."
import json, os, signal, subprocess, sys, time
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from finessl.cli.main import main as finessl
from finessl.algorithms import FineSSL
from finessl.anchored import AnchoredFineSSL
from finessl.backbone import load_backbone
from finessl.data import digits
from finessl.engine.features import FeatureTable, cache_folder, image_keys, stored_features, store_views
from finessl.engine.folders import image_folder
from finessl.engine.runs import load_run
from finessl.lab import Lab
from finessl.training import fit
from finessl.views import default_views

WHOLE = digits(2, 0)
DATA = WHOLE._replace(x_ulb=WHOLE.x_ulb[:60], y_ulb=WHOLE.y_ulb[:60], x_test=WHOLE.x_test[:30],
                      y_test=WHOLE.y_test[:30], split=None)
SHORT = dict(peft="linear", stored_views=(2, 3), steps=12, batch=8, evals=3, progress=False)


def put(x, y, folder):
    for i, (image, c) in enumerate(zip(x, y)):
        (folder / c).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / c / f"{i}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos") / "set"
    put(DATA.x_lb, [str(int(c)) for c in DATA.y_lb], root / "train")
    put(DATA.x_ulb[20:50], ["."] * 30, root / "unlabelled")
    put(DATA.x_test, [str(int(c)) for c in DATA.y_test], root / "test")
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINESSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def size(cache): return sum(f.stat().st_size for f in cache.rglob("rows"))


def test_heads_on_stored_features_are_a_run_like_any_other(cache, tmp_path):
    first = fit(DATA, "pocket", AnchoredFineSSL(), out=tmp_path / "run", **SHORT)
    rows = size(cache)
    again = fit(DATA, "pocket", AnchoredFineSSL(), **SHORT)
    assert first.record["stored_views"] == [2, 3] and size(cache) == rows > 0
    assert first.record["evaluations"] == again.record["evaluations"]
    assert first.record["weights_sha256"] == again.record["weights_sha256"]
    run = load_run(tmp_path / "run")                           # predict takes images again
    assert torch.equal(run.predict(DATA.x_test), first.predict(DATA.x_test))
    right = (run.predict(DATA.x_test).argmax(1) == DATA.y_test).float().mean()
    assert float(right) == pytest.approx(first.record["evaluations"][-1]["accuracy"])


def test_a_resume_goes_on_to_the_bit(cache, tmp_path, monkeypatch):
    from finessl import training
    want, step = fit(DATA, "pocket", FineSSL(), **SHORT), training.train_step
    def struck(state, *args, **kwargs):
        loss = step(state, *args, **kwargs)
        if state.step == 5: signal.raise_signal(signal.SIGINT)
        return loss
    monkeypatch.setattr(training, "train_step", struck)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5 of 12, checkpoint written"):
        fit(DATA, "pocket", FineSSL(), out=tmp_path / "run", **SHORT)
    run = fit(DATA, "pocket", FineSSL(), out=tmp_path / "run", resume=True, **SHORT)
    assert run.record["weights_sha256"] == want.record["weights_sha256"]
    assert run.record["evaluations"] == want.record["evaluations"]


@pytest.mark.parametrize("wrong, says", [(dict(peft="vpt"), 'stored_views belong to peft="linear"'),
                                         (dict(stored_views=(0, 3)), "stored_views (weak) must be"),
                                         (dict(stored_views=(1, 2.5)), "stored_views (strong) must be")])
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError) as error: fit(DATA, "pocket", FineSSL(), **SHORT | wrong)
    assert says in str(error.value)


def test_other_images_add_rows_and_change_none(cache):
    encoder = load_backbone("pocket")
    view = default_views(WHOLE, encoder).eval_view
    rows, at = stored_features(encoder, DATA.x_ulb[:20], view, cache)
    before = rows[at].clone()
    stored_features(encoder, DATA.x_ulb[10:40], view, cache)
    rows, at = stored_features(encoder, DATA.x_ulb[:40], view, cache)
    assert len(rows) == 40 and torch.equal(rows[at[:20]], before)


def test_nothing_is_kept_where_nothing_may_be(tmp_path, monkeypatch, capsys):
    encoder = load_backbone("pocket")
    view = default_views(WHOLE, encoder).eval_view
    want, place = stored_features(encoder, DATA.x_ulb[:5], view)
    monkeypatch.setenv("FINESSL_CACHE", "off")
    assert cache_folder() is None
    (tmp_path / "file").write_text("no folder")
    rows, at = stored_features(encoder, DATA.x_ulb[:5], view, tmp_path / "file")
    assert torch.equal(rows[at], want[place]) and "features cannot be kept in" in capsys.readouterr().err


def test_the_lab_reads_what_another_lab_has_kept(cache):
    a = Lab(n_weak=1, n_strong=1)
    rows, began = size(cache), time.process_time()
    b = Lab(n_weak=1, n_strong=1)
    assert size(cache) == rows and time.process_time() - began < 5
    for view in ("weak", "strong", "eval_view"):
        assert torch.equal(getattr(a.views, view).feat, getattr(b.views, view).feat)


WRITER = """
import sys, torch
from pathlib import Path
from finessl.engine.features import FeatureTable
table = FeatureTable("t", 64, Path(sys.argv[1]))
for i in range(int(sys.argv[2]), 10**6, 2):
    table.add([i.to_bytes(16, "big")], torch.full((1, 64), float(i)))
    if i < 2: print("begun", flush=True)
"""


def test_two_writers_are_killed_and_what_stands_is_whole(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    children = [subprocess.Popen([*command, i], stdout=subprocess.PIPE, text=True) for i in "01"]
    try:
        for c in children: assert c.stdout.readline() == "begun\n"
        time.sleep(1)
    finally:
        for c in children: c.kill()
        for c in children: c.wait()
    table = FeatureTable("t", 64, tmp_path)
    assert len(table.rows) > 2
    keys = list(table.place)
    at = table.find(keys)
    assert (at >= 0).all()
    assert table.rows[at, 0].tolist() == [float(int.from_bytes(k, "big")) for k in keys]


def test_a_folder_trains_heads_on_a_cpu_and_says_so(photos, cache, tmp_path, capsys):
    few = ["train", "--data", str(photos), "--steps", "12", "--batch", "8", "--evals", "2"]
    def run(out, *more):
        assert finessl([*few, "--out", str(tmp_path / out), *more]) == 0
        return json.loads((tmp_path / out / "record.json").read_text()), capsys.readouterr().out
    record, said = run("a")
    assert record["peft"] == "linear" and record["stored_views"] == [3, 5] and "--peft vpt" in said
    rows = size(cache)
    assert run("b", "--seed", "1")[0]["peft"] == "linear" and size(cache) == rows
    assert finessl(["report", "--run", str(tmp_path / "b"), "--out", str(tmp_path / "b.html")]) == 0
    assert size(cache) == rows and (tmp_path / "b.html").stat().st_size > 10_000
    capsys.readouterr()
    record, said = run("c", "--views", "new", "--peft", "linear")
    assert "stored_views" not in record and "--peft vpt" not in said
    record, said = run("d", "--prompts", "2")
    assert record["peft"] == "vpt" and "stored_views" not in record


def test_predict_finds_the_weights_of_the_encoder_where_training_did(cache, tmp_path):
    torch.manual_seed(0)
    path, run = tmp_path / "weights.safetensors", tmp_path / "run"
    save_file(timm.create_model("test_vit", num_classes=5).state_dict(), path)
    how = SHORT | {"steps": 2, "evals": 1}
    trained = fit(DATA, load_backbone("timm:test_vit", checkpoint=path, image_size=32), FineSSL(), out=run, **how)
    assert trained.record["checkpoint"] == str(path)
    assert torch.equal(load_run(run).predict(DATA.x_test), trained.predict(DATA.x_test))


def test_files_and_the_folder_beside_them_have_the_same_keys(photos):
    lazy, eager = image_folder(photos, lazy=True), image_folder(photos, lazy=False)
    assert image_keys(lazy.x_ulb) == image_keys(image_folder(photos, lazy=True).x_ulb)
    assert len(set(image_keys(lazy.x_ulb))) == len(set(image_keys(eager.x_ulb)))


def test_unreadable_images_are_left_out_and_named(photos, cache, tmp_path):
    import shutil
    shutil.copytree(photos, tmp_path / "set")
    broken = sorted((tmp_path / "set" / "unlabelled").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:100])
    ds = image_folder(tmp_path / "set", lazy=True, unreadable="skip")
    run = fit(ds, "pocket", AnchoredFineSSL(), **SHORT)
    unread = [*ds.split.unreadable, *run.record["unreadable"]]
    assert [os.path.basename(name) for name in unread] == [broken.name]
    encoder = load_backbone("pocket")
    stored = store_views(ds, encoder, default_views(ds, encoder), 1, 1, folder=cache)
    assert len(stored.dataset.x_ulb) + len(unread) - len(ds.split.unreadable) == len(ds.x_ulb)


def test_prompts_start_from_heads_that_were_trained_first(cache):
    long = dict(steps=40, batch=8, evals=1, progress=False)
    heads = fit(DATA, "pocket", AnchoredFineSSL(), peft="linear", stored_views=(3, 5), **long)
    from finessl.training import Runtime, Settings, build_state, prepare
    from finessl.engine.schedule import Schedule
    settings = Settings(Schedule(40), batch=8, evals=1, peft="vpt", n_prompts=1, head_init="trained")
    state = build_state(prepare(DATA, "pocket", AnchoredFineSSL(), settings, Runtime("cpu")))
    assert torch.equal(state.model.head.weight, heads.model.head.weight)
    assert torch.equal(state.model.aux_head.scale, heads.model.aux_head.scale)
    with pytest.raises(ValueError, match='"trained" where more than heads is trained'):
        fit(DATA, "pocket", AnchoredFineSSL(), head_init="trained", peft="linear", **long)


@pytest.mark.parametrize("wrong", ["full", "gone", "unreadable"])
def test_a_cache_that_fails_ends_no_run(cache, monkeypatch, capsys, wrong):
    from finessl.engine import feature_table
    want = fit(DATA, "pocket", FineSSL(), **SHORT).record["weights_sha256"]
    append, calls = feature_table.append_rows, []
    def failing(folder, *what):
        calls.append(1)
        if len(calls) == 2: # the first rows are on the disk
            if wrong == "full": raise OSError(28, "No space left on device")
            import shutil
            shutil.rmtree(folder)
        return append(folder, *what)
    monkeypatch.setenv("FINESSL_CACHE", str(cache.parent / "other"))
    monkeypatch.setattr(feature_table, "append_rows", failing)
    if wrong == "unreadable": monkeypatch.setattr(feature_table.FeatureTable, "load", lambda self: os.stat("nowhere"))
    run = fit(DATA, "pocket", FineSSL(), **SHORT)
    assert run.record["weights_sha256"] == want
    assert "features cannot be kept in" in capsys.readouterr().err


def test_tables_that_nobody_opens_go_and_nothing_else_does(tmp_path):
    def table(code): # as another command would leave it
        t = FeatureTable(code, 4, tmp_path)
        t.add([bytes(16)], torch.ones(1, 4))
        return t.folder
    old, used, other, shared = (table(c * 16) for c in "abcd")
    (shared / "note.txt").write_text("mine")
    named, link = tmp_path / "photos", tmp_path / ("e" * 16 + "-4")
    (named / "rows").parent.mkdir(), (named / "rows").write_text("mine")
    link.symlink_to(named, target_is_directory=True)
    for folder in (old, used, other, shared, named): os.utime(folder, (0, time.time() - 91 * 86400))
    table("b" * 16)                                            # opened again
    os.utime(other)
    FeatureTable("f" * 16, 4, tmp_path)                        # a new one
    assert not old.exists() and (used / "rows").exists() and (other / "rows").exists()
    assert (shared / "note.txt").read_text() == (named / "rows").read_text() == "mine" and link.is_symlink()


def test_whatever_lies_where_a_table_should_ends_no_run(cache, tmp_path, capsys):
    wrong = {"rows": [lambda p: p.mkdir(), lambda p: p.write_bytes(b"x")],
             "keys": [lambda p: p.write_bytes(b"z" * 4000), lambda p: p.mkdir()]}
    if os.name == "posix":
        (tmp_path / "mine").write_bytes(b"precious")
        wrong["keys"] += [os.mkfifo, lambda p: p.symlink_to(tmp_path / "mine")]
        wrong["rows"] += [os.mkfifo]
    encoder = load_backbone("pocket")
    view = default_views(DATA, encoder).eval_view
    for i, (name, make) in enumerate((n, m) for n, makes in wrong.items() for m in makes):
        folder = tmp_path / f"cache-{i}"
        good, at = stored_features(encoder, DATA.x_test[:4], view, folder)
        table, = folder.iterdir()
        (table / name).unlink()
        make(table / name)
        again, places = stored_features(encoder, DATA.x_test[:4], view, folder)
        assert torch.equal(again[places], good[at]), (name, i)
    if os.name == "posix": assert (tmp_path / "mine").read_bytes() == b"precious"


def test_a_user_without_a_home_trains(monkeypatch, capsys):
    from finessl.engine.atomic import say_once
    say_once.cache_clear()
    monkeypatch.setenv("FINESSL_CACHE", "~nobody-is-called-this/cache")
    assert cache_folder() is None and "there is no home folder" in capsys.readouterr().err
