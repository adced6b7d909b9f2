# SPDX-License-Identifier: Apache-2.0
"""The index of a distributed checkpoint, looked at before it is unpickled.

torch stores tensors of a distributed checkpoint raw, but their index (``.metadata``) as a pickle,
which it loads without restriction (``torch/distributed/checkpoint/filesystem.py``,
``read_metadata``). A pickle can name any function; here only those names are let through that an
index of tensors needs.
"""

from __future__ import annotations

import pickletools
from pathlib import Path

_CHECKPOINT = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing"
_ALLOWED = {
    "builtins": {"set"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int64"},
    "torch.serialization": {"_get_layout"},
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_MCORE}.core": {"CheckpointingConfig"},
    f"{_MCORE}.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}  # fmt: skip
"""Exact names: a prefix would let ``module.os.system`` through."""


def check_metadata(path: Path) -> None:
    """Refuse a pickle that names anything but the classes of a checkpoint's index. Executes nothing
    of it.

    Raises:
        ValueError: naming what it found.
        OSError: if the file cannot be read.
    """
    for module, name in _globals(path.read_bytes()):
        if name not in _ALLOWED.get(module, ()):
            raise ValueError(
                f"{path} names {module}.{name}, which an index of tensors does not need: not "
                "unpickled"
            )


def _globals(pickled: bytes) -> list[tuple[str, str]]:
    """Every ``module, name`` that the pickle would import.

    Raises:
        ValueError: if it is no pickle, or hides a name behind something else than a string.
    """
    found: list[tuple[str, str]] = []
    memo: dict[int, str | None] = {}
    stack: list[str | None] = []  # the strings pushed so far, None for what is none
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            module, name = str(argument).split(" ", 1)
            found.append((module, name))
            stack.append(None)
        elif opcode.name == "STACK_GLOBAL":
            if len(stack) < 2 or stack[-1] is None or stack[-2] is None:
                raise ValueError(
                    "the pickle imports a name that is not spelled out in it: not unpickled"
                )
            found.append((stack[-2], stack[-1]))
            stack.append(None)
        elif opcode.name.startswith("EXT"):
            raise ValueError("the pickle uses the extension registry: not unpickled")
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = stack[-1] if stack else None
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(str(argument))] = stack[-1] if stack else None
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(int(str(argument))))
        else:
            stack.append(argument if isinstance(argument, str) else None)
    return found
