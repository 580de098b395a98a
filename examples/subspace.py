"""How much of an answer flows through one plane of the residual stream. Usage: python examples/subspace.py [FOLDER]"""

import sys
from pathlib import Path

from depass import Contrast, DePass, Subspace

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
dp = DePass.from_pretrained()
prompt = "The Eiffel Tower is in Paris. The Colosseum is in"

# the plane spanned by the unembeddings of the two answers: 2 of the stream's 576 dimensions
ids = [dp.tokenizer.encode(answer, add_special_tokens=False)[0] for answer in (" Rome", " Paris")]
plane = dp.model.lm_head.weight[ids].detach()

lines = ["layer  through the plane  around it  Rome over Paris"]
for layer in range(0, 30, 3):
    res = dp.attribute(
        prompt, target=Contrast(" Rome", " Paris"), sources=Subspace(layer, basis=plane, labels=["the plane"])
    )
    scores = {source.label: float(score) for source, score in zip(res.sources, res.scores[0], strict=True)}
    lines.append(
        f"{layer:5}  {scores['the plane']:+17.2f}  {scores['rest']:+9.2f}  {float(res.target_logits[0]):+15.2f}"
    )
table = "\n".join(lines)
print(table)
(folder / "subspace.txt").write_text(table + "\n")
