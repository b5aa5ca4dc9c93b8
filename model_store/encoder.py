"""The forward, embeddings to head, top to bottom; training and serving both run this file.

Packed tokens in, one row of class logits per sequence out. BERT, RoBERTa, XLM-R, DistilBERT and
ELECTRA differ by `EncoderConfig` values alone. Attention runs over the whole mixed batch; the
feed-forward networks run per segment, each with its own task's neurons. Knows nothing of
tokenization, of files, of devices (see `ops.py`) or of where a batch comes from.

Three exact savings, each the same result for less work:

* a prompt's embedding and its layer-0 queries, keys and values are computed once per task;
* the last layer computes queries, output projection and FFN only at rows that a head reads;
* a verbalizer computes only its label tokens' rows of the MLM decoder.

Letters: `B` sequences, `M` text tokens, `N` packed tokens, `R` read rows, `H` hidden, `E` embedding
width, `A` heads, `F` FFN width, `K` kept neurons, `P` prompt length, `C` classes, `L` layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_store.backbone import EncoderConfig
from model_store.ops import Ffn, Linear, Norm, Ops, activate
from model_store.packing import Batch, Layout, Read


@dataclass(frozen=True)
class Layer:
    """One encoder layer's weights, made ready by `Ops`; its FFN is in the `Plan`."""

    qkv: Linear  # H -> 3H
    attention_out: Linear  # H -> H
    attention_norm: Norm
    ffn_norm: Norm


@dataclass(frozen=True)
class PromptCache:
    """A prompt's rows as they enter layer 0: the same for every request of the task."""

    hidden: Tensor  # [P, H]
    qkv: Tensor  # [P, 3H]


@dataclass(frozen=True)
class LinearHead:
    """`logits = read @ weight.T + bias`, in fp32."""

    weight: Tensor  # [C, H]
    bias: Tensor  # [C]


@dataclass(frozen=True)
class VerbalizerHead:
    """The MLM decoder's rows of the label tokens, in fp32."""

    weight: Tensor  # [C, E]
    bias: Tensor  # [C]


@dataclass(frozen=True)
class Plan:
    """An overlay made ready to run: per-layer slices, prompt, head.

    `gates` multiply each neuron's activation, `[K]` or `[rows, K]` per layer; only localization
    gives them. Their gradient at 1 is the attribution, and gates of 0 and 1 are the pruned network.
    """

    read: Read
    head: LinearHead | VerbalizerHead
    ffn: tuple[Ffn, ...]
    prompt: Tensor | None = None  # [P, E]
    prompt_cache: PromptCache | None = None
    gates: tuple[Tensor, ...] | None = None

    @property
    def layout(self) -> Layout:
        """What `packing.pack` must know of this plan."""
        return Layout(0 if self.prompt is None else len(self.prompt), self.read)


