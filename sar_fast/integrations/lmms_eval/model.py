"""An lmms-eval model: any supported Hugging Face model, with SAR on it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf import apply_sar
from sar_fast.integrations.lmms_eval.options import cut, generation_options, in_own_words, refuse_unknown
from sar_fast.lab.io.answering import encode_texts, generate, prepare_processor
from sar_fast.lab.io.model_errors import ModelError
from sar_fast.lab.io.models import find_model, load_model
from sar_fast.lab.io.pictures import PictureError, open_picture
from sar_fast.lab.io.processors import ProcessorRefusal
from sar_fast.lab.run.sar_flags import find_rule, refuse_papers
from sar_fast.lab.run.session import start_processes
from sar_fast.method.validation import check_flag


class SARHuggingFace(lmms):
    """Batched generation with left padding; pictures and text, no video or audio.

    Args:
        pretrained: folder or hub id of an image-text-to-text model, or of an adapter; 'miniature' is the small one
            shipped.
        base_model: the model that an adapter is for; by default the one that the adapter names.
        use_sar: False evaluates the model as it is, with everything else the same.
        sar_activation_layer_k, sar_beta, sar_normalize, sar_decode, sar_prior_source, sar_backend: of
            :class:`~sar_fast.SARConfig`.
        sar_weighting: another rule, in place of sar_beta and sar_normalize: a name, FILE.py:NAME, JSON or a folder
            (:func:`~sar_fast.method.weighting.find_weighting`).
        dtype: auto (bfloat16 on a GPU, else float32), or a name.
        template: a Jinja file in place of the model's chat template.
        batch_size, device, max_batch_size: lmms-eval's; the last has no effect.
    """

    is_simple = False

    @in_own_words
    def __init__(
        self,
        pretrained: str,
        base_model: str | None = None,
        use_sar: bool = True,
        sar_activation_layer_k: int = 10,
        sar_beta: float | None = None,
        sar_normalize: str | None = None,
        sar_weighting: str | dict[str, Any] | None = None,
        sar_decode: str = "running",
        sar_prior_source: str = "vision_layer",
        sar_backend: str = "auto",
        dtype: str = "auto",
        template: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(unknown, inspect.signature(SARHuggingFace).parameters)
        check_flag("--model_args: use_sar", use_sar)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ArgumentError("batch_size", repr(batch_size), "be a number, 1 or more")
        self.batch_size = int(batch_size)
        wanted = device or "auto"
        # lmms-eval itself asks for "cuda", with as many processes as there are GPUs
        self.state = start_processes("auto" if wanted == "cuda" else wanted)
        self._rank, self._world_size = self.state.process_index, self.state.num_processes
        self.accelerator = Accelerator(cpu=self.state.device.type == "cpu")  # lmms-eval gathers results through it
        try:
            place = str(self.state.device) if wanted in ("auto", "cuda") else wanted
            self.model, self.processor = load_model(find_model(pretrained, base_model), place, dtype)
        except ModelError as error:
            raise ValueError(error.worded(model="pretrained")) from error
        prepare_processor(self.processor, template)
        self.handle = None
        if use_sar:
            fields = {"beta": sar_beta if sar_beta is None else float(sar_beta), "normalize": sar_normalize}
            if sar_weighting is not None:
                refuse_papers("sar_weighting", [f"sar_{name}" for name, value in fields.items() if value is not None])
                fields = {"weighting": find_rule(sar_weighting, self.model.config)}
            config = SARConfig(
                activation_layer_k=sar_activation_layer_k,
                **fields,
                decode=sar_decode,
                prior_source=sar_prior_source,
                backend=sar_backend,
            )
            self.handle = apply_sar(self.model, config)

    @property
    def device(self) -> Any:
        return self.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Replies in the order of the requests; requests that generate alike share batches."""
        replies: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[2].items())), []).append(index)
        bar = tqdm(total=len(requests), desc="sar_hf", unit="sample", disable=self.rank != 0)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                for index, reply in zip(batch, self._answer([requests[i] for i in batch])):
                    replies[index] = reply
                    self.cache_hook.add_partial("generate_until", requests[index].args, reply)
                bar.update(len(batch))
        bar.close()
        return replies

    def _answer(self, requests: Sequence[Instance]) -> list[str]:
        texts, pictures, documents = [], [], []
        for request in requests:
            _, to_messages, _, doc_id, task, split = request.args
            chat = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
            images, videos, audios = chat.extract_media()
            if videos or audios:
                raise ValueError(f"task {task}: sar_hf takes pictures; document {doc_id} has video or audio")
            texts.append(
                self.processor.apply_chat_template(chat.to_hf_messages(), add_generation_prompt=True, tokenize=False)
            )
            try:
                pictures.append([open_picture(image) for image in images])
            except PictureError as error:
                raise ValueError(f"task {task}: a picture of document {doc_id} {error}") from error
            documents.append(f"task {task}, document {doc_id}")
        options = requests[0].args[2]
        inputs = self._encode(documents, texts, pictures).to(self.model.device, self.model.dtype)
        length = int(options.get("max_new_tokens", 128))
        replies = generate(self.model, self.processor, inputs, length, **generation_options(options))
        return [cut(reply, options.get("until")) for reply in replies]

    def _encode(self, documents: Sequence[str], texts: Sequence[str], pictures: Sequence[list[Any]]) -> Any:
        """Model inputs of a batch; ``ValueError`` names a document that the processor refuses."""
        try:
            return encode_texts(self.processor, [image for images in pictures for image in images], texts)
        except ProcessorRefusal:
            for document, text, images in zip(documents, texts, pictures):
                try:
                    encode_texts(self.processor, images, [text])
                except ProcessorRefusal as error:
                    raise ValueError(f"{document}: the processor refuses it: {error.why}") from error
            raise

    # The harness's base class demands these two of every model, and stops a task that needs them with their error.

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("sar_hf generates; a task with output_type loglikelihood needs another model")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("sar_hf answers in one round; a multi-round task needs another model")
