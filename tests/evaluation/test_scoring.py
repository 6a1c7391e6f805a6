"""Scores of every benchmark against cases worked out by hand, and what replies are read as."""

from __future__ import annotations

import pytest

from sar_fast.lab.benchmark.tasks import TASKS, find_task
from sar_fast.lab.benchmark.tasks.base import partial_totals
from sar_fast.lab.benchmark.tasks.choices import parse_choice
from sar_fast.lab.benchmark.tasks.mmbench import ABILITIES
from sar_fast.lab.benchmark.tasks.mme import COGNITION, PERCEPTION, parse_yes_no
from sar_fast.lab.benchmark.tasks.pope import binary_scores, is_clear, parse_pope
from sar_fast.lab.benchmark.tasks.scienceqa import parse_scienceqa
from sar_fast.lab.benchmark.tasks.textvqa import normalise, vqa_accuracy


def make(name, **options):
    task = find_task(name)
    return task(task.Options(**options))


def judged(task, samples, replies, **facts):
    """Records as a run makes them, one reply per sample."""
    assert len(samples) == len(replies)
    records = []
    for sample, reply in zip(samples, replies):
        record = {**sample.about, "key": sample.key, "group": sample.group, "reply": reply, **facts}
        records.append(record | task.judge(record))
    return records


# --- MME


def mme_rows(pictures, category="existence"):
    """Two questions per picture, yes then no."""
    return [
        {
            "question_id": f"{n}.png",
            "question": f"Is it {a}? Please answer yes or no.",
            "answer": a,
            "category": category,
        }
        for n in range(pictures)
        for a in ("Yes", "No")
    ]


def test_mme_is_accuracy_plus_accuracy_of_whole_pictures():
    task = make("mme")
    samples, skips = task.samples(mme_rows(3))
    # pictures: both right; one right; both wrong -> 3 of 6 questions, 1 of 3 pictures
    scores = task.scores(judged(task, samples, ["Yes", "No", "yes.", "Yes", "no", "maybe"]))
    existence = scores["categories"]["existence"]
    assert not skips
    assert existence["accuracy"] == pytest.approx(50)
    assert existence["accuracy_plus"] == pytest.approx(100 / 3)
    assert existence["score"] == pytest.approx(50 + 100 / 3)
    assert scores["perception"] == pytest.approx(50 + 100 / 3)
    assert scores["cognition"] is None  # nothing of it was asked: not a zero
    assert scores["unparsed"] == 1


def test_mme_gives_a_constant_answer_50_per_category_and_sums_categories():
    """Twice the accuracy, which is 100 here, would reward a model that never looks."""
    task = make("mme")
    rows = mme_rows(4) + mme_rows(2, "OCR") + mme_rows(2, "code_reasoning")
    samples, _ = task.samples(rows)
    scores = task.scores(judged(task, samples, ["Yes"] * len(samples)))
    assert {name: c["score"] for name, c in scores["categories"].items()} == {
        "existence": 50,
        "OCR": 50,
        "code_reasoning": 50,
    }
    assert (scores["perception"], scores["cognition"]) == (100, 50)  # sums over categories, not means
    best = task.scores(judged(task, samples, ["Yes", "No"] * 8))
    assert (best["perception"], best["cognition"], best["overall"]["score"]) == (400, 200, 600)


def test_mme_pairs_by_category_and_picture():
    """The same picture name in two categories is two pictures."""
    task = make("mme")
    samples, _ = task.samples(mme_rows(1, "existence") + mme_rows(1, "count"))
    scores = task.scores(judged(task, samples, ["Yes", "No", "Yes", "Yes"]))
    assert scores["categories"]["existence"]["score"] == 200
    assert scores["categories"]["count"]["score"] == 50


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("No, there is not.", "no"),
        ("Yes, but no", "yes"),
        ("  yes", "yes"),
        ('"Yes"', "yes"),
        ("", None),
        ("I think yes", None),  # only the first four characters count
        ("Oui", None),
        ("是", None),
        ("Nothing", "no"),  # the rule looks for letters, not words
        ("Sí, no hay", None),
    ],
)
def test_mme_reads_the_first_four_characters(reply, expected):
    assert parse_yes_no(reply) == expected


