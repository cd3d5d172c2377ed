"The study on photographs runs: on a folder of images, every kind of run, with an encoder of random weights."
import json
import numpy as np
import torch
from PIL import Image
from finessl.studies import photos
from finessl.checks.backbone import tiny_encoder
from finessl.engine.schedule import Schedule


def folder(root, classes=3, train=5, test=4):
    "Small noisy pictures, each class with its own colour."
    sample_params = np.random.RandomState(0)
    for part, n in (("train", train), ("test", test)):
        for k in range(classes):
            (root / part / f"class{k}").mkdir(parents=True)
            for i in range(n):
                x = sample_params.randint(0, 80, (32, 32, 3)); x[..., k] += 150
                Image.fromarray(x.astype("uint8")).save(root / part / f"class{k}" / f"{i}.png")
    return root


def test_a_smaller_number_of_labels_lies_inside_a_larger_one_and_both_in_the_pool(tmp_path):
    one, two = (photos.photo_split(folder(tmp_path / str(n)), n, seed=3, pool=4, test=2) for n in (1, 2))
    assert len(one.x_ulb) == 12 and len(one.x_test) == 6 and len(two.x_lb) == 6
    for ds in (one, two): assert torch.equal(ds.x_ulb[ds.split.idx_lb], ds.x_lb)
    assert {x.numpy().tobytes() for x in one.x_lb} <= {x.numpy().tobytes() for x in two.x_lb}


def test_every_kind_of_run_gives_a_record_that_json_can_write(tmp_path, monkeypatch):
    for name in ("SCHEDULE", "LONGER"): monkeypatch.setattr(photos, name, Schedule(3))
    monkeypatch.setattr(photos, "PROMPTS", 2)
    dataset, encoder = photos.photo_split(folder(tmp_path), 1, seed=0, pool=4, test=3), tiny_encoder("timm")
    jobs = {(j["row"], j["start"]): j
            for j in photos.plan_runs((0,), ())
            if j["n_per_class"] == (1 if j["row"] in ("encoder", *photos.methods(1)) else 4)}
    assert len(jobs) == 1 + 3 * 2 + len(photos.ABLATIONS) + 3   # with both starts, and longer
    for (row, start), job in jobs.items():
        record = json.loads(json.dumps(photos.run_photo(job, dataset, encoder)))
        assert (record["row"], record["start"]) == (row, start)
        if row == "encoder": assert set(record["look"]) == {"none", "random", "tokens"}
        else:
            assert record["evaluations"][-1]["step"] == 3 and len(record["pool"]["right"]) == len(dataset.x_ulb)
            right = record["pool"]["right"].count("1") / len(dataset.x_ulb)
            assert abs(right - record["evaluations"][-1]["pool_accuracy"]) < 1e-6, row


def test_the_runs_of_the_papers_length_differ_in_what_they_say_alone(tmp_path, monkeypatch):
    assert photos.plan_full_runs()[0]["schedule"] == Schedule(15_000, lr=.03, decay="epoch", reset_pace_every=500)
    assert len({(j["row"], j["start"], j["n_per_class"], j["seed"])
                for j in photos.plan_full_runs()}) == len(photos.plan_full_runs()) == 27
    for name, steps in (("PAPER_SCHEDULE", 4), ("LONGER", 2)): monkeypatch.setattr(photos, name, Schedule(steps))
    monkeypatch.setattr(photos, "PROMPTS", 2)
    dataset, encoder = photos.photo_split(folder(tmp_path), 1, seed=0, pool=4, test=3), tiny_encoder("timm")
    made = [json.loads(json.dumps(photos.run_photo(job, dataset, encoder))) for job in photos.plan_full_runs((0,), 1)]
    assert all(r["study"] == "whole" and "--whole" in r["command"] and "pool" not in r for r in made)
    runs = {(r["row"], r["start"]): r for r in made if r["row"] != "encoder"}
    assert len(runs) == 8 and {len(r["evaluations"]) for r in runs.values()} == {1, 2}
    alike = lambda r: {k: v for k,
                       v in r.items()
                       if k in ("dataset", "split", "batch", "mu", "n_prompts", "lr", "precision", "init_seed",
                                "labelled", "views")}
    assert all(alike(r) == alike(made[0]) for r in runs.values())
    for (row, start), r in runs.items():
        assert r["prompt_init"] == start
        assert r["schedule"]["steps"] == int(row.split()[-2])
        assert r["algorithm"]["name"] in row.replace("labelled-only", "SupervisedOnly")


def test_gamma_rises_to_its_value():
    rising = photos.GammaWarmup(rise=2)
    z, a = (torch.randn(4, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    step = photos_step(z, a)
    state = rising.init(10, 3)
    first, second, third = (float(rising(step, state)[0]) for _ in range(3))
    plain = lambda gamma: float(photos.FineSSL(gamma=gamma)(step, photos.FineSSL().init(10, 3))[0])
    assert abs(first - plain(0.)) < 1e-5                      # the pace table is empty at the first step of both
    assert first != second != third


def photos_step(z, a):
    "A step of four labelled and four unlabelled images."
    from finessl.pseudo_labels import BatchLogits
    return BatchLogits(z, torch.tensor([0, 1, 2, 0]), z, torch.cat([z, z]), a, a, torch.cat([a, a]), torch.arange(4))
