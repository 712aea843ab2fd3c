"""Runs killed at named and at random moments, several times over: `make torture`.

All must end in the record of a run that was left alone. Too long for the normal run."""

import random, shutil, sys, tempfile, time
from pathlib import Path

from test_crash import finished, killed

from adabatch import record

ENDINGS = {"fsync": [".pt.partial"], "replace": [".pt", ".pt.previous"]}

def moment(rng, length):
    "A named moment, as `make` takes it, or seconds."
    kind = rng.randrange(8)
    if kind == 0: return rng.choice([("fsync", ".npz.partial", 1), ("replace", ".npz", 1)])
    if kind > 3: return rng.uniform(0.05, 0.8) * length
    name = rng.choice(list(ENDINGS))
    return name, rng.choice(ENDINGS[name]), rng.randint(2, 6)

def main(kills=200):
    root, rng, done, alive, differ = Path(tempfile.mkdtemp()), random.Random(time.time_ns()), 0, 0, 0
    finished(root / "first")
    begin = time.monotonic()
    whole = finished(root / "whole")
    length = time.monotonic() - begin
    while done < kills:
        folder = root / "killed"
        folder.mkdir()
        moments = [moment(rng, length) for _ in range(min(kills - done, rng.randint(1, 4)))]  # of the same run
        alive += sum(killed(folder, when) for when in moments)
        done += len(moments)
        differs = record.differences(whole, finished(folder))
        if differs: print(f"DIFFERS in {differs} after kills at {moments}", flush=True)
        differ += bool(differs)
        shutil.rmtree(folder)
        found = f"{alive} of them before the end of the run; {differ} differing records"
        print(f"{done}/{kills} kills, {found}", flush=True)
    shutil.rmtree(root)
    return 1 if differ else 0

if __name__ == "__main__": sys.exit(main(*map(int, sys.argv[1:])))