def test_mme_prompt_is_the_question_with_the_suffix_in_place_of_its_own():
    row = {"question_id": "a", "question": "Is it? Please answer yes or no.", "answer": "Yes", "category": "count"}
    rows = [row, {**row, "question": "Is it not? Please answer yes or no.", "answer": "No"}]
    assert make("mme").samples(rows)[0][0].prompt == "Is it?\nAnswer the question using a single word or phrase."
    assert make("mme", prompt_suffix=" Yes or no?").samples(rows)[0][0].prompt == "Is it? Yes or no?"


def test_mme_skips_a_picture_with_one_question_and_says_so():
    rows = mme_rows(2)
    samples, skips = make("mme").samples(rows[:3])
    assert [s.about["question_id"] for s in samples] == ["0.png", "0.png"]
    assert [(s.key, s.reason) for s in skips] == [("existence/1.png", "one question of two: accuracy+ is not defined")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"category": "existance"},
            "row 1: category is 'existance', which MME does not have; did you mean 'existence'",
        ),
        ({"category": None}, "row 1: category is None"),
        ({"answer": "Maybe"}, "row 1: answer is 'Maybe', needed Yes or No"),
        ({"answer": None}, "row 1: answer is None, needed words"),
        ({"question": ""}, "row 1: question is '', needed words"),
        (
            {"question": "Is it Yes? Please answer yes or no.", "answer": "Yes"},
            "row 1: existence/0.png has this question in row 0",
        ),
    ],
)
def test_mme_names_a_bad_row(change, message):
    rows = mme_rows(1)
    rows[1] |= change
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        make("mme").samples(rows)


def test_mme_names_a_third_question_about_a_picture():
    third = {"question_id": "0.png", "question": "And this?", "answer": "No", "category": "existence"}
    with pytest.raises(ValueError, match=r"row 2 is a third question about existence/0\.png"):
        make("mme").samples([*mme_rows(1), third])


# --- POPE


def pope_rows(answers, category="random"):
    return [
        {"question_id": str(n), "question": "Is there a dog?", "answer": a, "category": category}
        for n, a in enumerate(answers)
    ]


def test_pope_counts_yes_as_positive_and_predictions_in_the_yes_ratio():
    answers = ["yes"] * 5 + ["no"] * 5
    replies = ["Yes"] * 3 + ["No"] * 2 + ["Yes, I see one"] + ["No"] * 4  # 3 true, 2 missed, 1 false alarm
    task = make("pope")
    samples, _ = task.samples(pope_rows(answers))
    scores = task.scores(judged(task, samples, replies))["categories"]["random"]
    assert scores == {
        "accuracy": 70,
        "precision": 75,
        "recall": 60,
        "f1": pytest.approx(200 / 3),
        "yes_ratio": 40,  # of the ground truth it is 50
        "total": 10,
    }


def test_pope_averages_over_ways_of_choosing_objects_not_over_questions():
    task = make("pope")
    rows = pope_rows(["yes", "no"], "random") + pope_rows(["yes", "no", "yes", "no"], "adversarial")
    samples, _ = task.samples(rows)
    scores = task.scores(judged(task, samples, ["yes", "no", "no", "no", "no", "no"]))
    assert scores["categories"]["random"]["f1"] == 100
    assert scores["categories"]["adversarial"]["f1"] == 0
    assert scores["overall"]["f1"] == 50
    assert scores["overall"]["accuracy"] == 75  # (100 + 50) / 2; over questions it would be 66.7
    assert scores["missing_categories"] == ["popular"]


