"""Draws docs/images/report.png anew: the first screen of the demo's report.

python docs/picture.py runs/demo/report.html
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

OUT = Path(__file__).parent / "images" / "report.png"


def draw(page: Path) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1000, "height": 640}, device_scale_factor=1.5)
        tab.goto(page.resolve().as_uri())
        picture = Image.open(io.BytesIO(tab.screenshot()))
        browser.close()
    OUT.parent.mkdir(exist_ok=True)
    picture.convert("RGB").quantize(128).save(OUT, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
