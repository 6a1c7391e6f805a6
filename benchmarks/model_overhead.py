"""What SAR costs a whole forward pass: a small LLaVA on the CPU, SAR on against SDPA and against the eager formulation.

The model's proportions are those of a large one (head dim 64, feed-forward 2.7 times the width), every layer is
re-weighted, and prompts hold one picture of 576 tokens or several. The last lines are the shipped miniature's: ten
padded prompts, as many layers re-weighted as its users get, where calls into PyTorch cost more than arithmetic. One
thread; what is counted is the processor time of the process, not the wall clock, so that other work on the machine
matters little; ratios are medians over interleaved rounds.

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_attention import metadata
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sar_fast import SARConfig, apply_sar, remove_sar
from sar_fast.hf import SARHandle
from sar_fast.lab.demo.examples import drawn_prompts
from sar_fast.lab.measure.eager import EagerSAR, eager_attention
from sar_fast.lab.measure.timing import interleaved_times
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.questions import build_prompt

LAYERS, WIDTH, HEADS, KV_HEADS = 4, 512, 8, 4
VISUAL, IMAGE = 576, 999
PROMPTS = {  # tokens, pictures, text after the pictures
    "short question": (1024, 1, 64),
    "long question": (1024, 1, 416),
    "three pictures": (2048, 3, 64),
    "six pictures": (4096, 6, 64),
}
BETA = 0.05
MINIATURE_K = 2


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


def miniature_inputs() -> dict[str, Tensor]:
    """Ten of the miniature's drawn questions, padded."""
    prompts = drawn_prompts(0, 10)
    words = [build_prompt(prompt.question) for prompt in prompts]
    images = [prompt.picture for prompt in prompts]
    inputs = load_miniature()[1](images=images, text=words, padding=True, return_tensors="pt")
    return {**inputs, "use_cache": False}


class Providers:
    """The same pass in several ways; ``run(name)`` gives the logits."""

    def __init__(self, inputs: dict[str, Tensor], model: Callable[[], nn.Module], layers: int) -> None:
        self.inputs = inputs
        self.models = {name: model() for name in ("sdpa (no SAR)", "sar composed", "sar torch")}
        self.stack = contextlib.ExitStack()
        for backend in ("composed", "torch"):
            config = SARConfig(activation_layer_k=layers, beta=BETA, backend=backend)
            handle = apply_sar(self.models[f"sar {backend}"], config)
        if inputs["input_ids"].shape[0] == 1:  # the eager formulation takes one sample
            self._add_eager(model(), handle)

    def _add_eager(self, model: nn.Module, handle: SARHandle) -> None:
        self.models["eager SAR"] = model
        self.run("sar torch")
        self.eager = EagerSAR(handle.roles.visual_mask, handle.roles.text_mask, handle.prior, beta=BETA)
        self.stack.enter_context(eager_attention(self.models["eager SAR"]))

    @torch.no_grad()
    def run(self, name: str) -> Tensor:
        model: nn.Module = self.models[name]
        extra = {"eager_sar": self.eager} if name == "eager SAR" else {}
        return model(**self.inputs, **extra, logits_to_keep=1).logits

    def check(self) -> None:
        """Refuse to time a wrong answer."""
        oracle = "eager SAR" if "eager SAR" in self.models else "sar torch"
        want = self.run(oracle)
        for name in ("sar composed", "sar torch"):
            error = ((self.run(name) - want).abs().max() / want.abs().max()).item()
            if error > 1e-4:
                raise SystemExit(f"{name}: logits differ from those of {oracle} by {error:.1e}, relatively")
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
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {load:.1f} on {os.cpu_count()} cores")
    print(f"all {LAYERS} layers re-weighted, {MINIATURE_K} of the miniature's; median of {args.repeats} rounds\n")
    print(f"{'prompt':>15} {'tokens':>7} {'provider':>14} {'ms':>8} {'x SDPA':>7} {'eager/x':>8}")
    records = []
    for label, (length, pictures, question) in PROMPTS.items():
        shape = {"N": length, "V": pictures * VISUAL, "T": question, "layers": LAYERS, "width": WIDTH, "H": HEADS}
        providers = Providers(make_inputs(length, pictures, question), make_model, LAYERS)
        records += measure(label, shape, providers, args.repeats)
    inputs = miniature_inputs()
    batch, length = inputs["input_ids"].shape
    shape = {"B": batch, "N": length, "V": 64, "T": 11, "layers": MINIATURE_K, "width": 128, "H": 8}
    providers = Providers(inputs, lambda: load_miniature()[0], MINIATURE_K)
    records += measure("miniature", shape, providers, args.repeats)
    if args.json:
        meta = metadata(args.repeats) | {"script": "benchmarks/model_overhead.py", "load_average": load}
        args.json.write_text(json.dumps({"meta": meta, "records": records}, indent=2) + "\n")


def measure(label: str, shape: dict[str, int], providers: Providers, repeats: int) -> list[dict[str, Any]]:
    """A record, and a printed line, per provider."""
    providers.check()
    calls = {name: partial(providers.run, name) for name in providers.models}
    rounds = interleaved_times(calls, repeats, clock=time.process_time)
    providers.close()
    base, eager = rounds["sdpa (no SAR)"], rounds.get("eager SAR")
    # of each round by itself, so that a slow spell of the machine cancels
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(a, b))
    records = []
    for name, seconds in rounds.items():
        milliseconds, times = statistics.median(seconds) * 1e3, ratio(seconds, base)
        speedup = None if eager is None else ratio(eager, seconds)
        records.append(
            {
                "benchmark": "model_forward",
                "provider": name,
                "prompt": label,
                "shape": shape,
                "dtype": "float32",
                "milliseconds_p50": milliseconds,
                "times_sdpa": times,
                "speedup_over_eager": speedup,
            }
        )
        shown = "-" if speedup is None else f"{speedup:.2f}"
        print(f"{label:>15} {shape['N']:>7} {name:>14} {milliseconds:>8.1f} {times:>7.2f} {shown:>8}")
    return records


if __name__ == "__main__":
    main()
