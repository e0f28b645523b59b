"""The program: `medr1`, and `python -m medr1` for `accelerate launch -m medr1 train …`."""

from medr1.processes import heed_interrupts


def main() -> None:
    """Run a command. Ctrl-C is heeded before anything slow is imported."""
    heed_interrupts()
    from medr1.cli import main as run

    run()


if __name__ == "__main__":
    main()
