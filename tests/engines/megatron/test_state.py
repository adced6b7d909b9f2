# SPDX-License-Identifier: Apache-2.0
"""CAPO's moments in checkpoints: resumed bit-exactly, under another layout, from a run without
CAPO, refused if damaged.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.capo_cases import KNOBS
from tests.engines.megatron.state_cases import (
    damaged,
    in_turn,
    load_only,
    refusals,
    resume,
    save_and_go_on,
)
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

SAVED = Layout(tp=2)


def on_ranks(function, layout: Layout, *args):
    return run_on_ranks(
        function, layout.world_size, layout, *args, preload=ENGINE_MODULES, timeout=300
    )


def rows_of(
    ranks: list[dict], tp: int, vocab_size: int, which: str = "moments"
) -> dict[str, torch.Tensor]:
    """The moments of the tensor-parallel ranks, one below the other, without the padding of the
    vocabulary.
    """
    states = [rank[which] for rank in ranks if rank[which]][:tp]  # data-parallel replicas follow
    return {
        name: torch.cat([state[name] for state in states])[:vocab_size]
        for name in ("exp_avg", "exp_avg_sq")
    }


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen2, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Two steps on two tensor-parallel ranks, a checkpoint, the third step; and the third step
    resumed.
    """
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    return path, on_ranks(in_turn, SAVED, tiny_qwen2, str(path), None)


def check_bit_exact(ranks: list[dict]) -> None:
    assert any(rank["uninterrupted"]["moments"] for rank in ranks)
    for a, b in ((rank["uninterrupted"], rank["resumed"]) for rank in ranks):
        assert a["metrics"] == b["metrics"]
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
        if a["moments"]:
            assert a["moments"]["step"] == b["moments"]["step"] == 3
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(a["moments"][name], b["moments"][name])
                assert not torch.equal(a["moments"][name], a["saved"][name])
        assert "random states" not in b["said"]


def test_resuming_continues_bit_exactly(checkpoint):
    check_bit_exact(checkpoint[1])


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2, packed=False), Layout(dp=2)], ids=str)
def test_resuming_continues_bit_exactly_and_under_another_layout(
    layout, checkpoint, tiny_qwen2, tmp_path
):
    path, tp2 = checkpoint
    ranks = on_ranks(in_turn, layout, tiny_qwen2, str(tmp_path / "checkpoint"), str(path))
    check_bit_exact(ranks)
    # Saved on two tensor-parallel ranks, resumed here.
    expected = rows_of([rank["uninterrupted"] for rank in tp2], 2, 128)
    resumed = [rank["other"] for rank in ranks]
    for name, moment in rows_of(resumed, 1, 128).items():
        torch.testing.assert_close(
            moment, expected[name], rtol=1e-3, atol=float(expected[name].abs().max()) * 1e-5
        )
    before = tp2[0]["uninterrupted"]["metrics"]
    after = next(rank["metrics"] for rank in resumed if rank["metrics"])
    assert after["capo/accepted_tokens"] == before["capo/accepted_tokens"]
    assert after["capo/policy_shift_max"][0] == pytest.approx(
        before["capo/policy_shift_max"][0], rel=1e-3
    )
    sizes = (
        f"was saved with (pipeline, tensor) parallel sizes (1, 2) and is loaded with ({layout.pp}, "
        "1)"
    )
    assert sizes in resumed[0]["said"]


def test_resuming_with_the_distributed_optimizer_continues_bit_exactly(tiny_qwen2, tmp_path):
    layout = Layout(dp=2, distributed_optimizer=True)
    check_bit_exact(on_ranks(in_turn, layout, tiny_qwen2, str(tmp_path / "checkpoint"), None))


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, ep=2), Layout(tp=2, sp=True, ep=2, etp=1, distributed_optimizer=True)],
    ids=str,
)
def test_experts_continue_bit_exactly(layout, models, tmp_path):
    check_bit_exact(on_ranks(in_turn, layout, models["experts"], str(tmp_path / "it"), None))


