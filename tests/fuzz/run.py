"""Search with coverage for inputs that the readers or the extractor do not bear. Not part of the ordinary tests.

    pip install atheris==3.0.0            # Linux, Python 3.11 to 3.13
    python tests/fuzz/run.py --minutes 10

Each target gets its share of the time in a process of its own. What is found lies in the folder given by --out, as
input (crash-…, timeout-…, oom-…); `python tests/fuzz/run.py --target image --input FILE` runs it again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]

INSTRUMENTED = {
    "image": ("medr1.data.images", "pydicom", "nibabel", "tifffile", "PIL"),
    "dataset": ("medr1.data.datasets", "medr1.data.records"),
    "reply": ("medr1.data.answers", "medr1.data.option_texts", "medr1.data.phrases", "medr1.data.sentences"),
}


def search(target: str, seconds: int, out: Path) -> int:
    """Run one target in this process; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED[target])):
        import targets

        if target == "image":
            import medr1.data.images.dicom
            import medr1.data.images.nifti
            import medr1.data.images.slide  # noqa: F401
    import seeds

    corpus = out / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds.SEEDS[target]()):
        (corpus / f"seed-{number}").write_bytes(seed)
    arguments = [f"-max_total_time={seconds}", f"-artifact_prefix={out}/{target}-", "-timeout=20", "-rss_limit_mb=3000"]
    arguments += ["-max_len=20000", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], targets.TARGETS[target])
    atheris.Fuzz()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of all targets together")
    parser.add_argument("--target", choices=sorted(INSTRUMENTED), help="this one only")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="folder for corpus and findings")
    parser.add_argument("--input", type=Path, help="run one input of the target once, without atheris")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)  # seconds: one target in this process
    args = parser.parse_args()
    if args.input:
        import targets

        targets.TARGETS[args.target](args.input.read_bytes())
        return 0
    if args.here:
        return search(args.target, args.here, args.out)
    chosen = [args.target] if args.target else sorted(INSTRUMENTED)
    seconds = max(1, round(60 * args.minutes / len(chosen)))
    failed = []
    for target in chosen:
        command = [sys.executable, __file__, "--target", target, "--here", str(seconds), "--out", str(args.out)]
        if subprocess.run(command, check=False).returncode:
            failed.append(target)
    print(f"{', '.join(chosen)}: {seconds} s each; " + (f"faults in {', '.join(failed)}" if failed else "no fault"))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
