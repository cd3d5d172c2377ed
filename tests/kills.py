"""Kill a training run again and again, go on each time, and compare the end with that of a run that nobody killed.

    python tests/kills.py --out figures/records/kills.json

A minute or two on a CPU. The moments are drawn from --seed: a step, and milliseconds after its checkpoint. Every other
kill waits for the next
half-written file, so that it falls while a checkpoint is written. Every run is a process of its own, forked from
one that has imported torch.
Exit code 1 where weights or record differ in anything but times and resumes.
"""
import argparse, hashlib, multiprocessing, os, random, signal, sys, tempfile, time
from pathlib import Path

# before torch: a process without threads, and without a GPU, can be forked
os.environ |= {"OMP_NUM_THREADS": "1", "FINESSL_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}

from finessl.cli import main as cli_main
from finessl.engine.environment import environment
from finessl.engine.checkpoint import latest_checkpoint
from finessl.engine.storage import write_json
from test_training import outcome, same_record

TRAIN = ("train --data digits --per-class 1 --steps {steps} --batch 4 --prompts 8 --evals 2 --checkpoint-every 1 "
         "--quiet --out run")


def command_line(command, where):
    os.chdir(where)
    sys.exit(cli_main.main(command.split()))


def start(command, where):
    p = multiprocessing.get_context("fork").Process(target=command_line, args=(command, where))
    p.start()
    return p


def half_written(folder: Path): return sorted(f.name.split(".", 1)[1].rsplit(".", 2)[0] for f in folder.glob(".*.tmp"))


def until(met, process, pause=.002):
    "Wait until `met()`, or until the process ends."
    while process.exitcode is None and not met(): time.sleep(pause)


def killed(process, folder: Path, step: int, milliseconds: float, aimed: bool) -> dict:
    "SIGKILL a run soon after a step; what it left."
    until(lambda: (c := latest_checkpoint(folder)) is not None and c["step"] >= step, process, .02)
    time.sleep(milliseconds / 1e3)
    if aimed: until(lambda: next(folder.glob(".*.tmp"), None), process, 0)
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise SystemExit(f"the run ended by itself before it was killed at step {step}: exit code {process.exitcode}")
    return {"after_step": step, "milliseconds": round(milliseconds, 3), "aimed": aimed,
            "half_written": half_written(folder)}


def finished(command, where):
    "Weights and record of a run that ends."
    p = start(command, where)
    p.join()
    if p.exitcode: raise SystemExit(f"exit code {p.exitcode}: finessl {command}")
    return outcome(where / "run")


def same(a: dict, b: dict) -> bool:
    try: same_record(a, b)
    except AssertionError: return False
    return True


def experiment(kills: int, seed: int, steps: int) -> dict:
    "The record."
    chance, command, moments = random.Random(seed), TRAIN.format(steps=steps), []
    # imports what a run imports late
    with tempfile.TemporaryDirectory() as d:
        cli_main.main(TRAIN.format(steps=1).replace("--out run", f"--out {d}/run").split())
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        for k, step in enumerate(sorted(chance.sample(range(1, steps - 5), kills))):
            p = start(command + " --resume" * (k > 0), b)
            moments.append(killed(p, Path(b, "run"), step, chance.uniform(0, 30), k % 2 == 1))
            print(f"killed {k + 1}: {moments[-1]}", flush=True)
        broken, whole = finished(f"{command} --resume", Path(b)), finished(command, Path(a))
    resumes = [r["step"] for r in broken[1]["resumes"]]
    sha256 = {name: hashlib.sha256(o[0]).hexdigest() for name, o in (("unbroken", whole), ("killed", broken))}
    return {"command": f"finessl {command}", "steps": steps, "seed": seed,
            "kills": [m | {"resumed_from": r} for m, r in zip(moments, resumes)], "resumes": len(resumes),
            "half_written": sum(bool(m["half_written"]) for m in moments), "sha256": sha256,
            "equal": sha256["unbroken"] == sha256["killed"],
            "record_equal": same(broken[1], whole[1]),
            "accuracy": whole[1]["evaluations"][-1]["accuracy"]} | environment("cpu")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--kills", type=int, default=20)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps", type=int, default=200)
    ap.add_argument("--out", type=Path, help="where the record goes")
    args = ap.parse_args()
    result = experiment(args.kills, args.seed, args.steps)
    if args.out: write_json(args.out, result)
    print(f"{args.kills} kills, {result['half_written']} while a file was written, {result['resumes']} resumes; "
          f"weights equal: {result['equal']}, record equal: {result['record_equal']}")
    sys.exit(0 if result["equal"] and result["record_equal"] else 1)
