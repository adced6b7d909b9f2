# SPDX-License-Identifier: Apache-2.0
"""verl's Megatron engine with CAPO. Importing this module registers it for NVIDIA GPUs, where it wins over verl's own.

Without ``+capo`` on the command line every method hands over to verl's at once.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from tensordict import TensorDict
from torch import Tensor
from verl.utils.device import get_device_id
from verl.utils.megatron.optimizer import get_megatron_last_lr
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from capo_verl.config import CapoConfig
from capo_verl.core import CapoFilter
from capo_verl.filtered_step import ACCEPTED, FilteredStep
from capo_verl.megatron import checkpoint
from capo_verl.megatron.hidden_states import HiddenStatesTap, output_layer_of
from capo_verl.megatron.packing import label_layout, pack_response

logger = logging.getLogger(__name__)


def capo_config_of(loss_function: Any) -> CapoConfig | None:
    """The knobs which verl's worker bound to its loss function, if the run was started with ``+capo``."""
    config = getattr(loss_function, "keywords", {}).get("config")
    knobs = getattr(getattr(config, "policy_loss", None), "capo", None)
    return knobs if isinstance(knobs, CapoConfig) else None


@EngineRegistry.register(model_type="language_model", backend="megatron", device="cuda", vendor="nvidia")
class CapoMegatronEngineWithLMHead(MegatronEngineWithLMHead):
    """``MegatronEngineWithLMHead`` that filters tokens on the last pipeline stage while it trains."""

    _capo: CapoConfig | None = None
    """The knobs, once a training step has come with them; known on every rank."""
    _step: FilteredStep | None = None
    """On the last pipeline stage only."""
    _tap: HiddenStatesTap | None = None
    _filter_seconds = 0.0
    _loaded_from: str | None = None
    _loaded_state: checkpoint.State | None = None

    def train_batch(self, data: TensorDict, loss_function: Any) -> Any:
        output = super().train_batch(data, loss_function)
        if self._step is not None and self.is_mp_src_rank_with_outputs():
            output["metrics"]["capo/filter_seconds"] = [self._filter_seconds]
        return output

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        config = None if forward_only else capo_config_of(loss_function)
        if config is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        if self._capo is None:
            self._switch_on(config)
        if self._step is None or self._tap is None:  # not the last pipeline stage
            return super().forward_backward_batch(data, loss_function, forward_only)
        group = self.optimizer.param_groups[0]
        self._step.capo.set_optimizer(group["betas"], group["eps"])
        self._tap.active = True
        try:
            output = super().forward_backward_batch(data, self._step.wrap_loss(loss_function), forward_only)
        finally:
            self._tap.active = False
        # Lists, because verl's reduction expects one value per micro-batch.
        output["metrics"].update({name: [value] for name, value in self._step.metrics().items()})
        return output

    def _lm_head_logits_processor(self, logits: Tensor, label: Tensor, temperature: Tensor, **kwargs: Any) -> Any:
        if self._step is None or self._tap is None or not self._tap.active:
            return super()._lm_head_logits_processor(logits, label, temperature, **kwargs)
        # Before verl's own processing, which divides the logits by the temperature and overwrites them.
        batch, data_format = kwargs["batch"], kwargs["data_format"]
        layout = label_layout(self, batch, data_format, unwrap_model(self.module[-1]))
        response = pack_response(batch, data_format, layout)
        learning_rate = get_megatron_last_lr(self.optimizer)
        accepted = self._step.evaluate(self._tap.take(), logits, label, temperature, response, learning_rate)
        output = super()._lm_head_logits_processor(logits, label, temperature, **kwargs)
        output[ACCEPTED] = accepted
        return output

    def optimizer_zero_grad(self) -> None:
        super().optimizer_zero_grad()
        if self._step is not None:
            self._step.discard()

    def optimizer_step(self) -> Any:
        grad_norm = super().optimizer_step()
        if self._step is not None:
            self._filter_seconds = self._step.optimizer_step()
        return grad_norm

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        # First, because verl marks a checkpoint as complete at the end of its own save.
        if self._capo is not None and self._capo.optimizer_model == "adam":
            checkpoint.save(local_path, {} if self._step is None else self._step.capo.state_dict())
        elif self._loaded_state is not None:  # not yet taken over by a training step
            checkpoint.save(local_path, self._loaded_state)
        super().save_checkpoint(local_path, *args, **kwargs)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().load_checkpoint(local_path, *args, **kwargs)
        self._loaded_from, self._loaded_state = local_path, checkpoint.load(local_path, *self._lm_head_shape())
        if self._capo is not None:
            self._take_over_loaded_state(self._capo)

    def _lm_head_shape(self) -> tuple[int, int]:
        """Rows and hidden size of this rank's shard of the LM head; 0 rows before the last pipeline stage."""
        model = unwrap_model(self.module[-1])
        if not model.post_process:
            return 0, self.tf_config.hidden_size
        return output_layer_of(model).output_size_per_partition, self.tf_config.hidden_size

    def _switch_on(self, config: CapoConfig) -> None:
        """The first training step says that this run is a CAPO run. Called on every rank."""
        self._capo = config
        rows, hidden_size = self._lm_head_shape()
        if rows:
            device = torch.device(get_device_id())
            capo = CapoFilter(
                config,
                vocab_size=self.model_config.hf_config.get_text_config().vocab_size,
                hidden_size=hidden_size,
                device=device,
                tp_group=mpu.get_tensor_model_parallel_group(),
                dp_group=mpu.get_data_parallel_group(),
                cp_group=mpu.get_context_parallel_group(),
                padded_vocab_size=rows * mpu.get_tensor_model_parallel_world_size(),
            )
            self._step = FilteredStep(capo, config, device)
            self._tap = HiddenStatesTap(unwrap_model(self.module[-1]))
        if self._loaded_from is not None:
            self._take_over_loaded_state(config)

    def _take_over_loaded_state(self, config: CapoConfig) -> None:
        state, self._loaded_state = self._loaded_state, None
        if self._step is None or config.optimizer_model != "adam":
            return
        if state is None:
            logger.warning("the checkpoint %s was written without CAPO: its moments start empty", self._loaded_from)
            return
        self._step.capo.load_state_dict(state)
