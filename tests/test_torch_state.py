"Whatever a caller has set in torch: every entry gives the same bits, and leaves everything as it found it."
import threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import pytest
import timm
import torch
from finessl.algorithms import FineSSL
from finessl.backbone import Encoder, load_backbone
from finessl.checks.torch_state import STATES, check_leaves_torch_alone
from finessl.data import digits, holdout, split_labels
from finessl.engine.evaluation import predict_logits
from finessl.engine.folders import image_folder
from finessl.engine.runs import load_run
from finessl.engine.torch_state import fresh_torch, thread_state
from finessl.lab import Lab, linear_probe, zero_shot
from finessl.peft import build_model, default_n_prompts, trainable_state_dict, weights_sha256
from finessl.training import build_state, finish, fit, prepare, read_keywords, train
from finessl.views import default_views

WHOLE = digits(1, 0)
DATA = WHOLE._replace(x_ulb=WHOLE.x_ulb[:20], y_ulb=WHOLE.y_ulb[:20], x_test=WHOLE.x_test[:10],
                      y_test=WHOLE.y_test[:10], split=None)
SHORT = dict(steps=2, evals=1, batch=4, progress=False)
bits = lambda model: torch.cat([v.detach().flatten() for v in trainable_state_dict(model).values()])


def composed(encoder):
    setup = prepare(DATA, encoder, FineSSL(), *read_keywords(None, None, SHORT))
    state = build_state(setup)
    train(setup, state)
    return bits(finish(setup, state).model)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    "A finished run, a folder of images, an encoder, the lab."
    from PIL import Image
    root = tmp_path_factory.mktemp("places")
    for part in ("train", "test"):
        for name in ("a", "b"):
            (root / "photos" / part / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), (200, 30, 30) if name == "a" else (30, 30, 200)).save(
                root / "photos" / part / name / "x.png")
    fit(DATA, "pocket", FineSSL(), out=root / "run", **SHORT)
    return root, load_backbone("pocket"), Lab(n_weak=1, n_strong=1)


ENTRIES = {
    "fit": lambda root, encoder, lab: bits(fit(DATA, encoder, FineSSL(), **SHORT).model),
    "fit with an adapter": lambda root, encoder, lab: bits(fit(DATA, encoder, FineSSL(), peft="ssf", **SHORT).model),
    "composed": lambda root, encoder, lab: composed(encoder),
    "load_run, predict": lambda root, encoder, lab: load_run(root / "run").predict(DATA.x_test[:3]),
    "load_backbone": lambda root, encoder, lab: next(load_backbone("pocket").parameters()).detach(),
    "build_model": lambda root, encoder, lab: bits(build_model(encoder, 3, "adapter:2", 0, 5)),
    "default_n_prompts": lambda root, encoder, lab: torch.tensor(default_n_prompts(encoder), device="cpu"),
    "predict_logits": lambda root, encoder, lab: predict_logits(
        encoder, DATA.x_test[:2], default_views(DATA, encoder).eval_view, "cpu"),
    "digits": lambda root, encoder, lab: holdout(digits(2, 1), 50, 0).x_test,
    "split_labels": lambda root, encoder, lab: split_labels(np.arange(6) % 2, 1, 0),
    "image_folder": lambda root, encoder, lab: image_folder(root / "photos").x_lb,
    "lab": lambda root, encoder, lab: lab.run(FineSSL(), 1, 0, steps=2, evals=1).z_ulb,
    "linear_probe": lambda root, encoder, lab: linear_probe(lab, 1, 0).z_ulb,
    "zero_shot": lambda root, encoder, lab: zero_shot(lab, 1, 0).z_ulb}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_leave_torch_alone(places, name):
    check_leaves_torch_alone(lambda: ENTRIES[name](*places))


def test_the_state_is_there_after_an_error(places):
    for name, state in STATES.items():
        with state():
            before = thread_state()
            with pytest.raises(ValueError): fit(DATA, places[1], FineSSL(), steps=0)
            assert thread_state() == before, name


def test_deterministic_algorithms_and_anomaly_detection_change_nothing(places):
    want = ENTRIES["fit"](*places)
    torch.use_deterministic_algorithms(True)
    try: assert torch.equal(ENTRIES["fit"](*places), want) and torch.are_deterministic_algorithms_enabled()
    finally: torch.use_deterministic_algorithms(False)


def test_nothing_is_drawn_from_numpy_or_python(places):
    import random
    np.random.seed(3), random.seed(3)
    before = np.random.get_state()[1].tolist(), random.getstate()
    for f in ENTRIES.values(): f(*places)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before


def test_threads_with_one_seed_start_alike(places):
    encoder, found = places[1], set()
    want, state = weights_sha256(build_model(encoder, 50, "lora:2", 4, 0)), torch.get_rng_state()
    def work():
        for _ in range(5): found.add(weights_sha256(build_model(encoder, 50, "lora:2", 4, 0)))
    with ThreadPoolExecutor(6) as pool: list(pool.map(lambda _: work(), range(6)))
    assert found == {want} and torch.equal(state, torch.get_rng_state())


def test_the_default_type_is_lent_to_threads_that_overlap():
    inside, go, seen = threading.Barrier(2), threading.Event(), []
    def work(first):
        with fresh_torch():
            inside.wait()
            if not first: go.wait()                            # it is still inside when the other one has left
            seen.append(torch.get_default_dtype())
    torch.set_default_dtype(torch.float64)
    try:
        threads = [threading.Thread(target=work, args=(first,)) for first in (True, False)]
        for t in threads: t.start()
        threads[0].join()
        go.set()
        threads[1].join()
        assert seen == [torch.float32, torch.float32] and torch.get_default_dtype() == torch.float64
    finally: torch.set_default_dtype(torch.float32)


def test_threads_train_on_one_encoder(places):
    "Each way to fine-tune, at the same time, gives what it gives alone."
    ways = ("vpt", "lora:2", "ssf", "bitfit", "full")
    one = lambda peft: bits(fit(DATA, places[1], FineSSL(), peft=peft, lr=1e-3, **SHORT).model)
    want, hash = list(map(one, ways)), places[1].hash
    with ThreadPoolExecutor(len(ways)) as pool: got = list(pool.map(one, ways))
    assert all(map(torch.equal, got, want)) and places[1].hash == hash


@pytest.mark.parametrize("made", ["inference_mode", "float64", "half"])
def test_an_encoder_of_ones_own_is_trained_through_however_it_was_made(made):
    make = lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2,
                                     num_heads=3, num_classes=0)
    if made == "half": vit = make().half()
    else:
        with STATES[made](): vit = make()
    fit(DATA, Encoder(vit, "own"), FineSSL(), **SHORT)
    torch.manual_seed(4)
    drawn = torch.get_rng_state()
    load_backbone("timm:vit_tiny_patch16_224", False)          # random weights are the caller's: drawn where he stands
    assert not torch.equal(drawn, torch.get_rng_state())
