"""Which earlier tokens led to each token of a generated text. Usage: python examples/generation.py [FOLDER]"""

import sys
from pathlib import Path

from depass import DePass

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
dp = DePass.from_pretrained()

generation = dp.generate("Water freezes at 0 degrees Celsius and boils at", max_new_tokens=8)
print(f"The model continues: {generation.text!r}")
for row, token in enumerate(generation.tokens):
    best = ", ".join(f"{source.label!r} {score:+.2f}" for source, score in generation.attribution.top(3, target=row))
    print(f"  {token!r} depends most on {best}")
generation.to_html(folder / "generation.html")
