"""The fuzzing targets in seconds: what was found once, what the search starts from, and damaged copies of it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FUZZ = Path(__file__).parent / "fuzz"


@pytest.fixture(scope="module", autouse=True)
def extras() -> Iterator[None]:
    for package in ("pydicom", "nibabel"):
        pytest.importorskip(package)
    sys.path.insert(0, str(FUZZ))
    yield
    sys.path.remove(str(FUZZ))


@pytest.mark.parametrize("path", sorted((FUZZ / "found").iterdir()), ids=lambda path: path.name)
def test_what_fuzzing_found_stays_mended(path: Path) -> None:
    from targets import TARGETS

    TARGETS[path.name.partition("-")[0]](path.read_bytes())


@pytest.mark.parametrize("target", ["image", "dataset", "reply"])
@settings(
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_damaged_files_and_replies(target: str, data: st.DataObject) -> None:
    """A seed with a byte changed, a piece cut out, or other bytes put in, up to four times."""
    from seeds import SEEDS
    from targets import TARGETS

    content = data.draw(st.sampled_from(sorted(SEEDS[target]())))
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = start + data.draw(st.sampled_from([0, 1, 2, 4, 100]))
        content = content[:start] + data.draw(st.binary(max_size=4)) + content[end:]
    TARGETS[target](content)


@settings(max_examples=300)
@given(text=st.text(), options=st.lists(st.text(min_size=1), min_size=0, max_size=5))
def test_replies_of_any_text(text: str, options: list[str]) -> None:
    from targets import check_reply

    check_reply(text, options)
