"""MileBench (arXiv 2404.18532): its data sets and prediction files, as they are distributed.

A set is a folder with a file of its name, `ActionSequence/ActionSequence.json`, beside its
`images/`. Predictions are a `pred.json` in a folder of the set's name.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from csp_edge.errors import OptionError
from csp_edge.eval.samples import Picture, Sample, Turn
from csp_edge.eval.scoring import Metric, choice_label, score


class Kind(NamedTuple):
    """Where a set belongs in MileBench, and how its answers are scored."""

    group: str
    skill: str
    metric: Metric


_ACTIONS = Kind("temporal", "actions", "choice")
_OBJECTS = Kind("temporal", "objects and scenes", "choice")
_NAVIGATION = Kind("temporal", "navigation", "choice")
_STATES = Kind("temporal", "counterfactuals and states", "choice")
_KNOWLEDGE = Kind("semantic", "knowledge", "choice")
_TEXT_IN_IMAGES = Kind("semantic", "text in images", "choice")
_VISUAL_RELATION = Kind("semantic", "visual relations", "rouge-l")

SETS = {
    "ActionLocalization": _ACTIONS,
    "ActionPrediction": _ACTIONS,
    "ActionSequence": _ACTIONS,
    "MovingAttribute": _OBJECTS,
    "ObjectExistence": _OBJECTS,
    "ObjectInteraction": _OBJECTS,
    "ObjectShuffle": _OBJECTS,
    "EgocentricNavigation": _NAVIGATION,
    "MovingDirection": _NAVIGATION,
    "CharacterOrder": _STATES,
    "CounterfactualInference": _STATES,
    "SceneTransition": _STATES,
    "StateChange": _STATES,
    "MultiModalQA": _KNOWLEDGE,
    "TQA": _KNOWLEDGE,
    "WebQA": _KNOWLEDGE,
    "WikiVQA": _KNOWLEDGE,
    "DocVQA": _TEXT_IN_IMAGES,
    "OCR-VQA": _TEXT_IN_IMAGES,
    "SlideVQA": _TEXT_IN_IMAGES,
    "CLEVR-Change": _VISUAL_RELATION,
    "IEdit": _VISUAL_RELATION,
    "Spot-the-Diff": _VISUAL_RELATION,
    "ALFRED": Kind("semantic", "dialogue", "rouge-l"),
    "MMCoQA": Kind("semantic", "dialogue", "contains"),
    "nuscenes": Kind("semantic", "space", "choice"),
    "ImageNeedleInAHaystack": Kind("needle", "needle in images", "needle"),
    "TextNeedleInAHaystack": Kind("needle", "needle in text", "needle"),
    "GPR1200": Kind("retrieval", "image retrieval", "choice"),
}

# what sets of one's own say under question_type
_METRICS: dict[str, Metric] = {"multi-choice": "choice", "open-ended": "rouge-l"}
# its choices are long lists of names, image1 to image100
_UNLABELLED = "GPR1200"
_CHOICES = re.compile(r".*Choice list:[^\S\n]*\n(.*)\nYour answer is:", re.DOTALL)
_MARK = re.compile(r"\{(?:image|table)#([0-9]{1,9})\}")

T = TypeVar("T")

#
# samples
#


def read_milebench(folder: Path) -> list[Sample]:
    """The samples of a set, or of all sets in a folder: the sets by name, samples as they come.

    Sets other than MileBench's 29 are taken as well: of group "other", their skill is their name,
    and they are scored as their `question_type` says.

    Raises:
        OptionError: there is no set, or a set is malformed or lacks a picture.
    """
    folder = Path(os.path.abspath(folder))
    own = folder / f"{folder.name}.json"
    files = (
        [own]
        if os.path.isfile(own)
        else sorted(file for file in folder.glob("*/*.json") if file.stem == file.parent.name)
    )
    if not files:
        raise OptionError(
            f"{folder}: no MileBench set: give a folder that has {folder.name}.json and images/, "
            "or one that holds such folders"
        )
    return [sample for file in files for sample in _read_set(file)]


def _read_set(path: Path) -> list[Sample]:
    folder = path.parent
    whole = _of(dict, _load(path), str(path))
    meta = _of(dict, whole.get("meta_data"), f"{path}: meta_data")
    kind = SETS.get(folder.name) or _own_kind(path, meta)
    instructions = meta.get("task_instruction")
    if isinstance(instructions, list):
        instructions = {str(i): instruction for i, instruction in enumerate(instructions)}
    instructions = _of(dict, instructions, f"{path}: task_instruction")
    samples: dict[str, Sample] = {}
    for i, entry in enumerate(_of(list, whole.get("data"), f"{path}: data")):
        sample = _sample(folder, kind, instructions, entry, f"{path}: data[{i}]")
        if sample.id in samples:
            raise OptionError(f"{path}: data[{i}]: sample_id {sample.id} stands there twice")
        samples[sample.id] = sample
    return list(samples.values())


def _own_kind(path: Path, meta: Mapping[str, Any]) -> Kind:
    question_type = _text(meta.get("question_type"), f"{path}: question_type")
    if question_type not in _METRICS:
        raise OptionError(
            f"{path}: question_type {question_type!r}: give it as {' or '.join(_METRICS)}"
        )
    return Kind("other", path.stem, _METRICS[question_type])


def _sample(
    folder: Path, kind: Kind, instructions: Mapping[str, Any], entry: object, where: str
) -> Sample:
    data = _of(dict, entry, where)
    task = _of(dict, data.get("task_instance"), f"{where}: task_instance")
    context = _of(str, task.get("context"), f"{where}: context")
    pictures = [
        _picture(folder, name, where)
        for name in _of(list, task.get("images_path"), f"{where}: images_path")
    ]
    answer = _text(data.get("response"), f"{where}: response")
    choices: tuple[str, ...] = ()
    if "choice_list" in task:
        listed = _of(list, task["choice_list"], f"{where}: choice_list")
        choices = tuple(_text(choice, f"{where}: choice_list") for choice in listed)
        context += _choice_list(choices, folder.name)
    if kind.metric == "choice":
        _score(kind.metric, "", answer, choices, where)
    i = _text(data.get("task_instruction_id"), f"{where}: task_instruction_id")
    instruction = _of(str, instructions.get(i), f"{where}: task_instruction {i}")
    content = _interleaved(context, pictures, where)
    *content, question = content if isinstance(content[-1], str) else (*content, "")
    return Sample(
        id=_text(data.get("sample_id"), f"{where}: sample_id"),
        dataset=folder.name,
        metric=kind.metric,
        content=tuple(content),
        turns=(Turn(str(question), answer, kind.skill, kind.group, choices),),
        instruction=f"{instruction}\n",
    )


def _picture(folder: Path, name: object, where: str) -> Path:
    path = folder / "images" / _of(str, name, f"{where}: images_path")
    if not os.path.isfile(path):
        raise OptionError(f"{where}: there is no picture {path}")
    return path


def _choice_list(choices: Sequence[str], dataset: str) -> str:
    lines = [
        choice if dataset == _UNLABELLED else f"{choice_label(i)}. {choice}"
        for i, choice in enumerate(choices)
    ]
    return "\nChoice list: \n" + "\n".join(lines) + "\nYour answer is: "


def _interleaved(context: str, pictures: Sequence[Picture], where: str) -> list[str | Picture]:
    """The context with its pictures where their marks are. Those without one come first."""
    texts, numbers = _MARK.split(context)[::2], [int(n) for n in _MARK.findall(context)]
    for n in numbers:
        if not 1 <= n <= len(pictures):
            raise OptionError(f"{where}: the context has image {n}, and there are {len(pictures)}")
    parts: list[str | Picture] = [p for i, p in enumerate(pictures, 1) if i not in numbers]
    parts.append(texts[0])
    for n, text in zip(numbers, texts[1:], strict=True):
        parts += [pictures[n - 1], text]
    return [part for part in parts if part != ""] or [""]


#
# predictions
#


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one file of predictions."""

    metric: Metric
    by_sample: dict[str, float]
    # Few, Medium or Many pictures, of the samples of which the file says it
    quantities: dict[str, str]

    @property
    def mean(self) -> float:
        """MileBench's figure for the set: its accuracy, or its mean ROUGE-L F."""
        return float(np.mean(list(self.by_sample.values())))

    def by_quantity(self) -> dict[str, tuple[float, int]]:
        """The mean, and the number of samples, of those with few, medium and many pictures."""
        scores: dict[str, list[float]] = {}
        for key, quantity in self.quantities.items():
            scores.setdefault(quantity, []).append(self.by_sample[key])
        return {quantity: (float(np.mean(s)), len(s)) for quantity, s in scores.items()}


