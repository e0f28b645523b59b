"""What every test shares: no network, the data folder that lies beside a checkout in CI, and no skips there.

A test that needs what a machine lacks is skipped with a reason that names the remedy; pytest lists them at the end. In
CI (MEDR1_CI is set) a skip is a failure, but for tests that need a GPU: their reason begins with "needs a GPU".
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with two threads each would wait for one another
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as `medr1` does, before anything imports transformers

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no fault of what is tested; and what fails in CI fails again here.
settings.register_profile(
    "medr1",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="MEDR1_CI" in os.environ,
)
settings.load_profile("medr1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and public split files that lies beside the checkout; never part of the package."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data folder beside the checkout ({SHARED.name}/ is absent)")
    return SHARED


@pytest.fixture
def local_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of this machine are asked by no proxy, and without a key of the user's."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a run in which something was skipped has failed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("MEDR1_CI") or reporter is None:
        return
    skipped = [str(report.longrepr[2]).removeprefix("Skipped: ") for report in reporter.stats.get("skipped", ())]
    if unwanted := [reason for reason in skipped if not reason.startswith("needs a GPU")]:
        reasons = "; ".join(sorted(set(unwanted)))
        reporter.write_line(f"\nMEDR1_CI is set, and {len(unwanted)} tests were skipped: {reasons}")
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium by Playwright: the machine's, or the one that `playwright install chromium` fetched."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright to open the page")
    with playwright.sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("google-chrome") or driver.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("needs Chromium: apt install chromium, or .venv/bin/playwright install chromium")
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=120_000)
        yield opened
        opened.close()
