"""Make recorded runs again, compare every evaluation to the bit: `python tests/reproduce.py [--photos DATA WEIGHTS]`.

One thread, as the records were made; the runs are named below, one or more from each file of `figures/records`
that holds runs. `--photos` adds runs on CIFAR-10 as image files (minutes each), `--whole` one on all of it.
Those are in bf16: minutes each on a processor with bf16 instructions, hours on one without.
"""
import argparse, sys
from pathlib import Path
import torch
from finessl.engine.old_records import read_runs, upgrade_record
from finessl.lab import Lab, linear_probe, raw_probe, zero_shot
from finessl.studies import comparison, photos

records = Path(__file__).resolve().parent.parent / "figures/records"
RUNS = {  # study -> (row, N, seed)
    "constants": [("FineSSL", 1, 0), ("− margin", 4, 3), ("margins permuted", 2, 7)],
    "more": [("FixMatch", 2, 12), ("FineSSL (paper)", 1, 19)],
    "open": [("labelled-only", 1, 5), ("− reweighting", 2, 8)],
    "tune": [("FineSSL #1", 4, 102)],
    "tuned": [("FixMatch", 1, 6)],
    "differences": [("smoothing over all C", 1, 2), ("labelled images dropped", 1, 4)],
    "map": [("γ=10.0 lr=0.03", 1, 101)],
}
REFERENCES = [(f, n, s, known) for f in (raw_probe, zero_shot, linear_probe)
              for n, s, known in ((1, 0, None), (4, 9, 6))]
PHOTOS = [("encoder", None, 4, 0), ("FineSSL", "tokens", 4, 0), ("FixMatch", "random", 1, 0)] # row, start, N, seed
TIMES = ("seconds", "eval_seconds", "steps_per_s")


def results(record): # what a run measured, clocks apart
    one = {k: record.get(k) for k in ("evaluations", "confusion", "per_class_accuracy", "look")}
    one["evaluations"] = [{k: v for k, v in e.items() if k not in TIMES} for e in one["evaluations"] or ()]
    return one


def differences(old, new, at=""): # names of what differs, with both values where they are numbers
    if isinstance(old, dict) and isinstance(new, dict):
        # later versions have more to say
        return [d for k in sorted(old) for d in differences(old[k], new.get(k), f"{at}.{k}" if at else k)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, pair in enumerate(zip(old, new)) for d in differences(*pair, f"{at}[{i}]")]
    return [] if old == new else [(at, old, new)]


def rounded(old, new): # may another processor's order of additions be the reason?
    return isinstance(old, float) and isinstance(new, float) and abs(old - new) <= 2e-5 * max(1, abs(old))


def compare(study, name, old, new): # 0: equal to the bit; 1: but for rounding; 2: not
    found = differences(results(old), results(upgrade_record(new)))
    grade = 0 if not found else 1 if all(rounded(a, b) for _, a, b in found) else 2
    said = "; ".join(f"{at} {a} -> {b}" for at, a, b in found[:3])
    kind = ('equal', 'rounding', 'DIFFERS')[grade]
    print(f"{study}: {', '.join(map(str, name))}: {kind} {said}".rstrip(), flush=True)
    return grade


def of_comparison():
    for study, names in RUNS.items():
        jobs = {comparison.run_key(j): j for j in comparison.plan_runs(study, records)}
        old = {comparison.run_key(r): r for r in read_runs(records / f"{study}.jsonl")}
        for name in names: yield study, name, old[name], comparison.run_job(jobs[name])


def of_references():
    lab, old = Lab(n_weak=1, n_strong=1), read_runs(records / "references.jsonl")
    for f, n, seed, known in REFERENCES:
        row = next(k for k, v in comparison.REFERENCES.items() if v is f)
        [mine] = [r for r in old if (r["row"], r["n_per_class"], r["seed"], r["known"]) == (row, n, seed, known)]
        yield "references", (row, n, seed, known), mine, f(lab, n, seed, known).record


def of_photos(data, checkpoint, names, whole=False):
    study = "whole" if whole else "photos"
    old = {photos.run_key(r): r for r in read_runs(records / f"{study}.jsonl")}
    jobs = {photos.run_key(j): j for j in (photos.plan_full_runs if whole else photos.plan_runs)()}
    for name in names:
        yield study, name, old[name], photos.run_job(jobs[name] | {"data": data, "checkpoint": checkpoint})


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--photos", nargs=2, metavar=("DATA", "WEIGHTS"),
                    help="CIFAR-10 as images, and the ViT-Ti's weights")
    ap.add_argument("--whole", action="store_true", help="with --photos: one run on all of CIFAR-10 too")
    args = ap.parse_args()
    torch.set_num_threads(1)
    if args.photos:
        found = [compare(*one) for one in of_photos(*args.photos, PHOTOS)]
        whole = [("labelled-only, 600 steps", "tokens", 4, 0)] if args.whole else []
        found += [compare(*one) for one in of_photos(*args.photos, whole, True)]
    else: found = [compare(*one) for one in (*of_references(), *of_comparison())]
    print(f"{found.count(0)} of {len(found)} equal to the bit, {found.count(1)} but for rounding, {found.count(2)} not")
    sys.exit(2 in found)
