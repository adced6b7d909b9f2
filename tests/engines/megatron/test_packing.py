# SPDX-License-Identifier: Apache-2.0
"""The recorded batch through ``pack_response`` and ``CapoFilter`` on real groups, without
Megatron's model.

So run the context-parallel slices which the installed Megatron-Core cannot train with: contiguous
ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.grouped import in_turn
from tests.helpers.recording import (
    BETAS,
    EPS,
    KNOBS,
    LEARNING_RATES,
    RecordedBatch,
    RecordedStep,
    record,
)
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks
from tests.helpers.syncs import recorded_syncs
from tests.helpers.tiny_model import make_tiny_model

VOCAB, HIDDEN = 125, 64  # two and four tensor-parallel ranks hold padding


def allow_contiguous() -> None:
    """Give Megatron-Core's ``PackedSeqParams`` the field that says how rows are cut, where it does
    not have it yet.
    """
    import dataclasses

    from verl.models.mcore import util

    if not util._PACKED_SEQ_PARAMS_HAS_CP_PARTITION_MODE:
        util.PackedSeqParams = dataclasses.make_dataclass(
            "PackedSeqParams", [("cp_partition_mode", str, "zigzag")], bases=(util.PackedSeqParams,)
        )
        util._PACKED_SEQ_PARAMS_HAS_CP_PARTITION_MODE = True


def nested_batch(batch: RecordedBatch, step: RecordedStep, mine: range) -> Any:
    """verl's fields of these sequences and the engine's own; hidden states and logits sit where the
    model would compute them.
    """
    from verl.utils import tensordict_utils as tu

    from capo_verl.engines.response import SAMPLE

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([rows[i] for i in mine], layout=torch.jagged)

    hidden, logits, token = [], [], 0
    for ids, prompt, mask in zip(batch.ids, batch.prompts, batch.response_mask, strict=True):
        for rows, recorded in ((hidden, step.hidden_states), (logits, step.logits)):
            sequence = torch.full((len(ids), recorded.shape[1]), 7.0)
            at = prompt - 1 + mask.nonzero()[:, 0]
            sequence[at] = torch.from_numpy(recorded[token : token + len(at)]).float()
            rows.append(sequence)
        token += int(mask.sum())
    fields = {
        "input_ids": nested(batch.ids),
        "prompts": nested([ids[:p] for ids, p in zip(batch.ids, batch.prompts, strict=True)]),
        "response_mask": nested(batch.response_mask),
        "advantages": nested(batch.advantages),
        SAMPLE: torch.tensor(list(mine)),
    }
    return tu.get_tensordict(fields, {}), nested(hidden), nested(logits)


def replay(
    sizes: tuple[int, int, int],
    data_format: str,
    layout: dict[str, Any],
    batch: RecordedBatch,
    steps: list[RecordedStep],
) -> list[dict[str, np.ndarray]]:
    from megatron.core import parallel_state as mpu
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

    from capo_verl import CapoConfig, CapoFilter
    from capo_verl.engines.megatron.packing import pack_response, token_positions, unpack

    tp, cp, dp = sizes
    if layout.get("cp_layout") == "contiguous":
        allow_contiguous()
    mpu.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    capo = CapoFilter(
        CapoConfig(**KNOBS), VOCAB, HIDDEN,
        tp_group=mpu.get_tensor_model_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
    )  # fmt: skip
    capo.set_optimizer(BETAS, EPS)
    preprocess = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
    count = len(batch.ids) // dp
    at = mpu.get_data_parallel_rank() * count
    seen = []
    for step, learning_rate in zip(steps, LEARNING_RATES, strict=True):
        rows: dict[str, list[torch.Tensor]] = {}
        for first in range(at, at + count, 2):
            fields, hidden, logits = nested_batch(batch, step, range(first, first + 2))
            hidden, logits, label = (
                preprocess(x, need_roll=roll, **layout)[0]
                for x, roll in ((hidden, False), (logits, False), (fields["input_ids"], True))
            )
            # Padding rows of the vocabulary would win every comparison, were they not left out.
            logits = torch.nn.functional.pad(logits, (0, -VOCAB % tp), value=99.0).chunk(tp, -1)[
                mpu.get_tensor_model_parallel_rank()
            ]
            ours = {
                name: layout[name] for name in ("use_fp8_padding", "cp_layout") if name in layout
            }
            with recorded_syncs() as found:
                places = token_positions(fields, label.shape, data_format, **ours)
                response = pack_response(fields, places)
                # Every token sits in one place on one rank, and finds its way back.
                back = unpack(places.float(), fields, places)
            assert found == []
            assert torch.equal(back.values(), torch.arange(len(back.values())).float())
            out = capo.evaluate(
                hidden, logits, label, response.advantages, response.response_mask, learning_rate,
                skip_masked=True,
                sequence_ids=response.sequence_ids, num_sequences=response.num_sequences,
            )  # fmt: skip
            mask = response.response_mask
            for name, values in (
                ("advantages", response.advantages), ("actions", label), ("accepted", out.accepted),
                ("objective_shift", out.objective_shift), ("policy_shift", out.policy_shift),
            ):  # fmt: skip
                rows.setdefault(name, []).append(values[mask])
        capo.step()
        seen.append({name: torch.cat(values).numpy() for name, values in rows.items()})
    return seen


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return record(
        make_tiny_model(
            tmp_path_factory.mktemp("model"),
            vocab_size=VOCAB,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    )


FORMATS = [
    ("thd", {"use_fp8_padding": False, "cp_layout": "zigzag"}),
    ("thd", {"use_fp8_padding": False, "cp_layout": "contiguous"}),
    ("thd", {"use_fp8_padding": False, "pad_to_length_bucket": 48, "cp_layout": "contiguous"}),
    ("thd", {"use_fp8_padding": True, "cp_layout": "zigzag"}),
    ("bshd", {"use_fp8_padding": False, "forced_max_seqlen": None}),
    ("bshd", {"use_fp8_padding": False, "forced_max_seqlen": 37}),
]


@pytest.mark.parametrize(
    "all_sizes", [[(1, 2, 1)], [(2, 2, 1), (1, 2, 2), (1, 4, 1)]], ids=["2 ranks", "4 ranks"]
)
def test_packed_fields_and_filter_equal_the_oracle(all_sizes, recording):
    cases = [(sizes, *form) for sizes in all_sizes for form in FORMATS]
    assert recording.margin > 1e-3
    world = int(np.prod(all_sizes[0]))
    calls = [(*case, recording.batch, recording.steps) for case in cases]
    ranks = run_on_ranks(in_turn, world, replay, calls, preload=ENGINE_MODULES)
    for at, (sizes, *form) in enumerate(cases):
        for number, step in enumerate(recording.steps):
            index = {np.float32(advantage): i for i, advantage in enumerate(step.advantages)}
            times_seen = np.zeros(len(index), dtype=int)
            for rank in ranks:
                seen = rank[at][number]
                mine = np.array([index[advantage] for advantage in seen["advantages"]], dtype=int)
                times_seen[mine] += 1
                assert np.array_equal(seen["actions"], step.actions[mine]), (sizes, form)
                assert np.array_equal(seen["accepted"], step.accepted[mine]), (sizes, form)
                for name in ("objective_shift", "policy_shift"):
                    want = getattr(step, name)
                    np.testing.assert_allclose(
                        seen[name],
                        want[mine],
                        rtol=2e-5,
                        atol=2e-5 * np.median(np.abs(want)),
                        err_msg=str((sizes, form)),
                    )
            assert (times_seen == sizes[0]).all(), (sizes, form)


def contiguous_error() -> str:
    from megatron.core import parallel_state as mpu
    from verl.models.mcore import util

    if util._PACKED_SEQ_PARAMS_HAS_CP_PARTITION_MODE:
        return ""
    mpu.initialize_model_parallel(context_parallel_size=2)
    with pytest.raises(ValueError) as error:
        util.preprocess_thd_engine(
            torch.nested.as_nested_tensor([torch.arange(8)], layout=torch.jagged),
            cp_layout="contiguous",
        )
    return str(error.value)


def test_documented_error_of_contiguous_slices():
    """docs/parallelism.md quotes it; with a Megatron-Core that can do it, the layout has to move to
    test_layouts.py.
    """
    message = run_on_ranks(contiguous_error, 2, preload=ENGINE_MODULES)[0]
    assert message.startswith("cp_layout='contiguous' requires PackedSeqParams.cp_partition_mode")
