"""Damaged records, weights and checkpoints, made from whole ones: each is read, or refused by a named error.

    python tests/fuzz_runs.py --n 20000                # --start 4711 --n 1 tries one of them again
"""
import argparse, copy, json, random, shutil, sys, tempfile, time
from pathlib import Path
import torch
from finessl.algorithms import FineSSL
from finessl.backbone import load_backbone
from finessl.data import digits
from finessl.engine.errors import TrainingError
from finessl.engine.runs import load_run
from finessl.training import fit

NAMED = ValueError, TrainingError, OSError            # what a command turns into one sentence
KINDS = "record", "weights", "checkpoint"
WORTH = (None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, .5, 1e308, "", "0", "pocket", "\x1b[2J", "../../x",
         "\udcff", [], [[]], [0], {}, {"": None}, "x" * 10_000)
HOW = dict(steps=4, batch=4, evals=2, n_prompts=1, progress=False)


def places(value, path=()):
    "Every place in a nested value."
    yield path
    if isinstance(value, dict): inside = value.items()
    elif isinstance(value, list): inside = enumerate(value[:8])
    else: return
    for k, v in inside: yield from places(v, (*path, k))


def mutate_json(text: str, draw: random.Random) -> str:
    "Another value, another key, one entry less or more, deep nesting, or torn text."
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 2, 4))):
        *where, last = draw.choice(list(places(value))[1:])
        spot = value
        try:
            for k in where: spot = spot[k]
            how = draw.randrange(5)
            if how == 0: del spot[last]
            elif how == 1 and isinstance(spot, dict): spot[f"{last}?"] = spot.pop(last)
            elif how == 2: spot[last] = [spot[last]] * draw.choice((0, 1, 2, 300))
            else: spot[last] = copy.deepcopy(draw.choice(WORTH))
        except (KeyError, IndexError, TypeError): pass # an earlier change took the place away
    text = json.dumps(value)
    if draw.random() < .1: text = text[:draw.randrange(len(text))]
    if draw.random() < .05: text = "[" * draw.choice((10, 5000)) + text
    if draw.random() < .05: text = text.replace("0", "NaN", 3)
    return text


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    "Flipped, cut, doubled, emptied; more often in the head, where the structure stands."
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 20))):
        at = draw.randrange(min(len(out), draw.choice((16, 400, len(out)))) or 1)
        how = draw.randrange(4)
        if not out: break
        if how == 0: out[at] ^= 1 << draw.randrange(8)
        elif how == 1: out[at:at + draw.choice((1, 8, 500))] = b""
        elif how == 2: out[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 8))))
        else: out[at] = draw.choice((0, 0x7f, 0xff))
    return bytes(out[:draw.randrange(len(out) + 1)] if draw.random() < .1 else out)


class Fuzz:
    "A finished and an unfinished run of a few steps, whose files are damaged one at a time."
    def __init__(self, folder):
        whole, self.encoder = digits(1, 0), load_backbone("pocket")
        self.data = whole._replace(x_ulb=whole.x_ulb[:8], y_ulb=whole.y_ulb[:8], x_test=whole.x_test[:4],
                                   y_test=whole.y_test[:4], split=None)
        self.done, self.begun, self.work = (Path(folder) / name for name in ("done", "begun", "work"))
        fit(self.data, self.encoder, FineSSL(), out=self.done, **HOW)
        try: fit(self.data, self.encoder, Stops(), out=self.begun, checkpoint_every=2, **HOW)
        except KeyboardInterrupt: pass
        self.images = self.data.x_test[:1]

    def try_one(self, number: int) -> str|None: # None: read; else the error's name
        "Damage one file and use the run; what is neither read nor named is raised."
        draw = random.Random(number)
        kind = KINDS[number % len(KINDS)]
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.begun if kind == "checkpoint" else self.done, self.work)
        if kind == "record":
            path = self.work / "record.json"
            text = mutate_json(path.read_text(encoding="utf-8"), draw)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        else:
            path = self.work / ("model.safetensors" if kind == "weights" else "checkpoint.pt")
            path.write_bytes(mutate_bytes(path.read_bytes(), draw))
        try:
            if kind == "checkpoint": fit(self.data, self.encoder, Stops(never=True), out=self.work, resume=True, **HOW)
            else: load_run(self.work).predict(self.images)
        except NAMED as e: return type(e).__name__


class Stops(FineSSL):
    "FineSSL that is stopped in its third step."
    def __init__(self, never=False):
        super().__init__()
        object.__setattr__(self, "calls", -10**9 if never else 0)

    def __call__(self, logits, state):
        object.__setattr__(self, "calls", self.calls + 1)
        if self.calls == 3: raise KeyboardInterrupt
        return super().__call__(logits, state)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--n", type=int, default=300, help="damaged files (default: %(default)s)")
    ap.add_argument("--start", type=int, default=0, help="number of the first (default: %(default)s)")
    args = ap.parse_args()
    count, longest = {}, 0.
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(folder)
        for number in range(args.start, args.start + args.n):
            began = time.process_time()
            try: result = fuzz.try_one(number)
            except Exception as e:
                print(f"number {number} ({KINDS[number % 3]}): {type(e).__name__}: {str(e)[:300]}", flush=True)
                result = "UNNAMED"
            longest = max(longest, time.process_time() - began)
            key = f"{KINDS[number % 3]}: {result or 'read'}"
            count[key] = count.get(key, 0) + 1
    print(json.dumps(dict(sorted(count.items()))), f"longest {longest:.1f} s of CPU time")
    return any("UNNAMED" in k for k in count)


if __name__ == "__main__": sys.exit(main())
