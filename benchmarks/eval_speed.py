"""Our analyses against the research code's way of doing them: same model, samples, machine and run.

The other side is written anew from a description of what the research code does: one sample at a time; SFS and FI by
eager attention with all matrices kept, a forward pass for each of six prompts; the probe by a forward pass for each
layer and sample, then a linear head for each layer; yes/no questions by eager attention and two decoded tokens, the
answer and the end. The K sweep has no such side: one prefill for all K is compared with batched runs of ours, one K at
a time. Both sides must agree before anything is reported.

Questions come in the numbers that the benchmarks have about a picture: MME 2, POPE 6 in each of its splits and 18 in
all three, and 1, where nothing can be shared. SAR re-weights 5 of 16 layers, the paper's proportion (10 of 32).

    python benchmarks/eval_speed.py                        # prints the table
    python benchmarks/eval_speed.py --json out.json        # also writes it, with versions and seed
    python benchmarks/eval_speed.py --only yes/no          # the rows whose name has these words

The model is LLaVA-1.5's architecture with 16 layers (32 in the sweep) and random weights, its 576 visual tokens
included. Seconds are the process's CPU time, the least of the rounds, so that other work on the machine does not count;
wall time lies beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sar_fast import SARConfig, apply_sar
from sar_fast.hf.branching import run_branches
from sar_fast.lab.benchmark.asking import Asker
from sar_fast.lab.benchmark.tasks import Sample
from sar_fast.lab.benchmark.tasks.mme import YES_NO
from sar_fast.lab.focus import DatasetMasks, FocusMetricsEvaluator, GroundingSample
from sar_fast.lab.focus.prompts import DEFAULT_TEMPLATES
from sar_fast.lab.io.chat_template import build_prompt
from sar_fast.lab.io.prompts import PromptFormat
from sar_fast.lab.measure.eager import EagerSAR, eager_attention
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.drawing import COLOURS, SHAPES, draw_scene
from sar_fast.lab.probe import HeadTraining, LayerwiseProbe
from sar_fast.lab.probe.probe import is_right, split_by_picture
from sar_fast.lab.run.run_metadata import commit, versions

SIDE, PATCH = 336, 14
LAYERS, WIDTH, HEADS = 16, 256, 8
THEIRS, OURS, SEPARATE = "research code's way", "this package", "one K at a time, batched"
SAR = SARConfig(activation_layer_k=5, beta=0.05)
SWEPT = [SAR.replace(activation_layer_k=k) for k in (0, 5, 10, 15)]
WORDS = "\nAnswer the question using a single word or phrase."  # after a question of MME or POPE
SWEEP_LAYERS = 32


def make_model(seed: int, layers: int = LAYERS) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """LLaVA-1.5's architecture, small, with the miniature's words."""
    words = load_miniature()[1]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words.tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=2048,
            initializer_range=0.08,
        ),
        image_token_index=words.tokenizer.convert_tokens_to_ids(words.image_token),
    )
    torch.manual_seed(seed)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=words.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )
    return LlavaForConditionalGeneration(config).eval(), processor


def make_samples(count: int, seed: int) -> list[GroundingSample]:
    rng, samples = np.random.default_rng(seed), []
    for number in range(count):
        scene = draw_scene(rng, size=SIDE, objects=2, background="gradient")
        thing = scene.objects[0]
        query = f"Give the box of the {thing.name}."
        picture = Image.fromarray(scene.image)
        samples.append(GroundingSample(str(number), picture, query, thing.name, thing.box, thing.mask))
    return samples


def research_focus(model, processor, samples: list[GroundingSample], sar: SARConfig | None) -> list[tuple]:
    """(SFS, FI) of each sample."""
    from skimage.metrics import structural_similarity

    scores = []
    with research_attention(model, sar, keep=True) as look:
        for sample in samples:
            maps = []
            for question in (sample.query, *(t.format(sample.object_prompt) for t in DEFAULT_TEMPLATES)):
                prompt = build_prompt(processor, question)
                inputs = processor(images=sample.image, text=prompt, return_tensors="pt")
                look(inputs, use_cache=False)
                seen = inputs["input_ids"][0] == model.config.image_token_id
                row = look.matrices[-1][0].mean(0)[-1, seen]  # (576,)
                side = SIDE // PATCH
                grid = Image.fromarray((row / row.max()).reshape(side, side).numpy())
                fine = np.asarray(grid.resize(sample.image.size, Image.Resampling.BICUBIC), dtype=np.float64).clip(0)
                maps.append(fine / fine.sum())
            similarities = [
                structural_similarity(maps[0], other, data_range=max(maps[0].max(), other.max())) for other in maps[1:]
            ]
            scores.append((maps[0][DatasetMasks().mask(sample)].sum(), 1 - np.mean(similarities)))
    return scores


class research_attention:
    """Within, calls run eager attention, with SAR or without; ``matrices`` are the last call's by layer, if kept."""

    def __init__(self, model, sar: SARConfig | None, *, keep: bool) -> None:
        self.model, self.sar, self.keep = model, sar, keep
        self.matrices, self._stack = [], contextlib.ExitStack()

    def __enter__(self) -> research_attention:
        softmax, block = torch.softmax, 2 * self.model.config.vision_config.num_hidden_layers // 3

        def keep_matrix(scores, *args, **kwargs):
            found = softmax(scores, *args, **kwargs)
            if found.dim() == 4:
                self.matrices.append(found)
            return found

        def keep_norms(module, args, output):
            norms = (output[0] if isinstance(output, tuple) else output)[:, 1:].norm(dim=-1)  # without the class token
            self._prior[self._visual] = (norms / norms.sum()).flatten()

        self._stack.enter_context(eager_attention(self.model))
        self._stack.enter_context(torch.no_grad())
        if self.keep:
            self._stack.enter_context(mock.patch.object(torch, "softmax", keep_matrix))
        hook = self.model.model.vision_tower.encoder.layers[block].register_forward_hook(keep_norms)
        self._stack.callback(hook.remove)
        return self

    def __call__(self, inputs, **options):
        self.matrices.clear()
        self._visual = visual = inputs["input_ids"] == self.model.config.image_token_id
        self._prior = torch.zeros(visual.shape)
        if self.sar is not None:
            text = ~visual & (visual.cumsum(-1) == visual.sum())
            options["eager_sar"] = EagerSAR(
                visual, text, self._prior, LAYERS - self.sar.activation_layer_k, self.sar.beta
            )
        return self.model(**inputs, **options)

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def our_focus(model, processor, samples: list[GroundingSample], batch_size: int, sar: SARConfig | None) -> list[tuple]:
    evaluator = FocusMetricsEvaluator(model, processor, config=sar)
    records = []
    for start in range(0, len(samples), batch_size):
        records += evaluator.score(samples[start : start + batch_size])
    return [(r["semantic_focus_score"], r["focus_instability"]) for r in records]