def score_path(path: Path) -> dict[str, Scores]:
    """Scores by set of a file of predictions, of a set's folder, or of a folder of those.

    Raises:
        OptionError: there are none, the set is not known, or a file is malformed.
    """
    path = Path(os.path.abspath(path))
    own = path if os.path.isfile(path) else path / "pred.json"
    files = [own] if os.path.isfile(own) else sorted(path.glob("*/pred.json"))
    if not files:
        raise OptionError(f"{path}: no predictions: give a pred.json, or a folder that holds some")
    return {
        file.parent.name: score_predictions(
            _of(list, _load(file), str(file)), file.parent.name, str(file)
        )
        for file in files
    }


def score_predictions(
    predictions: Sequence[Mapping[str, Any]], dataset: str, where: str = "predictions"
) -> Scores:
    """MileBench's scores of predictions for one of its sets.

    Args:
        predictions: of each sample `sample_id`, `gt_response` and `pred_response`; for multiple
            choice `choice_list`, or `question` with the choices in it; and perhaps
            `image_quantity_level`.
        where: they come from, for errors.

    Raises:
        OptionError: the set is not known, or a prediction is malformed.
    """
    if dataset not in SETS:
        raise OptionError(
            f"{where}: {dataset!r} is none of MileBench's sets: put it in a folder named like one"
        )
    if not predictions:
        raise OptionError(f"{where}: there are no predictions in it")
    metric = SETS[dataset].metric
    scores = Scores(metric, {}, {})
    for i, entry in enumerate(predictions):
        here = f"{where}: [{i}]"
        data = _of(dict, entry, here)
        key = _text(data.get("sample_id"), f"{here}: sample_id")
        if key in scores.by_sample:
            raise OptionError(f"{here}: sample_id {key} stands there twice")
        prediction = _text(data.get("pred_response"), f"{here}: pred_response")
        answer = _text(data.get("gt_response"), f"{here}: gt_response")
        choices = _choices(data, here) if metric == "choice" else []
        scores.by_sample[key] = _score(metric, prediction, answer, choices, here)
        if "image_quantity_level" in data:
            scores.quantities[key] = _text(data["image_quantity_level"], f"{here}: its level")
    return scores


