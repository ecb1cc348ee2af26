"""Train the tiny Gemma-4-style mixture-of-experts model that the demo and the tests serve.

    python examples/tiny_moe/train.py --out DIR [--device cuda]

Writes the float32-trained model as a BF16 transformers checkpoint with tokenizer and chat template, and
``training.json`` with the settings, the loss curve, the held-out perplexity and the SHA-256 of the weights.
Two CPU cores need about an hour, a data-centre GPU two minutes. Nothing is downloaded: the text is Python's own
(see corpus.py), so it changes a little with the version of Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import Split, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

VOCAB_SIZE = 2048
CONTEXT = 256
BATCH = 12
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
BALANCE_WEIGHT = 0.01
"""Weight of the load-balancing loss (Switch Transformer, eq. 4); without it a few experts take all tokens."""

# A plain concatenation: the model continues text, it has not learnt to answer.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def model_config() -> Gemma4TextConfig:
    """Gemma-4-26B-A4B in miniature: sliding and global layers, a dense MLP beside the experts, no per-layer input.

    The expert width of 192 is, like the original's 704, a multiple of 64 but not of 128.
    """
    return Gemma4TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        num_global_key_value_heads=1,
        head_dim=64,
        global_head_dim=128,
        sliding_window=128,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        max_position_embeddings=2048,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=16,
        top_k_experts=4,
        moe_intermediate_size=192,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
    )


def train_tokenizer(library: Path | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in documents("train", library)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_config().max_position_embeddings,
    )


def encode_split(
    tokenizer: PreTrainedTokenizerFast, split: Split, context: int = CONTEXT, library: Path | None = None
) -> torch.Tensor:
    """Encode a split as int64 windows ``[count, context + 1]`` of ``<bos> document <eos>`` laid end to end."""
    ids: list[int] = []
    for _, text in documents(split, library):
        ids += [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    count = (len(ids) - 1) // context
    stream = torch.tensor(ids[: count * context + 1])
    return stream.unfold(0, context + 1, context).contiguous()


def batches(windows: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Yield ``steps`` batches of shuffled windows, epoch after epoch."""
    generator = torch.Generator().manual_seed(0)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(windows), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        yield windows[chosen]


def balance_loss(router_probabilities: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Experts x share of tokens x mean probability, averaged over layers; 1 when perfectly even."""
    total = torch.zeros((), device=router_probabilities[0].device)
    for probabilities in router_probabilities:
        flat = probabilities.reshape(-1, probabilities.shape[-1])
        chosen = torch.zeros_like(flat).scatter_(1, flat.topk(top_k).indices, 1.0 / top_k)
        total = total + flat.shape[-1] * (chosen.mean(0) * flat.mean(0)).sum()
    return total / len(router_probabilities)


def dense_experts(
    experts: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute every expert for every token and weight by the router, zero for those not chosen.

    Four times the arithmetic in a twentieth of the launches, which are what a small model's step costs on a GPU.

    Args:
        experts: with ``gate_up_proj [E, 2 * width, hidden]``, ``down_proj [E, hidden, width]`` and ``act_fn``.
        hidden_states: ``[T, hidden]``.
        top_k_index: chosen experts ``[T, k]``.
        top_k_weights: their weights ``[T, k]``.

    Returns:
        ``[T, hidden]``.
    """
    weights = hidden_states.new_zeros(len(hidden_states), len(experts.gate_up_proj))
    weights = weights.scatter(1, top_k_index, top_k_weights.to(weights.dtype))
    gate, up = torch.einsum("th,eoh->eto", hidden_states, experts.gate_up_proj).chunk(2, dim=-1)
    inner = experts.act_fn(gate) * up * weights.t().unsqueeze(-1)
    return torch.einsum("etw,ehw->th", inner, experts.down_proj)


ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)


@torch.no_grad()
def window_losses(model: Gemma4ForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the predicted tokens of each of ``windows`` ``[n, context + 1]``, float64 [n]."""
    model.eval()
    losses = []
    for chunk in windows.split(8):
        chunk = chunk.to(model.device)
        logits = model(input_ids=chunk[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), chunk[:, 1:], reduction="none")
        losses.append(loss.double().mean(1).cpu())
    model.train()
    return torch.cat(losses)


def perplexity(model: Gemma4ForCausalLM, windows: torch.Tensor) -> float:
    """Exponential of the mean negative log-likelihood over all predicted tokens of ``windows`` ``[n, context + 1]``."""
    return math.exp(window_losses(model, windows).mean().item())


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices are decayed; norms, scales and the tied embedding are not."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embed" not in name]
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def train(
    model: Gemma4ForCausalLM, windows: torch.Tensor, held_out: torch.Tensor, steps: int
) -> list[dict[str, float]]:
    """Train in place with AdamW and a cosine schedule; return the loss curve."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def schedule(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / WARMUP_STEPS
        progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    curve: list[dict[str, float]] = []
    progress = tqdm(batches(windows, steps), total=steps, unit="step", mininterval=2.0)
    running = 0.0
    for step, batch in enumerate(progress, start=1):
        batch = batch.to(model.device)
        output = model(input_ids=batch[:, :-1], output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits, model.config.top_k_experts)
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        progress.set_postfix(loss=f"{running:.3f}", balance=f"{balance.item():.2f}", refresh=False)
        if step % 500 == 0 or step == steps:
            held = perplexity(model, held_out[:64])
            curve.append({"step": step, "loss": round(running, 4), "held_out_perplexity": round(held, 2)})
            tqdm.write(f"step {step}: loss {running:.3f}, held-out perplexity {held:.2f}")
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the BF16 checkpoint")
    parser.add_argument("--steps", type=int, default=3600, help=f"optimizer steps of {BATCH} x {CONTEXT} tokens")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--library", type=Path, help="folder of another Python's standard library, read as the text")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    arguments = parser.parse_args()
    # PyTorch's grouped product takes float32 on the CPU only.
    experts = "grouped_mm" if arguments.device.type == "cpu" else "dense"

    torch.manual_seed(arguments.seed)
    started = time.monotonic()
    tokenizer = train_tokenizer(arguments.library)
    windows = encode_split(tokenizer, "train", library=arguments.library)
    held_out = encode_split(tokenizer, "held-out", library=arguments.library)
    held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(1))]
    print(f"{windows.numel():,} training tokens, {held_out.numel():,} held out", flush=True)

    model = Gemma4ForCausalLM._from_config(
        model_config(), dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    ).to(arguments.device)
    model.train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    curve = train(model, windows, held_out, arguments.steps)

    model = model.to(torch.bfloat16)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    weights = arguments.out / "model.safetensors"
    log = {
        "steps": arguments.steps,
        "seed": arguments.seed,
        "batch": BATCH,
        "context": CONTEXT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": windows.numel(),
        "tokens_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "curve": curve,
        "held_out_perplexity_bf16": round(perplexity(model, held_out[:256]), 2),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if arguments.device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }
    (arguments.out / "training.json").write_text(json.dumps(log, indent=2) + "\n")
    print(f"held-out perplexity in BF16: {log['held_out_perplexity_bf16']}")


if __name__ == "__main__":
    main()
