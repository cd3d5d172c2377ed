"""Stop training on image files by every signal, many times each, in one process and in two, and go on each time.

    python tests/signals.py --out figures/records/signals.json     # about an hour on two cores

Each stop is one signal at a drawn moment (a step, and milliseconds after its checkpoint), to a process drawn from all
of the run's. At the end the weights and the record are those of a run that nobody stopped.
Exit code 1 where they differ in anything but times and resumes.
"""
import argparse, os, random, signal, sys, tempfile, time
from pathlib import Path
import kills                    # before torch: it chooses one thread, and no GPU
from finessl.cli import main as cli_main
from finessl.engine.checkpoint import latest_checkpoint
from finessl.engine.environment import environment
from finessl.engine.storage import write_json

SIGNALS = ("KILL", "INT", "TERM", "HUP", "USR1", "XCPU")
TRAIN = ("train --data photos --backbone pocket --peft vpt --prompts 8 --steps {steps} --batch 4 --mu 2 --evals 2 "
         "--checkpoint-every 1 --processes {processes} --quiet --out run")
PATIENCE = 120                  # seconds after which a process that was asked to stop counts as one that hangs


def write_photos(folder: Path):
    "Real digits as PNG files: 3 classes, 6 labelled and 20 test images each, 200 without a label."
    from PIL import Image
    from sklearn.datasets import load_digits
    bunch = load_digits()
    def save(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype("uint8")).save(path)
    for c, name in enumerate(("zero", "one", "two")):
        for k, image in enumerate(bunch.images[bunch.target == c][:26]):
            save(folder / ("train" if k < 6 else "test") / name / f"{k}.png", image)
    for k, image in enumerate(bunch.images[-200:]): save(folder / "unlabelled" / f"{k}.png", image)


def run_command(command, where):
    for name in SIGNALS[2:]: signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_DFL) # a parent may ignore them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kills.command_line(command, where)


def start(command, where):
    p = kills.multiprocessing.get_context("fork").Process(target=run_command, args=(command, where))
    p.start()
    return p


def members(pid: int) -> list: # process ids that are alive
    "A process and what it has started, and what those have started."
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: name, _, rest = stat.read_text().rpartition(")")
        except OSError: continue
        state, parent = rest.split()[:2]
        if state not in "ZX": parents[int(name.split()[0])] = int(parent)
    found = [pid] if pid in parents else []
    for one in found: found += sorted(p for p, parent in parents.items() if parent == one)
    return found


def alive(pids) -> list:
    return [p for p in pids if members(p)]


def stopped(process, folder: Path, step: int, milliseconds: float, name: str, chance: random.Random) -> dict:
    "Send a signal soon after a step; whom it met, how the run ended."
    kills.until(lambda: (c := latest_checkpoint(folder)) is not None and c["step"] >= step, process, .02)
    time.sleep(milliseconds / 1e3)
    everybody = members(process.pid)
    target = chance.choice(range(len(everybody)))
    os.kill(everybody[target], getattr(signal, f"SIG{name}"))
    began = time.monotonic()
    while alive(everybody) and time.monotonic() - began < PATIENCE: time.sleep(.02)
    seconds = time.monotonic() - began
    if left := alive(everybody):
        for pid in left: os.kill(pid, signal.SIGKILL)
        raise SystemExit(f"SIG{name} to process {target} after step {step}: {len(left)} still there")
    process.join()
    if not process.exitcode: raise SystemExit(f"SIG{name} to process {target} after step {step}: exit code 0")
    return {"after_step": step, "milliseconds": round(milliseconds, 3), "process": target, "of": len(everybody),
            "exit_code": process.exitcode, "seconds": round(seconds, 2), "left_at": latest_checkpoint(folder)["step"]}


def finished(command, where):
    p = start(command, where)
    p.join()
    if p.exitcode: raise SystemExit(f"exit code {p.exitcode}: finessl {command}")
    return kills.outcome(where / "run")


def experiment(name: str, processes: int, n: int, steps: int, seed: int, photos: Path, whole) -> dict:
    "The record of one signal; `whole`: weights and record of the run that nobody stopped."
    chance, command, stops = random.Random(f"{seed} {name} {processes}"), TRAIN.format(**locals()), []
    with tempfile.TemporaryDirectory() as d:
        Path(d, "photos").symlink_to(photos)
        for k, step in enumerate(sorted(chance.sample(range(1, steps - 5), n))):
            p = start(command + " --resume" * (k > 0), d)
            stops.append(stopped(p, Path(d, "run"), step, chance.uniform(0, 30), name, chance))
        weights, record = finished(f"{command} --resume", Path(d))
        unlike = sorted(p.name for p in Path(d).iterdir() if p.name not in ("photos", "run"))
    return {"signal": f"SIG{name}", "processes": processes, "stops": stops, "resumes": len(record["resumes"]),
            "left_behind": unlike, "equal": weights == whole[0], "record_equal": kills.same(record, whole[1])}


def all_experiments(names, processes, n: int, steps: int, seed: int) -> dict:
    found = []
    with tempfile.TemporaryDirectory() as d:
        write_photos(photos := Path(d, "photos"))
        os.chdir(d)
        cli_main.main(TRAIN.format(steps=1, processes=1).replace("--out run", "--out first").split()) # late imports
        for p in processes:
            (where := Path(d, f"whole-{p}")).mkdir()
            (where / "photos").symlink_to(photos)
            whole = finished(TRAIN.format(steps=steps, processes=p), where)
            for name in names:
                found.append(e := experiment(name, p, n, steps, seed, photos, whole))
                longest = max(s["seconds"] for s in e["stops"])
                print(f"SIG{name}, processes: {p}, stops: {n}, resumes: {e['resumes']}, longest {longest:.1f} s, "
                      f"weights equal: {e['equal']}, record equal: {e['record_equal']}", flush=True)
    return {"command": f"finessl {TRAIN}", "steps": steps, "seed": seed, "experiments": found} | environment("cpu")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--signals", nargs="+", default=SIGNALS, choices=SIGNALS)
    ap.add_argument("--processes", nargs="+", type=int, default=(1, 2))
    ap.add_argument("--stops", type=int, default=20)
    ap.add_argument("--steps", type=int, default=100)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--out", type=Path, help="where the record goes")
    args = ap.parse_args()
    home = Path.cwd()
    result = all_experiments(args.signals, args.processes, args.stops, args.steps, args.seed)
    os.chdir(home)
    if args.out: write_json(args.out, result)
    sys.exit(0 if all(e["equal"] and e["record_equal"] for e in result["experiments"]) else 1)
