"""Which words of a prompt led the model to its answer. Usage: python examples/tokens.py [FOLDER]"""

import sys
from pathlib import Path

from depass import Contrast, DePass

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
dp = DePass.from_pretrained()

res = dp.attribute(
    "The Eiffel Tower is in Paris. The Colosseum is in",
    target=[" Rome", Contrast(" Rome", " Paris")],
)
res.show()
res.aggregate("word").to_html(folder / "tokens.html")
res.save(folder / "tokens.safetensors")

for row, target in enumerate(res.targets):
    best = ", ".join(f"{source.label!r} {score:+.2f}" for source, score in res.top(3, target=row))
    print(f"{target.label!r} depends most on {best}")