def research_probe(model, processor, samples: list[GroundingSample]) -> np.ndarray:
    """Features, and the accuracy at IoU 0.5 of each layer; features raw, as they come."""
    boxes = torch.tensor([_box(sample) for sample in samples])
    train, validation = split_by_picture([s.picture_key for s in samples], 0)
    scores, layers = [], []
    for layer in range(LAYERS):
        rows = []
        for sample in samples:
            inputs = processor(images=sample.image, text=build_prompt(processor, sample.query), return_tensors="pt")
            with torch.no_grad():
                # before the final norm, which transformers applies to the last entry alone
                with _raw_last_layer(model) as last:
                    states = model(**inputs, output_hidden_states=True).hidden_states
                rows.append((states[layer + 1] if layer + 1 < LAYERS else last[0])[0, -1])
        features = torch.stack(rows)
        layers.append(features)
        generator = torch.Generator().manual_seed(0)
        head = torch.nn.Linear(WIDTH, 4)
        with torch.no_grad():
            head.weight.copy_(((2 * torch.rand(WIDTH, 4, generator=generator) - 1) * WIDTH**-0.5).T)
            head.bias.copy_((2 * torch.rand(4, generator=generator) - 1) * WIDTH**-0.5)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
        for _ in range(5):
            for batch in train[torch.randperm(len(train), generator=generator)].split(32):
                optimizer.zero_grad()
                torch.nn.functional.l1_loss(head(features[batch]), boxes[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            right = is_right(head(features[validation])[:, None], boxes[validation])
        scores.append(float(right.double().mean()))
    return _to_compare(torch.stack(layers, dim=1), scores)


class _raw_last_layer:
    """Within, the last layer's output of every forward pass is the list's first element."""

    def __init__(self, model) -> None:
        self.layer, self.found = model.model.language_model.layers[-1], [None]

    def __enter__(self) -> list:
        def keep(module, args, output):
            self.found[0] = output[0] if isinstance(output, tuple) else output

        self.hook = self.layer.register_forward_hook(keep)
        return self.found

    def __exit__(self, *exc: object) -> None:
        self.hook.remove()


def our_probe(model, processor, samples: list[GroundingSample], batch_size: int) -> np.ndarray:
    training = HeadTraining(feature_scale="none")
    probe = LayerwiseProbe(model, processor, training=training, seeds=(0,), batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        store, _ = probe.extract(samples, Path(folder))
        return _to_compare(store.get(torch.arange(len(samples))), probe.fit(samples, store).scores)


def make_questions(pictures: int, each: int, seed: int) -> list[tuple[Image.Image, list[str]]]:
    """Pictures with so many different questions about each."""
    rng, asked = np.random.default_rng(seed), []
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    for _ in range(pictures):
        scene = draw_scene(rng, size=SIDE, objects=2, background="gradient")
        chosen = rng.choice(len(names), each, replace=False)
        questions = [f"Is there a {names[i]} in the image?{WORDS}" for i in chosen]
        asked.append((Image.fromarray(scene.image), questions))
    return asked


def research_yes_no(model, processor, asked: list[tuple[Image.Image, list[str]]], sar: SARConfig | None) -> np.ndarray:
    """(questions, 2) log-probabilities that the answer starts with yes and no; then the token after it."""
    found = []
    with research_attention(model, sar, keep=False) as look:
        for picture, questions in asked:
            for question in questions:
                inputs = processor(images=picture, text=build_prompt(processor, question), return_tensors="pt")
                output = look(inputs, use_cache=True, logits_to_keep=1)
                found.append(_log_probabilities(processor, output.logits[:, -1]))
                first = output.logits[:, -1:].argmax(-1)
                model(input_ids=first, past_key_values=output.past_key_values, use_cache=True)
    return torch.cat(found).numpy()


def our_yes_no(
    model, processor, asked: list[tuple[Image.Image, list[str]]], batch_size: int, sar: SARConfig | None
) -> np.ndarray:
    """What ``evaluate.py --task ... --scoring first_token`` does with batches of whole pictures."""
    handle = None if sar is None else apply_sar(model, sar)
    ask = Asker(None, None, "first_token", model, processor, handle)
    form, found = PromptFormat.of(model, processor), []
    per_batch = max(1, batch_size // len(asked[0][1]))
    for start in range(0, len(asked), per_batch):
        pictures, questions = zip(*asked[start : start + per_batch])
        samples = [Sample("", 0, question, "", YES_NO) for row in questions for question in row]
        for reply in ask.replies(samples, form.encode_groups(pictures, questions)):
            found.append(list(reply["log_probabilities"].values()))
    ask.handle.remove()
    return np.array(found)


def sweep(model, processor, samples: list[GroundingSample], batch_size: int, *, branched: bool) -> np.ndarray:
    """(settings, samples, 2) log-probabilities of yes and no for every K."""
    found: list[list[torch.Tensor]] = [[] for _ in SWEPT]
    with apply_sar(model, SWEPT[-1]) as handle, torch.no_grad():
        for start in range(0, len(samples), batch_size):
            inputs = _inputs(processor, samples[start : start + batch_size])
            call = lambda: model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]  # noqa: B023
            if branched:
                results = [logits for _, logits in run_branches(handle, SWEPT, call)]
            else:
                results = []
                for config in SWEPT:
                    handle.reconfigure(config)
                    results.append(call())
            for kept, logits in zip(found, results):
                kept.append(_log_probabilities(processor, logits))
    return torch.stack([torch.cat(kept) for kept in found]).numpy()


def _inputs(processor, samples: list[GroundingSample]):
    processor.tokenizer.padding_side = "left"
    texts = [build_prompt(processor, f"Is there a {sample.object_prompt}?") for sample in samples]
    return processor(images=[s.image for s in samples], text=texts, padding=True, return_tensors="pt")


def _log_probabilities(processor, logits: torch.Tensor) -> torch.Tensor:
    ids = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    return logits.log_softmax(-1)[:, ids]


def _to_compare(features: torch.Tensor, scores) -> np.ndarray:
    """(n, L, d) features in units of their layer's root mean square, then the L scores, as one vector."""
    unit = features.square().mean((0, 2), keepdim=True).sqrt()
    return np.concatenate([(features / unit).flatten().numpy(), scores])


def _box(sample: GroundingSample) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (v / SIDE for v in sample.bbox)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def measure(calls: dict[str, Callable[[], object]], rounds: int, tolerance: float) -> dict[str, dict[str, float]]:
    """CPU and wall seconds of each call, the least of interleaved rounds. ``RuntimeError`` if their results differ."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        results = {}
        for name, call in calls.items():
            cpu, wall = time.process_time(), time.perf_counter()
            results[name] = np.asarray(call())
            spent = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
            best[name] = {k: min(v, best.get(name, spent)[k]) for k, v in spent.items()}
        first, second = results.values()
        gap = float(np.abs(first - second).max())
        if not gap <= tolerance:
            raise RuntimeError(f"the two sides differ by {gap:.1e} (allowed {tolerance:.0e})")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="words that a row's name must have")
    parser.add_argument("--focus-samples", type=int, default=8)
    parser.add_argument("--probe-samples", type=int, default=10)
    parser.add_argument("--questions", type=int, default=18, help="per row, and per batch of ours")
    parser.add_argument("--sweep-samples", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, processor = make_model(args.seed)
    processor.tokenizer.padding_side = "left"
    focus_samples = make_samples(args.focus_samples, args.seed + 1)
    probe_samples = make_samples(args.probe_samples, args.seed + 2)
    deep, _ = make_model(args.seed, SWEEP_LAYERS)
    swept = make_samples(args.sweep_samples, args.seed + 4)
    # tolerance of each: between two ways of rounding the same fp32 computation
    comparisons: dict[str, tuple[dict[str, Callable[[], object]], float]] = {}
    with_sar = f"with SAR (K = {SAR.activation_layer_k} of {LAYERS})"
    for words, sar in (("without SAR", None), (with_sar, SAR)):
        comparisons[f"SFS and FI {words}, {len(focus_samples)} samples"] = (
            {
                THEIRS: lambda sar=sar: research_focus(model, processor, focus_samples, sar),
                OURS: lambda sar=sar: our_focus(model, processor, focus_samples, args.batch_size, sar),
            },
            1e-3,  # SSIM of maps that agree to fp32 rounding
        )
    comparisons[f"layer-wise probe, {len(probe_samples)} samples"] = (
        {
            THEIRS: lambda: research_probe(model, processor, probe_samples),
            OURS: lambda: our_probe(model, processor, probe_samples, args.batch_size),
        },
        1e-3,  # features of 16 layers in fp32, with padding and without; scores are equal or far apart
    )
    for words, sar in (("without SAR", None), (with_sar, SAR)):
        for each in (1, 2, 6, 18):
            asked = make_questions(max(1, args.questions // each), each, args.seed + 3)
            comparisons[f"yes/no {words}, {each} per picture, {each * len(asked)} questions"] = (
                {
                    THEIRS: lambda asked=asked, sar=sar: research_yes_no(model, processor, asked, sar),
                    OURS: lambda asked=asked, sar=sar: our_yes_no(model, processor, asked, args.questions, sar),
                },
                1e-2,  # log-probabilities after re-weighted layers in fp32
            )
    comparisons[f"K in 0, 5, 10, 15 of {SWEEP_LAYERS} layers, {len(swept)} samples"] = (
        {
            SEPARATE: lambda: sweep(deep, processor, swept, args.batch_size, branched=False),
            OURS: lambda: sweep(deep, processor, swept, args.batch_size, branched=True),
        },
        0.0,  # the same operations on the same numbers
    )
    comparisons = {name: row for name, row in comparisons.items() if args.only in name}
    if not comparisons:
        parser.error(f"--only {args.only!r}: no row has these words")
    records = []
    print(f"{'':34} {'CPU s':>8} {'wall s':>8} {'ratio':>7}")
    for name, (calls, tolerance) in comparisons.items():
        seconds = measure(calls, args.rounds, tolerance)
        (other,) = (side for side in calls if side != OURS)
        ratio = seconds[other]["cpu_seconds"] / seconds[OURS]["cpu_seconds"]
        records.append({"analysis": name, "seconds": seconds, "ratio": ratio})
        print(name)
        for side in calls:
            cpu, wall = seconds[side]["cpu_seconds"], seconds[side]["wall_seconds"]
            shown = f"{ratio:6.1f}x" if side == OURS else ""
            print(f"    {side:30} {cpu:8.1f} {wall:8.1f} {shown:>7}", flush=True)
    if args.json:
        meta = {
            "seed": args.seed,
            "rounds": args.rounds,
            "batch_size": args.batch_size,
            "questions_per_batch": args.questions,
            "activation_layer_k": SAR.activation_layer_k,
            "layers": LAYERS,
            "width": WIDTH,
            "visual_tokens": (SIDE // PATCH) ** 2,
            "threads": torch.get_num_threads(),
            "cpu": platform.processor() or platform.machine(),
            "commit": commit(),
            "versions": versions(),
        }
        args.json.write_text(json.dumps({"meta": meta, "records": records}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
