"""The benchmark cases: a question, a model, a dtype and a size; and the methods that can answer each question."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from depass import DePass, Neurons, Spans
from depass.device_memory import asked_bytes
from depass.models.bind import bind
from depass.models.streaming import streamed
from depass.propagation.cuda_graphs import ROWS

from .baselines import ablation, eager, gradients, naive
from .machine import BenchmarkError, Machine, here

# D, F, H, K, d, layers, vocabulary
SHAPES: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "tiny": (32, 56, 4, 2, 8, 3, 301),
    "smollm2-135m": (576, 1536, 9, 3, 64, 30, 49152),
    "llama-3.2-1b": (2048, 8192, 32, 8, 64, 16, 128256),
    "llama-3.2-3b": (3072, 8192, 24, 8, 128, 28, 128256),
    "llama-2-7b": (4096, 11008, 32, 32, 128, 32, 32000),
    "llama-3.1-8b": (4096, 14336, 32, 8, 128, 32, 128256),
    "llama-2-13b": (5120, 13824, 40, 40, 128, 40, 32000),
}
REAL = "smollm2"  # the package's default model; all others have random weights of these shapes
ON_HOST = "@host"  # after a model's name: its weights stay in host memory and are copied to the GPU layer by layer
DTYPES = {
    REAL: ("float32", "bfloat16"),
    **dict.fromkeys(("tiny", "smollm2-135m", "llama-3.2-1b"), ("float32", "bfloat16")),
    **dict.fromkeys(("llama-3.2-3b", "llama-2-7b", "llama-3.1-8b", "llama-2-13b"), ("bfloat16",)),
    **dict.fromkeys((f"tiny{ON_HOST}", f"llama-2-7b{ON_HOST}", f"llama-2-13b{ON_HOST}"), ("bfloat16",)),
}
SIZES: dict[str, tuple[str, ...]] = {
    "tokens": ("10", "16", "32", "64", "128", "256", "512", "1024", "2048", "4096"),
    "heads": ("10", "16", "64", "256"),
    "neurons": ("10", "64"),
    "prompts": ("8", "64", "1000"),
    "spans": ("512x16", "8192x64"),
}
UNITS = {  # units of the sizes
    "tokens": "tokens of one prompt", "heads": "tokens; every head of every layer",
    "neurons": "tokens; every neuron of the middle layer", "prompts": "short prompts",
    "spans": "tokens x spans that cover them",
}  # fmt: skip
# lengths of the prompts of Known_1000 with SmolLM2's tokenizer: number of tokens -> number of prompts
KNOWN_1000 = {4: 5, 5: 39, 6: 84, 7: 130, 8: 174, 9: 167, 10: 171, 11: 142, 12: 78, 13: 53, 14: 48, 15: 36, 16: 17,
              17: 29, 18: 7, 19: 10, 20: 7, 21: 4, 22: 2, 23: 3, 26: 1, 27: 1, 28: 1}  # fmt: skip
TARGET = 5  # the token whose logit is explained
# tokens per pass of the baselines; halved as long as memory does not suffice
BATCH_TOKENS = {"cpu": 2048, "cuda": 1 << 17}


@dataclass(frozen=True)
class Case:
    """One case. Its name has four parts: ``tokens/smollm2/float32/128``."""

    question: str
    model: str
    dtype: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.question}/{self.model}/{self.dtype}/{self.size}"

    @property
    def number(self) -> int:
        """The number of tokens of a prompt, or the number of prompts."""
        return int(self.size.split("x")[0])

    @cached_property
    def prompts(self) -> list[Tensor]:
        """Random ids on the CPU; they depend only on the case."""
        vocabulary = SHAPES["smollm2-135m" if self.model == REAL else self.model.removesuffix(ON_HOST)][-1]
        lengths = [self.number]
        if self.question == "prompts":
            spread = [length for length, count in KNOWN_1000.items() for _ in range(count)]
            lengths = random.Random(0).choices(spread, k=self.number)
        chance = torch.Generator().manual_seed(self.number)
        return [torch.randint(100, vocabulary, (length,), generator=chance) for length in lengths]

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The spans of a case of spans: consecutive and of equal length."""
        count = int(self.size.split("x")[1])
        edges = [self.number * i // count for i in range(count + 1)]
        return list(itertools.pairwise(edges))


def all_cases() -> list[Case]:
    return [
        Case(question, model, dtype, size)
        for question, sizes in SIZES.items()
        for model, dtypes in DTYPES.items()
        for dtype in dtypes
        for size in sizes
    ]


def find(patterns: Sequence[str]) -> list[Case]:
    """The cases that match a pattern, such as ``tokens/smollm2/*`` or ``tokens/smollm2/float32/10,64``.

    Raises:
        BenchmarkError: a pattern matches no case.
    """
    cases = all_cases()
    chosen: list[Case] = []
    for pattern in patterns:
        head, _, sizes = pattern.rpartition("/")
        alternatives = [f"{head}/{size}" if head else size for size in sizes.split(",")]
        matching = [case for case in cases if any(fnmatch.fnmatch(case.name, name) for name in alternatives)]
        if not matching:
            raise BenchmarkError(_unknown(pattern, cases))
        chosen += [case for case in matching if case not in chosen]
    return chosen


def _unknown(pattern: str, cases: Sequence[Case]) -> str:
    parts = pattern.split("/")
    if len(parts) == 4 and parts[0] in SIZES and not any(fnmatch.fnmatch(model, parts[1]) for model in DTYPES):
        return f"unknown model {parts[1]!r}; choose from {', '.join(DTYPES)}"
    near = difflib.get_close_matches(pattern, [case.name for case in cases], n=3)
    similar = f"; similar names: {', '.join(near)}" if near else ""
    return f"no case is named {pattern!r}; `python -m benchmarks list` shows all cases{similar}"


# Models.


def load(case: Case, machine: Machine) -> Any:
    """The case's model on the machine's device, in eval mode, with frozen weights.

    Raises:
        ModelError: the real model cannot be loaded.
    """
    if case.model == REAL:
        dp = DePass.from_pretrained(REAL, dtype=getattr(torch, case.dtype), device_map=machine.device)
        return dp.model.requires_grad_(False)
    model = random_model(case.model.removesuffix(ON_HOST), case.dtype, machine.device)
    return model.cpu() if case.model.endswith(ON_HOST) else model


def random_model(shape: str, dtype: str, device: str) -> Any:
    """A model with random weights, created directly on the device."""
    D, F, H, K, d, layers, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=D, intermediate_size=F, num_attention_heads=H, num_key_value_heads=K, head_dim=d,
        num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=16384, name_or_path=shape,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if shape == "tiny":  # with the default spread of 0.02, the MLPs of so narrow a model contribute next to nothing
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(5)
    return model.eval().requires_grad_(False)


# The methods.


@dataclass(frozen=True)
class Outcome:
    """The scores of a case in one tensor; for DePass also its conservation error and the backends used."""

    scores: Tensor
    conservation_error: float | None = None
    backends: Mapping[str, str] | None = None


Work = Callable[[], Outcome]
Method = Callable[[Any, Case, str], Work]  # takes the model, the case and DePass's backend; returns the work to time


def _depass(model: Any, case: Case, backend: str, **options: Any) -> DePass:
    to = here() if case.model.endswith(ON_HOST) else None
    return DePass(model, backend=backend, stream_to=to, **options)


def _depass_tokens(model: Any, case: Case, backend: str) -> Work:
    dp = _depass(model, case, backend, exclude_bos=True)
    return lambda: _of(dp.attribute(case.prompts[0], TARGET))


def _depass_graphs(model: Any, case: Case, backend: str) -> Work:
    dp = _depass(model, case, backend, exclude_bos=True, cuda_graphs=True)

    def work() -> Outcome:
        return _of(dp.attribute(case.prompts[0], TARGET))

    work(), work()  # the first call is only noted, the second is recorded; later calls replay it
    return work


def _depass_heads(model: Any, case: Case, backend: str) -> Work:
    dp = _depass(model, case, backend)

    def work() -> Outcome:
        sweep = dp.sweep("heads", case.prompts[0], TARGET)
        scores = torch.cat([sweep.rest[0, :, None], sweep.scores[0]], dim=1)  # [L, H + 1]
        return Outcome(scores, float(sweep.conservation_error.max()), sweep.settings.backends)

    return work


def _depass_neurons(model: Any, case: Case, backend: str) -> Work:
    dp = _depass(model, case, backend)
    return lambda: _of(dp.attribute(case.prompts[0], TARGET, sources=Neurons(_middle(model.config))))


def _depass_prompts(model: Any, case: Case, backend: str) -> Work:
    dp = _depass(model, case, backend, exclude_bos=True)

    def work() -> Outcome:
        outcomes = [_of(result) for result in dp.attribute_many(case.prompts, TARGET)]
        return Outcome(
            torch.cat([outcome.scores for outcome in outcomes]),
            max(outcome.conservation_error or 0.0 for outcome in outcomes),
            outcomes[0].backends,
        )

    return work


def _depass_spans(model: Any, case: Case, backend: str) -> Work:
    dp = _depass(model, case, backend, exclude_bos=False)
    return lambda: _of(dp.attribute(case.prompts[0], TARGET, sources=Spans(case.spans)))


def _of(result: Any) -> Outcome:
    return Outcome(result.scores[0], float(result.conservation_error.max()), result.settings.backends)


def _each_prompt(scores: Callable[[Any, Tensor], Tensor]) -> Method:
    """A method that takes one prompt after the other."""
    return lambda model, case, _: lambda: Outcome(torch.cat([scores(model, ids).cpu() for ids in case.prompts]))


def _naive_heads(model: Any, case: Case, _: str) -> Work:
    layers = range(model.config.num_hidden_layers)
    return lambda: Outcome(
        torch.stack([naive.head_scores(model, case.prompts[0], TARGET, layer) for layer in layers]).cpu()
    )


def _eager(scores: Callable[[eager.Eager, Any, Case], Tensor], compiled: bool = False) -> Method:
    def prepare(model: Any, case: Case, _: str) -> Work:
        baseline = eager.compiled() if compiled else eager.Eager()
        return lambda: Outcome(scores(baseline, model, case).cpu())

    return prepare


def _eager_prompts(baseline: eager.Eager, model: Any, case: Case) -> Tensor:
    return torch.cat([baseline.token_scores(model, ids, TARGET) for ids in case.prompts])


def _batched(scores: Callable[[Any, Tensor, int], Tensor]) -> Method:
    """A method that takes several inputs per pass, and fewer if memory does not suffice."""

    def prepare(model: Any, case: Case, _: str) -> Work:
        batch = max(1, BATCH_TOKENS[model.device.type] // case.number)

        def work() -> Outcome:
            nonlocal batch
            while True:
                try:
                    return Outcome(scores(model, case.prompts[0], batch).cpu())
                except RuntimeError as error:
                    if asked_bytes(error) is None or batch == 1:
                        raise
                batch = -(-batch // 2)
                torch.cuda.empty_cache()

        return work

    return prepare


_GRADIENTS: dict[str, Method] = {
    "input_x_gradient": _each_prompt(lambda model, ids: gradients.input_x_gradient(model, ids, TARGET)),
    "integrated_gradients_20": _batched(
        lambda m, ids, batch: gradients.integrated_gradients(m, ids, TARGET, 20, batch)
    ),
    "integrated_gradients_50": _batched(
        lambda m, ids, batch: gradients.integrated_gradients(m, ids, TARGET, 50, batch)
    ),
    "ablation": _batched(lambda m, ids, batch: ablation.leave_one_out(m, ids, TARGET, batch)),
}
_NAIVE_TOKENS = _each_prompt(lambda model, ids: naive.token_scores(model, ids, TARGET))


def _tokens(baseline: eager.Eager, model: Any, case: Case) -> Tensor:
    return baseline.token_scores(model, case.prompts[0], TARGET)


def _heads(baseline: eager.Eager, model: Any, case: Case) -> Tensor:
    return baseline.head_scores(model, case.prompts[0], TARGET)


def _spans(baseline: eager.Eager, model: Any, case: Case) -> Tensor:
    return baseline.span_scores(model, case.prompts[0], TARGET, case.spans)


OURS = "depass"
GRAPHS = "depass_cuda_graphs"
METHODS: dict[str, dict[str, Method]] = {
    "tokens": {OURS: _depass_tokens, GRAPHS: _depass_graphs, "naive": _NAIVE_TOKENS, "eager": _eager(_tokens),
               "compiled": _eager(_tokens, compiled=True), **_GRADIENTS},
    "heads": {OURS: _depass_heads, "naive": _naive_heads, "eager": _eager(_heads),
              "compiled": _eager(_heads, compiled=True)},
    "neurons": {OURS: _depass_neurons},
    "prompts": {OURS: _depass_prompts, "naive": _NAIVE_TOKENS, "eager": _eager(_eager_prompts),
                "input_x_gradient": _GRADIENTS["input_x_gradient"]},
    "spans": {OURS: _depass_spans, "eager": _eager(_spans), "compiled": _eager(_spans, compiled=True),
              "input_x_gradient": _GRADIENTS["input_x_gradient"]},
}  # fmt: skip


def methods_of(case: Case, device: str) -> dict[str, Method]:
    """The methods that can answer a case on a device."""
    methods = METHODS[case.question]
    if case.model.endswith(ON_HOST):
        return {OURS: methods[OURS]}
    graphs = device == "cuda" and case.number * (case.number + 1) // 2 <= ROWS
    return {name: method for name, method in methods.items() if name != GRAPHS or graphs}


OTHER_QUESTIONS = tuple(_GRADIENTS)  # methods whose scores have another meaning than DePass's


def plain(model: Any, case: Case) -> Callable[[], object]:
    """The model's own pass over the case's prompts, one at a time, for the last position's logits."""
    device = torch.device(here()) if case.model.endswith(ON_HOST) else model.device

    def work() -> None:
        with torch.no_grad(), ExitStack() as stack:
            if case.model.endswith(ON_HOST):
                stack.enter_context(streamed(bind(model), device))
            for ids in case.prompts:
                ablation.last_logits(model, ids[None].to(device))

    return work


# The floor.


@dataclass(frozen=True)
class Rows:
    """The rows of the decomposed state, and the rows that go through each projection, summed over all layers.

    In the last layer only the last position is read, so only its rows go through the projections after the values.
    """

    state: int
    value: int
    output: int
    mlp: int


def count_rows(case: Case, config: Any) -> Rows:
    layers, n = config.num_hidden_layers, case.number
    if case.question == "heads":
        sources = config.num_attention_heads + 1
        each = n * sources
        attention, mlp = each * layers * (layers - 1) // 2, each * layers * (layers + 1) // 2
        spared = each - sources  # rows that each decomposition saves in the last layer
        return Rows(each * layers, attention, attention - spared * (layers - 1), mlp - spared * layers)
    if case.question == "neurons":
        sources, left = config.intermediate_size + 1, layers - 1 - _middle(config)
        state, last = n * sources, sources
    elif case.question == "spans":
        state, last, left = sum(n - begin for begin, _ in case.spans), len(case.spans), layers
    else:
        state, last, left = (
            sum(len(ids) * (len(ids) + 1) // 2 for ids in case.prompts),
            sum(map(len, case.prompts)),
            layers,
        )
    others = state * (left - 1) + last
    return Rows(state, state * left, others, others)


def floor_shapes(config: Any) -> list[tuple[int, int]]:
    """``[outputs, inputs]`` of the value, output, gate and down projections: the GEMMs of the floor."""
    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    return [(config.num_key_value_heads * d, D), (D, config.num_attention_heads * d), (F, D), (D, F)]


def per_row(rows: Rows, each: Sequence[float]) -> float:
    """The total over all rows, from the cost per row of each of the four projections."""
    value, output, gate, down = each
    return rows.value * value + rows.output * output + rows.mlp * (gate + down)


def floor_operations(case: Case, config: Any) -> float:
    """The operations that every exact method needs."""
    return per_row(count_rows(case, config), [2.0 * a * b for a, b in floor_shapes(config)])


def _middle(config: Any) -> int:
    middle: int = config.num_hidden_layers // 2
    return middle


def listed(cases: Sequence[Case]) -> Iterator[str]:
    """One line per case: its name, and the methods that can answer it on this machine."""
    for case in cases:
        yield f"{case.name:40} {', '.join(methods_of(case, here()))}"