def test_pope_has_no_precision_where_nothing_is_said_to_be_there():
    scores = binary_scores(["yes", "no"], ["no", "no"])
    assert scores["precision"] is None
    assert (scores["recall"], scores["f1"], scores["yes_ratio"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("reply", "prediction", "clear"),
    [
        ("Yes", "yes", True),
        ("no.", "no", True),
        ("No, there is no dog", "no", True),
        ("Yes, but no", "no", True),  # the first sentence has a no
        ("Yes. No dog though.", "yes", True),  # the second sentence does not count
        ("There is not", "no", True),
        ("", "yes", False),  # everything without a negation is a yes: counted as unclear
        ("Nein", "yes", False),
        ("NO", "yes", False),  # the rule knows No, no and not
        ("No\nthere is none", "yes", False),  # words are split at spaces alone
    ],
)
def test_pope_reads_negations_of_the_first_sentence(reply, prediction, clear):
    assert parse_pope(reply) == prediction
    assert is_clear(reply) is clear


def test_pope_names_a_duplicate_and_a_typo():
    with pytest.raises(ValueError, match="row 2: random question 0 is in row 0 already"):
        make("pope").samples(pope_rows(["yes", "no"]) + pope_rows(["yes"]))
    with pytest.raises(ValueError, match=r"category is 'adverserial', needed .*did you mean 'adversarial'"):
        make("pope").samples(pope_rows(["yes"], "adverserial"))


# --- multiple choice


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("B", 1),
        ("B.", 1),
        ("(C)", 2),
        ("The answer is D.", 3),
        ("B. cat", 1),
        ("cat", 1),
        ("It is a cat.", 1),  # a is no option letter: case counts
        ("A cat sits there", 1),  # A among many words is an article; the words decide
        ("A", 0),
        ("A or B", None),
        ("", None),
        ("a dog or a cat", None),
        ("E", None),
        ("zebra", None),
        ("cat " * 40, None),  # far longer than all choices: a rambling reply
    ],
)
def test_choice_by_letter_then_by_words(reply, expected):
    assert parse_choice(reply, ["dog", "cat", "horse", "cow"]) == expected


def mmbench_row(index, answer="A", **choices):
    choices = choices or {"A": "red", "B": "green", "C": "blue", "D": "nan"}
    return {
        "index": index,
        "question": "What colour?",
        "hint": "nan",
        "answer": answer,
        "category": "colour",
        "L2-category": "attribute",
        **choices,
    }


def test_mmbench_makes_every_rotation_and_wants_all_of_them_right():
    task = make("mmbench")
    samples, _ = task.samples([mmbench_row(7, "B"), mmbench_row(8, "C")])
    first = [s for s in samples if s.group == "7"]
    assert [s.about["choices"] for s in first] == [
        ["red", "green", "blue"],
        ["green", "blue", "red"],
        ["blue", "red", "green"],
    ]
    assert ["ABC"[s.about["answer"]] for s in first] == ["B", "A", "C"]  # green, wherever it stands
    assert first[1].prompt == (
        "What colour?\nA. green\nB. blue\nC. red\nAnswer with the option's letter from the given choices directly."
    )
    replies = ["B", "A", "C", "C", "C", "C"]  # question 8: blue is at C, B, A; the model always says C
    scores = task.scores(judged(task, samples, replies))
    assert scores["overall"]["accuracy"] == 50
    assert scores["overall"]["accuracy_without_rotations"] == 100
    assert scores["abilities"] == {"attribute": 50}


def test_mmbench_takes_published_rotations_as_they_are():
    """The hub's tables hold rotation r of question i as index i + r x 10^6."""
    turned = {"A": "green", "B": "blue", "C": "red", "D": "nan"}, {"A": "blue", "B": "red", "C": "green", "D": "nan"}
    rows = [mmbench_row(3, "A"), mmbench_row(1_000_003, "C", **turned[0]), mmbench_row(2_000_003, "B", **turned[1])]
    task = make("mmbench")
    samples, skips = task.samples(rows)
    assert (len(samples), skips) == (3, [])
    assert task.scores(judged(task, samples, ["A", "C", "B"]))["overall"]["accuracy"] == 100
    assert task.scores(judged(task, samples, ["A", "C", "A"]))["overall"]["accuracy"] == 0


