"Every record names the encoder that made it, and it is the one in the package; every picture has its data beside it."
from pathlib import Path
import pandas as pd
import pytest
from finessl.studies import comparison
from finessl.backbone import load_backbone
from finessl.engine.storage import read_records
from finessl.studies.statistics import paired_t_interval

root = Path(__file__).resolve().parent.parent


def test_records_were_made_with_the_pocket_in_the_package():
    pocket, seen = load_backbone("pocket").hash, 0
    for path in sorted((root / "figures" / "records").glob("*.jsonl")):
        for record in read_records(path):
            if record.get("backbone", "pocket") == "pocket" and record.get("way", "CLIP") == "CLIP":
                assert record["backbone_hash"] == pocket, f"{path.name} was made with another pocket encoder"
                seen += 1
    assert seen > 100


def test_no_run_is_recorded_twice_and_each_says_how_it_was_made():
    for path in sorted((root / "figures" / "records").glob("*.jsonl")):
        records = read_records(path)
        which = ("row", "n_per_class", "set", "start", "scale", "known", "way", "kind", "level",
                 "pool", "peft") # if a study has them
        runs = [(seed, *(str(r.get(k)) for k in which)) for r in records for seed in r.get("seeds") or [r.get("seed")]]
        assert len(set(runs)) == len(runs), path.name
        assert all(r["command"].startswith("python -m finessl") and r["versions"]["torch"] and r["device"]
                   for r in records), path.name


def test_every_picture_has_its_data_beside_it():
    pictures = [p for p in sorted((root / "figures").glob("*.png"))
                if not p.name.startswith("index-")] # the README's: its numbers stand below it
    assert pictures
    for p in pictures:
        assert p.with_suffix(".csv").exists() or p.with_suffix(".json").exists(), f"{p.name} stands without its data"


def test_a_study_that_is_recorded_says_so_and_how_to_make_it_again(capsys):
    folder = root / "figures" / "records"
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.jsonl")}
    comparison.main(["references", "constants", "more", "--records", str(folder)])
    runs = {"references": 360, "constants": 270, "more": 270}
    said = [f"all {n} runs of {study} are recorded in {folder}; --records NEW makes them again"
            for study, n in runs.items()]
    assert capsys.readouterr().out.splitlines() == said
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*.jsonl")} == before


def test_how_long_the_studies_take_is_what_the_records_say(capsys):
    for study, hours in comparison.HOURS.items():
        records = read_records(root / "figures" / "records" / f"{study}.jsonl")
        assert round(sum(r["seconds"] + r["eval_seconds"] for r in records) / 3600, 1) == hours, study
    with pytest.raises(SystemExit): comparison.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "constants 1.6" in said and f"{sum(comparison.HOURS.values()):.1f} in all" in said
    with pytest.raises(SystemExit, match="2"): comparison.main(["mre"])
    assert "unknown study 'mre'" in capsys.readouterr().err


def test_what_the_readme_says_of_photographs_is_what_the_records_say():
    from finessl.studies.photo_figures import photo_results
    df = photo_results(root / "figures" / "records")
    text = (root / "README.md").read_text(encoding="utf-8")
    for n in (1, 2, 4):
        wide = df[(df.N == n) & (df.start == "tokens")].pivot(index="seed", columns="row", values="accuracy")
        wide = wide[["FineSSL, 600 steps", "FixMatch, 600 steps"]].dropna()
        p = str(paired_t_interval(*wide.T.to_numpy())).replace("+", "")
        assert len(wide) == 10 and p in text, p
    whole = photo_results(root / "figures" / "records", "whole")
    last = whole[(whole.start == "tokens") & whole.row.str.endswith(", 15000 steps")]
    last = last.pivot(index="seed", columns="row", values="accuracy")
    p = str(paired_t_interval(*last[["FineSSL, 15000 steps", "FixMatch, 15000 steps"]].to_numpy().T)).replace("+", "")
    assert len(last) == 3 and f"by {p} points" in text, p


def test_a_finished_run_of_an_earlier_version_loads_in_todays_names(tmp_path):
    import json
    from finessl.data import digits
    from finessl.engine.runs import load_run, read_record
    from finessl.pseudo_labels import SupervisedOnly
    from finessl.training import fit
    ds = digits(1, 0)
    ds = ds._replace(x_test=ds.x_test[:20], y_test=ds.y_test[:20])
    few = dict(steps=2, batch=4, n_prompts=1, evals=1, progress=False)
    run = fit(ds, "pocket", SupervisedOnly(), out=tmp_path / "run", **few)
    path = tmp_path / "run/record.json"
    today = json.loads(path.read_text(encoding="utf-8"))
    old = path.read_text(encoding="utf-8").replace("mask_ratio", "util").replace("reset_pace_every", "clear_every")
    path.write_text(old.replace("SupervisedOnly", "LabelledOnly"), encoding="utf-8")
    assert "mask_ratio" not in path.read_text(encoding="utf-8") and read_record(tmp_path / "run") == today
    assert (load_run(tmp_path / "run").predict(ds.x_test) == run.predict(ds.x_test)).all()


