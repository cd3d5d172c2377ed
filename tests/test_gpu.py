"The paper's scale: data by name, list files, offline messages, the benchmark, and what needs a GPU."
import contextlib, functools, io, json, time
from types import SimpleNamespace
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from finessl import gpu, peft, training, views
from finessl.algorithms import FineSSL
from finessl.backbone import attention, load_backbone, naive_attention
from finessl.bench.measure import compilations, step_flops
from finessl.bench.runner import BenchConfig, BenchmarkRunner
from finessl.cli.main import main
from finessl.data import check_dataset, digits
from finessl.engine import checkpoint, evaluation
from finessl.engine import downloads, named, precision, processes
from finessl.engine import prefetch as prefetching
from finessl.engine.batches import compute_logits, make_batch
from finessl.engine.errors import DataError
from finessl.engine.folders import image_lists
from finessl.engine.images import ImageFiles
from finessl.engine.metrics import MetricAccumulator, NonFiniteGuard
from finessl.engine.operations import OPERATIONS, rand_augment
from finessl.engine.prefetch import make_fetcher, prefetch
from finessl.engine.schedule import Schedule
from finessl.gpu import ABLATION_ORDER, VARIANTS
from finessl.pseudo_labels import FixMatch, SupervisedOnly
from finessl.training import fit
from finessl.views import natural_views
from pretended_device import PretendedDevice, check_waits_for_nothing, steps_there

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
tiny = "timm:vit_tiny_patch16_224"


@functools.cache
def encoder():
    torch.manual_seed(0)
    return load_backbone(tiny, False, 48)


def small(device="cpu", **kwargs):
    settings = dict(n_prompts=4, pool=64, n_classes=5, schedule=Schedule(30))
    return BenchConfig(encoder(), torch.device(device), 2, "float32", **settings | kwargs)


