"Where heads start, and prompts that enter once: each is a run like any other, saved, resumed and loaded."
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from finessl.algorithms import FineSSL
from finessl.anchored import AnchoredFineSSL
from finessl.backbone import caption_templates, class_embeddings, load_backbone
from finessl.cli.main import main as finessl
from finessl.data import Dataset
from finessl.engine.heads import probe_rows, text_rows
from finessl.engine.images import ImageFiles, SkippedFiles
from finessl.engine.runs import load_run
from finessl.lab import extract_features
from finessl.peft import VPT, build_model, init_heads_from_means, mean_rows
from finessl.pseudo_labels import FixMatch
from finessl.training import Runtime, Settings, build_state, fit, prepare
from finessl.views import default_views
from PIL import Image
from sklearn.datasets import load_digits
from test_training import few, run

encoder = load_backbone("pocket")


def start(**changes):
    return build_state(prepare(few(), encoder, FixMatch(), Settings(batch=4, **changes), Runtime("cpu"))).model


def test_class_means_are_those_of_the_heads_room():
    model, feat, y = build_model(encoder, 10), torch.randn(30, encoder.width), torch.arange(10).repeat(3)
    init_heads_from_means(model, feat, y)
    assert torch.equal(model.head.weight, mean_rows(feat, y, 10))


def test_a_probe_by_scikit_learn_says_the_same():
    from sklearn.linear_model import LogisticRegression
    g = torch.Generator().manual_seed(0)
    feat, y = torch.randn(40, 8, generator=g), torch.arange(4).repeat(10)
    x = (F.normalize(feat, dim=1) / .07).numpy()
    for y in (y, y % 2):
        C = int(y.max()) + 1
        probe, w = LogisticRegression(C=10., max_iter=2000).fit(x, y.numpy()), probe_rows(feat, y, C)
        z = torch.from_numpy(x @ probe.coef_.T)
        want = z.argmax(1) if C > 2 else (z[:, 0] > 0).long()
        assert torch.equal((torch.from_numpy(x) @ w.T).argmax(1), want) or C > 2 # lengths of the rows count above two
        cos = F.cosine_similarity(w, torch.from_numpy(probe.coef_).float() if C > 2 else
                                  torch.from_numpy(probe.coef_[[0, 0]]).float() * torch.tensor([[-1.], [1.]]))
        assert cos.min() > .9999


def test_names_as_rows_are_zero_shot_but_for_the_lengths():
    names, templates = few().classes, caption_templates(encoder)
    rows, feat = text_rows(encoder, names, templates), torch.randn(5, encoder.width)
    text = F.normalize(class_embeddings(encoder, names, templates), dim=1)
    w = text @ encoder.proj.T
    assert torch.allclose(F.normalize(w, dim=1), rows, atol=1e-6)
    shift = encoder.project(torch.zeros(1, encoder.width)) @ text.T # of a bias, the same for all images
    assert torch.allclose(feat @ w.T + shift, encoder.project(feat) @ text.T, atol=1e-4)


@pytest.mark.parametrize("how", ["means", "centred", "probe", "text"])
def test_both_heads_start_there_with_prompts_and_without(how):
    for peft in ("vpt", "linear"):
        model, random = start(head_init=how, peft=peft, n_prompts=1), start(head_init="random", peft=peft, n_prompts=1)
        assert torch.equal(model.head.weight, model.aux_head.weight)
        assert not torch.equal(model.head.weight, random.head.weight)
        assert torch.allclose(model.head.weight.norm(dim=1), torch.ones(10), atol=1e-5)
    kept = fit(few(), encoder, FixMatch(), peft="linear", head_init=how, stored_views=(1, 1), steps=1, batch=4, evals=1,
               progress=False)
    assert kept.record["head_init"] == how


def test_an_encoder_without_text_says_so():
    import timm
    from finessl.backbone import Encoder
    plain = Encoder(timm.create_model("test_vit", img_size=32, num_classes=0), "plain")
    with pytest.raises(ValueError, match='plain has no text tower.*head_init may be "means" or "probe"'):
        fit(few(), plain, FixMatch(), peft="linear", head_init="text", steps=1, batch=4, progress=False)
    with pytest.raises(ValueError, match='head_init must be "random", "means", "centred", "probe", "text"'):
        fit(few(), encoder, FixMatch(), head_init="names", progress=False)


@pytest.mark.parametrize("how", [dict(peft="vpt-shallow", prompt_init="tokens"), dict(head_init="centred")])
def test_these_are_runs_like_any_other(tmp_path, how):
    whole = run(encoder, **how)
    class Cut(FineSSL):
        def __call__(self, logits, state):
            state["n"] = state.get("n", 0) + 1
            if state["n"] == 9: raise OSError("no power")
            return super().__call__(logits, state)
    Cut.__name__ = "FineSSL"
    with pytest.raises(OSError, match="no power"): run(encoder, Cut(), tmp_path / "run", checkpoint_every=4, **how)
    resumed = run(encoder, FineSSL(), tmp_path / "run", checkpoint_every=4, resume=True, **how)
    assert resumed.record["weights_sha256"] == whole.record["weights_sha256"] and resumed.record["resumes"]
    assert torch.equal(load_run(tmp_path / "run").predict(few().x_test), whole.predict(few().x_test))
    assert whole.record["weights_sha256"] != run(encoder).record["weights_sha256"]


