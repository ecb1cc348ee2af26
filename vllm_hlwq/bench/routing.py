"""Routing with the locality that was measured in real models, for checkpoints whose random weights route uniformly.

A strategy of vLLM's ``RoutingSimulator``, chosen by ``VLLM_MOE_ROUTING_SIMULATION_STRATEGY=measured_locality``; its
sibling ``measured_locality_but_one`` never names the last expert, so that a cache of all the others soon misses
nothing. What takes part in a step is read from a table made once, on the CPU and from a seed: a step costs two small
kernels a layer in a CUDA graph and no host synchronisation, less than the router it replaces, so timings stay
comparable.

The simulator hands over hidden states and router logits, not sequences or positions. So up to ``DECODE_ROWS`` rows
are taken as one token each of as many sequences, row r always the same one; more rows are taken as consecutive tokens.
A short prompt is thus spread over more experts than its own, a mixed batch treats its decoding rows as prompt, and a
sequence that takes over another's row goes on with that row's prompt. Warm-up advances the table as well. On a CPU
vLLM's simulator, whatever the strategy, runs with ``--enforce-eager`` only: torch.compile cannot trace its log line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..vllm_compat import borrow

MEASURED_LOCALITY = "measured_locality"
BUT_ONE = "measured_locality_but_one"
STRATEGIES = {MEASURED_LOCALITY: 0, BUT_ONE: 1}
"""Strategies by name, with how many of a layer's last experts they never name."""
SEED = 0
REPEAT = 0.45
"""Probability that an expert is used again at the next token."""
REUSE_WITHIN_8 = 0.80
"""Probability that an expert is used again at one of the next 8 tokens."""
MEMORY = 8
LATER_REUSE = 0.158
"""Probability at each of the tokens 2 to 8 that an expert not used since comes back. (1 - 0.45)(1 - p)^7 = 0.2 gives
0.134; the rest makes up for tokens that have no room left, calibrated at 8 of 128 experts."""
POPULARITY_SLOPE, PROMPT_SPREAD = 2.0, 0.75
"""Log popularity falls by the slope times the log rank, and each prompt shifts it by this standard deviation. Chosen so
that a batch names as many experts as was measured: of 128, 15, 27, 43 and 59 at 2, 4, 8 and 16 tokens with 8 each."""
PROMPT_TOKENS = 512
"""Mean tokens of a prompt, geometrically distributed; a switch forgets what was used and draws a new popularity."""
DECODE_ROWS = 256
STEPS = 512
LAYER_STRIDE = 37
"""Layers read other sequences of the table than their neighbours: coprime to ``DECODE_ROWS``."""
NEVER = 10**6