def folder_of_lists(folder, labelled, unlabelled=(), test=()):
    for c in ("cat", "dog"):
        (folder / c).mkdir()
        for i in range(5): Image.effect_noise((40, 30), 90).convert("RGB").save(folder / c / f"a {i}.jpg")
    for name, lines in (("labelled", labelled), ("unlabelled", unlabelled), ("test", test)):
        if lines: (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


# Data by name (presets: test_presets.py)

@pytest.mark.parametrize("name, file", [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz"),
                                        ("food101", "food-101.tar.gz")])
def test_offline_says_which_file_to_bring(name, file, tmp_path):
    with pytest.raises(DataError, match=f"{name} is not in .*; bring {file} .* from http.* and put it into"):
        named.torchvision_dataset(name, 1, folder=tmp_path, ask=lambda url: "no answer")
    (tmp_path / file).write_bytes(b"half an archive")
    with pytest.raises(DataError, match=f"{file} is damaged .*; bring {file}"):
        named.torchvision_dataset(name, 1, folder=tmp_path, ask=lambda url: "no answer")


def test_unknown_data_are_refused():
    with pytest.raises(DataError, match="no data set is called"): named.torchvision_dataset("mnist", 1)


def test_a_server_that_is_not_there_is_known_within_5_seconds():
    start = time.perf_counter()
    assert downloads.url_error("https://no-such-host.invalid/a.tar.gz") != ""
    assert downloads.url_error("https://10.255.255.1/a.tar.gz") != ""
    assert time.perf_counter() - start < 5


def test_named_data_become_a_dataset(monkeypatch, tmp_path):
    pixels = np.arange(12 * 32 * 32 * 3, dtype="uint32").astype("uint8").reshape(12, 32, 32, 3)
    part = SimpleNamespace(data=pixels, targets=[0, 1, 2] * 4, classes=["a", "b", "c"])
    monkeypatch.setattr(named, "torchvision_parts", lambda name, folder, ask: (part, part))
    ds = check_dataset(named.torchvision_dataset("cifar10", 2, 0, tmp_path))
    assert ds.x_ulb.shape == (12, 3, 32, 32) and ds.y_lb.tolist() == [0, 0, 1, 1, 2, 2] and ds.split.source == "cifar10"
    assert ds.x_ulb[3, 1, 2, 5] == part.data[3, 2, 5, 1] and torch.equal(ds.x_lb, ds.x_ulb[ds.split.idx_lb])
    assert named.torchvision_dataset("cifar10", 2, 1, tmp_path).split.hash != ds.split.hash
    folder_of_lists(tmp_path, ["cat/a 0.jpg\tcat"])
    files = sorted(tmp_path.rglob("*.jpg"))
    part = SimpleNamespace(_image_files=files, _labels=[0] * 5 + [1] * 5, classes=["cat", "dog"])
    ds = check_dataset(named.torchvision_dataset("food101", 2, 0, tmp_path))
    assert isinstance(ds.x_ulb, ImageFiles) and len(ds.x_lb) == 4 and ds.x_lb[0].shape == (3, 256, 256)


# List files

def test_list_files(tmp_path):
    folder_of_lists(tmp_path, ["cat/a 0.jpg\tcat", "dog/a 0.jpg\tdog", "dog/a 1.jpg\tdog"],
                    ["cat/a 0.jpg\t", "cat/a 1.jpg\t", "dog/a 2.jpg\towl"], ["cat/a 4.jpg\tcat"])
    ds = image_lists(tmp_path, n_per_class=1, image_size=32)
    check_dataset(ds)
    assert ds.classes == ("cat", "dog") and ds.y_lb.tolist() == [0, 1] and len(ds.x_ulb) == 5
    assert ds.y_ulb.tolist()[2] == 2 # a class without a label: out of distribution
    assert torch.equal(ds.x_ulb[ds.split.idx_lb], ds.x_lb[:])


def test_list_files_name_the_line_that_is_wrong(tmp_path):
    with pytest.raises(DataError, match="list file does not exist"): image_lists(tmp_path)
    (tmp_path / "labelled.txt").write_text("a.jpg\n")
    with pytest.raises(DataError, match="labelled.txt, line 1: 'a.jpg' has no label"): image_lists(tmp_path)


def test_numbers_are_sorted_as_numbers(tmp_path):
    (tmp_path / "labelled.txt").write_text("".join(f"{i}.jpg {i}\n" for i in (10, 2, 1)))
    assert image_lists(tmp_path).classes == ("1", "2", "10")


# Images never wait, and nothing changes by that

def test_images_made_ahead_are_the_same_and_in_order(tmp_path):
    folder_of_lists(tmp_path, [f"{c}/a {i}.jpg\t{c}" for c in ("cat", "dog") for i in range(5)])
    ds, views, algorithm = image_lists(tmp_path, image_size=40), natural_views(32), FineSSL()
    lb, ulb = make_fetcher(ds.x_lb, "cpu"), make_fetcher(ds.x_ulb, "cpu")
    make = lambda t: make_batch(ds, views, algorithm, lb, ulb, 0, t, 3, 1, Schedule(30))
    for plain, early in zip(prefetch(make, range(6), 0), prefetch(make, range(6), 3)):
        assert plain.keys() == early.keys() and all(torch.equal(v, early[k]) for k, v in plain.items())


def test_an_error_in_a_worker_reaches_the_loop(tmp_path):
    def make(t):
        if t == 3: raise DataError("cannot read image 3")
        return t
    seen = []
    with pytest.raises(DataError, match="image 3"):
        for t in prefetch(make, range(9), 2): seen.append(t)
    assert seen == [0, 1, 2]
    with pytest.raises(ValueError, match="depth must be >= 0"): list(prefetch(make, range(2), -1))


def test_leaving_early_ends_the_workers():
    made = []
    images = prefetch(lambda t: made.append(t) or t, range(1000), 2)
    next(images); images.close()
    assert len(made) <= 4


# The step

@pytest.mark.parametrize("name", ABLATION_ORDER)
def test_every_variant_gives_the_same_losses(name):
    def losses(v): return [float(t.step(t.images(i), i)) for t in [BenchmarkRunner(v, small())] for i in range(2)]
    pillow = VARIANTS[name].views == "pillow"                  # rounds otherwise: a grey level here and there
    other = VARIANTS["batch-views" if not pillow else "pace-on-device"]
    assert losses(VARIANTS[name]) == pytest.approx(losses(other), rel=1e-5)
    assert losses(VARIANTS[name]) == pytest.approx(losses(VARIANTS["finessl"]), rel=1e-2 if pillow else 1e-5)


def test_a_form_of_attention_is_one_encoders_alone():
    "Written and fused attention agree, and choosing one for a variant leaves the shared encoder as it is."
    twins, x = {form: gpu.with_attention(encoder(), form) for form in gpu.FORMS}, torch.randn(2, 3, 48, 48)
    for twin in twins.values():
        assert (twin(x) - encoder()(x)).abs().max() < 1e-4
        assert all(a is b for a, b in zip(twin.parameters(), encoder().parameters()))
    assert all(block.attention is attention for block in encoder().blocks)
    assert twins["eager"].blocks[0].attention is naive_attention


@pytest.mark.parametrize("accumulate", (1, 2))
def test_a_step_waits_for_nothing(accumulate, monkeypatch):
    def in_floats(x, size):                                    # as on a device: the CPU's own form rounds otherwise
        smaller = max(size) < max(x.shape[-2:])
        x = F.interpolate(x.float(), size, mode="bilinear", antialias=smaller)
        return x.round_().clamp_(0, 255).to(torch.uint8)
    monkeypatch.setattr(views, "resize", in_floats)
    step = functools.partial(steps_there, VARIANTS["finessl-eager"], small(), accumulate=accumulate)
    there, here = check_waits_for_nothing(step), step("cpu")()
    assert [float(z.near) for z in there] == pytest.approx([float(z) for z in here], rel=1e-4)


@pytest.mark.parametrize("k", range(len(OPERATIONS)), ids=[name for name, *_ in OPERATIONS])
def test_an_operation_of_randaugment_waits_for_nothing(k):
    def prepare(device):
        x = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device)
        return lambda: rand_augment(x, torch.full((2,), k), torch.tensor([1, 9]), torch.tensor([-1, 1]))
    check_waits_for_nothing(prepare)


