"""The rivals of FineSSL and its anchored form: saved and resumed, in processes and pieces, no wait for the device."""
import functools, io, json, re, signal
from pathlib import Path

import pytest
import torch
from pretended_device import check_waits_for_nothing

from finessl.anchored import AnchoredFineSSL
from finessl.backbone import load_backbone
from finessl.checks.rivals import random_batches
from finessl.data import digits, generator
from finessl.devices import fit_distributed
from finessl.engine.batches import VIEW_STRONG, make_batch
from finessl.engine.errors import TrainingError
from finessl.engine.launch import launch
from finessl.engine.prefetch import make_fetcher
from finessl.engine.schedule import SHORT_SCHEDULE
from finessl.peft import trainable_state_dict
from finessl.pseudo_labels import BatchLogits
from finessl.rivals import AdaMatch, DebiasPL, FlexMatch, FreeMatch, PseudoLabel, SoftMatch
from finessl.training import fit
from finessl.views import default_views

# such that in a dozen steps something is kept, something is not, and what is remembered matters
RIVALS = {"Pseudo-Label": PseudoLabel(tau=.5, ramp_start=2, ramp_end=8),
          "Pseudo-Label, strong view": PseudoLabel(tau=.5, ramp_start=2, ramp_end=8, view="strong"),
          "FlexMatch": FlexMatch(), "FlexMatch, no warm-up": FlexMatch(warm_up=False),
          "FreeMatch": FreeMatch(momentum=.7, fairness=.1), "SoftMatch": SoftMatch(momentum=.7, n_strong=2),
          "AdaMatch": AdaMatch(momentum=.7), "DebiasPL": DebiasPL(tau=.5, momentum=.7),
          "anchored": AnchoredFineSSL(zeta=.5)}
each = pytest.mark.parametrize("name", RIVALS)
CLOSE = 1e-5


def batches(algorithm, device="cpu"):
    "Six steps in float32, the strong and the labelled logits with gradient."
    def leaf(k, t):
        weak = k in ("z_ulb_w", "a_ulb_w")
        return t.float().to(device).requires_grad_(not weak) if t.is_floating_point() else t.to(device)
    some = random_batches(algorithm.n_strong, "weak" in algorithm.required_outputs)
    if "aux" in algorithm.required_outputs:
        some = [b._replace(a_lb=.7 * b.z_lb, a_ulb_w=.7 * b.z_ulb_w, a_ulb_s=.7 * b.z_ulb_s) for b in some]
    return [BatchLogits(**{k: None if t is None else leaf(k, t) for k, t in b._asdict().items()}) for b in some]


def few():
    "Ten labelled digits, sixty in the pool, forty for the test."
    ds = digits(1, 0)
    first = {k: getattr(ds, k)[:n] for k, n in {"x_ulb": 60, "y_ulb": 60, "x_test": 40, "y_test": 40}.items()}
    return ds._replace(split=ds.split._replace(idx_lb=torch.zeros(0, dtype=torch.int64)), **first)


SETTINGS = dict(n_prompts=2, steps=12, batch=9, mu=2, evals=3, head_init="random", progress=False,
                device="cpu")


def run(algorithm, **changes): return fit(few(), load_backbone("pocket"), algorithm, **SETTINGS | changes)


def outcome(folder: Path):
    "Weights, and the record but for times and resumes."
    record = json.loads((folder / "record.json").read_text())
    for k in ("seconds", "eval_seconds", "resumes", "commit", "dirty"): record.pop(k)
    return (folder / "model.safetensors").read_bytes(), record


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run in one process, undisturbed, made when it is first asked for: name -> folder, run."
    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp("whole")
        return folder, run(RIVALS[name], out=folder)
    return made


# ---------------------------------------------------------------- the state

@each
def test_a_state_saved_half_way_goes_on_to_the_bit(name):
    "Through the bytes of a checkpoint: losses, gradients and what is kept."
    algorithm, losses = RIVALS[name], {}
    state = algorithm.init(12, 4, "cpu")
    for t, (here, there) in enumerate(zip(batches(algorithm), batches(algorithm), strict=True)):
        if t == 3:
            payload, again = io.BytesIO(), algorithm.init(12, 4, "cpu")
            torch.save({k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}, payload)
            for k, v in torch.load(io.BytesIO(payload.getvalue()), weights_only=True).items():
                if hasattr(again[k], "load_state_dict"): again[k].load_state_dict(v)
                else: again[k] = v
        (loss, metrics), other = algorithm(here, state), algorithm(there, again) if t >= 3 else None
        if other is None: continue
        loss.backward(), other[0].backward()
        assert torch.equal(loss, other[0]) and all(torch.equal(v, other[1][k]) for k, v in metrics.items())
        assert torch.equal(here.z_ulb_s.grad, there.z_ulb_s.grad) and torch.equal(here.z_lb.grad, there.z_lb.grad)


@each
def test_what_is_remembered_matters(name):
    "Otherwise a state that is lost would pass every test here."
    algorithm = RIVALS[name]
    def new(): return algorithm.init(12, 4, "cpu")
    state = new()
    gaps = [(algorithm(b, state)[0] - algorithm(b, new())[0]).detach().abs() for b in batches(algorithm)]
    assert max(gaps) > 1e-3


def test_a_state_of_another_size_is_refused():
    few, many = (FreeMatch().init(12, C, "cpu") for C in (3, 4))
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\)"): many["p"].load_state_dict(few["p"].state_dict())


