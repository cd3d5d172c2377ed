"A run of each study: its record is JSON and answers its job. What takes long: `pytest -m slow tests/test_studies.py`."
import pytest
import torch
from finessl.engine.storage import encode_json
from finessl.pocket.pretrain import Recipe
from finessl.studies import far, grid, pretraining, sweeps

CLOCKS = ("seconds", "commit", "dirty")


def made(study, job):
    record = study.run_job(job)
    assert study.run_key(record) == study.run_key(job) and encode_json(record)
    return {k: v for k, v in record.items() if k not in CLOCKS}


@pytest.mark.slow
def test_far_and_what_features_share(monkeypatch):
    monkeypatch.setattr(far, "SPLITS", (0,))
    jobs = [j for j in far.plan_runs() if (j["kind"], j["level"], j["n_per_class"]) == ("contrast", 4, 1)]
    done = {j["row"]: made(far, j) for j in jobs if j["row"] in ("FineSSL", "FineSSL, centred", "linear probe")}
    assert made(far, jobs[0]) == made(far, jobs[0])
    assert all(r["common"] > .9 for r in done.values())
    assert done["FineSSL, centred"]["accuracy"][0] > done["FineSSL"]["accuracy"][0] + 10


def test_sweeps_change_one_constant(monkeypatch):
    jobs = {(j["row"], j["n_per_class"]): j | {"seeds": [0]} for j in sweeps.plan_runs() if j["n_per_class"] == 1}
    usual, other = made(sweeps, jobs["lab", 1]), made(sweeps, jobs["gamma 0.3", 1])
    differ = {k for k, v in usual["algorithm"].items() if other["algorithm"][k] != v}
    assert differ == {"gamma"} and other["algorithm"]["gamma"] == .3
    short = made(sweeps, jobs["steps 50", 1])
    assert short["schedule"]["steps"] == 50 and short["peft"] == "vpt"


@pytest.mark.slow
def test_other_pretraining_is_made_kept_and_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "SPLITS", (0,))
    short = lambda way, recipe=None: real(way, Recipe(steps=3, batch=32))
    real = pretraining.pretrain_way
    monkeypatch.setattr(pretraining, "pretrain_way", short)
    [job] = [j for j in pretraining.plan_encoders(tmp_path) if j["way"] == "SimCLR"]
    first, again = pretraining.train_encoder(job), pretraining.train_encoder(job)
    assert first["sha256"] == again["sha256"] and pretraining.encoder_key(first) == pretraining.encoder_key(job)
    [probe] = [j for j in pretraining.plan_runs(tmp_path)
               if (j["way"], j["row"], j["n_per_class"]) == ("SimCLR", "linear probe", 1)]
    record = made(pretraining, probe)
    assert abs(sum(record["mean_shares"]) - 1) < .01 and 0 <= record["missing"][0] < 10
    encoder = pretraining.way_lab("SimCLR", str(tmp_path)).encoder
    shipped = pretraining.load_backbone("pocket")
    assert not torch.equal(encoder.model.visual.conv1.weight, shipped.model.visual.conv1.weight)


def test_the_grid_holds_each_row_on_each_split(tmp_path):
    for part in ("rivals", "lr", "heads"):
        jobs = grid.plan_runs(part, tmp_path)
        assert len({grid.run_key(j) for j in jobs}) == len(jobs)