def far_range(f, device): # what `f` does with ten numbers of the device
    x = torch.arange(10., device=device)
    return lambda: f(x)


def look_at_the_loss(loss): return loss if loss.sum().isnan() else None


index = torch.tensor([1, 2])
WAITS = {"a printed value": (print, "asks the device for values"),
         "a look at the loss": (look_at_the_loss, "asks the device for values"),
         "a boolean index": (lambda x: x[x > 4], "asks the device which indices are meant"),
         "a blocking copy": (lambda x: x + torch.ones(10).to(x.device), "copies to the device while the host waits"),
         "an index on the host": (lambda x: x[index], "copies to the device while the host waits")}


@pytest.mark.parametrize("name", WAITS)
def test_what_makes_a_host_wait_is_found(name):
    f, why = WAITS[name]
    with pytest.raises(AssertionError, match=why): check_waits_for_nothing(functools.partial(far_range, f))
    with PretendedDevice(): far_range(f, "meta")()             # and nothing else is wrong with it


def test_numbers_handed_over_one_by_one_are_found():
    "They never reach the pretended device, so that is all that can be said of them."
    f = lambda x: x + torch.tensor([1.] * 10, device=x.device)
    with pytest.raises(AssertionError, match="fills a tensor on the device with numbers of the host"):
        check_waits_for_nothing(functools.partial(far_range, f))


def test_a_pace_table_on_the_cpu_makes_the_host_wait():
    variant = VARIANTS["finessl-eager"]._replace(pace="cpu")
    with pytest.raises(AssertionError, match="asks the device"):
        check_waits_for_nothing(functools.partial(steps_there, variant, small()))


calls = {} # of what may wait, in the last `watched_fit`

