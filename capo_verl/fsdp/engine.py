# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine with CAPO. Importing this module registers it for NVIDIA GPUs, where it wins over verl's own.

The parameters are sharded, but not the vocabulary: every rank sees whole logits and holds the moments of the whole LM head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from capo_verl.config import CapoConfig
from capo_verl.core import CapoFilter
from capo_verl.engine_mixin import CapoEngineMixin, State
from capo_verl.filtered_step import ACCEPTED
from capo_verl.fsdp import checkpoint
from capo_verl.fsdp.packing import from_padded, packed_response, padded_response, to_padded
from capo_verl.hidden_states import HiddenStatesTap


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia")
class CapoFSDPEngineWithLMHead(CapoEngineMixin, FSDPEngineWithLMHead):
    """``FSDPEngineWithLMHead`` that filters tokens while it trains."""

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        if self._step is None or self._tap is None or not self._tap.active:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        # verl's forward pass runs under autocast, which would compute the filter in bfloat16.
        with torch.no_grad(), torch.autocast(torch.device(get_device_id()).type, enabled=False):
            accepted = self._accepted(self._tap.take(), output.logits, output_args, micro_batch)
        model_output = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        offsets = micro_batch["input_ids"].offsets()
        model_output[ACCEPTED] = torch.nested.nested_tensor_from_jagged(accepted, offsets)
        return model_output

    def _accepted(
        self, hidden_states: Tensor, logits: Tensor, output_args: dict[str, Any], batch: TensorDict
    ) -> Tensor:
        """1 where a token of ``input_ids`` stays in the loss, at the position that predicts it; ``[total]`` float32."""
        labels = output_args["input_ids_rmpad_rolled"]
        if tu.get_non_tensor_data(data=batch, key="use_remove_padding", default=True):
            response, temperature = packed_response(self, batch), output_args["temperature_rmpad"]
            accepted = self._step.evaluate(
                hidden_states, logits, labels[None], temperature[None], response, self._learning_rate()
            )
            return self._gather_and_unpad_packed(accepted[0], output_args["pad_size"])
        length = logits.shape[1]
        temperature = output_args["temperature"][:, None].expand(-1, length)
        response, labels = padded_response(batch, length), to_padded(labels, batch, length)
        accepted = self._step.evaluate(hidden_states, logits, labels, temperature, response, self._learning_rate())
        return from_padded(accepted, batch)

    def _lm_head(self) -> nn.Module:
        """Also through the wrappers of FSDP and PEFT, which forward what they do not have themselves."""
        return self.module.get_output_embeddings()

    def _lm_head_shape(self) -> tuple[int, int]:
        """Rows and hidden size of the whole LM head; its weight is sharded."""
        lm_head: Any = self._lm_head()
        return int(lm_head.out_features), int(lm_head.in_features)

    def _make_filter(self, config: CapoConfig, device: torch.device) -> tuple[CapoFilter, HiddenStatesTap]:
        if self.scaler is not None:
            raise ValueError(
                "CAPO does not support float16 with FSDP: the loss scaler skips optimizer steps that CAPO would count; set "
                "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"
            )
        rows, hidden_size = self._lm_head_shape()
        capo = CapoFilter(
            config,
            vocab_size=int(self.model_config.hf_config.get_text_config().vocab_size),
            hidden_size=hidden_size,
            device=device,
            dp_group=self.get_data_parallel_group(),
            cp_group=self.ulysses_parallel_group,
            padded_vocab_size=rows,
        )
        return capo, HiddenStatesTap(self._lm_head())

    def _learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _optimizer_steps(self) -> int:
        return int(self.lr_scheduler.last_epoch)

    def _gradients(self) -> Iterable[Tensor]:
        for parameter in self.module.parameters():
            gradient = parameter.grad
            if gradient is not None:
                yield gradient.to_local() if isinstance(gradient, DTensor) else gradient

    def _save_state(self, checkpoint_path: str, state: State) -> None:
        checkpoint.save(checkpoint_path, state)

    def _load_state(self, checkpoint_path: str) -> State | None:
        return checkpoint.load(checkpoint_path, self._lm_head_shape(), torch.device(get_device_id()))
