# SPDX-License-Identifier: Apache-2.0
"""Data files of a run, read as verl's trainer will, before it starts.

Checked is what verl's data set and reward manager need in every row and, if the run is rewarded by
this package, what its rewards need. Another reward function may take any ground truth.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from capo_verl.data.schema import SOURCE_PREFIX, prompt_problems, reward_problems
from capo_verl.data.sources import read_file
from capo_verl.data.values import short
from capo_verl.plugin.checks.run_spec import MODEL

SECONDS = 5.0
"""Seconds for reading all files of a run; what is not reached is not checked."""
BATCH = 1000
GYM, MATH = "capo_verl.data.gym", "capo_verl.data.rewards.math_answers"
"""Modules with a reward of this package."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles that chat templates know. Qwen's leave messages of another out without a word."""
MANAGERS = ("naive", "dapo", "gdpo", "rate_limited", "remote")
"""verl's reward managers, all of which read ``data_source`` and ``reward_model["ground_truth"]``
(``verl/experimental/reward_loop/reward_manager/``).
"""
EXTRA_INFO = ("extra_info.answer_format", "extra_info.entry")
"""Columns that are read of ``extra_info``, which may be long."""


@dataclass(frozen=True)
class Needs:
    """Fields of a row that a run reads."""

    prompt: str
    """Column of the prompt."""
    roles: tuple[str, ...] | None
    """Roles of its messages; None for any."""
    manager: bool
    """True if one of verl's reward managers reads the row."""
    reward: str | None
    """Module of the reward, if it is this package's."""

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """The first thing that a row lacks, as ``field: what is wrong``."""
        for field, problem in prompt_problems(row[self.prompt], self.roles, parts=True):
            return f"{self.prompt}{field}: {problem}"
        extra = row.get("extra_info")
        if not (extra is None or isinstance(extra, Mapping)):  # rl_dataset.py calls its get()
            return f"extra_info: {short(extra)} is not an object"
        if self.manager and "data_source" not in row:
            return "data_source: it is missing"
        reward = row.get("reward_model")
        if self.manager and not (isinstance(reward, Mapping) and "ground_truth" in reward):
            return f"reward_model: {short(reward)} is not an object with ground_truth"
        if self.manager and self.reward:
            for field, problem in reward_problems(row):
                return f"{field}: {problem}, as the reward in {self.reward} needs it"
            if self.reward == GYM and not row["data_source"].startswith(SOURCE_PREFIX):
                return (
                    f"data_source: {short(row['data_source'])} is not {SOURCE_PREFIX}GENERATOR, as "
                    f"the reward in {GYM} needs it"
                )
        return None


@dataclass(frozen=True)
class Reading:
    """Findings in one data file."""

    problem: str | None = None
    read: int = 0
    """Rows that were read."""
    total: int | None = None
    """Rows that it has; None if that cannot be told."""


def read_data(config: DictConfig) -> tuple[list[str], list[str]]:
    """Read the data files that are on this machine.

    Returns:
        A sentence for each file that verl or the reward would stop at, with its first bad row; and
        notes that say how many rows were read.
    """
    problems: list[str] = []
    notes: list[str] = []
    if OmegaConf.select(config, "data.custom_cls.path") is not None:
        return problems, notes
    needs = _needs(config)
    files = {key: _files(config, f"data.{key}") for key in ("train_files", "val_files")}
    seconds = SECONDS / max(sum(map(len, files.values())), 1)
    for key, names in files.items():
        rows: list[int | None] = []
        for name in names:
            what = f"data.{key}={name}"
            found = _read(what, name, needs, seconds)
            if found.problem:
                problems.append(found.problem)
            elif found.read:
                end = "" if found.read == found.total else f", which is what {seconds:.1f} s allow"
                of = f" of {found.total}" if found.total else ""
                notes.append(f"{what}: read {found.read}{of} rows{end}")
            rows.append(found.total)
        if None not in rows and not problems:
            problems += _too_few(config, key, sum(row for row in rows if row is not None))
    return problems, notes


def _needs(config: DictConfig) -> Needs:
    def value(path: str) -> Any:
        return OmegaConf.select(config, path)

    path, name = (value(f"reward.custom_reward_function.{key}") for key in ("path", "name"))
    by_model = value("reward.reward_model.enable") and not path  # reward_loop.py:146
    managed = value("reward.reward_manager.source") == "register"
    return Needs(
        prompt=value("data.prompt_key") or "prompt",
        roles=None if value(f"{MODEL}.custom_chat_template") else ROLES,
        manager=managed and value("reward.reward_manager.name") in MANAGERS and not by_model,
        reward=_own_reward(path, name),
    )


def _own_reward(path: str | None, name: str) -> str | None:
    """The module of this package that ``reward.custom_reward_function`` means, if it is one.

    Raises:
        ValueError: if it is to be in this package, and is not.
    """
    if path and path.startswith("pkg://capo_verl"):
        try:
            module = importlib.import_module(path.removeprefix("pkg://").replace("/", "."))
            found = getattr(module, name).__module__
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"reward.custom_reward_function.path={path} has no {name} ({error}): set path to "
                f"pkg://{MATH}, and name to compute_score"
            ) from error
        return found if found in (GYM, MATH) else None
    for own in (GYM, MATH):
        spec = importlib.util.find_spec(own)
        if path and spec and Path(path.removeprefix("file://")).resolve() == Path(str(spec.origin)):
            return own
    return None