def watched_fit(monkeypatch, dataset, algorithm, **settings):
    """`fit` on the pretended device; only evaluations and what is read and written beside them may wait, from the first
    step's images to the end."""
    calls.clear()
    device = PretendedDevice()
    def may_wait(owner, name):
        f = getattr(owner, name)
        def waiting(*a, **k):
            calls[name] = calls.get(name, 0) + 1
            with device.strictly(False): return f(*a, **k)
        monkeypatch.setattr(owner, name, waiting)
    for name in ("evaluate", "finalize_log"): may_wait(training, name)
    may_wait(checkpoint, "save_checkpoint")
    may_wait(NonFiniteGuard, "check")
    may_wait(MetricAccumulator, "read")
    in_one_thread = lambda make, steps, depth=0, device=None: (make(t) for t in steps) # the pretence is one thread's
    for m in (training, evaluation): monkeypatch.setattr(m, "prefetch", in_one_thread)
    images = training.make_batch
    def from_here_on(*a, **k):
        device.strict = True
        return images(*a, **k)
    monkeypatch.setattr(training, "make_batch", from_here_on)
    train = training.train
    def until_here(*a, **k):
        try: return train(*a, **k)
        finally: device.strict = False
    monkeypatch.setattr(training, "train", until_here)
    settings |= dict(device="meta", compile=False, prefetch_depth=0, progress=False)
    with device: return fit(dataset, "pocket", algorithm, **settings)


ALGORITHMS = {"FineSSL": FineSSL(), "paper": FineSSL(form="paper"), "FixMatch": FixMatch(),
              "labelled-only": SupervisedOnly()}


def fewer_digits():
    "Two labelled digits a class and 100 for the test."
    ds = digits(2, 0)
    return ds._replace(x_test=ds.x_test[:100], y_test=ds.y_test[:100])


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_the_loop_waits_for_evaluations_alone(monkeypatch, tmp_path, algorithm):
    settings = dict(schedule=Schedule(6, reset_pace_every=4), batch=4, evals=2, checkpoint_every=2)
    here = fit(fewer_digits(), "pocket", algorithm, device="cpu", compile=False, progress=False, **settings)
    run = watched_fit(monkeypatch, fewer_digits(), algorithm, out=tmp_path / "run", **settings)
    few = {"evaluate": 2, "read": 2, "save_checkpoint": 2, "check": 4, "finalize_log": 1}
    assert calls == few, "something waits more often than it has to"
    for a, b in zip(run.record["evaluations"], here.record["evaluations"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=.02)


FORMS = {"prompts": dict(), "heads": dict(peft="linear"), "release": dict(labelled="release"),
         "tokens in pieces": dict(prompt_init="tokens", accumulate=2)}


@pytest.mark.parametrize("how", FORMS.values(), ids=FORMS)
def test_the_loop_waits_for_nothing_with_files(monkeypatch, tmp_path, how):
    folder_of_lists(tmp_path, [f"{c}/a {i}.jpg\t{c}" for c in ("cat", "dog") for i in range(5)])
    ds = image_lists(tmp_path, image_size=40)
    run = watched_fit(monkeypatch, ds, FineSSL(), schedule=Schedule(3), batch=4, evals=1, **how)
    assert run.record["evaluations"][0]["loss"] > 0


@pytest.mark.parametrize("wrong", ["peeking at the loss", "peeking between steps", "printing between steps"])
def test_a_loop_that_waits_is_found(monkeypatch, wrong):
    class Peeking(FixMatch):
        def __call__(self, step, state):
            loss, metrics = super().__call__(step, state)
            if wrong == "peeking at the loss" and loss > 1e9: raise ValueError
            return loss, metrics
    if wrong == "peeking between steps":
        step = training.train_step
        monkeypatch.setattr(training, "train_step", lambda *a, **k: float(step(*a, **k)))
    if wrong == "printing between steps":
        step = training.train_step
        monkeypatch.setattr(training, "train_step", lambda *a, **k: print(f"loss {step(*a, **k):.3f}"))
    with pytest.raises(AssertionError, match="asks the device for values"):
        watched_fit(monkeypatch, fewer_digits(), Peeking(), schedule=Schedule(3), batch=4, evals=1)


def test_operations_fall_along_the_chain():
    counts = [step_flops(VARIANTS[name], small()) for name in ("naive", "sdpa", "exact-prompts", "no-gradient")]
    assert counts[0] == counts[1] > counts[2] > counts[3]


def test_nothing_is_compiled_after_the_first_step():
    trainer = BenchmarkRunner(VARIANTS["finessl"], small())
    f = torch.compile(trainer.model.features, backend="eager", dynamic=False, fullgraph=True)
    trainer.compute = functools.partial(compute_logits, features=f)
    assert compilations(lambda t: trainer.step(trainer.images(t), t), 4) == [2, 0, 0, 0]


def test_every_kind_of_fit_in_a_process_is_compiled(monkeypatch):
    "All models share the code of one forward pass, and torch.compile gives up on code compiled eight times."
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    ds, encoder = fewer_digits(), load_backbone("pocket")
    one = lambda t: fit(ds, encoder, FixMatch(), n_prompts=t + 1, schedule=Schedule(1), batch=4, evals=1,
                        compile=True, device="cpu", progress=False)
    assert compilations(one, 6) == [2] * 6


def test_pieces_add_up_in_memory_of_their_own(monkeypatch):
    "Where a gradient is the output of a CUDA graph, a second piece would add to what the graph overwrites."
    owned, real = [], torch.autograd.backward
    def backward(*args, **kwargs):
        owned.append(trainer.model.features.prompts.grad is not None)
        real(*args, **kwargs)
    monkeypatch.setattr(torch.autograd, "backward", backward)
    for pieces in (1, 2):
        trainer = BenchmarkRunner(VARIANTS["finessl"], small())
        trainer.accumulate = pieces
        trainer.step(trainer.images(0), 0)
    assert owned[-2:] == [True, True] and True not in owned[:-2]


def test_bf16_is_the_default_where_the_hardware_has_it(monkeypatch):
    assert precision.default_precision("cpu") == precision.default_precision("mps") == "float32"
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: there)
        assert precision.default_precision("cuda:0") == ("bf16" if there else "float32")
    run = fit(digits(2, 0), "pocket", SupervisedOnly(), schedule=Schedule(1), batch=4, evals=1, progress=False)
    assert run.record["precision"] == "float32"