def _choices(data: Mapping[str, Any], where: str) -> list[str]:
    """As they are listed, or as `_choice_list` has put them into the question."""
    if "choice_list" in data:
        listed = _of(list, data["choice_list"], f"{where}: choice_list")
        return [_text(choice, f"{where}: choice_list") for choice in listed]
    found = _CHOICES.match(_of(str, data.get("question"), f"{where}: question"))
    if not found:
        raise OptionError(f"{where}: no choices: neither choice_list nor a list in question")
    lines = found[1].split("\n")
    if not lines[0].startswith("A. "):
        return lines
    choices: list[str] = []
    for line in lines:
        label = choice_label(len(choices)) + ". "
        if line.startswith(label):
            choices.append(line.removeprefix(label))
        else:
            choices[-1] += f"\n{line}"
    return choices


def _score(
    metric: Metric, prediction: str, answer: str, choices: Sequence[str], where: str
) -> float:
    try:
        return score(metric, prediction, answer, choices)
    except ValueError:
        raise OptionError(f"{where}: the answer {answer!r} is none of its choices") from None


#
# JSON
#


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path}: not JSON: {error}") from None


def _of(kind: type[T], value: object, where: str) -> T:
    if not isinstance(value, kind):
        raise OptionError(f"{where} is a {type(value).__name__}: give a {kind.__name__}")
    return value


def _text(value: object, where: str) -> str:
    return str(value) if isinstance(value, (int, float)) else _of(str, value, where)
