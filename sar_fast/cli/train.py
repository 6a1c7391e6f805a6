"""What ``experiments/train.py`` does: the command line, and the training that it asks for."""

from __future__ import annotations

import contextlib
import logging
import sys

import torch.distributed as dist
from transformers.utils import logging as hf_logging

from sar_fast.base.errors import arguments_named
from sar_fast.lab.run.flags import expand
from sar_fast.lab.run.process_group import leave_process_group
from sar_fast.lab.run.threads import one_thread_for
from sar_fast.lab.training.arguments import FLAGS, main_arguments
from sar_fast.lab.training.checking import ending_at_a_bad_record
from sar_fast.lab.training.distributed import asks_for_deepspeed, prepare_deepspeed
from sar_fast.lab.training.models import source_of
from sar_fast.lab.training.run import build, run


def main() -> None:
    """Run the command line; bad input ends it with one line on stderr and exit code 2."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    hf_logging.enable_propagation()
    hf_logging.disable_default_handler()
    try:
        _train()
    except KeyboardInterrupt as error:
        sys.stderr.write("\ninterrupted: --resume_from_checkpoint true goes on from the last whole checkpoint\n")
        raise SystemExit(130) from error
    leave_process_group()


def _train() -> None:
    with contextlib.ExitStack() as threads:
        try:
            if asks_for_deepspeed(expand(sys.argv[1:])):
                prepare_deepspeed()
            arguments = main_arguments()
            threads.enter_context(one_thread_for(source_of(arguments.model).base_name))
            with arguments_named(FLAGS):
                trainer, checkpoint = build(arguments)
        except (ValueError, TypeError, ImportError, OSError) as error:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            raise SystemExit(2) from error
        with ending_at_a_bad_record():
            run(trainer, arguments, checkpoint)
        if dist.is_initialized():  # a rank that leaves while another still writes would abort
            dist.barrier()
