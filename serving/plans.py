"""Keeps plans ready to run: the gathered and packed slices of each task, under a byte budget."""

from collections import OrderedDict

from model_store.artifact import Overlay
from model_store.encoder import Encoder
from model_store.ops import Linear, Norm
from model_store.plan import Plan


class PlanCache:
    """Plans by artifact digest, least recently used out first. For one thread: the engine's."""

    def __init__(self, encoder: Encoder, budget_bytes: int) -> None:
        self._encoder = encoder
        self._budget = budget_bytes
        self._plans: OrderedDict[str, tuple[Plan, int]] = OrderedDict()
        self.bytes = 0

    def get(self, digest: str, overlay: Overlay) -> Plan:
        """The plan of an overlay, built if it is not there. The newest stays, however large."""
        known = self._plans.get(digest)
        if known is not None:
            self._plans.move_to_end(digest)
            return known[0]
        plan = overlay.plan(self._encoder)
        size = plan_bytes(plan)
        self._plans[digest] = plan, size
        self.bytes += size
        while self.bytes > self._budget and len(self._plans) > 1:
            _, (_, freed) = self._plans.popitem(last=False)
            self.bytes -= freed
        return plan


def plan_bytes(plan: Plan) -> int:
    """Memory of a plan's own tensors: slices, layers, prompt and what is cached of it, head."""
    maps: list[Linear | Norm] = [linear for ffn in plan.ffn for linear in (ffn.inner, ffn.outer)]
    for layer in plan.layers or ():
        maps += [*layer.projections, layer.attention_out, layer.attention_norm, layer.ffn_norm]
    tensors = [part.weight for part in maps] + [part.bias for part in maps]
    tensors += [plan.head.weight, plan.head.bias, plan.prompt]
    if plan.prompt_cache is not None:
        tensors += [plan.prompt_cache.hidden, plan.prompt_cache.qkv]
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors if tensor is not None)
