"""Which attention heads led the model to its answer. Usage: python examples/heads.py [FOLDER]"""

import sys
from pathlib import Path

from depass import DePass

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
dp = DePass.from_pretrained()

sweep = dp.sweep("heads", "The Eiffel Tower is in Paris. The Colosseum is in", target=[" Rome", " Paris"])
sweep.show()
sweep.plot(folder / "heads.png")
sweep.to_html(folder / "heads.html")

for row, target in enumerate(sweep.targets):
    print(f"The heads that matter most to {target.label!r}:")
    for source, score in sweep.top(5, target=row):
        print(f"  {source.label:<6} {score:+.2f}")
