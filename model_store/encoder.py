"""The forward, embeddings to head, top to bottom; training and serving both run this file.

Packed tokens in, one row of class logits per sequence out. BERT, RoBERTa, XLM-R, DistilBERT and
ELECTRA differ by `EncoderConfig` values alone. Attention runs over the whole mixed batch; the
feed-forward networks run per segment, each with its own task's neurons; a task with attention of
its own is a batch by itself. Knows nothing of tokenization, of files, of devices (see `ops.py`) or
of where a batch comes from.

Three exact savings, each the same result for less work:

* a prompt's embedding and its layer-0 queries, keys and values are computed once per task;
* the last layer computes queries, output projection and FFN only at rows that a head reads;
* a verbalizer computes only its label tokens' rows of the MLM decoder.

Letters: `B` sequences, `M` text tokens, `N` packed tokens, `R` read rows, `H` hidden, `E` embedding
width, `A` heads, `F` FFN width, `K` kept neurons, `P` prompt length, `C` classes, `L` layers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model_store.backbone import EncoderConfig
from model_store.ops import Ffn, Linear, Norm, Ops, Run, activate
from model_store.packing import Batch, Read
from model_store.plan import (
    UNCHANGED,
    Changes,
    Layer,
    LinearHead,
    Part,
    Plan,
    PromptCache,
    VerbalizerHead,
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
        for number in range(self.config.layers - 1):
            x = self._layer(number, layers[number], x, qkv, batch, plans)
            qkv = None
        x = self._last_layer(layers[-1], x, qkv, batch, plans)
        return [
            self._head(_read(x, batch, number, plan.read), plan.head)
            for number, plan in enumerate(plans)
        ]

    def hidden_states(self, batch: Batch, plans: Sequence[Plan]) -> Tensor:
        """The last layer's output at every packed token, `[N, H]`: plain and untrimmed."""
        batch = batch.to(self.ops.device)
        layers = self._layers_of(plans)
        x, qkv = self._embed(batch, plans, layers[0])
        for number, layer in enumerate(layers):
            x = self._layer(number, layer, x, qkv, batch, plans)
            qkv = None
        return x

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """The whole MLM head on `hidden [n, H]`: `[n, V]` in fp32."""
        every = torch.arange(self.config.vocabulary)
        return self._head(hidden, self.verbalizer(every))

    def _layers_of(self, plans: Sequence[Plan]) -> tuple[Layer, ...]:
        own = plans[0].layers
        assert all(plan.layers is own for plan in plans), "plans of one batch share their layers"
        return own or self._layers

    def _embed(
        self, batch: Batch, plans: Sequence[Plan], first: Layer
    ) -> tuple[Tensor, Tensor | None]:
        """Layer 0's input `[N, H]`, and its `qkv [N, 3ad]` where prompts make it worth having."""
        words = self.tensors["embeddings.word"][batch.token_ids]
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
        batch: Batch,
        plans: Sequence[Plan],
    ) -> Tensor:
        if qkv is None:
            qkv = self._qkv(x, layer)
        q, k, v = qkv.chunk(3, dim=1)
        ranges = [segment.rows for segment in batch.segments]
        x = self._attention(number, layer, q, k, v, batch.runs, x, plans)
        return self.ops.add_norm(self._ffn(number, x, ranges, plans), x, layer.ffn_norm)

    def _last_layer(
        self,
        layer: Layer,
        x: Tensor,
        qkv: Tensor | None,
        batch: Batch,
        plans: Sequence[Plan],
    ) -> Tensor:
        """The last layer at the read rows alone, `[R, H]`."""
        number = self.config.layers - 1
        read = x[batch.read_rows]
        if qkv is None:
            to_q, to_kv = layer.projections
            q = self.ops.linear(read, to_q)
            k, v = self.ops.linear(x, to_kv).chunk(2, dim=1)
        else:  # a one-layer encoder with prompts
            q, k, v = qkv.chunk(3, dim=1)
            q = q[batch.read_rows]
        x = self._attention(number, layer, q, k, v, batch.read_runs, read, plans)
        ranges = [segment.reads for segment in batch.segments]
        return self.ops.add_norm(self._ffn(number, x, ranges, plans), x, layer.ffn_norm)

    def _attention(
        self,
        number: int,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        runs: Sequence[Run],
        residual: Tensor,
        plans: Sequence[Plan],
    ) -> Tensor:
        """Attention, its output projection and its norm; q `[nq, ad]` -> `[nq, H]`."""
        q = _gated(plans, number, "q", q)
        k = _gated(plans, number, "k", k)
        v = _gated(plans, number, "v", v)
        # Without a head left, the projection gives its bias.
        attended = self.ops.attention(q, k, v, runs, layer.heads) if layer.heads else q
        attended = _gated(plans, number, "heads", attended)
        out = _gated(plans, number, "o", self.ops.linear(attended, layer.attention_out))
        return self.ops.add_norm(out, residual, layer.attention_norm)

    def _ffn(self, layer: int, x: Tensor, ranges: Sequence[slice], plans: Sequence[Plan]) -> Tensor:
        """Each segment's rows through its own task's neurons, `[n, H] -> [n, H]`."""
        outputs = []
        for rows, plan in zip(ranges, plans, strict=True):
            ffn = plan.ffn[layer]
            inner = self.ops.linear(x[rows], ffn.inner)
            if ffn.scale is not None:
                inner = inner * ffn.scale
            inner = _gated([plan], layer, "ffn_in", inner)
            outputs.append(_gated([plan], layer, "ffn_out", self.ops.linear(inner, ffn.outer)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _head(self, read: Tensor, head: LinearHead | VerbalizerHead) -> Tensor:
        if isinstance(head, VerbalizerHead):
            assert self._mlm_dense is not None, "a verbalizer needs an MLM head"
            x = self.ops.linear(read, self._mlm_dense)
            x = activate(x, self.config.mlm_activation)
            read = self.ops.add_norm(x, torch.zeros_like(x), self._norm("mlm.norm"))
        return torch.nn.functional.linear(read.float(), head.weight, head.bias)

    def _linear(self, name: str) -> Linear:
        return self.ops.pack_linear(self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, name: str) -> Norm:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return Norm(weight, bias, self.config.norm_eps)


def _gated(plans: Sequence[Plan], layer: int, part: Part, x: Tensor) -> Tensor:
    """`x`, or what the plan's gate makes of it; a plan with a gate is alone in its batch."""
    if plans[0].gate is None:
        return x
    assert len(plans) == 1, "a plan with a gate shares its batch with others"
    return plans[0].gate(layer, part, x)


def _read(x: Tensor, batch: Batch, number: int, read: Read) -> Tensor:
    """Segment `number`'s read vectors: its rows of `x [R, H]`, or their mean per sequence."""
    segment = batch.segments[number]
    rows = x[segment.reads]
    if read != "mean":
        return rows
    count = segment.sequences.stop - segment.sequences.start
    sequence = batch.read_sequence[segment.reads] - segment.sequences.start
    # In fp32: a sum over hundreds of bf16 rows would lose the small ones.
    total = rows.new_zeros(count, x.shape[1], dtype=torch.float32)
    total = total.index_add(0, sequence, rows.float())
    return total / torch.bincount(sequence, minlength=count)[:, None]
