"""The functions that mme_mini.yaml names: lmms-eval's own."""

from lmms_eval.tasks.mme.utils import (  # noqa: F401
    mme_aggregate_results,
    mme_doc_to_text,
    mme_doc_to_visual,
    mme_process_results,
)
