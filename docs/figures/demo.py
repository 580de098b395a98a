"""Draw demo.svg: what the page of `make demo` shows, saved by the page itself in a headless Chromium.

Usage: python docs/figures/demo.py
"""

import sys
import tempfile
from pathlib import Path

from depass import DePass

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "tests" / "support"))
import browser  # noqa: E402

program = browser.find()
if program is None:
    sys.exit("there is no Chromium: apt install chromium")
res = DePass.from_pretrained().attribute("Catalonia belongs to the continent of", target=[" Europe", " Asia"])
with tempfile.TemporaryDirectory() as folder:
    tab = browser.Browser(program, Path(folder))
    try:
        tab.open(res.to_html(), width=760)
        tab.click(".numbers")
        svg = tab.ask("picture(document.querySelector('figure'))")
    finally:
        tab.close()
(HERE / "demo.svg").write_text(svg.replace("><", ">\n<") + "\n", encoding="utf-8")
