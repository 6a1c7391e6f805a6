"""What SAR costs a whole forward pass: a small LLaVA on the CPU, SAR on against SDPA and against the eager formulation.

The model's proportions are those of a large one (head dim 64, feed-forward 2.7 times the width), every layer is
re-weighted, and prompts hold one picture of 576 tokens or several. One thread; what is counted is the processor
time of the process, not the wall clock, so that other work on the machine matters little; ratios are medians over
interleaved rounds.

    python benchmarks/model_overhead.py                     # prints the table
    python benchmarks/model_overhead.py --json out.json     # also writes it, with versions and load
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from cpu_attention import metadata
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sar_fast import SARConfig, apply_sar, remove_sar
from sar_fast.analysis.eager import EagerSAR, eager_attention
from sar_fast.analysis.timing import interleaved_times

LAYERS, WIDTH, HEADS, KV_HEADS = 4, 512, 8, 4
VISUAL, IMAGE = 576, 999
PROMPTS = {  # tokens, pictures, text after the pictures
    "short question": (1024, 1, 64),
    "long question": (1024, 1, 416),
    "three pictures": (2048, 3, 64),
    "six pictures": (4096, 6, 64),
}
BETA = 0.05


def make_model() -> LlavaForConditionalGeneration:
    """A random LLaVA-1.5 layout with 576 visual tokens; its vision encoder is small, as SAR leaves it alone."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=96, patch_size=4
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=1000,
        max_position_embeddings=4096,
        initializer_range=0.05,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=VISUAL)
    return LlavaForConditionalGeneration(config).eval()


def make_inputs(length: int, pictures: int, question: int) -> dict[str, Tensor]:
    """One prompt: text, pictures, ``question`` tokens of text."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, IMAGE, (1, length), generator=generator)
    ids[:, length - question - pictures * VISUAL : length - question] = IMAGE
    pixels = torch.randn(pictures, 3, 96, 96, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "use_cache": False}


class Providers:
    """The same pass in four ways; ``run(name)`` gives the logits."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = inputs
        self.models = {name: make_model() for name in ("sdpa (no SAR)", "sar composed", "sar torch", "eager SAR")}
        for backend in ("composed", "torch"):
            handle = apply_sar(
                self.models[f"sar {backend}"], SARConfig(activation_layer_k=LAYERS, beta=BETA, backend=backend)
            )
        self.run("sar torch")
        self.eager = EagerSAR(handle.roles.visual_mask, handle.roles.text_mask, handle.prior, beta=BETA)
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(eager_attention(self.models["eager SAR"]))

    @torch.no_grad()
    def run(self, name: str) -> Tensor:
        model: nn.Module = self.models[name]
        extra = {"eager_sar": self.eager} if name == "eager SAR" else {}
        return model(**self.inputs, **extra, logits_to_keep=1).logits

    def check(self) -> None:
        """Refuse to time a wrong answer."""
        want = self.run("eager SAR")
        for name in ("sar composed", "sar torch"):
            error = ((self.run(name) - want).abs().max() / want.abs().max()).item()
            if error > 1e-4:
                raise SystemExit(f"{name}: logits differ from the eager formulation's by {error:.1e}, relatively")
        if torch.allclose(self.run("sdpa (no SAR)"), want, rtol=1e-3):
            raise SystemExit("SAR changes nothing here; there is nothing to time")

    def close(self) -> None:
        self.stack.close()
        for backend in ("composed", "torch"):
            remove_sar(self.models[f"sar {backend}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--json", type=Path, help="also write the records here")
    args = parser.parse_args()

    torch.set_num_threads(1)
    records = []
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {load:.1f} on {os.cpu_count()} cores")
    print(f"{LAYERS} layers, all re-weighted; median of {args.repeats} rounds\n")
    print(f"{'prompt':>15} {'tokens':>7} {'provider':>14} {'ms':>8} {'x SDPA':>7} {'eager/x':>8}")
    for label, (length, pictures, question) in PROMPTS.items():
        providers = Providers(make_inputs(length, pictures, question))
        providers.check()
        calls = {name: partial(providers.run, name) for name in providers.models}
        rounds = interleaved_times(calls, args.repeats, clock=time.process_time)
        providers.close()
        base = rounds["sdpa (no SAR)"]
        for name, seconds in rounds.items():
            record = {
                "benchmark": "model_forward",
                "provider": name,
                "prompt": label,
                "shape": {"N": length, "V": pictures * VISUAL, "T": question}
                | {"layers": LAYERS, "width": WIDTH, "H": HEADS},
                "dtype": "float32",
                "milliseconds_p50": statistics.median(seconds) * 1e3,
                # of each round by itself, so that a slow spell of the machine cancels
                "times_sdpa": statistics.median(a / b for a, b in zip(seconds, base)),
                "speedup_over_eager": statistics.median(e / a for e, a in zip(rounds["eager SAR"], seconds)),
            }
            records.append(record)
            print(
                f"{label:>15} {length:>7} {name:>14} {record['milliseconds_p50']:>8.1f} {record['times_sdpa']:>7.2f} "
                f"{record['speedup_over_eager']:>8.2f}"
            )
    if args.json:
        meta = metadata(args.repeats) | {"script": "benchmarks/model_overhead.py", "load_average": load}
        args.json.write_text(json.dumps({"meta": meta, "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