def test_a_resume_keeps_its_precision_on_another_device(monkeypatch, tmp_path):
    "A run begun on a CPU goes on where bf16 is the default."
    settings = dict(schedule=Schedule(4), batch=4, evals=1, progress=False, out=tmp_path / "run", checkpoint_every=2)
    step = training.train_step
    def broken(*args, **kwargs):
        if args[0].step == 3: raise KeyboardInterrupt
        return step(*args, **kwargs)
    monkeypatch.setattr(training, "train_step", broken)
    with pytest.raises(KeyboardInterrupt): fit(digits(2, 0), "pocket", SupervisedOnly(), **settings)
    monkeypatch.setattr(training, "train_step", step)
    monkeypatch.setattr(training, "default_precision", lambda device: "bf16")
    record = fit(digits(2, 0), "pocket", SupervisedOnly(), resume=True, **settings).record
    assert record["precision"] == "float32" and record["resumes"][0]["step"] == 2
    new = fit(digits(2, 0), "pocket", SupervisedOnly(), resume=True, **settings | {"out": tmp_path / "new"})
    assert new.record["precision"] == "bf16"


def test_a_device_may_be_named_by_the_environment(monkeypatch):
    monkeypatch.setenv("FINESSL_DEVICE", "cuda:7")
    assert precision.default_device() == "cuda:7"
    assert processes.ProcessInfo(join=False).device == torch.device("cuda:7")
    monkeypatch.setenv("FINESSL_DEVICE", "")
    assert precision.default_device() in ("cpu", "cuda", "mps")


# The benchmark

