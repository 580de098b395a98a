"""inseq: DePass as a method of inseq, which shows and saves the result. Usage: python with_inseq.py [FOLDER]"""

import sys
from pathlib import Path

import inseq

import depass.compat.inseq  # noqa: F401  # registers the method
from depass import DePass

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
dp = DePass.from_pretrained()
model = inseq.load_model(dp.model, "depass", tokenizer=dp.tokenizer)

text = "The Colosseum is in the city of"
out = model.attribute(text, f"{text} Rome, Italy", attributed_fn="logit", show_progress=False)
(folder / "inseq.html").write_text(out.show(display=False, return_html=True))
out.save(folder / "inseq.json", overwrite=True)

(sequence,) = out.sequence_attributions
sums = sequence.target_attributions.nansum(0).tolist()
print(f"the columns add up to {sums}, the logits are {sequence.step_scores['logit'].tolist()}")

layers = model.attribute(text, f"{text} Rome", attributed_fn="logit", outputs="layers", show_progress=False)
print(f"of the stream entering each layer: {tuple(layers[0].target_attributions.shape)} (token, target, layer)")