def test_mmbench_skips_a_question_without_all_its_rotations():
    rows = [mmbench_row(3), mmbench_row(4), mmbench_row(1_000_003), mmbench_row(2_000_003)]
    samples, skips = make("mmbench").samples(rows)
    assert {s.group for s in samples} == {"3"}
    assert [(s.key, s.reason) for s in skips] == [("question 4", "rotations [0] of 3")]


def test_mmbench_finds_the_answer_that_stands_in_words():
    task = make("mmbench", choice_format="cloze")
    samples, _ = task.samples([mmbench_row(0, "B")])
    assert {s.prompt for s in samples} == {"What colour?"}
    assert samples[0].options == (("red",), ("green",), ("blue",))
    assert task.scores(judged(task, samples, ["green", "Green.", "it is green"]))["overall"]["accuracy"] == 100


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (mmbench_row(0, None), "row 0 has no answer"),
        (mmbench_row(0, "D"), "row 0: answer is 'D', needed one of A, B, C"),
        (mmbench_row(0, "A", A="x", B="nan"), "row 0: 1 choices, needed two or more"),
        (mmbench_row(0, "C", A="x", B="y", C="nan", D="z"), "row 0: answer is 'C', needed one of A, B$"),
    ],
)
def test_mmbench_names_a_bad_row(row, message):
    with pytest.raises(ValueError, match=message):
        make("mmbench").samples([row])


@pytest.mark.parametrize("index", ["abc", None, 1.5, "", -1, float("nan")])
def test_mmbench_names_a_row_without_an_index(index):
    with pytest.raises(ValueError, match=r"row 1: index is .*, needed a whole number"):
        make("mmbench").samples([mmbench_row(3), {**mmbench_row(4), "index": index}])


def test_mmbench_names_a_duplicate():
    with pytest.raises(ValueError, match="row 1: index 3 is in row 0 already"):
        make("mmbench").samples([mmbench_row(3), mmbench_row(3)])


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("B", 1),
        ("b", None),
        ("B.", None),
        ("B. because", 1),
        ("C.cat", None),
        ("B because", None),
        ("B\nbecause", None),
        ("The answer is B.", 1),
        ("So: The answer is B, clearly", 1),  # the rule's point is any character
        ("The answer is B", None),
        ("The answer is B\n", None),
        ("The answer is A. The answer is B.", None),
        ("The answer is A. The answer is A.", None),
        ("The answer is D.", None),
        ("E. The answer is A.", None),
        ("F. The answer is A.", 0),  # of questions with five choices at most
        ("D", None),
        ("", None),
        ("Б", None),
    ],
)
def test_scienceqa_reads_replies_as_llavas_script_does(reply, expected):
    assert parse_scienceqa(reply, 3) == expected


def test_scienceqa_scores_subjects():
    row = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "Look.", "subject": "natural science"}
    task = make("scienceqa")
    samples, _ = task.samples([row, {**row, "subject": "social science", "hint": None}])
    assert samples[0].prompt.startswith("Context: Look.\nWhich?\nA. x\nB. y\nAnswer with")
    scores = task.scores(judged(task, samples, ["B", "no idea"]))
    assert scores["overall"] == {"accuracy": 50, "correct": 1, "total": 2}
    assert scores["subjects"] == {"natural science": 100, "social science": 0}
    assert scores["unparsed"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"choices": ["x"]},
        {"choices": None},
        {"choices": [None, "x"]},
        {"choices": ["x", " "]},
        {"answer": 2},
        {"answer": None},
    ],
)
def test_scienceqa_names_a_bad_row(change):
    row = {"question": "Which?", "choices": ["x", "y"], "answer": 1} | change
    with pytest.raises(ValueError, match=f"row 0: {next(iter(change))} is"):
        make("scienceqa").samples([row])


