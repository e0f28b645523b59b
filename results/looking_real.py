"""Keep the replies of a comparison on a data set: every run that is done of a folder of `benchmarks/looking.py --data`.

    python results/looking_real.py runs/looking-pairs results/looking-pairs

The figures beside them (figures.json) are the JSON line that the benchmark ends with.
"""

import sys
from pathlib import Path

from collect import keep_rows


def main() -> None:
    runs, out = Path(sys.argv[1]), Path(sys.argv[2])
    done = sorted(path.parent for path in runs.glob("*/*/done"))
    found = {
        f"{run.parent.name} {run.name} {way}": run / f"{way}.jsonl"
        for run in done
        for way in ("image", "shuffled", "reader")
    }
    keep_rows(found, out / "rows.csv.gz")


if __name__ == "__main__":
    main()
