# SPDX-License-Identifier: Apache-2.0
"""verl's Megatron engine with CAPO.

Importing this module registers it for NVIDIA GPUs, where it wins over verl's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from tensordict import TensorDict
from torch import Tensor, nn
from verl.models.mcore import model_forward_fused
from verl.utils.device import get_device_id
from verl.utils.megatron.optimizer import get_megatron_last_lr
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron import transformer_impl
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from capo_verl.config import CapoConfig
from capo_verl.core import ProjectedLogits, curvature_penalty
from capo_verl.core.logits import VocabShard
from capo_verl.engines import lm_head
from capo_verl.engines.checkpoint import State
from capo_verl.engines.filter_step import ACCEPTED, PENALTY
from capo_verl.engines.kl_probe import place_of
from capo_verl.engines.lm_head import LMHead, LMHeadCall
from capo_verl.engines.megatron import checkpoint, parameters, routing
from capo_verl.engines.megatron.packing import label_layout, pack_response, token_positions, unpack
from capo_verl.engines.mixin import CapoEngineMixin, has_dropout

logger = logging.getLogger(__name__)


def output_layer_of(model: nn.Module) -> nn.Module:
    """The LM head of an unwrapped Megatron model, text-only or multi-modal, without adapters around
    it.
    """
    output_layer: Any = getattr(model, "language_model", model).output_layer
    linear: nn.Module = getattr(output_layer, "to_wrap", output_layer)
    return linear


@EngineRegistry.register(
    model_type="language_model", backend="megatron", device="cuda", vendor="nvidia"
)
class CapoMegatronEngineWithLMHead(CapoEngineMixin, MegatronEngineWithLMHead):
    """``MegatronEngineWithLMHead`` that filters tokens on the last pipeline stage while it
    trains.
    """

    verl_module = transformer_impl
    _accepted: Tensor | None = None
    """1 where a token stays in the loss, at the position that predicts it, of the micro-batch in
    flight; nested ``[b, j]``.
    """
    _penalty: Tensor | None = None
    """The penalty of each token, part of the graph, if there is one; nested ``[b, j]``."""
    _head_call: LMHeadCall | None = None
    """The LM head's call in the micro-batch in flight, if the KL probe wants to see it."""

    def forward_step(
        self,
        batch_iter: Iterator[TensorDict],
        model: nn.Module,
        logits_processor_func: Any,
        postprocess_micro_batch_func: Any,
    ) -> Any:
        if self._filtering is None and self._kl is None:
            return super().forward_step(
                batch_iter, model, logits_processor_func, postprocess_micro_batch_func
            )
        batch = next(batch_iter).to(get_device_id())
        self._accepted, self._probed = None, self._probed_part(batch)
        try:
            with lm_head.before_each_call(
                model_forward_fused, "linear_cross_entropy", lm_head.of_linear_cross_entropy,
                lambda call: self._look(
                    call.hidden_states.transpose(0, 1), call.logits(), call.labels,
                    call.temperatures(), batch, "thd"
                ),
            ):  # fmt: skip
                output, postprocess = super().forward_step(
                    iter((batch,)), model, logits_processor_func, postprocess_micro_batch_func
                )
        finally:
            self._probed = None
        if self._filtering is not None and unwrap_model(model).post_process:
            if self._accepted is None:
                raise RuntimeError(lm_head.NOT_CALLED)
            # Not through verl's output processing, which unpacks one sequence after the other.
            output[ACCEPTED], self._accepted = self._accepted, None
            if self._penalty is not None:
                output[PENALTY], self._penalty = self._penalty, None
        return output, postprocess

    def _lm_head_logits_processor(
        self, logits: Tensor, label: Tensor, temperature: Tensor, **kwargs: Any
    ) -> Any:
        # Before verl's own processing, which divides the logits by the temperature and overwrites
        # them.
        batch, data_format = kwargs["batch"], kwargs["data_format"]
        hidden_states = None if self._filtering is None else self._hidden_states()
        self._look(hidden_states, logits, label, temperature, batch, data_format)
        if self._filtering is not None:
            self._penalise(logits, label, batch, data_format)
        return super()._lm_head_logits_processor(logits, label, temperature, **kwargs)

    @torch.no_grad()
    def _look(
        self,
        hidden_states: Tensor | None,
        logits: Tensor | ProjectedLogits,
        labels: Tensor,
        temperature: Tensor,
        batch: TensorDict,
        data_format: str,
    ) -> None:
        """Show the micro-batch in flight to the filter and to the KL probe."""
        step = self._filtering
        if step is None and self._probed is None:
            return
        at = self._token_positions(labels, batch, data_format)
        if self._probed is not None:
            place, count = place_of(self._probed)
            response = pack_response(self._probed, at)._replace(max_tokens=count)
            call, self._head_call = self._head_call, None
            if call is not None:
                hidden = self._gathered(call.hidden_states)
                call = LMHeadCall(hidden, call.head, call.output.transpose(0, 1))
                self._kl_probe.see_head(call, response)
            self._kl_probe.see(logits, hidden_states, temperature, response, place)
        if step is not None:
            assert hidden_states is not None
            accepted = step.evaluate(
                hidden_states,
                logits,
                labels,
                temperature,
                pack_response(batch, at),
                self._learning_rate(),
            )
            self._accepted = unpack(accepted, batch, at)
            step.samples.lay_out(lambda values: unpack(values, batch, at).values())

    def _token_positions(self, labels: Tensor, batch: TensorDict, data_format: str) -> Tensor:
        return token_positions(
            batch, labels.shape, **label_layout(self, data_format, unwrap_model(self.module[-1]))
        )

    def _penalise(
        self, logits: Tensor, labels: Tensor, batch: TensorDict, data_format: str
    ) -> None:
        """The penalty of every token just evaluated, if there is one, as a function of the
        logits.
        """
        assert self._step is not None
        terms = self._step.take_penalty_terms()
        if terms is not None:
            at = self._token_positions(labels, batch, data_format)
            self._penalty = unpack(curvature_penalty(logits, terms), batch, at)

    @torch.no_grad()
    def _hidden_states(self) -> Tensor:
        """``[b, s, H]`` of the micro-batch in flight, gathered over the sequence-parallel group."""
        assert self._step is not None
        return self._gathered(self._step.tap.take())

    @torch.no_grad()
    def _gathered(self, hidden_states: Tensor) -> Tensor:
        """``[b, s, H]`` of what the LM head was given."""
        if self.tf_config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        return hidden_states.transpose(0, 1)

    def _find_lm_head(self) -> LMHead | None:
        model = unwrap_model(self.module[-1])
        if not model.post_process:
            return None
        linear: Any = output_layer_of(model)
        rows = int(linear.output_size_per_partition)
        return LMHead(
            getattr(model, "language_model", model).output_layer,
            linear,
            VocabShard(self._vocab_size(), rows, rows * mpu.get_tensor_model_parallel_rank()),
            self.tf_config.hidden_size,
            mpu.get_tensor_model_parallel_group(),
            mpu.get_data_parallel_group(),
            mpu.get_context_parallel_group(),
        )

    def _see_lm_head(self, call: LMHeadCall) -> None:
        self._head_call = call  # the layout of the batch is known where the logits are seen

    def _has_dropout(self) -> bool:
        config = self.tf_config
        return bool(
            config.hidden_dropout or config.attention_dropout or has_dropout(self.module)
        ) or routing.differs_in_training(config)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        for chunk in self.module:
            chunk.eval()
        try:
            yield
        finally:
            for chunk in self.module:
                chunk.train()

    def _micro_batch_groups(self) -> int:
        interleaved = (mpu.get_virtual_pipeline_model_parallel_world_size() or 1) > 1
        return int(self.tf_config.microbatch_group_size_per_vp_stage) if interleaved else 1

    def _optimised(self) -> list[Tensor]:
        return parameters.optimised(self.optimizer, self.module)

    def _spread_parameters(self) -> None:
        parameters.spread(self.optimizer, self.module)

    def _check_supported(self, config: CapoConfig) -> None:
        if config.kl_budget is not None:
            routing.check_repeatable(self.tf_config)
            if config.kl_budget.line_search is not None:
                parameters.check_reachable(self.optimizer)

    def _vocab_size(self) -> int:
        return self.model_config.hf_config.get_text_config().vocab_size

    def _learning_rate(self) -> float:
        return float(get_megatron_last_lr(self.optimizer))  # a capturable Adam has a tensor

    def _optimizer_steps(self) -> int:
        return int(self.lr_scheduler.num_steps)

    def _gradients(self) -> Iterable[Tensor]:
        for chunk in self.module:
            for parameter in chunk.parameters():
                # Megatron's DDP accumulates into main_grad, a view of its buffers.
                gradient = getattr(parameter, "main_grad", parameter.grad)
                if gradient is not None:
                    yield gradient

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        contents = self.checkpoint_mananager.checkpoint_load_contents
        saved = checkpoint.layout_of_random_states(local_path)
        current = (
            mpu.get_pipeline_model_parallel_world_size(),
            mpu.get_tensor_model_parallel_world_size(),
        )
        if saved not in (None, current) and "extra" in contents:
            # verl would fail with a missing key: these states exist once per pipeline and tensor
            # rank of the saved layout.
            logger.warning(
                "%s was saved with (pipeline, tensor) parallel sizes %s and is loaded with %s: "
                "Megatron's random states (dropout) are not restored", local_path, saved, current,
            )  # fmt: skip
            self.checkpoint_mananager.checkpoint_load_contents = [
                name for name in contents if name != "extra"
            ]
        try:
            super().load_checkpoint(local_path, *args, **kwargs)
        finally:
            self.checkpoint_mananager.checkpoint_load_contents = contents

    def _save_state(self, checkpoint_path: str, state: State) -> None:
        checkpoint.save(checkpoint_path, state, self._vocab_size())

    def _state_path(self, checkpoint_path: str) -> Path:
        return checkpoint.directory(checkpoint_path)

    def _load_state(self, checkpoint_path: str) -> State | None:
        head = self.lm_head
        rows, hidden_size = (0, 0) if head is None else (head.shard.rows, head.hidden_size)
        return checkpoint.load(checkpoint_path, rows, hidden_size, self._vocab_size())
