"""MileBench's sets as they are distributed, and its prediction files with their scores."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from csp_edge.errors import OptionError
from csp_edge.eval.milebench import SETS, read_milebench, score_path, score_predictions
from csp_edge.eval.samples import Sample, Turn
from csp_edge.template import normalize_messages

ROOT = Path(__file__).parents[1]
MADE_UP = ROOT / "tests/milebench"
# real predictions with their published scores, which are not part of this project
REAL = Path(os.environ.get("CSP_EDGE_MILEBENCH", ROOT.parent / "shared/milebench"))

#
# predictions
#


def published(folder):
    figures = json.loads((folder / "eval.json").read_text())
    by_sample = json.loads((folder / "eval_score.json").read_text())
    return figures, {entry["id"]: float(entry["score"]) for entry in by_sample}


@pytest.mark.parametrize(
    "folder",
    [MADE_UP / name for name in sorted(path.name for path in MADE_UP.iterdir())]
    + [REAL / name for name in ("ActionSequence", "Spot-the-Diff", "TextNeedleInAHaystack")],
    ids=lambda folder: f"{folder.parts[-2]}/{folder.name}",
)
def test_scores_are_the_published_ones(folder):
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    figures, by_sample = published(folder)
    [(name, scores)] = score_path(folder).items()
    assert name == folder.name
    assert scores.mean == figures["Rouge-L f" if scores.metric == "rouge-l" else "Accuracy"]
    assert {key: round(value, 3) for key, value in scores.by_sample.items()} == by_sample
    assert list(scores.by_sample) == list(by_sample)


def test_scores_by_number_of_pictures():
    file = REAL / "ActionSequence/pred_with_extracted.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    figures, by_sample = published(file.parent)
    scores = score_path(file)["ActionSequence"]
    assert scores.by_sample == by_sample
    assert scores.by_quantity() == {
        level: (figures["image_quantity_level-Accuracy"][level], n)
        for level, (_, n) in figures["image_quantity_level-Result"].items()
        if n
    }


def test_a_folder_of_sets_and_a_file():
    scores = score_path(MADE_UP)
    assert list(scores) == sorted(path.name for path in MADE_UP.iterdir())
    assert scores["MMCoQA"] == score_path(MADE_UP / "MMCoQA/pred.json")["MMCoQA"]


def prediction(**changes):
    question = "Which?\nChoice list: \nA. one\nand a half\nB. two\nYour answer is: "
    entry = {"sample_id": 7, "gt_response": "two", "pred_response": "B", "question": question}
    return {key: value for key, value in (entry | changes).items() if value is not None}


def test_choices_come_from_the_list_or_else_from_the_question():
    def right(**changes):
        return score_predictions([prediction(**changes)], "TQA").by_sample["7"]

    assert right() == 1
    assert right(pred_response="A") == 0
    assert right(gt_response="one\nand a half", pred_response="A") == 1
    assert right(choice_list=["two", "one"], pred_response="A") == 1
    assert right(question="Choice list: \nA. no\n" + prediction()["question"]) == 1


@pytest.mark.parametrize(
    "entries, dataset, message",
    [
        ([prediction()], "NoSuchSet", "'NoSuchSet' is none of MileBench's sets"),
        ([], "TQA", "there are no predictions"),
        (["B"], "TQA", r"\[0\] is a str: give a dict"),
        ([prediction(sample_id=None)], "TQA", "sample_id is a NoneType"),
        ([prediction(), prediction()], "TQA", r"\[1\]: sample_id 7 stands there twice"),
        ([prediction(pred_response=["B"])], "TQA", "pred_response is a list: give a str"),
        ([prediction(gt_response=None)], "IEdit", "gt_response is a NoneType"),
        ([prediction(question="Which?")], "TQA", "no choices"),
        ([prediction(question=None)], "TQA", "question is a NoneType"),
        ([prediction(choice_list={"A": 1})], "TQA", "choice_list is a dict: give a list"),
        ([prediction(gt_response="three")], "TQA", "'three' is none of its choices"),
        ([prediction(choice_list=[])], "TQA", "'two' is none of its choices"),
    ],
)
def test_bad_predictions(entries, dataset, message):
    with pytest.raises(OptionError, match=message):
        score_predictions(entries, dataset)


def test_bad_prediction_files(tmp_path):
    with pytest.raises(OptionError, match="no predictions: give a pred.json"):
        score_path(tmp_path)
    with pytest.raises(OptionError, match="no predictions: give a pred.json"):
        score_path(Path("no\0such"))
    file = tmp_path / "pred.json"
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(OptionError, match="not JSON"):
            score_path(tmp_path)
    file.write_text("{}")
    with pytest.raises(OptionError, match="is a dict: give a list"):
        score_path(file)


#
# sets
#


def entry(context="{image#1} and {image#2}: which?", pictures=("0.jpg", "b/1.jpg"), **changes):
    task = {"context": context, "images_path": list(pictures), "choice_list": ["one", "two"]}
    data = {"sample_id": 3, "task_instruction_id": 1, "task_instance": task, "response": "two"}
    data = data | {key: value for key, value in changes.items() if key in data}
    task |= {key: value for key, value in changes.items() if key not in data}
    return data


def write(root, *entries, name="TQA", **meta):
    """A set as it is distributed: its file beside the pictures."""
    folder = root / name
    (folder / "images/b").mkdir(parents=True)
    for picture in ("0.jpg", "b/1.jpg", "2.jpg"):
        Image.new("RGB", (2, 2)).save(folder / "images" / picture)
    meta = {"task_instruction": ["Say.", "Look. "], "question_type": "multi-choice"} | meta
    text = json.dumps({"meta_data": meta, "data": list(entries)})
    (folder / f"{name}.json").write_text(text)
    return folder


def shown(sample, answers=()):
    """Its messages, with names for the pictures."""
    return [
        [
            part["text"] if part["type"] == "text" else (Path(part["image"]).name,)
            for part in message["content"]
        ]
        for message in sample.messages(answers)
    ]


def test_sets_are_mile_benchs():
    assert Counter(kind.group for kind in SETS.values()) == {
        "temporal": 13, "semantic": 13, "needle": 2, "retrieval": 1
    }  # fmt: skip
    assert Counter(kind.metric for kind in SETS.values()) == {
        "choice": 22, "rouge-l": 4, "needle": 2, "contains": 1
    }  # fmt: skip
    assert {name for name, kind in SETS.items() if kind.metric == "rouge-l"} == {
        "ALFRED", "CLEVR-Change", "IEdit", "Spot-the-Diff"
    }  # fmt: skip


def test_a_sample(tmp_path):
    folder = write(tmp_path, entry())
    [sample] = read_milebench(folder)
    assert (sample.id, sample.dataset, sample.metric, sample.n_pictures) == (
        "3",
        "TQA",
        "choice",
        2,
    )
    [turn] = sample.turns
    assert (turn.skill, turn.group) == ("knowledge", "semantic")
    assert (turn.answer, turn.choices) == ("two", ("one", "two"))
    assert shown(sample) == [
        [
            "Look. \n", ("0.jpg",), " and ", ("1.jpg",),
            ": which?\nChoice list: \nA. one\nB. two\nYour answer is: ",
        ]
    ]  # fmt: skip
    [message] = normalize_messages(sample.messages())
    assert message.pictures == [folder / "images/0.jpg", folder / "images/b/1.jpg"]


@pytest.mark.parametrize(
    "context, expected",
    [
        ("Table: {table#1} {image#2} Q", ["Say.\nTable: ", ("0.jpg",), " ", ("1.jpg",), " Q"]),
        ("{image#2}{image#1}", ["Say.\n", ("1.jpg",), ("0.jpg",)]),
        ("{image#1}a{image#1}", ["Say.\n", ("1.jpg",), ("0.jpg",), "a", ("0.jpg",)]),
        ("No marks", ["Say.\n", ("0.jpg",), ("1.jpg",), "No marks"]),
        ("{image#x}{image#1}{image#2}.", ["Say.\n{image#x}", ("0.jpg",), ("1.jpg",), "."]),
    ],
)
def test_pictures_stand_where_their_marks_are(tmp_path, context, expected):
    changed = entry(context, task_instruction_id="0", response="two cars")
    del changed["task_instance"]["choice_list"]
    [sample] = read_milebench(write(tmp_path, changed, name="Spot-the-Diff"))
    assert shown(sample) == [expected]


def test_choices_of_image_retrieval_have_no_labels(tmp_path):
    [sample] = read_milebench(write(tmp_path, entry("Which?", ()), name="GPR1200"))
    assert shown(sample) == [["Look. \nWhich?\nChoice list: \none\ntwo\nYour answer is: "]]


def test_instructions_by_name_and_numbers_as_answers(tmp_path):
    changed = entry(task_instruction_id=5, response=2, choice_list=[1, 2], sample_id="x")
    [sample] = read_milebench(write(tmp_path, changed, task_instruction={"5": "Five."}))
    assert (sample.id, sample.instruction) == ("x", "Five.\n")
    assert (sample.turns[0].answer, sample.turns[0].choices) == ("2", ("1", "2"))


def test_a_folder_of_sets(tmp_path):
    write(tmp_path, entry(), entry(sample_id=4), name="WikiVQA")
    write(tmp_path, entry(), name="IEdit")
    (tmp_path / "WikiVQA/WikiVQA-adv.json").write_text("not read")
    (tmp_path / "other").mkdir()
    samples = read_milebench(tmp_path)
    assert [(s.dataset, s.id, s.metric) for s in samples] == [
        ("IEdit", "3", "rouge-l"), ("WikiVQA", "3", "choice"), ("WikiVQA", "4", "choice")
    ]  # fmt: skip


def test_a_set_of_ones_own(tmp_path):
    [sample] = read_milebench(write(tmp_path, entry(), name="Mine", question_type="open-ended"))
    assert (sample.metric, sample.turns[0].group, sample.turns[0].skill) == (
        "rouge-l", "other", "Mine"
    )  # fmt: skip


@pytest.mark.parametrize(
    "changed, message",
    [
        ("text", r"data\[0\] is a str: give a dict"),
        (entry(task_instance=[]), r"data\[0\]: task_instance is a list: give a dict"),
        (entry(context=None), "context is a NoneType: give a str"),
        (entry("{image#3}"), r"the context has image 3, and there are 2"),
        (entry("{image#0}"), r"the context has image 0"),
        (entry(images_path="0.jpg"), "images_path is a str: give a list"),
        (entry(images_path=[1]), "images_path is a int: give a str"),
        (entry(pictures=["9.jpg"]), "there is no picture .*images/9.jpg"),
        (entry(pictures=["9" * 999]), "there is no picture"),
        (entry(pictures=["\0"]), "there is no picture"),
        (entry(pictures=["b"]), "there is no picture"),
        (entry(choice_list="one"), "choice_list is a str: give a list"),
        (entry(choice_list=[["one"]]), "choice_list is a list: give a str"),
        (entry(response="three"), "the answer 'three' is none of its choices"),
        (entry(response=None), "response is a NoneType"),
        (entry(task_instruction_id=2), "task_instruction 2 is a NoneType: give a str"),
        (entry(task_instruction_id=None), "task_instruction_id is a NoneType"),
        (entry(sample_id={}), "sample_id is a dict"),
    ],
)
def test_bad_samples(tmp_path, changed, message):
    with pytest.raises(OptionError, match=message) as error:
        read_milebench(write(tmp_path, changed))
    assert "TQA.json: data[0]" in str(error.value)


@pytest.mark.parametrize(
    "name, meta, message",
    [
        ("TQA", {"task_instruction": "Look."}, "task_instruction is a str: give a dict"),
        ("Mine", {"question_type": "riddle"}, "'riddle': give it as multi-choice or open-ended"),
        ("Mine", {"question_type": []}, "question_type is a list: give a str"),
    ],
)
def test_bad_meta_data(tmp_path, name, meta, message):
    with pytest.raises(OptionError, match=message):
        read_milebench(write(tmp_path, entry(), name=name, **meta))


def test_bad_sets(tmp_path):
    for path in (tmp_path, tmp_path / "none", Path("no\0such")):
        with pytest.raises(OptionError, match="no MileBench set: give a folder"):
            read_milebench(path)
    folder = write(tmp_path, entry(), entry())
    with pytest.raises(OptionError, match=r"data\[1\]: sample_id 3 stands there twice"):
        read_milebench(folder)
    for text, message in [
        ("[", "not JSON"),
        ("[]", "is a list"),
        ("{}", "meta_data is a NoneType"),
    ]:
        (folder / "TQA.json").write_text(text)
        with pytest.raises(OptionError, match=message):
            read_milebench(tmp_path)


#
# samples of several turns
#


def test_conversation():
    drawn = []

    def draw():
        drawn.append(True)
        return Image.new("RGB", (2, 2))

    turns = (Turn("What?", "a", "list", "semantic"), Turn("Where?", "b", "find", "retrieval"))
    sample = Sample("1", "scenes", "exact", (draw, draw), turns)
    assert sample.n_pictures == 2 and not drawn

    [first] = normalize_messages(sample.messages())
    assert len(first.pictures) == len(drawn) == 2
    assert first.parts[2].text == "What?"
    messages = normalize_messages(sample.messages(["maybe a"]))
    assert [message.role for message in messages] == ["user", "assistant", "user"]
    assert [len(message.pictures) for message in messages] == [2, 0, 0]
    assert [m.parts[-1].text for m in messages] == ["What?", "maybe a", "Where?"]


def test_shortened():
    content = ("a", Path("0"), "b", Path("1"), Path("2"), "c")
    sample = Sample("1", "TQA", "choice", content, (Turn("?", "a", "", ""),), "Look.\n")
    assert sample.shortened(3) == sample
    assert shown(sample.shortened(2)) == [["Look.\nb", ("1",), ("2",), "c?"]]
    assert shown(sample.shortened(1)) == [["Look.\n", ("2",), "c?"]]
    assert shown(sample.shortened(0)) == [["Look.\nc?"]]
