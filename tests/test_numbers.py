"Absurd numbers are refused at once with their limit; a launcher's variables are meant, harmless, or one sentence."
import decimal, resource, threading, time
import pytest
import torch
from finessl.algorithms import FineSSL
from finessl.backbone import load_backbone
from finessl.cli.main import main
from finessl.data import digits
from finessl.engine.errors import MOST, SEEDS, BackboneError, UsageError
from finessl.engine.images import ImageFiles
from finessl.engine.processes import ProcessGroup, said_if_it_lasts
from finessl.pseudo_labels import FixMatch
from finessl.training import fit

DATA = digits(1, 0)
HUGE = (10**9 + 1, 2**64, 10**19, 10**400, -1, -10**30)


@pytest.mark.parametrize("name", ["batch", "mu", "evals", "n_prompts", "steps", "accumulate", "checkpoint_every",
                                  "prefetch_depth", "reset_pace_every"])
def test_python_refuses_what_no_machine_serves(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in HUGE:
        start = time.monotonic()
        with pytest.raises(ValueError, match=f"{name} must be a whole number from . to {MOST[name]}, got"):
            fit(DATA, "pocket", FineSSL(), **{name: value})
        assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000 # KiB


@pytest.mark.parametrize("option", ["batch", "mu", "evals", "prompts", "steps", "accumulate", "processes",
                                    "checkpoint-every", "image-size", "seed", "init-seed", "split-seed"])
def test_the_command_line_refuses_it_without_torch(option, capsys, tmp_path):
    least = SEEDS[0] if "seed" in option else 1
    for value in HUGE:
        if least <= value <= SEEDS[1] and "seed" in option: continue
        code = main(["train", "--data", "digits", "--per-class", "1", "--out", str(tmp_path / "r"),
                     f"--{option}={value}"])
        said = capsys.readouterr().err
        assert code == 2 and f"--{option}: must be" in said and said.count("\n") == 1, said
    assert not (tmp_path / "r").exists()


def test_many_small_factors_are_too_many_together():
    with pytest.raises(ValueError, match="batch 1024, mu 1000 and 2 strong views make 3073024 images a step"):
        fit(DATA, "pocket", FineSSL(), batch=1024, mu=1000)
    with pytest.raises(ValueError, match="and 1000000000 strong views make"):
        fit(DATA, "pocket", FixMatch(n_strong=10**9))


@pytest.mark.parametrize("seed", [*SEEDS, -1, 2**63])
def test_every_seed_within_the_limits_trains(seed):
    small = DATA._replace(x_ulb=DATA.x_ulb[:10], y_ulb=DATA.y_ulb[:10], x_test=DATA.x_test[:4], y_test=DATA.y_test[:4],
                          split=None)
    assert fit(small, "pocket", FineSSL(), seed=seed, steps=1, evals=1, batch=2, progress=False).record["seed"] == seed


def test_momentum_and_weight_decay_are_numbers():
    for how in (dict(momentum=float("nan")), dict(momentum=2.), dict(weight_decay=-1.), dict(weight_decay="a")):
        with pytest.raises(ValueError, match=next(iter(how))): fit(DATA, "pocket", FineSSL(), **how)


def test_images_of_a_mile_are_refused():
    with pytest.raises(BackboneError, match="at most 8192 pixels"): load_backbone("pocket", image_size=8 * 10**9)


@pytest.mark.parametrize("name", ["lora:99999", "adapter:" + "9" * 5000])
def test_sizes_of_adapters_have_a_limit(name):
    with pytest.raises(ValueError, match="must be a whole number from 1 to 16384"):
        fit(DATA, "pocket", FineSSL(), peft=name)


def test_world_size_without_the_rest_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="RANK is not set, .* WORLD_SIZE=4 says"): ProcessGroup("cpu")
    assert main(["train", "--data", "digits", "--per-class", "1", "--out", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err
    assert "RANK is not set" in said and "unset WORLD_SIZE" in said and said.count("\n") == 1
    assert main(["train", "--data", "nowhere", "--out", str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("left_over", [{"LOCAL_RANK": "1"}, {"RANK": ""}, {"RANK": "3", "LOCAL_WORLD_SIZE": "4"},
                                       {"WORLD_SIZE": "1", "RANK": "2", "LOCAL_RANK": "2"}])
def test_what_another_launcher_left_over_silences_nothing(left_over, monkeypatch, capsys, tmp_path):
    for name, value in left_over.items(): monkeypatch.setenv(name, value)
    group = ProcessGroup("cpu")
    assert (group.rank, group.world_size, group.is_main) == (0, 1, True)
    assert main(["train", "--data", "nowhere", "--out", str(tmp_path / "r")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["train", "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_who_waits_for_others_says_so(capsys):
    before = threading.active_count()
    with said_if_it_lasts(0, 3, 600., seconds=.01): time.sleep(.3)
    said = capsys.readouterr().err
    assert "process 0 of 3 waits up to 600 s" in said and "WORLD_SIZE" in said
    with said_if_it_lasts(1, 3, 600., seconds=30): pass
    assert capsys.readouterr().err == "" and threading.active_count() <= before + 1


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "checkpoint_minutes"])
@pytest.mark.parametrize("value", [True, 10**400, float("nan"), decimal.Decimal("0.1"), "0.1", torch.tensor([.1, .2])],
                         ids=lambda v: str(v)[:12])
def test_a_number_is_one_number(name, value):
    with pytest.raises(ValueError, match=f"{name} must"): fit(DATA, "pocket", FineSSL(), **{name: value})
    with pytest.raises(ValueError, match="gamma must"): FineSSL(gamma=value)


@pytest.mark.parametrize("wrong", [5, (1,), (1, 2, 3), "ab", (True, 1), (10**9, 1)], ids=str)
def test_stored_views_are_two_numbers(wrong):
    with pytest.raises(ValueError, match="stored_views"):
        fit(DATA, "pocket", FineSSL(), peft="linear", stored_views=wrong)


@pytest.mark.parametrize("device", ["tpu", 5.5], ids=str)
def test_a_device_is_one_that_computes(device, monkeypatch):
    with pytest.raises(ValueError, match="device must be one that computes"):
        fit(DATA, "pocket", FineSSL(), device=device)
    monkeypatch.setenv("FINESSL_DEVICE", "tpu")
    with pytest.raises(ValueError, match="got 'tpu' from FINESSL_DEVICE"): ProcessGroup()


@pytest.mark.parametrize("out", ["", " ", "a\0b", "~nobody-is-called-this/x"])
def test_a_run_needs_a_folder_with_a_name(out):
    with pytest.raises(ValueError, match="name"): fit(DATA, "pocket", FineSSL(), out=out)


@pytest.mark.parametrize("size", [0, True, 10**6, "24"], ids=str)
def test_sizes_of_images_have_a_limit(size):
    with pytest.raises(ValueError, match="size must be a whole number from 1 to 8192"): ImageFiles([], size)
