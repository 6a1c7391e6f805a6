"""What ``experiments/evaluate.py`` does: the command line, and which evaluation it asks for."""

from __future__ import annotations

import logging
import sys
from typing import Any

from sar_fast.base.extras import need
from sar_fast.cli.evaluate.arguments import EvaluationArguments, parse
from sar_fast.cli.evaluate.loading import source_of
from sar_fast.lab.run.flags import arguments_of_process
from sar_fast.lab.run.process_group import leave_process_group
from sar_fast.lab.run.threads import one_thread_for


def main() -> None:
    """Run the command line; bad input ends it with one line on stderr and exit code 2."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    for library in ("httpx", "datasets"):
        logging.getLogger(library).setLevel(logging.WARNING)
    arguments = arguments_of_process(parse)
    try:
        with one_thread_for(source_of(arguments).base_name):
            evaluate(arguments)
    except (ValueError, TypeError, ImportError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        sys.stderr.write("\ninterrupted: the same command continues\n")
        raise SystemExit(130) from error
    finally:
        leave_process_group()


def evaluate(arguments: EvaluationArguments) -> dict[str, Any]:
    """The evaluation that the arguments ask for, and what its main file of results holds, on the main process.

    ``ImportError`` names what it needs and does not find.
    """
    if arguments.do_sfs_fi_eval:
        need("--do_sfs_fi_eval", "skimage", *(["matplotlib"] if arguments.focus_overlays else []))
        from sar_fast.cli.evaluate import focus

        return focus.run(arguments)
    if arguments.do_layerwise_probe:
        need("--do_layerwise_probe", "matplotlib")
        from sar_fast.cli.evaluate import probe

        return probe.run(arguments)
    from sar_fast.cli.evaluate import benchmark

    return benchmark.run(arguments)
