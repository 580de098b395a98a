"""What each token of a generated text owes to all text before it. Usage: python examples/generation.py [FOLDER]"""

import sys
from pathlib import Path

from depass import DePass

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
dp = DePass.from_pretrained()

made = dp.generate("Water freezes at 0 degrees Celsius and boils at", max_new_tokens=8)
print(f"The model goes on: {made.text!r}")
for row, token in enumerate(made.tokens):
    best = ", ".join(f"{source.label!r} {score:+.2f}" for source, score in made.attribution.top(3, target=row))
    print(f"  {token!r} owes most to {best}")
made.to_html(folder / "generation.html")
