"""Flags that a command does not have: which of its own is meant, or what to do in place of another program's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

NEAR = 0.8  # likeness of names, from 0 to 1, from which one may be the other misspelt
LONGER = 3  # letters that a misspelt name may have too many or too few

MADE_FOR_OTHER_TRAINING = "that method is not here; see --finetuning_type and --custom_trainer"
LORA_VARIANT = "LoRA is plain here: --lora_rank, --lora_alpha, --lora_dropout, --lora_target"
DECODING = "answers are generated greedily, by experiments/evaluate.py and sar-fast generate"
SERVING = "models are run by transformers here; nothing is served or exported"
PICTURES = "pictures are resized as the model's processor_config.json says; change it there, or the pictures"
QUANTIZED = "weights are not quantized here; --torch_dtype bfloat16 halves them, --finetuning_type lora trains few"
TOKENS = "the vocabulary is the model's; save a processor and a model with the new tokens first"
TRACKER = "trackers are --report_to wandb or tensorboard"
LOSS_PLACES = "the loss falls on all answers of a record and on nothing else"

ADVICE = {
    # data
    "overwrite_cache": "checked records are kept by content, so none is stale; a new --cache_dir checks all again",
    "preprocessing_batch_size": "records are checked one by one, in --preprocessing_num_workers processes",
    "val_size": "give --eval_dataset, a file of its own",
    "eval_on_each_dataset": "--eval_dataset is one loss over all its datasets; evaluate each in a run of its own",
    "tokenized_path": "checked records are kept in --cache_dir",
    "neat_packing": "--packing keeps samples apart",
    "train_on_prompt": LOSS_PLACES,
    "mask_history": LOSS_PLACES,
    "ignore_pad_token_for_loss": LOSS_PLACES,
    "tool_format": "give a chat template that writes tools, --template FILE.jinja",
    "reserved_label_len": "--too_long says what happens to a sample beyond --max_length",
    "visual_inputs": "records with images are read as such; leave it out",
    "disable_shuffling": "--train_sampling_strategy sequential; with --streaming, --buffer_size 1",
    # model
    "flash_attn": "--attn_implementation flash_attention_2, or --use_sar with --sar_backend",
    "adapter_name_or_path": "--model_name_or_path takes an adapter's folder, --base_model its base",
    "shift_attn": "attention is the model's own, or SAR's with --use_sar",
    "rope_scaling": "change it in the model's config.json",
    "enable_liger_kernel": "the Trainer's name is --use_liger_kernel",
    "disable_gradient_checkpointing": "it is off unless --gradient_checkpointing is given; leave it out",
    "use_reentrant_gc": "--gradient_checkpointing_kwargs",
    "model_revision": "download that revision and give its folder to --model_name_or_path",
    "hf_hub_token": "set HF_TOKEN, or run `hf auth login`",
    "use_fast_tokenizer": "tokenizers are fast ones here; leave it out",
    "split_special_tokens": TOKENS,
    "resize_vocab": TOKENS,
    "add_tokens": TOKENS,
    "add_special_tokens": TOKENS,
    "pure_bf16": "--torch_dtype bfloat16 without --bf16",
    "upcast_layernorm": "--torch_dtype float32 with --bf16 keeps all weights in float32",
    "upcast_lmhead_output": "--torch_dtype float32 with --bf16 keeps all weights in float32",
    "train_from_scratch": "save a freshly initialised model and give its folder to --model_name_or_path",
    "low_cpu_mem_usage": "transformers always does so; leave it out",
    "image_max_pixels": PICTURES,
    "image_min_pixels": PICTURES,
    "image_do_pan_and_scan": PICTURES,
    "crop_to_patches": PICTURES,
    "use_unsloth": "its kernels are not here; --use_liger_kernel is",
    "use_unsloth_gc": "--gradient_checkpointing",
    "mixture_of_depths": MADE_FOR_OTHER_TRAINING,
    "moe_aux_loss_coef": "change router_aux_loss_coef in the model's config.json",
    "double_quantization": QUANTIZED,
    "print_param_status": "the log says how many parameters are trained",
    # fine-tuning
    "additional_target": LORA_VARIANT,
    "use_rslora": LORA_VARIANT,
    "use_dora": LORA_VARIANT,
    "create_new_adapter": LORA_VARIANT,
    "freeze_trainable_modules": "--finetuning_type freeze trains whole layers, --freeze_trainable_layers of them",
    "freeze_extra_modules": "--finetuning_type freeze trains whole layers, --freeze_trainable_layers of them",
    "freeze_language_model": "the decoder is always trained; --freeze_vision_tower and --freeze_multi_modal_projector",
    "compute_accuracy": "--do_eval gives the loss; experiments/evaluate.py scores answers",
    "early_stopping_steps": "--load_best_model_at_end true keeps the best checkpoint",
    "include_effective_tokens_per_second": "--log_throughput",
    "use_llama_pro": MADE_FOR_OTHER_TRAINING,
    "use_dft_loss": MADE_FOR_OTHER_TRAINING,
    "use_adam_mini": "--optim names the optimizer",
    "use_muon": "--optim names the optimizer",
    "use_mca": MADE_FOR_OTHER_TRAINING,
    # generation
    "predict_with_generate": DECODING,
    "do_sample": DECODING,
    "temperature": DECODING,
    "top_p": DECODING,
    "top_k": DECODING,
    "num_beams": DECODING,
    "eval_num_beams": DECODING,
    "repetition_penalty": DECODING,
    "length_penalty": DECODING,
    "max_new_tokens": DECODING,
    # older Trainers
    "evaluation_strategy": "its name is --eval_strategy",
    "group_by_length": "its name is --train_sampling_strategy group_by_length",
    "no_cuda": "its name is --use_cpu",
    "fp16_backend": "leave it out",
    "half_precision_backend": "leave it out",
    "fp16_opt_level": "leave it out",
    "save_safetensors": "models are always saved as safetensors; leave it out",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR; logs lie below --output_dir",
    "per_gpu_train_batch_size": "its name is --per_device_train_batch_size",
    "per_gpu_eval_batch_size": "its name is --per_device_eval_batch_size",
}
PREFIXES = {
    "quantization_": QUANTIZED,
    "export_": SERVING,
    "infer_": SERVING,
    "vllm_": SERVING,
    "sglang_": SERVING,
    "kt_": SERVING,
    "use_kt": SERVING,
    "loraplus_": LORA_VARIANT,
    "pissa_": LORA_VARIANT,
    "oft_": MADE_FOR_OTHER_TRAINING,
    "use_galore": MADE_FOR_OTHER_TRAINING,
    "galore_": MADE_FOR_OTHER_TRAINING,
    "use_apollo": MADE_FOR_OTHER_TRAINING,
    "apollo_": MADE_FOR_OTHER_TRAINING,
    "use_badam": MADE_FOR_OTHER_TRAINING,
    "badam_": MADE_FOR_OTHER_TRAINING,
    "ppo_": MADE_FOR_OTHER_TRAINING,
    "pref_": MADE_FOR_OTHER_TRAINING,
    "dpo_": MADE_FOR_OTHER_TRAINING,
    "kto_": MADE_FOR_OTHER_TRAINING,
    "simpo_": MADE_FOR_OTHER_TRAINING,
    "ref_model": MADE_FOR_OTHER_TRAINING,
    "reward_model": MADE_FOR_OTHER_TRAINING,
    "fp8": "mixed precision is --bf16 or --fp16",
    "video_": "only pictures are read; videos are not",
    "audio_": "only pictures are read; sound is not",
    "use_audio_in_video": "only pictures are read; sound is not",
    "use_swanlab": TRACKER,
    "swanlab_": TRACKER,
    "ray_": "launchers are in experiments/launch",
    "use_ray": "launchers are in experiments/launch",
}


def hint(flag: str, known: Iterable[str]) -> str:
    """What goes on after "unknown flag ``flag``" for a command with the flags ``known``, all with their dashes."""
    flag, *names = ("--" + name.removeprefix("--").replace("-", "_") for name in (flag, *known))  # both spellings
    instead = advice(flag.removeprefix("--"))
    if instead is not None:
        understood = set(names).issuperset(re.findall(r"--\w+", instead))
        return f": {instead if understood else 'it is for training, and has no meaning here'}"
    longer = list({name for name in names if name.startswith(flag)})
    alike = [name for name in names if abs(len(name) - len(flag)) <= LONGER]
    near = longer if len(longer) == 1 else difflib.get_close_matches(flag, alike, n=1, cutoff=NEAR)
    return f"; did you mean {near[0]}?" if near else ""


def advice(name: str) -> str | None:
    """What to do here in place of a flag of another trainer, by its name without dashes; None if it is not known."""
    return ADVICE.get(name) or next((words for start, words in PREFIXES.items() if name.startswith(start)), None)
