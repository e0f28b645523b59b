"""`python -m medr1`, for `accelerate launch -m medr1 train …`."""

from medr1.cli import main

main()
