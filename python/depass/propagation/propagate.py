"""The decomposed state and its propagation through a layer, with the frozen values of the layer's trace.

The state has ``[R, D]`` rows in the packed (staircase) layout, in fp32 (fp64 for fp64 models). No other buffer grows with
``R``. The attention runs on blocks of sources, because it is linear and each source is independent. The MLP runs on blocks
of positions, because sharing couples only the sources of one position and neuron; where one position is too large, also on
blocks of neurons. Blocks change results only by rounding. The exceptions are layers with parallel attention and MLP
(GPT-NeoX), whose values ``[R, K·d]`` are computed for all rows, in the model's dtype, before the MLP changes the state,
and layers whose values later ones take (Gemma 4), which are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from depass_kernels import SourceLayout, backends, mix_values, normed, residual_update
from depass_kernels.reference import matmul

from ..models.bound import BoundModel, Layer, Mixer, Norm
from ..models.recurrences import Recurrence, convolved
from ..models.trace import MixerTrace, Trace
from ..sources.source import Decomposition
from .blocks import Blocks, Cut, _Kept, _PositionBlock, _SourceBlock, cut, traits
from .mlp import Branch, branches, late_branch
from .projections import add_constant, bias_rows, constant_of, folded
from .sharing import MLPSharing


def with_rows_in_runs(pattern: Tensor, run: int) -> Tensor:
    """Pad the rows of a pattern ``[B, H, N, N]`` to a multiple of ``run`` keys, so that kernels read ``run`` keys at once.

    Returns:
        ``[B, H, N, W]`` with zeros after the ``N`` keys; the pattern itself if ``N`` is a multiple of ``run``.
    """
    n = pattern.shape[-1]
    if n % run == 0:
        return pattern
    rows = pattern.new_zeros(*pattern.shape[:-1], -(-n // run) * run)
    rows[..., :n] = pattern
    return rows


class Propagation:
    """A decomposed state and its propagation through a model: call :meth:`attention`, then :meth:`mlp`, for each layer.

    It holds several decompositions, of one prompt or of several. Each is one staircase, which joins at its layer.

    Args:
        bound: the model.
        sharing: the rule that shares MLP outputs among the sources.
        blocks: how many rows the steps of a layer take at once; it changes results only by rounding.
        lengths: the prompts' numbers of tokens; their positions follow one another in every trace.
        rows: the number of rows of all decompositions together.
    """

    _cut: Cut  # of the layout

    def __init__(
        self, bound: BoundModel, sharing: MLPSharing, blocks: Blocks, lengths: Sequence[int], rows: int
    ) -> None:
        self.bound, self.sharing, self.blocks = bound, sharing, blocks
        self.product_dtype, self.state_dtype = bound.product_dtype, bound.state_dtype
        self.layout: SourceLayout | None = None
        self.state = torch.empty(0, device="cpu")  # [R, D], of the decompositions that have joined
        self.served: dict[str, set[str]] = {}  # by op, the backends used
        self._rows, self.prompt_start = rows, [0, *itertools.accumulate(lengths)]
        self._memory = torch.empty(0, device="cpu")  # [rows, D]
        self._positions: list[Tensor] = []  # by staircase, the positions of its prompt that it has
        self._where: Tensor | None = None  # [P], the position in a trace of each position; None: the same
        # by staircase, its first row, and the rows of its positions' owners
        self._owners: list[tuple[int, Tensor]] = []
        self._lent: dict[int, Tensor] = {}  # by layer, the values [R', K·d] of the rows that had joined before it
        self._beside_mlp: list[tuple[_Mixing, list[Tensor]]] = []  # values that wait for the MLP

    def join(self, joining: Sequence[tuple[Decomposition, int]], trace: Trace) -> None:
        """Add decompositions, after those that have joined before.

        Args:
            joining: pairs of a decomposition and the index of its prompt, at least one. Source 0 of each decomposition is
                the bias source if the model has biases.
            trace: the trace of the current layer, on its device.
        """
        layouts: list[SourceLayout] = []
        prompts: list[int] = []
        if self.layout is None:
            self._memory = trace.stream.new_empty(self._rows, trace.stream.shape[1], dtype=self.state_dtype)
        else:
            self._to(trace.stream.device)
            layouts, prompts = [self.layout], self.layout.prompt.tolist()
        end = len(self.state)
        for parts, prompt in joining:
            rows = self._memory[end : end + parts.layout.rows]
            parts.fill(rows.zero_(), trace.of(self.prompt_start[prompt], self.prompt_start[prompt + 1]))
            if self.bound.lending:
                self._owners.append((end, end + parts.layout.row_start[:-1] + parts.owner))
            end += parts.layout.rows
            layouts.append(parts.layout)
            prompts.append(prompt)
            self._positions.append(torch.arange(parts.layout.positions, device="cpu"))
        joined = layouts[0] if len(layouts) == 1 and prompts == [0] else SourceLayout.concat(layouts, prompts)
        self._lay_out(joined, end)

    def _lay_out(self, layout: SourceLayout, rows: int, is_kept: bool = True) -> None:
        """Make the first ``rows`` rows of the memory the state; ``is_kept``: other prompts may have the same layout."""
        self.layout, self.state = layout, self._memory[:rows]
        prompts = zip(layout.prompt.tolist(), self._positions, strict=True)
        where = torch.cat([self.prompt_start[prompt] + positions for prompt, positions in prompts])
        same = len(where) == self.prompt_start[-1] and bool((where == torch.arange(len(where), device="cpu")).all())
        self._where = None if same else where.to(self.state.device)
        self._cut = cut(layout, self.blocks) if is_kept else Cut(layout, self.blocks)

    def attention(self, index: int, trace: Trace, read: Sequence[Sequence[int]] | None = None) -> None:
        """Propagate the state through the attention of layer ``index``, in place (docs/method.md, equation 3).

        It does nothing before a decomposition has joined, nor in a layer without attention. Parallel attention and MLP
        (GPT-NeoX) both read the layer's input, so the values are computed here, before the MLP changes the state, and
        :meth:`mlp` mixes them. Mixers side by side (Falcon-H1) read it too, so all values of a block come first.

        Args:
            index: the layer, from 0.
            trace: the frozen values of the layer, on its device.
            read: for the last layer, the positions of every staircase that are read after it; the state may drop the
                others. None keeps all.
        """
        layer = self.bound.layers[index]
        if self.layout is None or not layer.mixers:
            return
        with backends.record(self.served):
            self._to(layer.device)  # a model may be spread over several devices
            pairs = zip(layer.mixers, trace.mixers, strict=True)
            mixing, blocks = [_Mixing(self, layer, trace, *pair) for pair in pairs], self._cut.of_sources
            if self.bound.parallel:
                self._beside_mlp = [(each, [self._values(index, each, block) for block in blocks]) for each in mixing]
                return
            kept = self._kept(read)
            for block in blocks:
                values = [self._values(index, each, block) for each in mixing]
                for each in mixing:
                    each.mix(block, values.pop(0), kept)  # freed before the next block's
            self._narrow(kept)
            for each in mixing:
                each.add_bias(trace)

    def mlp(self, index: int, trace: Trace, read: Sequence[Sequence[int]] | None = None) -> None:
        """Propagate the state through the MLP of layer ``index``, in place (docs/method.md, equation 4).

        Arguments as for :meth:`attention`.
        """
        if self.layout is None:
            return
        with backends.record(self.served):
            self._to(self.bound.layers[index].device)
            kept, blocks = self._kept(read), self._cut.of_sources
            self._narrow(kept)  # also the decompositions that joined after the attention
            self._through(list(branches(self, self.bound.layers[index], trace)))
            waiting, self._beside_mlp = self._beside_mlp, []
            for mixing, values in waiting:
                for block, value in zip(blocks, values, strict=True):
                    mixing.mix(block, value, kept, narrowed=True)
                mixing.add_bias(trace)

    def _values(self, index: int, mixing: _Mixing, block: _SourceBlock) -> Tensor:
        """The values ``[R_block, K·d]`` of a block in a mixer of a layer, which may be those of an earlier layer."""
        lender, rows = mixing.mixer.values_of, block.rows_on(self.state.device)
        if lender is not None:
            assert mixing.taken is not None
            taken = self._taken(lender, mixing.taken)
            return taken if rows is None else taken.index_select(0, rows)
        values = mixing.values(block)
        if index in self.bound.lending and mixing.mixer.recurrence is None:
            if index not in self._lent:
                self._lent[index] = values.new_empty(len(self.state), values.shape[1])
            self._lent[index][slice(None) if rows is None else rows] = values
        return values

    def _taken(self, lender: int, frozen: Tensor) -> Tensor:
        """The values ``[R, K·d]`` that layer ``lender`` lent, of which ``frozen`` ``[P, K·d]`` are the sums.

        Those of a decomposition that joined behind it were computed before: they belong to the owner of their position.
        """
        assert self.layout is not None
        dtype, device = self.product_dtype, self.state.device
        width, known = frozen.shape[1], self._lent.get(lender)
        known = frozen.new_empty(0, width, dtype=dtype) if known is None else known.to(device)
        if len(known) < len(self.state):
            later = known.new_zeros(len(self.state) - len(known), width)
            for (begin, rows), prompt in zip(self._owners, self.layout.prompt.tolist(), strict=True):
                if begin >= len(known):
                    values = frozen[self.prompt_start[prompt] : self.prompt_start[prompt + 1]]
                    later[(rows - len(known)).to(device)] = values.to(later)
            known = torch.cat([known, later])
        self._lent[lender] = known
        return known

    def _kept(self, read: Sequence[Sequence[int]] | None) -> _Kept | None:
        """The rows of the positions that are read, or None if they are more than half of all rows."""
        if read is None:
            return None
        assert self.layout is not None
        wanted = [torch.tensor(positions, device="cpu") for positions in read]
        positions = [held[torch.isin(held, chosen)] for held, chosen in zip(self._positions, wanted, strict=False)]
        first = self.layout.position_start.tolist()
        where = [begin + torch.searchsorted(held, chosen)
                 for begin, held, chosen in zip(first[:-1], self._positions, positions, strict=True)]  # fmt: skip
        layout, rows = self.layout.select_positions(where)
        if 2 * len(rows) > self.layout.rows:
            return None
        return _Kept(layout, rows.to(self.state.device), positions)

    def _narrow(self, kept: _Kept | None) -> None:
        if kept is not None:
            self._memory[: len(kept.rows)] = self.state.index_select(0, kept.rows)
            self._positions = kept.positions
            self._lay_out(kept.layout, len(kept.rows), is_kept=False)

    def _to(self, device: torch.device) -> None:
        if device != self.state.device:
            self._memory, began = self._memory.to(device), len(self.state)
            self.state = self._memory[:began]
            self._where = None if self._where is None else self._where.to(device)

    def rows_at(self, staircase: int, position: int) -> Tensor:
        """The state ``[sources, D]`` at one position of a staircase."""
        assert self.layout is not None
        first = int(self.layout.position_start[staircase] + torch.searchsorted(self._positions[staircase], position))
        return self.state[int(self.layout.row_start[first]) : int(self.layout.row_start[first + 1])]

    def at(self, scale: Tensor | None) -> Tensor | None:
        """The entries of a trace's ``[P]`` or ``[P, ...]`` at the positions of the layout."""
        return scale if scale is None or self._where is None else scale.index_select(0, self._where)

    def finish(self, index: int, trace: Trace) -> None:
        """Propagate the state through what layer ``index`` has behind its MLP, in place: a branch, and a factor.

        Arguments as for :meth:`attention`.
        """
        layer = self.bound.layers[index]
        if self.layout is None:
            return
        with backends.record(self.served):
            self._to(layer.device)
            branch, scalar = late_branch(self, layer, trace), layer.scalar
            if branch is not None:
                self._through([branch])
            if scalar is not None:
                self.state *= scalar.to(self.state)

    def _through(self, through: Sequence[Branch]) -> None:
        """Add to the state what branches give that all read what it is before."""
        for block in self._cut.of_positions:
            positions = slice(block.first, block.last)
            in_trace = positions if self._where is None else self._where[positions]
            # later branches, and later blocks of neurons, read what the state was before the first one's update
            operands: list[tuple[Norm | None, Tensor]] = []
            for branch in through:
                if not any(norm is branch.norm for norm, _ in operands):
                    scale = None if branch.scale is None else branch.scale[positions]
                    rows = self.state[block.begin : block.end]
                    operands.append((branch.norm, self.normed(branch.norm, scale, block.layout, rows)))
            for branch in through:
                branch.add(block, next(operand for norm, operand in operands if norm is branch.norm), in_trace)
        for branch in through:
            branch.add_bias()

    def normed(
        self,
        norm: Norm | None,
        scale: Tensor | None,
        layout: SourceLayout,
        state: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Rows of a state through a norm, ``[R', D]`` in the dtype of the products, for the positions of ``layout``."""
        backend, gamma = backends.named_for("normed", self.sharing.backend), None if norm is None else norm.gamma()
        return normed(
            state,
            layout,
            scale=scale,
            weight=None if gamma is None else gamma.to(state.device),
            centred=norm is not None and norm.is_centred,
            rows=rows,
            out=state.new_empty(layout.rows, state.shape[1], dtype=self.product_dtype),
            backend=backend,
        )

    def add(self, operand: Tensor, weight: Tensor, state: Tensor, rows: Tensor | None = None) -> None:
        """Add a projection's output to rows of the state, a run of rows at a time: what waits to be added takes memory."""
        backend = backends.named_for("residual_update", self.sharing.backend)
        for begin in range(0, len(operand), self.blocks.run):
            run = slice(begin, begin + self.blocks.run)
            added = (state[run], None) if rows is None else (state, rows[run])
            residual_update(added[0], operand[run], weight, rows=added[1], backend=backend)

    def add_bias(self, bias: Tensor) -> None:
        """Add a sublayer's output bias, ``[D]`` or ``[P, D]`` by position of the trace, to the bias source."""
        assert self.layout is not None
        where = self._where if bias.dim() == 2 else None
        self.state[bias_rows(self.layout, self.state)] += bias if where is None else bias[where]


class _Mixing:
    """One mixer of a layer on blocks of sources."""

    def __init__(self, propagation: Propagation, layer: Layer, trace: Trace, mixer: Mixer, own: MixerTrace) -> None:
        assert own.pattern is not None
        self.propagation, self.layer, self.mixer = propagation, layer, mixer
        self.pattern = with_rows_in_runs(own.pattern, traits(own.pattern.device).keys)
        self.scale = propagation.at(trace.scales.get("attention_norm"))
        self.query_scale = propagation.at(trace.scales.get("attention_post_norm"))
        self.latent_scale = propagation.at(own.latent_scale)
        self.value_scale = propagation.at(own.value_scale)  # [P, K·d]
        self.mix_scale = propagation.at(own.mix_scale)  # [P, H·d]
        dtype, state_dtype = propagation.product_dtype, propagation.state.dtype
        self.taken = own.values  # [P, K·d]
        self.output_weight = folded(mixer.output.weight, layer.attention_post_norm, dtype)  # [D, H·d]
        if mixer.values_of is not None:
            return
        self.value_weight = mixer.value.weight.to(dtype)  # [K·d, D] or, behind a latent projection, [K·d, rank]
        self.latent_weight = None if mixer.latent is None else mixer.latent.weight.to(dtype)  # [rank, D]
        first = mixer.latent or mixer.value  # which reads the residual stream
        self.first_constant = constant_of(first, layer.attention_norm, state_dtype)
        self.constant = None
        if mixer.latent is not None:
            self.constant = constant_of(mixer.value, mixer.latent_norm, state_dtype)

    def values(self, block: _SourceBlock) -> Tensor:  # [R_block, K·d]
        propagation, rows = self.propagation, block.rows_on(self.propagation.state.device)
        values = self.value_weight.new_empty(block.layout.rows, len(self.value_weight))
        for run in block.runs:
            held = slice(run.begin, run.end)
            positions = slice(run.first, run.last)
            state = propagation.state[held] if rows is None else propagation.state
            scale = None if self.scale is None else self.scale[positions]
            normed = propagation.normed(
                self.layer.attention_norm, scale, run.layout, state, None if rows is None else rows[held]
            )
            if self.latent_weight is not None:
                normed = self._latent(normed, self.latent_weight, run, positions, block.has_bias_source)
            torch.mm(normed, self.value_weight.T, out=values[held])
        for constant in (self.constant, None if self.latent_weight is not None else self.first_constant):
            if constant is not None and block.has_bias_source:
                add_constant(values, constant, block.layout)
        if self.mixer.recurrence is not None:
            return self._convolved(values, self.mixer.recurrence, block)
        if self.value_scale is not None:
            self._scale(values, self.value_scale, block)
        return values

    def _scale(self, rows: Tensor, scale: Tensor, block: _SourceBlock) -> None:
        """Multiply a block's rows ``[R_block, n]`` by the frozen ``scale`` ``[P, n]`` of their positions, in place."""
        for run in block.runs:
            where = run.layout.position_of_row(rows.device)
            rows[run.begin : run.end] *= scale[run.first : run.last].to(rows.dtype)[where]

    def _convolved(self, values: Tensor, recurrence: Recurrence, block: _SourceBlock) -> Tensor:  # [R_block, K·d]
        """The values of a recurrence: each source's own behind the convolution, times what the SiLU let through."""
        assert self.value_scale is not None
        taps = recurrence.taps().to(values.dtype)
        out = convolved(values, taps, block.layout.rows_before(taps.shape[1] - 1, values.device))
        bias = recurrence.taps_bias()
        if bias is not None and block.has_bias_source:
            add_constant(out, bias, block.layout)
        self._scale(out, self.value_scale, block)
        return out

    def _latent(self, normed: Tensor, weight: Tensor, run: _PositionBlock, positions: slice, has_bias: bool) -> Tensor:
        """What the value projection reads of normed rows ``[R', D]``: latent vectors after the norm, ``[R', rank]``."""
        latent = matmul(normed, weight).to(self.propagation.state.dtype)
        if self.first_constant is not None and has_bias:
            add_constant(latent, self.first_constant, run.layout)
        scale = None if self.latent_scale is None else self.latent_scale[positions]
        return self.propagation.normed(self.mixer.latent_norm, scale, run.layout, latent)

    def mix(self, block: _SourceBlock, values: Tensor, kept: _Kept | None, narrowed: bool = False) -> None:
        """Mix a block's values and add the result to the state; with ``kept``, only to the kept rows.

        ``narrowed``: the state holds only the kept rows.
        """
        state, heads = self.propagation.state, self.mixer.num_heads
        mixed = mix_values(
            self.pattern,
            values,
            block.layout,
            kv_heads=values.shape[1] // (self.output_weight.shape[1] // heads),
            query_scale=self.query_scale,
            backend=self.propagation.sharing.backend,
        )  # [R_block, H·d]
        if self.mix_scale is not None:
            self._scale(mixed, self.mix_scale, block)
        rows = block.rows_on(state.device)
        if kept is not None:
            picked, which = kept.of(rows)
            mixed, rows = mixed.index_select(0, picked), which if narrowed else kept.rows[which]
        self.propagation.add(mixed, self.output_weight, state, rows)

    def add_bias(self, trace: Trace) -> None:
        """Add the output projection's bias to the bias source, through the norm on the output if there is one."""
        bias, norm, scale = (
            self.mixer.output.bias,
            self.layer.attention_post_norm,
            trace.scales.get("attention_post_norm"),
        )
        if bias is not None:
            bias = bias.to(self.propagation.state.dtype)
            bias = bias if norm is None or scale is None else norm.weighted(bias) * scale[:, None]
            self.propagation.add_bias(bias)