# --- TextVQA


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    [
        (0, 0.0),
        (1, 0.3),  # the one who agrees sees 0 others, nine see 1 of 3
        (2, 0.6),  # two see 1/3, eight see 2/3
        (3, 0.9),  # three see 2/3, seven see 1
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_vqa_accuracy_leaves_one_person_out(agreeing, expected):
    assert vqa_accuracy("blue", ["Blue."] * agreeing + ["red"] * (10 - agreeing)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("3.50", "3.50"),
        ("1,000", "1000"),
        ("coca-cola", "coca cola"),
        ("Joe's", "joe 's"),
        ("none", "0"),
        ("stop!", "stop"),
        ("", ""),
        ("café", "café"),
    ],
)
def test_vqa_answers_are_normalised(answer, expected):
    assert normalise(answer) == expected


def test_textvqa_means_over_questions_and_refuses_tables_without_answers():
    task = make("textvqa")
    rows = [{"question_id": n, "question": "what is it?", "answers": ["stop"] * 10} for n in range(2)]
    samples, _ = task.samples(rows)
    assert samples[0].prompt == "What is it?\nAnswer the question using a single word or phrase."
    assert task.scores(judged(task, samples, ["Stop", ""]))["overall"]["accuracy"] == 50
    with pytest.raises(ValueError, match="row 0 has no answers"):
        task.samples([{"question_id": 1, "question": "what?", "answers": [""] * 10}])
    with pytest.raises(ValueError, match="row 2: question_id 0 is in row 0 already"):
        task.samples([*rows, rows[0]])


# --- all


def test_every_task_names_its_source_and_hub_dataset():
    for name, task in TASKS.items():
        assert task.name == name
        assert task.source
        assert task.hub_id.startswith("lmms-lab/")


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"task must be one of mme, .*got 'mmbnch'; did you mean 'mmbench'"):
        find_task("mmbnch")


# --- totals over parts that are not all there


def science_rows(*subjects):
    return [{"question": "?", "choices": ["a", "b"], "answer": 0, "subject": subject} for subject in subjects]


def ability_rows(*abilities):
    return [mmbench_row(n) | {"L2-category": ability} for n, ability in enumerate(abilities)]


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        (
            "mme",
            mme_rows(2),
            {"overall": "1 of 14 categories", "perception": "1 of 10 categories", "cognition": "0 of 4 categories"},
        ),
        (
            "mme",
            [row for name in PERCEPTION for row in mme_rows(1, name)],
            {"overall": "10 of 14 categories", "cognition": "0 of 4 categories"},
        ),
        ("mme", [row for name in PERCEPTION + COGNITION for row in mme_rows(1, name)], {}),
        (
            "pope",
            pope_rows(["yes"], "random") + pope_rows(["yes"], "popular"),
            {f"mean {name}": "2 of 3 categories" for name in ("f1", "accuracy", "yes_ratio")},
        ),
        ("pope", [row for name in ("random", "popular", "adversarial") for row in pope_rows(["yes"], name)], {}),
        ("scienceqa", science_rows("natural science", "social science"), {"accuracy": "2 of 3 subjects"}),
        ("scienceqa", science_rows("natural science", "social science", "language science"), {}),
        ("scienceqa", science_rows("botany", "social science"), {}),  # its own subjects: what is missing is not known
        ("scienceqa", science_rows(None), {}),
        (
            "mmbench",
            ability_rows("logic_reasoning"),
            {f"accuracy, {name}": "1 of 6 abilities" for name in ("circular", "unrotated")},
        ),
        ("mmbench", ability_rows(*ABILITIES), {}),
        ("mmbench", ability_rows("chinese culture"), {}),
    ],
)
def test_a_total_of_some_parts_says_of_how_many(name, rows, expected):
    task = make(name)
    samples, _ = task.samples(rows)
    scores = task.scores(judged(task, samples, ["Yes"] * len(samples)))
    assert partial_totals(task, scores) == expected
    assert expected.keys() <= {"overall", *dict(task.headline(scores))}
