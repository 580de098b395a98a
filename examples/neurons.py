"""Which MLP neurons led the model to its answer. Usage: python examples/neurons.py [FOLDER]"""

import sys
from pathlib import Path

from depass import DePass, Neurons

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
dp = DePass.from_pretrained()
prompt = "The Eiffel Tower is in Paris. The Colosseum is in"

# one layer: every neuron's output at the last position, followed through the later layers
res = dp.attribute(prompt, target=" Rome", sources=Neurons(27, positions=[-1]))
res.to_html(folder / "neurons-27.html")
print("The neurons of layer 27 that matter most to ' Rome':")
for source, score in res.top(9):
    # the remainder (`rest`) has the largest score
    if source.kind == "neuron":
        print(f"  {source.label:<8} {score:+.2f}")

# several layers, each decomposed by itself
sweep = dp.sweep("neurons", prompt, target=" Rome", layers=range(24, 30), positions=[-1])
sweep.show()
sweep.plot(folder / "neurons.png")
sweep.to_html(folder / "neurons.html")