def _files(config: DictConfig, key: str) -> list[str]:
    files = OmegaConf.select(config, key)
    return [str(file) for file in (files if isinstance(files, list | ListConfig) else [files])]


def _read(what: str, name: str, needs: Needs, seconds: float) -> Reading:
    path = Path(name).expanduser()
    if "://" in name or any(c in name for c in "*?[") or path.is_dir():
        return Reading()
    if not path.exists():
        return Reading(f"{what} does not exist: set it to a parquet file in verl's schema")
    if path.suffix not in (".parquet", ".json", ".jsonl"):  # verl/utils/dataset/rl_dataset.py
        return Reading(
            f"{what} is neither .parquet, .json nor .jsonl: set it to a parquet file in verl's "
            "schema"
        )
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    is_json = path.suffix != ".parquet"
    try:
        with _silent_datasets():
            total, rows = (None, _json(path)) if is_json else _parquet(path, needs)
            problem, read, whole = _first_bad(rows, needs, seconds)
        if problem and is_json:
            problem = _in_the_text(path, needs) or f"{problem} (parquet keeps text as it is)"
    except (OSError, ValueError, pa.ArrowException, DatasetsError) as error:
        reason = (is_json and _in_the_text(path, needs)) or error.__cause__ or error
        return Reading(
            f"{what} cannot be read ({reason}): set it to a parquet file in verl's schema"
        )
    return Reading(f"{what}{problem}" if problem else None, read, read if whole else total)


def _first_bad(
    rows: Iterator[Mapping[str, Any]], needs: Needs, seconds: float
) -> tuple[str | None, int, bool]:
    """Problem of the first bad row, rows that were read, and whether those are all."""
    end = time.monotonic() + seconds
    number = -1
    for number, row in enumerate(rows):
        if needs.prompt not in row:
            return (
                f" lacks the column '{needs.prompt}' (it has {', '.join(row)}): prepare it anew, "
                "or set data.prompt_key",
                number,
                False,
            )
        problem = needs.problem(row)
        if problem:
            sentence = f", row {number}, {problem}: correct the row, or prepare the file anew"
            return sentence, number, False
        if number % BATCH == 0 and time.monotonic() > end:
            return None, number + 1, False
    return None, number + 1, True


def _parquet(path: Path, needs: Needs) -> tuple[int, Iterator[dict[str, Any]]]:
    """Number of rows of a parquet file, and its rows with the columns that are needed."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    schema = file.schema_arrow
    columns = None  # all, for an error that names them
    if needs.prompt in schema.names:
        extra = "extra_info" in schema.names and schema.field("extra_info").type
        is_struct = isinstance(extra, pyarrow.StructType)
        columns = [needs.prompt, "data_source", "reward_model"]
        columns += EXTRA_INFO if is_struct else ["extra_info"]
    batches = file.iter_batches(BATCH, columns=columns)
    return file.metadata.num_rows, (row for batch in batches for row in batch.to_pylist())


def _json(path: Path) -> Iterator[dict[str, Any]]:
    """Rows as ``datasets`` reads them for verl: text that looks like a date is none any more."""
    from datasets import load_dataset

    try:
        rows = load_dataset("json", data_files=str(path), split="train", streaming=True)
    except StopIteration:  # its word for an empty file
        return
    if rows.features is None:  # of a JSON list it knows the types only once it has read it whole
        rows = load_dataset("json", data_files=str(path), split="train")
    if "Json(" in str(rows.features):  # columns of several types, which Arrow keeps as JSON
        yield from rows
    else:
        for batch in rows.with_format("arrow").iter(BATCH):
            yield from batch.to_pylist()


@contextlib.contextmanager
def _silent_datasets() -> Iterator[None]:
    """``datasets`` without progress bars, and without a log of what it raises."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _in_the_text(path: Path, needs: Needs) -> str | None:
    """Fault of a JSON file as it is written.

    One number among texts makes ``datasets`` read numbers in other rows, too.
    """
    try:
        return _first_bad(read_file(path), needs, SECONDS)[0]
    except ValueError as error:
        return str(error).removeprefix(str(path)).lstrip(", :")


def _too_few(config: DictConfig, key: str, rows: int) -> Iterator[str]:
    """Problem of data that are fewer than a batch.

    verl leaves out an incomplete batch, and divides by their number (``trainer_base.py:765``).
    """
    if key == "val_files":
        if not rows:
            yield "data.val_files have no rows: give some"
        return
    batch = OmegaConf.select(config, "data.train_batch_size")
    limit: Any = OmegaConf.select(config, "data.train_max_samples") or -1
    used = rows if limit < 0 else min(rows, limit)
    if used < batch:
        yield (
            f"data.train_files have {used} prompts, less than one data.train_batch_size={batch}: "
            "lower it, or give more"
        )
