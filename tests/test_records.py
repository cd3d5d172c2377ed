"Every record names the encoder that made it, and it is the one in the package; every picture has its data beside it."
from pathlib import Path
from finessl.backbone import load_backbone
from finessl.training import read_records

root = Path(__file__).resolve().parent.parent


def test_records_were_made_with_the_pocket_in_the_package():
    pocket, seen = load_backbone("pocket").hash, 0
    for path in sorted((root / "figures" / "records").glob("*.jsonl")):
        for record in read_records(path):
            if record["backbone"] == "pocket":
                assert record["backbone_hash"] == pocket, f"{path.name} was made with another pocket encoder"
                seen += 1
    assert seen > 100


def test_no_run_is_recorded_twice_and_each_says_how_it_was_made():
    for path in sorted((root / "figures" / "records").glob("*.jsonl")):
        records = read_records(path)
        runs = [(r["row"], r.get("start"), r["n_per_class"], r["seed"], r["known"]) for r in records]
        assert len(set(runs)) == len(runs), path.name
        assert all(r["command"].startswith("python -m finessl") and r["versions"]["torch"] and r["device"] for r in records), path.name


def test_every_picture_has_its_data_beside_it():
    pictures = sorted((root / "figures").glob("*.png"))
    assert pictures
    for p in pictures: assert p.with_suffix(".csv").exists() or p.with_suffix(".json").exists(), f"{p.name} stands without its data"
