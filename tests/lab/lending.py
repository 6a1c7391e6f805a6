"""A model that is lent to the laboratory: what it was before, and whether it is so again."""

from __future__ import annotations

import contextlib

import torch

from sar_fast.hf.features import handle_of


def _hooks(part):
    """Those that transformers puts on a model in its first pass are no business of the laboratory's."""
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    return [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers.")]


def _facts(model, processor):
    handle = handle_of(model.base_model)
    return {
        "training": [part.training for part in model.modules()],
        "hooks": [_hooks(part) for part in model.modules()],
        "attention": [model.config._attn_implementation, model.config.get_text_config()._attn_implementation],
        "features": type(model.base_model).get_image_features,
        "handle": handle,
        "options": handle and handle.config,
        "padding": [processor.tokenizer.padding_side, processor.tokenizer.pad_token_id, processor.chat_template],
    }


@contextlib.contextmanager
def lent(model, processor):
    """Whatever happens inside, with or without an error, the model and the processor are exactly as before."""
    before, state = _facts(model, processor), {name: x.clone() for name, x in model.state_dict().items()}
    try:
        yield
    finally:
        assert _facts(model, processor) == before
        after = model.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], x) for name, x in state.items())