def test_bench_on_the_command_line(tmp_path):
    out, file = io.StringIO(), tmp_path / "bench.json"
    with contextlib.redirect_stdout(out):
        assert main(["bench", "--device", "cpu", "--backbone", tiny, "--image-size", "48", "--batch", "2",
                     "--prompts", "4", "--steps", "1", "--json", "--out", file]) == 0
    result = json.loads(out.getvalue().splitlines()[-1])
    assert {"device", "encoder", "batch", "variants"} <= result.keys() and result["batch"] == 2
    assert list(result["variants"]) == ["naive", "finessl"]
    for v in result["variants"].values():
        assert {"step_ms", "step_with_views_ms", "mfu", "peak_memory_mb"} <= v.keys()
        assert v["step_with_views_ms"] >= v["step_ms"] > 0
        assert {"images_per_s", "views_images_per_s", "share", "preset_seconds", "loss"} <= v.keys()
        assert set(v["share"]) == {"views", "encoder", "rest"}
        assert v["views_times_step"] == pytest.approx(v["step_ms"] / (v["step_with_views_ms"] - v["step_ms"]), rel=.02)
        products = result["cpu_time_product_tflops"] / result["product_tflops"] # one clock each
        assert v["mfu"] / v["cpu_time"]["mfu"] == pytest.approx(v["cpu_ms"]["step"] / v["step_ms"] * products, rel=.05)
    assert result["clock"] == "wall" and "TFLOP/s by the clock on the wall" in out.getvalue()
    assert "views/s" in out.getvalue() and "15,000 steps" in out.getvalue()
    assert json.loads(file.read_text()) == result


def test_bench_refuses_bad_values(capsys):
    assert main(["bench", "--variants", "fast"]) == 2 and "no variant is called 'fast'" in capsys.readouterr().err
    assert main(["bench", "--steps", "0"]) == 2


