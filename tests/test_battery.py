"The battery: what is planned, a real cell of it, and what it refuses."
import json
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from finessl.engine.storage import read_records
from finessl.studies import battery
from finessl.studies.battery_sets import FOLDERS, LABELS, SETS, folder_parts


def test_every_cell_is_planned_once_and_the_main_rows_come_first():
    jobs = battery.plan_runs()
    keys = [battery.run_key(j) for j in jobs]
    assert len(set(keys)) == len(keys) == len(SETS) * len(LABELS) * len(battery.ROWS)
    assert {j["row"] for j in jobs[:6 * len(SETS) * len(LABELS)]} == {
        battery.PROBE, battery.ALONE, battery.CANDIDATE, "FixMatch", "FineSSL, γ = 1", "FineSSL, γ = 3"}
    assert {len(j["seeds"]) for j in jobs} == {20} and set(battery.RIVALS) < set(battery.ROWS)
    some = battery.plan_runs(("digits",), (1,), splits=range(3), prompts=True)
    assert [j["seeds"] for j in some] == [(s,) for s in range(3) for _ in battery.PROMPT_ROWS]


@pytest.mark.parametrize("name", ["digits, long tail", pytest.param("digits, open", marks=pytest.mark.slow)])
def test_a_cell_is_recorded_and_made_again_to_the_bit(tmp_path, name):
    where = {"data": None, "checkpoint": None, "cache": None}
    for row in (battery.PROBE, battery.CANDIDATE):
        job, = battery.plan_runs((name,), (1,), (row,), range(100, 102))
        first, again = (battery.run_job(job | where) for _ in range(2))
        assert first["accuracy"] == again["accuracy"] and list(first["accuracy"]) == [name]
        assert battery.run_key(json.loads(json.dumps(first))) == battery.run_key(job)
        assert all(70 < a < 100 for a in first["accuracy"][name]) and first["seeds"] == [100, 101]
        path = tmp_path / f"{row}.jsonl"
        path.write_text(json.dumps(first) + "\n", encoding="utf-8")
        assert len(battery.load_battery(path)) == 2


def test_the_scans_have_two_test_parts_and_no_image_twice(tmp_path, monkeypatch):
    images = load_digits().images
    for part, n in (("train", 7), ("test", 3)):
        for c in "ab":
            folder = tmp_path / "mri" / part / c
            folder.mkdir(parents=True)
            for i in range(n):
                image = images[20 * (part == "test") + 50 * (c == "b") + i] * 15.9
                Image.fromarray(image.astype("uint8")).save(folder / f"{i}.png")
    monkeypatch.setattr("finessl.studies.battery_sets.FOLDERS", FOLDERS | {"mri": 4})
    ds, parts = folder_parts("mri", tmp_path)
    assert len(ds.x_ulb) == 8 and ds.y_ulb.bincount().tolist() == [4, 4]
    files = [*ds.x_ulb.files, *ds.x_test.files]
    assert len(set(files)) == len(files) == 20 and list(parts) == ["mri", "mri, published test"]
    published = [Path(f).parent.parent.name for f in ds.x_test.files[parts["mri, published test"]]]
    assert published == ["test"] * 6 and len(ds.x_test.files[parts["mri"]]) == 6


def test_the_command_says_what_it_lacks(capsys, tmp_path):
    for argv, words in ((["--sets", "mri"], "mri needs --data and --checkpoint"),
                        (["--sets", "birds"], "invalid choice"),
                        (["--sets", "mri", "--data", str(tmp_path), "--checkpoint", "x"], "holds no folder mri")):
        with pytest.raises(SystemExit, match="2"): battery.main(argv)
        assert words in capsys.readouterr().err


def test_the_table_and_its_picture_say_what_the_splits_do():
    import matplotlib.pyplot as plt
    import pandas as pd
    cells = (("digits", 1, 2.), ("digits", 2, 2.), ("mri", 1, -8.))
    rows = {battery.ALONE: 0, "FixMatch": 1}
    df = pd.DataFrame([{"set": name, "N": n, "row": row, "seed": s, "accuracy": 60. + s + part * (gain + .1 * s)}
                       for name, n, gain in cells for s in range(5) for row, part in rows.items()])
    means = battery.cell_means(df)
    assert list(means.columns) == [c[:2] for c in cells] and list(means.index) == [battery.ALONE, "FixMatch"]
    worse = battery.clearly_below(battery.differences(df, "FixMatch", (battery.ALONE,)))
    assert list(zip(worse["set"], worse.N)) == [("mri", 1)] and worse["mean"].round(1).tolist() == [-7.8]
    assert round(battery.mean_difference(df, "FixMatch", battery.ALONE).mean, 2) == -1.13
    fig, ax = plt.subplots()
    battery.plot_battery(df, ("FixMatch",), ax)
    assert [t.get_text() for t in ax.texts if "×" in t.get_text()] == ["−7.8×"]
    plt.close(fig)


def test_what_the_readme_says_of_the_battery_is_what_the_records_say():
    root = Path(__file__).resolve().parent.parent
    df = battery.load_battery(root / "figures/records/battery.jsonl")
    text = (root / "README.md").read_text(encoding="utf-8")
    below = {row: int((battery.differences(df, row, (battery.ALONE,))["mean"] < 0).sum())
             for row in (battery.CANDIDATE, "FixMatch", "FineSSL, γ = 3")}
    cells = len(df.groupby(["set", "N"]))
    assert f"in {below[battery.CANDIDATE]} of {cells} cells, FixMatch in {below['FixMatch']} and " in text, below
    assert f"FineSSL with γ = 3 in {below['FineSSL, γ = 3']};" in text, below
    ahead = str(battery.mean_difference(df, battery.CANDIDATE, "FineSSL, γ = 3")).replace("+", "")
    assert f"ahead of FineSSL by {ahead} points" in text, ahead
    centred = str(battery.mean_difference(df, "FineSSL, γ = 3, centred", "FineSSL, γ = 3")).replace("+", "")
    assert f"gain {centred} points over the battery" in text, centred
    assert not len(battery.clearly_below(battery.differences(df, battery.CANDIDATE, (battery.ALONE, battery.PROBE))))


def test_what_the_readme_says_of_faded_digits_is_what_the_records_say():
    root = Path(__file__).resolve().parent.parent
    last = {r["row"]: sum(r["accuracy"]) / len(r["accuracy"]) for r in read_records(root / "figures/records/far.jsonl")
            if (r["kind"], r["level"], r["n_per_class"]) == ("contrast", 4, 4)}
    assert 10 < last["FineSSL"] < 15 and round(last["FineSSL, centred"]) in (68, 69), last
    assert "take it back to 68 of 100" in (root / "README.md").read_text(encoding="utf-8")
