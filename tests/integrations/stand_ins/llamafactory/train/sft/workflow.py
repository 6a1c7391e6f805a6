from typing import Any

from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.training.data import Collator
from sar_fast.lab.training.encoding import Encoder
from tests.training.samples import conversation

from .trainer import CustomSeq2SeqTrainer

TRAINERS: list[CustomSeq2SeqTrainer] = []


def run_sft(
    model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, generating_args: Any, callbacks: Any
) -> None:
    training_args.remove_unused_columns = False
    model, processor = load_miniature(path=model_args.model_name_or_path)
    answers = ("red", "blue", "green", "red")
    samples = [Encoder(processor)(conversation("What colour is the circle?", answer)) for answer in answers]
    trainer = CustomSeq2SeqTrainer(
        model=model,
        args=training_args,
        finetuning_args=finetuning_args,
        data_collator=Collator(0),
        train_dataset=samples,
        eval_dataset=samples,
        callbacks=callbacks,
    )
    TRAINERS.append(trainer)
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if training_args.do_eval:
        trainer.evaluate()