class Encoder:
    """A backbone on one device in one precision; immutable, and shared by all tasks."""

    def __init__(self, config: EncoderConfig, tensors: Mapping[str, Tensor], ops: Ops) -> None:
        """Tensors as in `EncoderConfig.shapes`; those in the ops' precision are not copied."""
        self.config = config
        self.ops = ops
        self.tensors = {
            name: tensor.to(device=ops.device, dtype=ops.dtype) for name, tensor in tensors.items()
        }
        self._layers = tuple(
            Layer(
                self._linear(f"layers.{number}.qkv"),
                self._linear(f"layers.{number}.attention_out"),
                self._norm(f"layers.{number}.attention_norm"),
                self._norm(f"layers.{number}.ffn_norm"),
            )
            for number in range(config.layers)
        )
        # The last layer's queries are wanted for other rows than its keys and values.
        last = f"layers.{config.layers - 1}.qkv"
        weight, bias = self.tensors[f"{last}.weight"], self.tensors[f"{last}.bias"]
        self._last_q = ops.pack_linear(weight[: config.hidden], bias[: config.hidden])
        self._last_kv = ops.pack_linear(weight[config.hidden :], bias[config.hidden :])
        self._projection = None
        if config.embedding != config.hidden:
            self._projection = self._linear("embeddings.projection")
        self._mlm_dense = self._linear("mlm.dense") if config.has_mlm else None

    # -- Getting ready ----------------------------------------------------------------------------

    def ffn(self, layer: int, neurons: Tensor | None = None) -> Ffn:
        """Layer `layer`'s feed-forward network, cut down to `neurons [K]` where given."""
        name = f"layers.{layer}"
        w_in, b_in = self.tensors[f"{name}.ffn_in.weight"], self.tensors[f"{name}.ffn_in.bias"]
        w_out, b_out = self.tensors[f"{name}.ffn_out.weight"], self.tensors[f"{name}.ffn_out.bias"]
        if neurons is not None:
            rows = neurons.to(device=w_in.device, dtype=torch.long)
            w_in, b_in, w_out = w_in[rows], b_in[rows], w_out[rows]
        return self.ops.pack_ffn(w_in, b_in, w_out, b_out, self.config.activation)

    def verbalizer(self, token_ids: Tensor) -> VerbalizerHead:
        """The MLM decoder's rows of `token_ids [C]`."""
        assert self.config.has_mlm, "a verbalizer needs an MLM head"
        decoder = self.tensors.get("mlm.decoder.weight", self.tensors["embeddings.word"])
        bias = self.tensors["mlm.decoder.bias"]
        rows = token_ids.to(device=bias.device, dtype=torch.long)
        return VerbalizerHead(decoder[rows].float(), bias[rows].float())

    def prompt_cache(self, prompt: Tensor) -> PromptCache:
        """Layer 0's view of `prompt [P, E]`."""
        hidden = self._embed_prompt(prompt)
        return PromptCache(hidden, self.ops.linear(hidden, self._layers[0].qkv))

    def word_embeddings(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding table in fp32, `[n, E]`: where prompt vectors may start from."""
        return self.tensors["embeddings.word"][token_ids.to(self.ops.device)].float()

    # -- The forward ------------------------------------------------------------------------------

    def forward(self, batch: Batch, plans: Sequence[Plan]) -> list[Tensor]:
        """Class logits in fp32, one `[b, C]` per segment; sequences in packed order.

        `plans[s]` serves segment s of `batch`, which must have been packed with its layout.
        """
        batch = batch.to(self.ops.device)
        x, qkv = self._embed(batch, plans)
        for number in range(self.config.layers - 1):
            x = self._layer(number, x, qkv, batch, plans)
            qkv = None
        x = self._last_layer(x, qkv, batch, plans)
        return [
            self._head(_read(x, batch, number, plan.read), plan.head)
            for number, plan in enumerate(plans)
        ]

    def hidden_states(self, batch: Batch, plans: Sequence[Plan]) -> Tensor:
        """The last layer's output at every packed token, `[N, H]`: plain and untrimmed."""
        batch = batch.to(self.ops.device)
        x, qkv = self._embed(batch, plans)
        for number in range(self.config.layers):
            x = self._layer(number, x, qkv, batch, plans)
            qkv = None
        return x

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """The whole MLM head on `hidden [n, H]`: `[n, V]` in fp32."""
        every = torch.arange(self.config.vocabulary)
        return self._head(hidden, self.verbalizer(every))

    def _embed(self, batch: Batch, plans: Sequence[Plan]) -> tuple[Tensor, Tensor | None]:
        """Layer 0's input `[N, H]`, and its `qkv [N, 3H]` where prompts make that worth having."""
        words = self.tensors["embeddings.word"][batch.token_ids]
        text = self._finish_embedding(words, batch.positions, batch.token_types)  # [M, H]
        if batch.source is None:
            return text, None
        qkv = self.ops.linear(text, self._layers[0].qkv)
        caches = [
            plan.prompt_cache or self.prompt_cache(plan.prompt)
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

    def _layer(
        self, number: int, x: Tensor, qkv: Tensor | None, batch: Batch, plans: Sequence[Plan]
    ) -> Tensor:
        layer = self._layers[number]
        if qkv is None:
            qkv = self.ops.linear(x, layer.qkv)
        q, k, v = qkv.chunk(3, dim=1)
        attended = self.ops.attention(q, k, v, batch.runs, self.config.heads)
        x = self.ops.add_norm(
            self.ops.linear(attended, layer.attention_out), x, layer.attention_norm
        )
        ranges = [segment.rows for segment in batch.segments]
        return self.ops.add_norm(self._ffn(number, x, ranges, plans), x, layer.ffn_norm)

    def _last_layer(
        self, x: Tensor, qkv: Tensor | None, batch: Batch, plans: Sequence[Plan]
    ) -> Tensor:
        """The last layer at the read rows alone, `[R, H]`."""
        layer = self._layers[-1]
        read = x[batch.read_rows]
        if qkv is None:
            q = self.ops.linear(read, self._last_q)
            k, v = self.ops.linear(x, self._last_kv).chunk(2, dim=1)
        else:  # a one-layer encoder with prompts
            q, k, v = qkv.chunk(3, dim=1)
            q = q[batch.read_rows]
        attended = self.ops.attention(q, k, v, batch.read_runs, self.config.heads)
        x = self.ops.add_norm(
            self.ops.linear(attended, layer.attention_out), read, layer.attention_norm
        )
        ranges = [segment.reads for segment in batch.segments]
        return self.ops.add_norm(
            self._ffn(self.config.layers - 1, x, ranges, plans), x, layer.ffn_norm
        )

    def _ffn(self, layer: int, x: Tensor, ranges: Sequence[slice], plans: Sequence[Plan]) -> Tensor:
        """Each segment's rows through its own task's neurons, `[n, H] -> [n, H]`."""
        outputs = []
        for rows, plan in zip(ranges, plans, strict=True):
            ffn = plan.ffn[layer]
            inner = self.ops.linear(x[rows], ffn.inner)
            if plan.gates is not None:
                inner = inner * plan.gates[layer]
            outputs.append(self.ops.linear(inner, ffn.outer))
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
