"""nnsight: attribute the wrapped model, and compare with a trace of it. Usage: python with_nnsight.py [FOLDER]"""

import sys
from pathlib import Path

import nnsight

from depass import DePass
from depass.compat.nnsight import from_nnsight

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
smollm2 = DePass.from_pretrained()
model = nnsight.TransformersModel(smollm2.model, tokenizer=smollm2.tokenizer, task="text-generation")

text = "The Colosseum is in the city of"
res = from_nnsight(model).attribute(text, target=" Rome")
res.show()
res.to_html(folder / "nnsight.html")

with model.trace(text):
    logits = model.lm_head.output.save()
print(f"the scores add up to {res.scores.sum():.3f}, the trace says {logits[0, -1, res.targets[0].token_ids[0]]:.3f}")
