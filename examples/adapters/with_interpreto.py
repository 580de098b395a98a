"""interpreto: DePass as an explainer, with a score for each word. Usage: python with_interpreto.py [FOLDER]"""

import sys
from pathlib import Path

from interpreto import Granularity

from depass import DePass
from depass.compat.interpreto import DePassExplainer

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
dp = DePass.from_pretrained()
explainer = DePassExplainer(dp.model, dp.tokenizer, granularity=Granularity.WORD)

(result,) = explainer("The Colosseum is in the city of", " Rome")
lines = [f"{word!r} {score:+.2f}" for word, score in zip(result.elements, result.attributions[0].tolist(), strict=True)]
print("\n".join(lines))
(folder / "interpreto.txt").write_text("\n".join(lines))