def test_the_distributed_optimizer_resumes_under_another_layout(tiny_qwen2, tmp_path):
    path = str(tmp_path / "checkpoint")
    saved = on_ranks(save_and_go_on, Layout(tp=2, distributed_optimizer=True), tiny_qwen2, path)
    resumed = on_ranks(resume, Layout(pp=2, distributed_optimizer=True), tiny_qwen2, path)
    before, after = (
        next(rank["metrics"] for rank in ranks if rank["metrics"]) for ranks in (saved, resumed)
    )
    assert after["capo/accepted_tokens"] == before["capo/accepted_tokens"]
    for name, weight in saved[0][
        "weights"
    ].items():  # after the third step, the first after the checkpoint
        difference = (resumed[0]["weights"][name] - weight).abs()
        assert float(difference.max()) < 2e-3 and float(difference.mean()) < 5e-6


def test_bfloat16_moments_resume_bit_exactly(tiny_qwen2, tmp_path):
    knobs = {**KNOBS, "moments_dtype": "bfloat16"}
    ranks = on_ranks(in_turn, SAVED, tiny_qwen2, str(tmp_path / "checkpoint"), None, knobs)
    check_bit_exact(ranks)
    assert {rank["resumed"]["moments"]["exp_avg_sq"].dtype for rank in ranks} == {torch.bfloat16}


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=4)], ids=str)
def test_padding_of_the_vocabulary_may_differ(layout, odd_vocabulary, tmp_path):
    """125 tokens are 126 rows on two ranks, 125 on one, 128 on four: each row arrives where it
    belongs.
    """
    path = str(tmp_path / "checkpoint")
    saved = rows_of(on_ranks(save_and_go_on, SAVED, odd_vocabulary, path), 2, 125, "saved")
    loaded = on_ranks(load_only, layout, odd_vocabulary, path)
    assert [len(rank["moments"]["exp_avg"]) for rank in loaded] == [
        -(-125 // layout.tp)
    ] * layout.tp
    for name, moment in rows_of(loaded, layout.tp, 125).items():
        assert torch.equal(moment, saved[name]) and moment[-1].any()


def test_a_run_without_capo_goes_on_with_it(odd_vocabulary, tmp_path):
    path = str(tmp_path / "checkpoint")
    on_ranks(save_and_go_on, Layout(), odd_vocabulary, path, None)
    assert not Path(path, "capo").exists()
    (resumed,) = on_ranks(resume, Layout(), odd_vocabulary, path, KNOBS)
    assert resumed["moments"]["step"] == 1
    assert (
        f"the checkpoint {path} was written without CAPO: its moments start empty"
        in resumed["said"]
    )


def test_a_run_that_leaves_capo_and_comes_back_keeps_the_moments(checkpoint, tiny_qwen2, tmp_path):
    """Loaded, trained without the switch, saved: nothing took the moments over, so they are written
    again.
    """
    path, ranks = checkpoint
    again = str(tmp_path / "again")
    for rank, kept in zip(
        ranks, on_ranks(_load_save_load, SAVED, tiny_qwen2, str(path), again), strict=True
    ):
        assert (
            torch.equal(rank["uninterrupted"]["saved"]["exp_avg"], kept["exp_avg"])
            and kept["step"] == 2
        )


def _load_save_load(layout: Layout, model: str, checkpoint: str, again: str) -> dict:
    from tests.engines.megatron.state_cases import new_engine, step

    engine = new_engine(layout, model)
    engine.load_checkpoint(checkpoint, del_local_after_load=False)
    step(engine, None)
    engine.save_checkpoint(again, global_step=3)
    return engine._load_state(again)


def test_damaged_and_foreign_states_are_refused(checkpoint, odd_vocabulary, tiny_qwen2, tmp_path):
    path, _ = checkpoint
    copies = damaged(path, tmp_path)
    for said in on_ranks(refusals, SAVED, tiny_qwen2, [str(copy) for copy in copies.values()]):
        reasons = dict(zip(copies, said, strict=True))
        for name, reason in reasons.items():
            assert f"the CAPO state in {copies[name]}/capo/dist_ckpt cannot be used (" in reason
            assert "to start with empty moments" in reason
        assert (
            "names pathlib.Path.touch, which an index of tensors does not need: not unpickled"
            in reasons["code"]
        )
        assert "FileNotFoundError" in reasons["no index"]
        assert "checksum does not fit: the files were damaged" in reasons["flipped"]
    assert not (tmp_path / "executed").exists()
    for said in on_ranks(refusals, SAVED, odd_vocabulary, [str(path)]):
        assert (
            "saved for a vocabulary of 128 and hidden size 64, this model has 125 and 64" in said[0]
        )
