"""Our scores against lmms-eval's scorers on random replies, where it is installed (pip install sar_fast[lmms-eval]).

POPE and ScienceQA are left out: lmms-eval reads their replies by other rules than the benchmarks' own scripts.
"""

from __future__ import annotations

import random
from string import ascii_uppercase

import pytest

from sar_fast.lab.benchmark.tasks import find_task
from sar_fast.lab.benchmark.tasks.refcoco import RefCOCO
from sar_fast.lab.benchmark.tasks.textvqa import CONTRACTIONS, normalise

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
ROUNDS = 50


@pytest.fixture(params=range(ROUNDS))
def rng(request):
    return random.Random(request.param)


def scores(task, samples, replies, **facts):
    records = []
    for sample, reply in zip(samples, replies):
        record = {**sample.about, "key": sample.key, "group": sample.group, "reply": reply, **facts}
        records.append(record | task.judge(record))
    return task.scores(records)


def test_mme(rng):
    from lmms_eval.tasks.mme import utils

    rows = [
        {"question_id": str(n), "question": f"{answer} {n}", "answer": answer, "category": category}
        for category in rng.sample(utils.eval_type_dict["Perception"], 3)
        for n in range(rng.randint(1, 6))
        for answer in ("Yes", "No")
    ]
    said = ["Yes", "No", "yes.", "No, not", "Yes it is", "no way", "Maybe", "I do not", "Not", "", "Yes, but no"]
    replies = [rng.choice(said) for _ in rows]
    task = find_task("mme")()
    samples, _ = task.samples(rows)
    results = [utils.mme_process_results(row, [reply])["mme_perception_score"] for row, reply in zip(rows, replies)]
    assert scores(task, samples, replies)["perception"] == pytest.approx(utils.mme_aggregate_results(results))


def test_refcoco(rng):
    from lmms_eval.tasks.refcoco import utils_rec

    task = RefCOCO(RefCOCO.Options(box_format="fraction"))
    width, height = rng.randint(50, 600), rng.randint(50, 600)
    rows, replies, results = [], [], []
    for number in range(10):
        x, y, w, h = rng.random() / 2, rng.random() / 2, rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.5)
        near = [round(v + rng.uniform(-0.04, 0.04), 2) for v in (x, y, x + w, y + h)]
        rows.append({"question_id": number, "answer": ["it"], "bbox": [x * width, y * height, w * width, h * height]})
        replies.append(str(near))
        results.append({"bbox": [x, y, x + w, y + h], "pred": utils_rec.parse_float_sequence_within(str(near))})
    samples, _ = task.samples(rows)
    overall = scores(task, samples, replies, image_size=[width, height], frame=None)["overall"]
    theirs = lambda metric: utils_rec.refcoco_bbox_rec_aggregation_result(results, metric)
    assert overall["accuracy"] == pytest.approx(100 * theirs("ACC@0.5"))
    assert overall["accuracy_iou_0.7"] == pytest.approx(100 * theirs("ACC@0.7"))
    assert overall["mean_iou"] == pytest.approx(theirs("IoU"))


@pytest.mark.filterwarnings("ignore")
def test_mmbench(rng):
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    rows = []
    for base in range(6):
        choices = ["cat", "dog", "cow", "pig"][: rng.randint(2, 4)]
        right = rng.choice(choices)
        for turn in range(len(choices)):
            turned = choices[turn:] + choices[:turn]
            letters = {letter: turned[n] if n < len(turned) else "nan" for n, letter in enumerate("ABCD")}
            fixed = {"question": "Which?", "hint": "nan", "category": "c", "L2-category": "l"}
            answer = ascii_uppercase[turned.index(right)]
            rows.append({"index": base + turn * 1_000_000, "answer": answer, **fixed, **letters})
    replies = {}
    for row in rows:
        there = [letter for letter in "ABCD" if row[letter] != "nan"]
        letter = row["answer"] if rng.random() < 0.8 else rng.choice(there)
        replies[row["index"]] = rng.choice([letter, f"{letter}.", f"({letter})", f"{letter}. {row[letter]}"])
    task = find_task("mmbench")()
    samples, _ = task.samples(rows)
    ours = scores(task, samples, [replies[s.about["index"] + s.about["rotation"] * 1_000_000] for s in samples])
    predicted = [{**row, "prediction": replies[row["index"]]} for row in rows]
    theirs, _, _ = MMBench_Evaluator().eval_result(predicted, "static")
    assert ours["overall"]["accuracy"] == pytest.approx(100 * theirs)


def test_textvqa(rng):
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    process = EvalAIAnswerProcessor()
    words = [
        *process.CONTRACTIONS,
        *CONTRACTIONS,
        "a",
        "the",
        "An",
        "one",
        "None",
        "3.5",
        "1,000",
        "u.s.",
        "co-op",
        "(b)",
    ]
    for _ in range(200):
        answer = "".join(rng.choice(words) + rng.choice([" ", "", ", ", "-", "! "]) for _ in range(rng.randint(0, 5)))
        assert normalise(answer) == process(answer)