def test_train_with_a_preset(tmp_path, capsys):
    (data := tmp_path / "data").mkdir()
    folder_of_lists(data, [f"{c}/a {i}.jpg\t{c}" for c in ("cat", "dog") for i in range(4)])
    assert main(["train", "--preset", "semi-aves-ood", "--data", str(data), "--out", str(tmp_path / "run"),
                 "--backbone", "pocket", "--image-size", "32", "--steps", "2", "--batch", "2", "--evals", "1",
                 "--device", "cpu", "--quiet"]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["algorithm"]["gamma"] == 1 and record["n_prompts"] == 50
    assert record["mean"] == pytest.approx([.485, .456, .406])
    assert record["schedule"] == {"steps": 2, "lr": .03, "decay": "epoch", "reset_pace_every": 500}
    other = ["--out", str(tmp_path / "other")]
    assert main(["train", "--preset", "cifar", *other]) == 2 and "no such preset" in capsys.readouterr().err
    assert main(["train", "--preset", "semi-aves", *other]) == 2 and "needs --data" in capsys.readouterr().err


def test_the_encoder_is_compiled_where_its_compiler_is(monkeypatch):
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: True)
    for major, wanted in ((6, False), (7, True), (9, True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        assert precision.supports_compile("cuda") is wanted
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: None)
    for device in ("cuda", "cpu", "mps"): assert not precision.supports_compile(device)


def test_threads_that_make_images_start_on_the_gpu_they_serve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [prefetching.cuda_index(d) for d in ("cpu", "mps", "cuda", "cuda:3")] == [None, None, 1, 3]
    assert prefetching.thread_initializer("cpu") == ()
    assert prefetching.thread_initializer("cuda") == (torch.cuda.set_device, (1,))
    started, given = [], []
    monkeypatch.setattr(torch.cuda, "set_device", started.append)
    monkeypatch.setattr(prefetching, "prefetch_stream", lambda device: None)
    monkeypatch.setattr(prefetching, "wait_event", lambda device, images, event: given.append(device) or images)
    assert list(prefetch(lambda t: t, range(5), 2, "cuda:3")) == [0, 1, 2, 3, 4] and given == 5 * ["cuda:3"]
    assert 1 <= len(started) <= 2 and set(started) == {3}


def test_a_process_that_fails_on_gpus_does_not_wait_for_those_that_go_on(monkeypatch):
    monkeypatch.setattr(processes.dist.distributed_c10d, "_get_default_store", torch.distributed.HashStore)
    for device, wanted in (("cuda", [processes.dist.destroy_process_group]), ("cpu", [])):
        left = []
        monkeypatch.setattr(processes.atexit, "unregister", left.append)
        group = SimpleNamespace(world_size=2, rank=0, device=torch.device(device))
        with pytest.raises(OSError, match="no power"), processes.fail_together(group): raise OSError("no power")
        assert left == wanted


def test_train_can_leave_the_encoder_uncompiled(tmp_path, monkeypatch):
    given = []
    note = lambda *args, **kwargs: given.append(kwargs["runtime"].compile) or exit(0)
    monkeypatch.setattr("finessl.devices.fit_distributed", note)
    command = ["train", "--data", "digits", "--per-class", "1", "--out", str(tmp_path / "run")]
    for more in ([], ["--no-compile"]):
        with contextlib.suppress(SystemExit): main([*command, *more])
    assert given == [None, False]


# On a GPU (skipped where there is none)

@needs_gpu
def test_a_step_on_a_gpu_waits_for_nothing():
    trainer = BenchmarkRunner(VARIANTS["finessl-eager"], small("cuda"))
    for t in range(3): trainer.step(trainer.images(t), t)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(3, 6): trainer.step(trainer.images(t), t)
    finally: torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_images_made_ahead_on_a_gpu_are_the_same():
    ds, encoder = digits(2, 0), load_backbone("pocket")
    settings = dict(schedule=Schedule(20), batch=8, evals=1, compile=False, progress=False, device="cuda")
    runs = [fit(ds, encoder, FixMatch(), prefetch_depth=d, **settings) for d in (0, 3)]
    now, early = (r.record["evaluations"][0]["loss"] for r in runs)
    assert early == pytest.approx(now, rel=1e-2)


@needs_gpu
def test_compiled_and_graphed_steps_give_the_same_losses():
    def losses(name):
        runner = BenchmarkRunner(VARIANTS[name], small("cuda"))
        return [float(runner.step(runner.images(t), t)) for t in range(4)]
    plain = losses("finessl-eager")
    for name in ("finessl", "finessl-graphs"): assert losses(name) == pytest.approx(plain, rel=1e-2)


@needs_gpu
def test_files_reach_a_gpu_through_pinned_memory(tmp_path):
    folder_of_lists(tmp_path, [f"{c}/a {i}.jpg\t{c}" for c in ("cat", "dog") for i in range(5)])
    lists = image_lists(tmp_path, image_size=32)
    for x in (lists.x_lb, lists.x_ulb):
        idx = torch.tensor([3, 0, 0, 9])
        assert torch.equal(make_fetcher(x, torch.device("cuda"))(idx).cpu(), x[idx])


@needs_gpu
@pytest.mark.parametrize("how", (False, True))
def test_a_run_goes_on_on_a_gpu(tmp_path, how):
    class PowerCut(FixMatch):
        def __call__(self, step, state):
            state["n"] = state.get("n", 0) + 1
            if state["n"] == 9: raise OSError("no power")
            return super().__call__(step, state)
    PowerCut.__name__ = "FixMatch"
    go = lambda algorithm, **k: fit(digits(2, 0), load_backbone("pocket"), algorithm, schedule=Schedule(12), batch=8,
                                    evals=2, compile=how, precision="float32", progress=False, device="cuda", **k)
    whole = go(FixMatch())
    with pytest.raises(OSError): go(PowerCut(), out=tmp_path / "run", checkpoint_every=6)
    resumed = go(FixMatch(), out=tmp_path / "run", checkpoint_every=6, resume=True)
    assert resumed.record["resumes"] and [e["step"] for e in resumed.record["evaluations"]] == [6, 12]
    again = peft.trainable_state_dict(resumed.model)
    for name, v in peft.trainable_state_dict(whole.model).items():
        torch.testing.assert_close(again[name], v, rtol=1e-3, atol=1e-5)