def test_shallow_prompts_enter_once():
    whole = run(encoder, peft="vpt-shallow", prompt_init="tokens")
    assert isinstance(whole.model.features, VPT) and whole.model.features.prompts.shape == (1, 2, encoder.width)
    assert whole.record["n_prompts"] == 2


def test_a_centre_is_the_pools_mean_and_stays():
    ds, model = few(), start(head_init="centred", n_prompts=2)
    feat = extract_features(model.features, ds.x_ulb, default_views(ds, encoder).eval_view)[0]
    assert torch.allclose(model.head.centre, feat.mean(0), atol=1e-5)
    done = run(encoder, head_init="centred").model
    assert torch.equal(done.head.centre, done.aux_head.centre) and not done.head.centre.requires_grad
    assert torch.equal(done.head.centre, run(encoder, head_init="centred", lr=.1).model.head.centre)


def test_nothing_that_all_features_share_counts_in_centred_heads():
    g = torch.Generator().manual_seed(0)
    feat, y = torch.randn(40, encoder.width, generator=g), torch.arange(10).repeat(4)
    def logits(feat, centre):
        model = build_model(encoder, 10)
        init_heads_from_means(model, feat, y, feat.mean(0) if centre else None)
        return model.head(feat)
    moved = 50 + .1 * feat
    assert torch.allclose(logits(moved, True), logits(feat, True), atol=1e-2)
    assert logits(moved, False).std(1).max() < .1 * logits(feat, False).std(1).min()


def test_trained_heads_bring_their_centre(tmp_path):
    how = dict(steps=2, batch=4, evals=1, n_prompts=2, head_init="trained", progress=False, device="cpu")
    whole = fit(few(), encoder, AnchoredFineSSL(), out=tmp_path / "run", **how)
    assert whole.model.head.centre.norm() > 0
    assert torch.equal(load_run(tmp_path / "run").predict(few().x_test), whole.predict(few().x_test))


def test_on_the_command_line(tmp_path, capsys):
    some = ["train", "--data", "digits", "--per-class", "1", "--steps", "1", "--batch", "4", "--evals", "1", "--quiet"]
    assert finessl([*some, "--peft", "vpt-shallow", "--prompts", "1", "--head-init", "text", "--out",
                    str(tmp_path / "run")]) == 0
    record = load_run(tmp_path / "run").record
    assert (record["peft"], record["head_init"], record["n_prompts"]) == ("vpt-shallow", "text", 1)
    assert finessl([*some, "--peft", "vpt-shalow", "--out", str(tmp_path / "no")]) == 2
    assert "must be one of vpt, linear, lora" in capsys.readouterr().err


def photographs(folder): # three classes of three images, and six more without a label
    "Real digits as files that are left out where they cannot be read."
    bunch = load_digits()
    def save(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype("uint8")).save(path)
        return path
    files = [save(folder / f"{c}/{k}.png", image) for c in range(3)
             for k, image in enumerate(bunch.images[bunch.target == c][:3])]
    more = [save(folder / f"more/{k}.png", image) for k, image in enumerate(bunch.images[-6:])]
    x = [ImageFiles(some, 32, SkippedFiles(folder)) for some in (files, more, more)]
    y = torch.arange(3).repeat_interleave(3), torch.full((6,), -1), torch.zeros(6, dtype=torch.int64)
    return Dataset(x[0], y[0], x[1], y[1], x[2], y[2], ("0", "1", "2"), None), files


@pytest.mark.parametrize("how", ["means", "probe"])
def test_a_labelled_file_that_breaks_later_starts_nothing(tmp_path, how):
    "It is in no mean and lends no token, whoever reads it first."
    def begin(ds, prompts="random"):
        settings = Settings(batch=4, n_prompts=2, head_init=how, prompt_init=prompts)
        return build_state(prepare(ds, encoder, FixMatch(), settings, Runtime("cpu"))).model
    ds, files = photographs(tmp_path)
    files[4].write_text("broken")
    rest = [0, 1, 2, 3, 5, 6, 7, 8]
    without = ds._replace(x_lb=ImageFiles([files[i] for i in rest], 32), y_lb=ds.y_lb[rest])
    assert torch.allclose(begin(ds).head.weight, begin(without).head.weight, atol=1e-6)
    assert begin(photographs(tmp_path / "again")[0]._replace(x_lb=ds.x_lb), "tokens").features.prompts.isfinite().all()


def test_a_run_goes_on_without_a_labelled_file_that_broke(tmp_path):
    how = dict(steps=6, batch=4, evals=1, n_prompts=2, head_init="means", prompt_init="tokens", checkpoint_every=2,
               progress=False, device="cpu")
    class Stop(FixMatch):
        def __call__(self, logits, state):
            if len(calls) == 3: raise RuntimeError("cut")
            calls.append(0)
            return super().__call__(logits, state)
    Stop.__name__, calls = "FixMatch", []
    ds, files = photographs(tmp_path / "photos")
    with pytest.raises(RuntimeError, match="cut"): fit(ds, encoder, Stop(), out=tmp_path / "run", **how)
    files[4].write_text("broken")
    on = fit(ds, encoder, FixMatch(), out=tmp_path / "run", resume=True, **how)
    assert [Path(f).name for f in on.record["unreadable"]] == ["1.png"]