# ---------------------------------------------------------------- in the loop

@each
def test_a_run_keeps_some_and_not_all(whole, name):
    "What the tests below compare is at work."
    _, r = whole(name)
    kept = [e["mask_ratio"] for e in r.record["evaluations"]]
    assert .02 < min(kept) < .9 and len(set(kept)) > 1
    assert r.record["algorithm"]["name"] == type(RIVALS[name]).__name__


@each
@pytest.mark.parametrize("after", [3, 11])
def test_a_resume_is_exact(whole, tmp_path, monkeypatch, name, after):
    "Ctrl-C during a step, then on with it."
    kind, calls = type(RIVALS[name]), []
    real = kind.__call__
    def call(self, logits, state):
        calls.append(1)
        if len(calls) == after: signal.raise_signal(signal.SIGINT)
        return real(self, logits, state)
    monkeypatch.setattr(kind, "__call__", call)
    with pytest.raises(KeyboardInterrupt, match=f"after step {after}"): run(RIVALS[name], out=tmp_path / "run")
    monkeypatch.undo()
    r = run(RIVALS[name], out=tmp_path / "run", resume=True)
    assert r.record["resumes"][0]["step"] == after
    assert outcome(tmp_path / "run") == outcome(whole(name)[0])


def test_pseudo_label_learns_weak_views_unless_told_otherwise():
    "In the place of the strong views: of the same images, changed as `view` says, with a draw of their own."
    ds, encoder = few(), load_backbone("pocket")
    views, fetch = default_views(ds, encoder), [make_fetcher(x, "cpu") for x in (ds.x_lb, ds.x_ulb)]
    def images(a): return make_batch(ds, views, a, *fetch, seed=0, step=3, batch=9, mu=2, schedule=SHORT_SCHEDULE)
    weak, strong, other = images(PseudoLabel()), images(PseudoLabel(view="strong")), images(FlexMatch())
    expected = views.weak(ds.x_ulb[weak["idx_ulb"]], views.weak.sample_params(18, generator(0, 3, VIEW_STRONG)))
    assert torch.equal(weak["x_s"], expected) and "x_w" not in weak
    assert torch.equal(strong["x_s"], other["x_s"]) and not torch.equal(weak["x_s"], other["x_w"])


def test_another_setting_does_not_go_on_from_a_checkpoint(tmp_path, monkeypatch):
    "Every argument is part of what identifies a run."
    real = FreeMatch.__call__
    def call(self, logits, state):
        signal.raise_signal(signal.SIGINT)
        return real(self, logits, state)
    monkeypatch.setattr(FreeMatch, "__call__", call)
    with pytest.raises(KeyboardInterrupt): run(FreeMatch(), out=tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(TrainingError, match=re.escape("algorithm.momentum: 0.999 there, 0.9 here")):
        run(FreeMatch(momentum=.9), out=tmp_path / "run", resume=True)


def result(r): return r.record, {k: v.detach().cpu().clone() for k, v in trainable_state_dict(r.model).items()}


def in_each():
    "What each of two processes does."
    return {name: result(run(algorithm)) for name, algorithm in RIVALS.items()}


def same(a, b, name=None):
    "Assert that two results are equal to float rounding: losses, what is kept, and weights."
    for x, y in zip(a[0]["evaluations"], b[0]["evaluations"], strict=True):
        assert abs(x["loss"] / y["loss"] - 1) < CLOSE, (name, x, y)
        assert x["mask_ratio"] == y["mask_ratio"] and x["pool_pl_counts"] == y["pool_pl_counts"], (name, x, y)
    for k, v in a[1].items(): assert (v - b[1][k]).abs().max() < CLOSE, (name, k)


def test_two_processes_train_as_one(whole):
    for name, two in launch(2, in_each, threads=1).items(): # every run, in the same two processes
        assert two[0]["processes"] == 2, name
        same(two, result(whole(name)[1]), name)


@pytest.mark.slow
def test_two_processes_of_a_command(whole):
    "As the command line starts them."
    name = "FreeMatch"
    same(result(fit_distributed(2, few(), load_backbone("pocket"), RIVALS[name], **SETTINGS)), result(whole(name)[1]))


@each
def test_pieces_give_the_same_update(whole, name):
    "Four pieces that do not divide the batch."
    same(result(run(RIVALS[name], accumulate=4)), result(whole(name)[1]))


# ---------------------------------------------------------------- the device

@each
def test_a_step_waits_for_nothing(name):
    "On a device, no value is fetched; and the numbers are those of the CPU."
    def prepare(device):
        algorithm = RIVALS[name]
        steps, state = batches(algorithm, device), algorithm.init(12, 4, device)
        def work():
            losses = [algorithm(b, state)[0] for b in steps]
            for loss in losses: loss.backward()
            return losses
        return work
    there, here = check_waits_for_nothing(prepare), prepare("cpu")()
    assert [float(z.near) for z in there] == pytest.approx([float(z) for z in here], rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each
def test_a_step_on_a_gpu_waits_for_nothing(name):
    algorithm = RIVALS[name]
    steps, state = batches(algorithm, "cuda"), algorithm.init(12, 4, "cuda")
    algorithm(steps[0], algorithm.init(12, 4, "cuda"))[0].backward()           # libraries are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for b in steps: algorithm(b, state)[0].backward()
    finally: torch.cuda.set_sync_debug_mode("default")