def test_what_the_readme_says_of_every_algorithm_with_prompts_is_what_the_grid_recorded():
    from finessl.studies.grid import RIVALS
    from finessl.studies.statistics import holm, load_results, paired_p_value, pivot_rows
    records = root / "figures" / "records"
    grid = pd.DataFrame([{"row": r["row"], "N": r["n_per_class"], "seed": r["seed"], "accuracy": 100 * r["accuracy"]}
                         for r in read_records(records / "grid_rivals.jsonl")])
    rest = load_results(("references", "constants", "more"), records)
    rest = rest[rest.known.isna() & rest.row.isin(["FixMatch", "FineSSL"])]
    wide = pivot_rows(pd.concat([rest, grid]))
    assert len(wide) == 60 and set(RIVALS) < set(wide) and not wide.isna().any().any()
    published, text = wide.drop(columns="anchored"), (root / "README.md").read_text("utf-8")
    assert all(published.loc[n].mean().idxmax() == "FineSSL" for n in (1, 2))
    others, rows = wide.groupby("seed").mean(), [row for row in published if row != "FineSSL"]
    p = holm([paired_p_value(others["FineSSL"], others[row]) for row in rows])
    clear = {row for row, q in zip(rows, p) if q < .05}
    assert clear == {"FixMatch", "FlexMatch", "SoftMatch", "AdaMatch", "Pseudo-Label"}
    ahead = {row: paired_t_interval(others["anchored"], others[row]) for row in published}
    assert f"by {str(ahead['FineSSL']).replace('+', '')} points and of all others by more" in text
    assert min(ahead, key=lambda row: ahead[row].mean) == "FineSSL" and all(d.low > 0 for d in ahead.values())


def test_what_the_readme_says_of_training_from_scratch_is_what_was_recorded():
    runs = {(r["row"], r["n_per_class"], r["seed"]): r for r in read_records(root / "figures/records/scratch.jsonl")}
    times, gaps = [], {}
    for (row, n, seed), prompts in runs.items():
        if row != "FineSSL, prompts": continue
        scratch, goal = runs["FixMatch, from scratch", n, seed], prompts["evaluations"][-1]["accuracy"]
        work = lambda r, step: step * r["flops_per_step"] / (200 * prompts["flops_per_step"])
        there = [e["step"] for e in scratch["evaluations"] if e["accuracy"] >= goal]
        times.append(work(scratch, there[0]) if there else None)
        gaps[n, seed] = 100 * (goal - scratch["evaluations"][-1]["accuracy"])
    reached, text = [t for t in times if t], (root / "README.md").read_text("utf-8")
    assert (len(reached), len(times)) == (4, 9) and round(min(reached), 1) == 6.5 and round(max(reached)) == 20
    assert [round(gaps[1, s]) for s in (0, 1, 2)] == [3, 20, 17] and round(work(scratch, 3000), 1) == 21.8
    assert "in four of nine cases (three splits, three label counts), after 6.5 to 20 times the operations" in text
    assert "not within 21.8 times" in text and "by 17 to 20 points on two splits and by 3 on the third" in text


def test_what_the_readme_says_of_long_tails_is_what_was_recorded():
    lines = [{k: r[k] for k in ("peft", "pool", "row", "seed")} | {"accuracy": 100 * r["accuracy"]}
             for r in read_records(root / "figures/records/pools.jsonl")]
    both = pd.DataFrame(lines).pivot(index=["peft", "pool", "seed"], columns="row", values="accuracy")
    gain = lambda pool, a, b, peft="linear": paired_t_interval(both.loc[peft, pool][a], both.loc[peft, pool][b])
    wide = both.loc["linear"]
    tails, text = ("long tail, 10", "long tail, 20"), (root / "README.md").read_text("utf-8")
    said = " and ".join(str(gain(pool, "FineSSL", "labelled-only")).replace("+", "") for pool in tails)
    assert f"FixMatch gains nothing over the labelled images alone, FineSSL {said} points" in text
    plain = lambda d: str(d).replace("[-", "[−").replace("+", "")
    rival = " and ".join(plain(gain(pool, "DebiasPL", "labelled-only")) for pool in tails)
    assert f"DebiasPL {rival}; FineSSL with prompts" in text
    prompted = [plain(gain(pool, "FineSSL", "labelled-only", "vpt")) for pool in tails]
    assert f"with prompts (ten splits) only {' and '.join(prompted)}" in text
    for pool in tails:
        assert not gain(pool, "FixMatch", "labelled-only").clear
        assert not any(gain(pool, "FineSSL", "SoftMatch", peft).clear for peft in ("linear", "vpt"))
    cost = (wide.loc["open"] - wide.loc["open, unknown left out"]).mean().drop("labelled-only")
    assert cost.between(-2.4, -1.9).all() and "cost every method that uses the pool about two points" in text


def test_what_the_readme_says_of_fine_tuning_is_what_the_grid_recorded():
    runs = [r for r in read_records(root / "figures/records/grid_peft.jsonl") if r["n_per_class"] != 2]
    lines = [{"way": r["row"].rsplit(", ", 1)[0], "method": r["row"].rsplit(", ", 1)[1], "seed": r["seed"],
              "accuracy": 100 * r["accuracy"]} for r in runs]
    mean = pd.DataFrame(lines).pivot_table(index=["way", "seed"], columns="method", values="accuracy") # over N
    gain = {way: paired_t_interval(t["FineSSL"], t["FixMatch"]) for way, t in mean.groupby("way")}
    assert len(gain) == 12 and sum(d.low > 0 for d in gain.values()) == 8 and gain["full"].high < 0
    text, minus = (root / "README.md").read_text("utf-8"), lambda d: str(d).replace("-", "−").replace(", +", ", ")
    assert f"(0.1: {minus(gain['vpt'])} points" in text
    ours = mean["FineSSL"]
    assert f"gains {str(paired_t_interval(ours['partial'], ours['vpt'])).replace('+', '')} points over prompts" in text
