"""The figures of ``kills.py``, into a folder."""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from tests.faults.kills import report, survive

parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
parser.add_argument("--kills", type=int, default=100)
parser.add_argument("--out", type=Path)

if __name__ == "__main__":
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        tally = survive(args.kills, Path(temporary))
    text = report(tally, shlex.join(["python", "-m", "tests.faults", *sys.argv[1:]]))
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kills.md").write_text(text)
        (args.out / "kills.json").write_text(json.dumps(vars(tally), indent=1) + "\n")
