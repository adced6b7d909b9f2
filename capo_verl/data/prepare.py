# SPDX-License-Identifier: Apache-2.0
"""Preparation of data sets: names become parquet files and a report.

Everything is read and checked before the first file is written, and each file appears whole or not
at all.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from capo_verl.data import gym, lengths, overlap, sources
from capo_verl.data.datasets import DATASETS, GYM_LICENCE, DataSet, find
from capo_verl.data.gym import SOURCE_PREFIX
from capo_verl.data.rows import PROMPT, REWARD, Row, check_rows, math_rows
from capo_verl.data.templates import TEMPLATES
from capo_verl.utils import replace_text, replacing

if TYPE_CHECKING:
    import pyarrow as pa

REPORT = "report.json"
INSTRUCTIONS = [
    part.strip() for template in TEMPLATES.values() for part in template.user.split("{question}")
]


@dataclass
class Prepared:
    """One file to be written."""

    name: str
    split: str
    origin: str
    licence: str
    rows: list[Row]
    expected: int | None = None
    """Rows that the data set is known to have."""

    @property
    def label(self) -> str:
        return f"{self.name}/{self.split}"

    def path(self, output: Path) -> Path:
        return output / self.name.replace("/", "_") / f"{self.split}.parquet"


def run(args: argparse.Namespace, console: Console) -> None:
    """Read and check the named data sets, then write their files and the report.

    Raises:
        ValueError, OSError: whatever is wrong with the input, in one sentence, before anything is
            written.
    """
    output = Path(args.output)
    plan = _plan(args)
    _refuse_to_overwrite(output, plan, args.overwrite)
    tokenizer = lengths.load_tokenizer(args.tokenizer) if args.tokenizer else None
    against = {path: _read_prepared(Path(path)) for path in args.against}

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        makers = progress.track(plan.values(), description="reading")
        files = [file for make in makers for file in make()]
        for file in progress.track(files, description="checking"):
            check_rows(file.rows, f"{file.label} ({file.origin})")
        found = compare(
            files, against, lambda pairs: progress.track(pairs, description="comparing")
        )
        if args.drop_overlap:
            _drop(files, found)
        measured: dict[str, lengths.Lengths] = {}
        if tokenizer is not None:
            for file in progress.track(files, description="measuring"):
                measured[file.label] = lengths.measure(file.rows, tokenizer, args.max_prompt_length)
        tables = [as_table(file.rows, f"{file.label} ({file.origin})") for file in files]
        for file, table in progress.track(
            list(zip(files, tables, strict=True)), description="writing"
        ):
            write_parquet(table, file.path(output))
    _write_report(output / REPORT, _report(args, files, found, measured))
    _show(Console(), output, files, found, measured, args)


def _plan(args: argparse.Namespace) -> dict[str, Callable[[], list[Prepared]]]:
    """Readers by name of data set. All that can be refused without reading is refused here."""
    local = args.source not in (None, "hub", "package")
    if local and len(args.names) > 1:
        raise ValueError(
            f"--from {args.source} is one data set's; {len(args.names)} were named: "
            f"{', '.join(args.names)}"
        )
    settings = _generator_config(args.generator_config)
    plan: dict[str, Callable[[], list[Prepared]]] = {}
    for name in args.names:
        if name.startswith(SOURCE_PREFIX):
            if local or args.source == "hub":
                raise ValueError(f"{name} is generated, --from {args.source} does not apply")
            plan[name] = partial(_prepare_gym, name, args, settings)
            continue
        if local and name not in DATASETS:  # in verl's schema, or with columns of the usual names
            dataset = DataSet(name, name, name, "that of the file", {"train": 0, "test": 0})
            dataset = replace(
                dataset, question=(PROMPT, *dataset.question), answer=(REWARD, *dataset.answer)
            )
        else:
            dataset = find(name)
        if args.split and args.split not in dataset.sizes:
            raise ValueError(f"--split {args.split}: {name} has {', '.join(dataset.sizes)}")
        dataset = replace(
            dataset,
            question=(args.question_column,) if args.question_column else dataset.question,
            answer=(args.answer_column,) if args.answer_column else dataset.answer,
            answer_form=args.answer_form or dataset.answer_form,
        )
        plan[name] = partial(_prepare_dataset, dataset, args)
    return plan


def _prepare_dataset(dataset: DataSet, args: argparse.Namespace) -> list[Prepared]:
    licence = dataset.licence
    source = args.source or ("hub" if dataset.hub else "package")
    if source == "hub":
        splits, card = sources.from_hub(dataset)
        licence = f"{licence}; card: {card}"
    elif source == "package":
        splits = sources.from_wheel(dataset)
    else:
        splits = sources.from_path(dataset, Path(source), args.split)
    template = TEMPLATES[args.template or "qwen-math"]
    known = source in ("hub", "package")
    return [
        Prepared(
            dataset.name, split, origin, licence,
            math_rows(dataset, records, split, template, origin),
            dataset.sizes[split] if known or dataset.name in DATASETS else None,
        )
        for split, (origin, records) in splits.items()
        if args.split in (None, split)
    ]  # fmt: skip


def _prepare_gym(
    name: str, args: argparse.Namespace, settings: Mapping[str, Any]
) -> list[Prepared]:
    # The test split comes first: it stays the same when the training split grows.
    sizes = {"test": args.test_size, "train": args.train_size}
    rows = gym.gym_rows(name, sizes, args.seed, settings, TEMPLATES[args.template or "tags"])
    origin = f"reasoning-gym {version('reasoning-gym')}, seed {args.seed}"
    return [
        Prepared(name, split, origin, GYM_LICENCE, rows[split], sizes[split])
        for split in ("train", "test")
        if rows[split]
    ]


def compare(
    files: Sequence[Prepared],
    against: Mapping[str, list[Row]],
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> dict[str, overlap.Duplicates | overlap.Overlap]:
    """Duplicates of each file, and the overlap of each training file with each test file.

    The files of ``against`` count as test files.
    """
    found: dict[str, overlap.Duplicates | overlap.Overlap] = {
        f.label: overlap.duplicates(f.rows) for f in files
    }
    tests = {f.label: f.rows for f in files if f.split == "test"} | dict(against)
    pairs = [(f, label, rows) for f in files if f.split == "train" for label, rows in tests.items()]
    for file, label, rows in track(pairs):
        found[f"{file.label} and {label}"] = overlap.overlap(
            file.rows, rows, INSTRUCTIONS, near=not file.name.startswith(SOURCE_PREFIX)
        )
    return found


def _drop(
    files: Sequence[Prepared], found: Mapping[str, overlap.Duplicates | overlap.Overlap]
) -> None:
    for file in files:
        shared = [
            o
            for key, o in found.items()
            if isinstance(o, overlap.Overlap) and key.startswith(f"{file.label} and ")
        ]
        gone = set().union(*(o.training_rows for o in shared))
        file.rows = [row for i, row in enumerate(file.rows) if i not in gone]
        if not file.rows:
            raise ValueError(
                f"{file.label}: every row is in a test file too; without --drop-overlap they are "
                "kept"
            )


def as_table(rows: Sequence[Row], origin: str) -> pa.Table:
    """Rows as columns.

    Args:
        origin: what the rows were read from, for errors.

    Raises:
        ValueError: naming the first row with another type than those before it.
    """
    import pyarrow as pa

    def problem(count: int) -> Exception | None:
        try:
            pa.Table.from_pylist(list(rows[:count]))
        except (pa.ArrowException, OverflowError) as error:
            return error
        return None

    try:
        return pa.Table.from_pylist(list(rows))
    except (pa.ArrowException, OverflowError):
        counts = range(len(rows) + 1)
        first = bisect_left(counts, True, key=lambda count: problem(count) is not None)
        raise ValueError(
            f"{origin}, row {first - 1}: a key of extra_info or of a message has another type than "
            f"in the rows before ({problem(first)})"
        ) from None


def write_parquet(rows: Sequence[Row] | pa.Table, path: Path) -> None:
    """Write one parquet file, whole or not at all.

    The same rows and the same pyarrow give the same bytes.
    """
    import pyarrow.parquet as parquet

    table = as_table(rows, str(path)) if isinstance(rows, Sequence) else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        parquet.write_table(table, temporary)


def write_json(value: Any, path: Path) -> None:
    """One JSON file, whole or not at all."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def _refuse_to_overwrite(output: Path, plan: Iterable[str], overwrite: bool) -> None:
    if overwrite:
        return
    for name in plan:
        existing = sorted((output / name.replace("/", "_")).glob("*.parquet"))
        if existing:
            raise ValueError(f"{existing[0]} exists already: --overwrite replaces it")