def locality_trace(num_experts: int, top_k: int, seed: int = SEED, steps: int = STEPS) -> torch.Tensor:
    """Experts of ``DECODE_ROWS`` independent sequences, int32 ``[steps, DECODE_ROWS, top_k]``, distinct in a token.

    An expert of the last token stays with probability ``REPEAT``; one of the seven before comes back with
    ``LATER_REUSE``; what room is left goes to others, drawn by popularity without replacement (Gumbel top-k).
    With few experts a token more the probabilities cannot all hold: 16 experts of which 4 are used are soon all recent.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randperm(num_experts, generator=generator) + 1
    common = -POPULARITY_SLOPE * torch.log(rank.float())

    def prompt_popularity(rows: int) -> torch.Tensor:
        return common + PROMPT_SPREAD * torch.randn(rows, num_experts, generator=generator)

    popularity = prompt_popularity(DECODE_ROWS)
    age = torch.full((DECODE_ROWS, num_experts), NEVER)
    chance_at_age = torch.zeros(MEMORY + 2)
    chance_at_age[1], chance_at_age[2 : MEMORY + 1] = REPEAT, LATER_REUSE
    # Classes, best first: kept, brought back, not recent, recent but not chosen. 1000 is more than popularity spans.
    class_of_age = torch.zeros(2, MEMORY + 2)
    class_of_age[1], class_of_age[1, 1], class_of_age[0, MEMORY + 1] = 2000.0, 3000.0, 1000.0
    trace = torch.empty(steps, DECODE_ROWS, top_k, dtype=torch.int32)
    uniform, waiting = torch.empty(age.shape), torch.empty(age.shape)
    for step in range(steps):
        switching = (torch.rand(DECODE_ROWS, generator=generator) < 1 / PROMPT_TOKENS).nonzero().flatten()
        age[switching] = NEVER
        popularity[switching] = prompt_popularity(len(switching))
        recent = age.clamp(max=MEMORY + 1)
        chosen = uniform.uniform_(generator=generator) < chance_at_age[recent]
        gumbel = -waiting.exponential_(generator=generator).log_()
        order = class_of_age[chosen.long(), recent] + popularity + gumbel
        ids = order.topk(top_k, dim=1).indices
        age += 1
        age.scatter_(1, ids, 1)
        # Routers list experts by weight, of which the table knows nothing: any order.
        shuffled = torch.rand(ids.shape, generator=generator).argsort(1)
        trace[step] = ids.gather(1, shuffled)
    return trace


@dataclass(frozen=True)
class LocalityTable:
    """A trace on a device, with the step that all layers are at.

    decode: int32 ``[STEPS, 2 * DECODE_ROWS, k]``, the sequences twice, so that any of them can come first.
    prompt: int32 ``[DECODE_ROWS * STEPS, k]``, sequence after sequence.
    step: int64 ``[1]``, position in the trace.
    """

    decode: torch.Tensor
    prompt: torch.Tensor
    step: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, num_experts: int, top_k: int) -> LocalityTable:
        trace = locality_trace(num_experts, top_k)
        return cls(
            torch.cat([trace, trace], 1).to(device),
            trace.transpose(0, 1).reshape(-1, top_k).to(device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def route(self, tokens: int, layer: int) -> torch.Tensor:
        """Experts int32 ``[tokens, k]`` of a layer, counted from 0; the first layer of a forward pass advances."""
        if layer == 0:
            self.step.add_(1).remainder_(len(self.decode))
        if tokens <= DECODE_ROWS:
            first = layer * LAYER_STRIDE % DECODE_ROWS
            return self.decode[:, first : first + tokens].index_select(0, self.step)[0]
        positions = torch.arange(tokens, device=self.step.device) + layer * LAYER_STRIDE * STEPS
        positions = (positions + self.step * DECODE_ROWS).remainder_(len(self.prompt))
        return self.prompt.index_select(0, positions)


_tables: dict[tuple[torch.device, int, int], LocalityTable] = {}
"""Made by the first step of a process, vLLM's profiling run, so that nothing is allocated while graphs are captured."""


def _layer_of_call() -> int:
    """How many layers this forward pass has routed before: a new pass comes with a new context.

    Layers of a draft model, which has a forward pass of its own, count from 0 as well.
    """
    kept = borrow("get_forward_context")().additional_kwargs
    layer: int = kept.get(MEASURED_LOCALITY, 0)
    kept[MEASURED_LOCALITY] = layer + 1
    return layer


def table_on(device: torch.device, num_experts: int, top_k: int) -> LocalityTable:
    """This process's table for a device and shape."""
    key = (device, num_experts, top_k)
    if key not in _tables:
        with torch.inference_mode(False):  # its step advances in whatever mode a later pass runs
            _tables[key] = LocalityTable.on(*key)
    return _tables[key]


def register_strategies() -> None:
    """Make our strategies known to vLLM's routing simulator in this process; harmless when done before."""

    class MeasuredLocality(borrow("RoutingStrategy")):  # type: ignore[misc]
        """The strategy; weights are equal, since nothing that is timed depends on them."""

        def __init__(self, unused: int) -> None:
            self.unused = unused

        def route_tokens(
            self,
            hidden_states: torch.Tensor,
            router_logits: torch.Tensor,
            top_k: int,
            indices_type: torch.dtype | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            tokens, num_experts = router_logits.shape
            table = table_on(router_logits.device, num_experts - self.unused, top_k)
            ids = table.route(tokens, _layer_of_call())
            weights = torch.full(ids.shape, 1 / top_k, dtype=torch.float32, device=ids.device)
            return weights, ids.to(indices_type or ids.dtype)

    for name, unused in STRATEGIES.items():
        borrow("RoutingSimulator").register_strategy(name, MeasuredLocality(unused))
