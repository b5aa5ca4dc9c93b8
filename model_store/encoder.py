"""The forward, embeddings to head, top to bottom; training and serving both run this file.

Packed tokens in, one row of class logits per sequence out. BERT, RoBERTa, XLM-R, DistilBERT and
ELECTRA differ by `EncoderConfig` values alone. Attention runs over the whole mixed batch; the
feed-forward networks run per segment, each with its own task's neurons. A task with attention of
its own is a batch by itself, or has its changes beside the shared layers (`Ops.shares_layers`).
Knows nothing of tokenization, of files, of devices (see `ops.py`) or of where a batch comes from.

Three exact savings, each the same result for less work:

* a prompt's embedding and its layer-0 queries, keys and values are computed once per task;
* the last layer computes queries, output projection and FFN only at rows that a head reads;
* a verbalizer computes only its label tokens' rows of the MLM decoder.

Letters: `B` sequences, `M` text tokens, `N` packed tokens, `R` read rows, `H` hidden, `E` embedding
width, `A` heads, `F` FFN width, `K` kept neurons, `P` prompt length, `C` classes, `L` layers.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from model_store.backbone import EncoderConfig
from model_store.ops import (
    Adapter,
    Ffn,
    Groups,
    Linear,
    Norm,
    NormName,
    Ops,
    Projection,
    Spans,
    Work,
    activate,
    inner_of,
    outer_of,
)
from model_store.packing import Batch
from model_store.plan import (
    UNCHANGED,
    Changes,
    Gate,
    Layer,
    LinearHead,
    Part,
    Plan,
    PromptCache,
    VerbalizerHead,
    adapter,
    ffn_beside,
    merged,
    norm_with,
)


class Encoder:
    """A backbone on one device in one precision; immutable, and shared by all tasks."""

    def __init__(self, config: EncoderConfig, tensors: Mapping[str, Tensor], ops: Ops) -> None:
        """Tensors as in `EncoderConfig.shapes`; those in the ops' precision are not copied."""
        self.config = config
        self.ops = ops
        self.tensors = {
            name: tensor.to(device=ops.device, dtype=ops.dtype) for name, tensor in tensors.items()
        }
        self._layers = tuple(self.layer(number) for number in range(config.layers))
        self._whole_ffns: tuple[Ffn, ...] = ()
        if ops.shares_layers:
            self._whole_ffns = tuple(self.ffn(number) for number in range(config.layers))
        self._projection = None
        if config.embedding != config.hidden:
            self._projection = self._linear("embeddings.projection")
        self._mlm_dense = self._linear("mlm.dense") if config.has_mlm else None

    # -- Getting ready ----------------------------------------------------------------------------

    def layer(
        self, number: int, heads: Tensor | None = None, changes: Changes = UNCHANGED
    ) -> Layer:
        """Layer `number`'s attention and norms, cut down to `heads [a]`, with changes merged in."""
        qkv, out = f"layers.{number}.qkv", f"layers.{number}.attention_out"
        weight, bias = self.tensors[f"{qkv}.weight"], self.tensors[f"{qkv}.bias"]
        w_out = self.tensors[f"{out}.weight"]
        count = self.config.heads
        if heads is not None:
            width = self.config.hidden // count
            rows = torch.arange(self.config.hidden).view(count, width)[heads.long()].flatten()
            rows = rows.to(weight.device)
            weight = weight.view(3, -1, self.config.hidden)[:, rows].flatten(0, 1)
            bias = bias.view(3, -1)[:, rows].flatten()
            w_out, count = w_out[:, rows], len(heads)
        if f"delta.{number}.q.down" in changes:
            parts = zip(weight.chunk(3), "qkv", strict=True)
            weight = torch.cat(
                [merged(rows, changes, f"delta.{number}.{part}") for rows, part in parts]
            )
        # The last layer's queries are wanted for other rows than its keys and values.
        queries = len(weight) // 3
        last = number == self.config.layers - 1
        groups = [slice(queries), slice(queries, None)] if last else [slice(None)]
        return Layer(
            tuple(self.ops.pack_linear(weight[group], bias[group]) for group in groups),
            self.ops.pack_linear(
                merged(w_out, changes, f"delta.{number}.o"), self.tensors[f"{out}.bias"]
            ),
            count,
            norm_with(
                self._norm(f"layers.{number}.attention_norm"), changes, f"norm.{number}.attention"
            ),
            norm_with(self._norm(f"layers.{number}.ffn_norm"), changes, f"norm.{number}.ffn"),
        )

    def ffn(self, layer: int, neurons: Tensor | None = None, changes: Changes = UNCHANGED) -> Ffn:
        """Layer `layer`'s feed-forward network, cut down to `neurons [K]`, with changes merged in.

        Scales go into the rows of `w_out`, whose neurons are rows: `[K, H]`.
        """
        name = f"layers.{layer}"
        w_in, b_in = self.tensors[f"{name}.ffn_in.weight"], self.tensors[f"{name}.ffn_in.bias"]
        w_out, b_out = self.tensors[f"{name}.ffn_out.weight"], self.tensors[f"{name}.ffn_out.bias"]
        if neurons is not None:
            rows = neurons.to(device=w_in.device, dtype=torch.long)
            w_in, b_in, w_out = w_in[rows], b_in[rows], w_out[rows]
        w_in = merged(w_in, changes, f"delta.{layer}.ffn_in")
        w_out = merged(w_out.t(), changes, f"delta.{layer}.ffn_out").t()
        scale, shift = changes.get(f"ffn.{layer}.scale"), changes.get(f"ffn.{layer}.bias")
        if scale is not None:
            w_out = (w_out.float() * scale.to(w_out.device).float()[:, None]).to(w_out.dtype)
        if shift is not None:
            b_out = (b_out.float() + shift.to(b_out.device).float()).to(b_out.dtype)
        return self.ops.pack_ffn(w_in, b_in, w_out, b_out, self.config.activation)

    def ffn_beside(self, layer: int, neurons: Tensor, changes: Changes = UNCHANGED) -> Ffn:
        """The same network, its neurons read from the backbone by number: `neurons [K]`."""
        return ffn_beside(self._whole_ffns[layer], neurons, changes, layer)

    def adapter(self, number: int, heads: Tensor | None, changes: Changes) -> Adapter:
        """What a task with only `heads [a]` and these changes has beside layer `number`."""
        norm = self._norm(f"layers.{number}.ffn_norm")
        last = number == self.config.layers - 1
        return adapter(changes, number, heads, norm, self.config.heads, last=last)

    def verbalizer(self, token_ids: Tensor) -> VerbalizerHead:
        """The MLM decoder's rows of `token_ids [C]`."""
        assert self.config.has_mlm, "a verbalizer needs an MLM head"
        decoder = self.tensors.get("mlm.decoder.weight", self.tensors["embeddings.word"])
        bias = self.tensors["mlm.decoder.bias"]
        rows = token_ids.to(device=bias.device, dtype=torch.long)
        return VerbalizerHead(decoder[rows].float(), bias[rows].float())

    def prompt_cache(self, prompt: Tensor, first: Layer | None = None) -> PromptCache:
        """Layer 0's view of `prompt [P, E]`; `first`: a task's own layer 0."""
        hidden = self._embed_prompt(prompt)
        return PromptCache(hidden, self._qkv(hidden, first or self._layers[0]))

    def word_embeddings(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding table in fp32, `[n, E]`: where prompt vectors may start from."""
        return self.tensors["embeddings.word"][token_ids.to(self.ops.device)].float()

    # -- The forward ------------------------------------------------------------------------------

    def forward(self, batch: Batch, plans: Sequence[Plan]) -> list[Tensor]:
        """Class logits in fp32, one `[b, C]` per segment; sequences in packed order.

        `plans[s]` serves segment s of `batch`, which must have been packed with its layout. A plan
        with layers of its own must be the only one.
        """
        batch = batch.to(self.ops.device)
        layers = self._layers_of(plans)
        x, qkv = self._embed(batch, plans, layers[0])
        rows, gate = self._rows(batch, plans), _gate(plans)
        reads = self.ops.group([segment.reads for segment in batch.segments], plans, rows)
        work = Work(batch.spans, batch.read_spans, batch.read_rows, rows, reads)
        if layers is self._layers and gate is None:
            read = self.ops.launch(self._through, x, qkv, work)
        else:
            read = self._through_layers(layers, x, qkv, work, gate)
        return self._heads(_sequence_means(read, batch), batch, plans)

    def hidden_states(self, batch: Batch, plans: Sequence[Plan]) -> Tensor:
        """The last layer's output at every packed token, `[N, H]`: plain and untrimmed."""
        batch = batch.to(self.ops.device)
        layers = self._layers_of(plans)
        x, qkv = self._embed(batch, plans, layers[0])
        rows, gate = self._rows(batch, plans), _gate(plans)
        for number, layer in enumerate(layers):
            x = self._layer(number, layer, x, qkv, batch.spans, rows, gate)
            qkv = None
        return x

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """The whole MLM head on `hidden [n, H]`: `[n, V]` in fp32."""
        every = torch.arange(self.config.vocabulary)
        head = self.verbalizer(every)
        return torch.nn.functional.linear(self._to_words(hidden), head.weight, head.bias)

    def _through(self, x: Tensor, qkv: Tensor | None, work: Work) -> Tensor:
        return self._through_layers(self._layers, x, qkv, work, None)

    def _through_layers(
        self,
        layers: Sequence[Layer],
        x: Tensor,
        qkv: Tensor | None,
        work: Work,
        gate: Gate | None,
    ) -> Tensor:
        """`[N, H] -> [R, H]`"""
        for number in range(self.config.layers - 1):
            x = self._layer(number, layers[number], x, qkv, work.spans, work.rows, gate)
            qkv = None
        return self._last_layer(layers[-1], x, qkv, work, gate)

    def _rows(self, batch: Batch, plans: Sequence[Plan]) -> Groups:
        return self.ops.group([segment.rows for segment in batch.segments], plans)

    def _layers_of(self, plans: Sequence[Plan]) -> tuple[Layer, ...]:
        own = plans[0].layers
        assert all(plan.layers is own for plan in plans), "plans of one batch share their layers"
        return own or self._layers

    def _embed(
        self, batch: Batch, plans: Sequence[Plan], first: Layer
    ) -> tuple[Tensor, Tensor | None]:
        """Layer 0's input `[N, H]`, and its `qkv [N, 3ad]` where prompts make it worth having."""
        words = self.tensors["embeddings.word"][batch.token_ids]
        if self.ops.shares_layers and batch.source is not None:
            return self._embed_together(words, batch, plans)[batch.source], None
        text = self._finish_embedding(words, batch.positions, batch.token_types)  # [M, H]
        if batch.source is None:
            return text, None
        qkv = self._qkv(text, first)
        caches = [
            plan.prompt_cache or self.prompt_cache(plan.prompt, first)
            for plan in plans
            if plan.prompt is not None
        ]
        hidden = torch.cat([text, *(cache.hidden for cache in caches)])
        qkv = torch.cat([qkv, *(cache.qkv for cache in caches)])
        return hidden[batch.source], qkv[batch.source]

    def _embed_together(self, words: Tensor, batch: Batch, plans: Sequence[Plan]) -> Tensor:
        """Text rows and every segment's prompt rows at once: however many tasks, a few launches."""
        prompts = [plan.prompt for plan in plans if plan.prompt is not None]
        places = torch.cat([torch.arange(1, len(prompt) + 1) for prompt in prompts])
        positions = torch.cat([batch.positions, places.to(words.device)])
        types = torch.nn.functional.pad(batch.token_types, (0, len(places)))
        words = torch.cat([words, *(prompt.to(words) for prompt in prompts)])
        return self._finish_embedding(words, positions, types)

    def _embed_prompt(self, prompt: Tensor) -> Tensor:
        positions = torch.arange(1, len(prompt) + 1, device=self.ops.device)
        vectors = prompt.to(device=self.ops.device, dtype=self.ops.dtype)
        return self._finish_embedding(vectors, positions, torch.zeros_like(positions))

    def _finish_embedding(self, words: Tensor, positions: Tensor, token_types: Tensor) -> Tensor:
        x = words + self.tensors["embeddings.position"][positions + self.config.position_offset]
        # DistilBERT has no token types: its norm then adds nothing to the sum.
        types = self.tensors.get("embeddings.token_type")
        residual = torch.zeros_like(x) if types is None else types[token_types]
        x = self.ops.add_norm(x, residual, self._norm("embeddings.norm"))
        return x if self._projection is None else self.ops.linear(x, self._projection)

    def _qkv(self, x: Tensor, layer: Layer) -> Tensor:
        """`[n, H] -> [n, 3ad]`"""
        parts = [self.ops.linear(x, projection) for projection in layer.projections]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _layer(
        self,
        number: int,
        layer: Layer,
        x: Tensor,
        qkv: Tensor | None,
        spans: Spans,
        rows: Groups,
        gate: Gate | None,
    ) -> Tensor:
        if qkv is None:
            qkv = self._qkv(x, layer)
        if rows.adapted:
            qkv = self._adapt_qkv(number, layer, x, qkv, rows)
        x = self._attention(number, layer, qkv.chunk(3, dim=1), spans, x, rows, gate)
        return self._add_norm(
            number, "ffn", self._ffn(number, x, rows, gate), x, layer.ffn_norm, rows
        )

    def _last_layer(
        self, layer: Layer, x: Tensor, qkv: Tensor | None, work: Work, gate: Gate | None
    ) -> Tensor:
        """The last layer at the read rows alone, `[R, H]`."""
        number = self.config.layers - 1
        read = x[work.read_rows]
        if qkv is None:
            to_q, to_kv = layer.projections
            q, kv = self.ops.linear(read, to_q), self.ops.linear(x, to_kv)
            if work.rows.adapted:
                q = self.ops.adapt(number, "q", read, q, work.reads)
                kv = self.ops.adapt(number, "kv", x, kv, work.rows)
            k, v = kv.chunk(2, dim=1)
        else:  # a one-layer encoder with prompts
            q, k, v = qkv.chunk(3, dim=1)
            q = q[work.read_rows]
        x = self._attention(number, layer, (q, k, v), work.read_spans, read, work.reads, gate)
        return self._add_norm(
            number, "ffn", self._ffn(number, x, work.reads, gate), x, layer.ffn_norm, work.reads
        )

    def _adapt_qkv(self, number: int, layer: Layer, x: Tensor, qkv: Tensor, rows: Groups) -> Tensor:
        """`qkv [N, 3ad]` with each task's deltas on it; the last layer has them in two parts."""
        if len(layer.projections) == 1:
            return self.ops.adapt(number, "qkv", x, qkv, rows)
        q, kv = qkv.tensor_split([qkv.shape[1] // 3], dim=1)
        names: tuple[tuple[Projection, Tensor], ...] = (("q", q), ("kv", kv))
        return torch.cat([self.ops.adapt(number, name, x, y, rows) for name, y in names], dim=1)

    def _attention(
        self,
        number: int,
        layer: Layer,
        qkv: Sequence[Tensor],
        spans: Spans,
        residual: Tensor,
        groups: Groups,
        gate: Gate | None,
    ) -> Tensor:
        """Attention, its output projection and its norm; q `[nq, ad]` -> `[nq, H]`."""
        parts: tuple[Part, ...] = ("q", "k", "v")
        q, k, v = (_gated(gate, number, part, x) for part, x in zip(parts, qkv, strict=True))
        # Without a head left, the projection gives its bias.
        attended = self.ops.attention(q, k, v, spans, layer.heads) if layer.heads else q
        if groups.adapted:
            attended = self.ops.keep_heads(number, attended, groups)
        attended = _gated(gate, number, "heads", attended)
        out = self.ops.linear(attended, layer.attention_out)
        if groups.adapted:
            out = self.ops.adapt(number, "o", attended, out, groups)
        out = _gated(gate, number, "o", out)
        return self._add_norm(number, "attention", out, residual, layer.attention_norm, groups)

    def _ffn(self, layer: int, x: Tensor, groups: Groups, gate: Gate | None) -> Tensor:
        """Each segment's rows through its own task's neurons, `[n, H] -> [n, H]`."""
        if gate is None:
            return self.ops.ffn(layer, x, groups)
        ffn = groups.networks[0].ffn[layer]
        inner = gate(layer, "ffn_in", inner_of(self.ops, x, ffn))
        return gate(layer, "ffn_out", outer_of(self.ops, inner, ffn))

    def _add_norm(
        self, number: int, name: NormName, x: Tensor, residual: Tensor, norm: Norm, groups: Groups
    ) -> Tensor:
        if groups.adapted:
            return self.ops.add_own_norm(number, name, x, residual, norm, groups)
        return self.ops.add_norm(x, residual, norm)

    def _heads(self, vectors: Tensor, batch: Batch, plans: Sequence[Plan]) -> list[Tensor]:
        """Every task's logits from its sequences' vectors `[B, H]`; heads of a kind together."""
        logits: dict[int, Tensor] = {}
        for kind in (LinearHead, VerbalizerHead):
            chosen = [number for number, plan in enumerate(plans) if isinstance(plan.head, kind)]
            if not chosen:
                continue
            x, ranges = _taken(vectors, [batch.segments[number].sequences for number in chosen])
            if kind is VerbalizerHead:
                x = self._to_words(x)
            heads = [(plans[number].head.weight, plans[number].head.bias) for number in chosen]
            logits |= zip(chosen, self.ops.classify(x, ranges, heads), strict=True)
        return [logits[number] for number in range(len(plans))]

    def _to_words(self, x: Tensor) -> Tensor:
        """The MLM head up to its decoder: `[n, H] -> [n, E]` in fp32."""
        assert self._mlm_dense is not None, "a verbalizer needs an MLM head"
        x = self.ops.linear(x.to(self.ops.dtype), self._mlm_dense)
        x = activate(x, self.config.mlm_activation)
        return self.ops.add_norm(x, torch.zeros_like(x), self._norm("mlm.norm")).float()

    def _linear(self, name: str) -> Linear:
        return self.ops.pack_linear(self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, name: str) -> Norm:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return Norm(weight, bias, self.config.norm_eps)


def _gate(plans: Sequence[Plan]) -> Gate | None:
    """The batch's gate; a plan with a gate is alone in its batch."""
    gates = [plan.gate for plan in plans if plan.gate is not None]
    assert not gates or len(plans) == 1, "a plan with a gate shares its batch with others"
    return gates[0] if gates else None


def _gated(gate: Gate | None, layer: int, part: Part, x: Tensor) -> Tensor:
    """`x`, or what the gate makes of it."""
    return x if gate is None else gate(layer, part, x)


def _taken(x: Tensor, ranges: Sequence[slice]) -> tuple[Tensor, list[slice]]:
    """The rows of `ranges`, which may leave gaps, one after another; and where they are then."""
    sizes = [rows.stop - rows.start for rows in ranges]
    ends = list(accumulate(sizes))
    if ends[-1] < len(x):
        x = torch.cat([x[rows] for rows in ranges])
    return x, [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _sequence_means(x: Tensor, batch: Batch) -> Tensor:
    """One vector per sequence, `[B, H]`, from the read rows `[R, H]`: the mean of its own."""
    if len(x) == batch.sequences:
        return x
    # In fp32: a sum over hundreds of bf16 rows would lose the small ones.
    total = x.new_zeros(batch.sequences, x.shape[1], dtype=torch.float32)
    total = total.index_add(0, batch.read_sequence, x.float())
    starts = batch.read_spans.query_starts
    return total / (starts[1:] - starts[:-1])[:, None]