def _read_prepared(path: Path) -> list[Row]:
    rows = list(sources.read_file(path))
    check_rows(rows, f"--against {path}")
    return rows


def _generator_config(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--generator-config {text!r} is not JSON: {error}") from error
    if not isinstance(settings, dict) or {"seed", "size"} & settings.keys():
        raise ValueError(
            f"--generator-config {text!r}: an object is expected, without seed and size (they have "
            "options)"
        )
    return settings


def _report(
    args: argparse.Namespace,
    files: Sequence[Prepared],
    found: Mapping[str, overlap.Duplicates | overlap.Overlap],
    measured: Mapping[str, lengths.Lengths],
) -> dict[str, dict[str, Any]]:
    common = {
        "template": args.template or "default",
        "seed": args.seed,
        "overlap_dropped": args.drop_overlap,
    }
    return {
        "files": {
            f.label: {
                "rows": len(f.rows),
                "known_size": f.expected,
                "source": f.origin,
                "licence": f.licence,
                **common,
            }
            for f in files
        },
        "duplicates": overlap.as_json(
            {k: v for k, v in found.items() if isinstance(v, overlap.Duplicates)}
        ),
        "overlap": overlap.as_json(
            {k: v for k, v in found.items() if isinstance(v, overlap.Overlap)}
        ),
        "prompt_tokens": {
            label: {**asdict(value), "max_prompt_length": args.max_prompt_length}
            for label, value in measured.items()
        },
    }


def _write_report(path: Path, report: dict[str, dict[str, Any]]) -> None:
    """Add to the report of earlier calls with the same folder."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    merged = {part: {**earlier.get(part, {}), **values} for part, values in report.items()}
    write_json(merged, path)


def _show(
    console: Console,
    output: Path,
    files: Sequence[Prepared],
    found: Mapping[str, overlap.Duplicates | overlap.Overlap],
    measured: Mapping[str, lengths.Lengths],
    args: argparse.Namespace,
) -> None:
    for file in files:
        _say(
            console,
            f"{file.path(output)}: {len(file.rows)} rows from {file.origin}; licence: "
            f"{file.licence}",
        )
    for file in files:
        if file.expected and len(file.rows) != file.expected and not args.drop_overlap:
            _say(
                console,
                f"note: {file.label} has {len(file.rows)} rows, {file.expected} were expected",
            )
    for label, value in found.items():
        if isinstance(value, overlap.Duplicates):
            if value.exact:
                pairs = value.contradictions
                differ = (
                    f", {len(pairs)} of them with another answer: rows {str(pairs[:5])[1:-1]}"
                    if pairs
                    else ""
                )
                _say(console, f"duplicates: {label}: {value.exact} questions came before{differ}")
            continue
        what = f"{len(value.exact)} the same, {len(value.near)} nearly the same"
        dropped = f"; {len(value.training_rows)} training rows dropped" if args.drop_overlap else ""
        _say(console, f"overlap: {label}: {what}{dropped}")
    for label, length in measured.items():
        _say(
            console,
            f"prompts: {label}: median {length.median}, 99 % within {length.p99}, longest "
            f"{length.longest} tokens; {length.too_long} above {args.max_prompt_length}",
        )
    _say(console, f"report: {output / REPORT}")


def _say(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True, highlight=False)
