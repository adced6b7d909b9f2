# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine with CAPO. Importing this module registers it for NVIDIA GPUs, where it wins
over verl's own.

The parameters are sharded, but not the vocabulary: every rank sees whole logits (or, with a fused
cross-entropy, the whole LM head during the forward pass) and holds the moments of the whole LM
head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel import linear_cross_entropy
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from capo_verl.config import CapoConfig
from capo_verl.core import ProjectedLogits, curvature_penalty
from capo_verl.core.logits import VocabShard
from capo_verl.engines.checkpoint import State
from capo_verl.engines.filter_step import ACCEPTED, PENALTY
from capo_verl.engines.fsdp import checkpoint
from capo_verl.engines.fsdp.packing import from_padded, packed_response, padded_response, to_padded
from capo_verl.engines.kl_probe import place_of
from capo_verl.engines.lm_head import (
    NOT_CALLED,
    FusedCall,
    LMHead,
    LMHeadCall,
    before_each_call,
    of_fused_linear,
    of_linear_cross_entropy,
)
from capo_verl.engines.mixin import CapoEngineMixin, has_dropout
from capo_verl.engines.response import PackedResponse


def check_fused_settings(model_config: Any, engine_config: Any) -> None:
    """Refuse what verl 0.9.1 ends with an error about tensors, at its first log-prob.

    Raises:
        ValueError: naming the key of the config and the value to give it.
    """
    model = "actor_rollout_ref.model"
    if not model_config.use_fused_kernels:
        return
    # It shards an untied LM head on its own, and reads the weight without calling the module: a
    # DTensor.
    if engine_config.strategy == "fsdp2" and not getattr(
        model_config.hf_config, "tie_word_embeddings", False
    ):
        raise ValueError(
            f"{model}.use_fused_kernels=True needs a model with tied embeddings under FSDP2; set "
            "actor_rollout_ref.actor.strategy=fsdp, or use_fused_kernels=False"
        )
    # Its kernel returns [tokens], and [batch, length] is expected for padded batches.
    if (
        model_config.fused_kernel_options.get("impl_backend") == "triton"
        and not model_config.use_remove_padding
    ):
        raise ValueError(
            f"{model}.fused_kernel_options.impl_backend=triton needs packed batches; set "
            f"{model}.use_remove_padding=True, or impl_backend=torch"
        )


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia"
)
class CapoFSDPEngineWithLMHead(CapoEngineMixin, FSDPEngineWithLMHead):
    """``FSDPEngineWithLMHead`` that filters tokens while it trains."""

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        check_fused_settings(model_config, engine_config)
        super().__init__(model_config, engine_config, *args, **kwargs)

    _fused_accepted: Tensor | None = None
    """The verdict on the micro-batch in flight, from its fused forward pass.

    The gathered LM head exists only within that.
    """

    verl_module = transformer_impl

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        if self._filtering is None and self._kl is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        self._probed = self._probed_part(micro_batch)
        look = partial(self._look_fused, batch=micro_batch)
        try:
            with (
                before_each_call(FusedLinearForPPO, "forward", of_fused_linear, look),
                before_each_call(
                    linear_cross_entropy, "linear_cross_entropy", of_linear_cross_entropy, look
                ),
            ):
                return super().forward_step(micro_batch, loss_function, forward_only)
        finally:
            self._probed = None

    def prepare_model_outputs(
        self,
        output: Any,
        output_args: dict[str, Any],
        micro_batch: TensorDict,
        logits_processor_func: Any,
    ) -> dict[str, Tensor]:
        step, fused = self._filtering, _is_fused(micro_batch)
        if self._probed is not None and not fused:
            labels, temperature = self._labels(output.logits, output_args, micro_batch)
            self._show_probe(output.logits, None, temperature)
        if step is None:
            return super().prepare_model_outputs(
                output, output_args, micro_batch, logits_processor_func
            )
        if fused:
            accepted, self._fused_accepted = self._fused_accepted, None
            if accepted is None:
                raise RuntimeError(NOT_CALLED)
        else:
            labels, temperature = self._labels(output.logits, output_args, micro_batch)
            accepted = self._evaluate(
                step.tap.take(), output.logits, labels, temperature, micro_batch
            )

        def to_sequences(values: Tensor) -> Tensor:
            if _is_packed(micro_batch):
                return self._gather_and_unpad_packed(values[0], output_args["pad_size"])
            return from_padded(values, micro_batch)

        accepted = to_sequences(accepted)
        step.samples.lay_out(to_sequences)
        terms = step.take_penalty_terms()
        # Now: verl divides the logits by the temperature in place.
        penalty = None if terms is None else to_sequences(curvature_penalty(output.logits, terms))
        model_output = super().prepare_model_outputs(
            output, output_args, micro_batch, logits_processor_func
        )
        offsets = micro_batch["input_ids"].offsets()
        model_output[ACCEPTED] = torch.nested.nested_tensor_from_jagged(accepted, offsets)
        if penalty is not None:
            model_output[PENALTY] = torch.nested.nested_tensor_from_jagged(penalty, offsets)
        return model_output

    def _labels(
        self, logits: Tensor, output_args: dict[str, Any], batch: TensorDict
    ) -> tuple[Tensor, Tensor]:
        """Labels and temperatures ``[b, s]`` in the layout of the logits ``[b, s, V]``."""
        labels = output_args["input_ids_rmpad_rolled"]
        if _is_packed(batch):
            return labels[None], output_args["temperature_rmpad"][None]
        labels = to_padded(labels, batch, logits.shape[1])
        return labels, output_args["temperature"][:, None].expand_as(labels)

    def _look_fused(self, call: FusedCall, batch: TensorDict) -> None:
        if self._probed is not None:
            self._show_probe(call.logits(), call.hidden_states, call.temperatures())
        if self._filtering is not None:
            self._fused_accepted = self._evaluate(
                call.hidden_states, call.logits(), call.labels, call.temperatures(), batch
            )

    def _show_probe(
        self, logits: Tensor | ProjectedLogits, hidden_states: Tensor | None, temperature: Tensor
    ) -> None:
        place, response = self._probed_response(temperature.shape[1])
        self._kl_probe.see(logits, hidden_states, temperature, response, place)

    def _see_lm_head(self, call: LMHeadCall) -> None:
        self._kl_probe.see_head(call, self._probed_response(call.output.shape[1])[1])

    def _probed_response(self, length: int) -> tuple[int, PackedResponse]:
        """The number of the probed micro-batch in flight, and its tokens."""
        assert self._probed is not None
        place, count = place_of(self._probed)
        return place, self._response(length, self._probed)._replace(max_tokens=count)

    def _response(self, length: int, batch: TensorDict) -> PackedResponse:
        """The response fields in the layout of logits ``[b, length, V]``."""
        return packed_response(self, batch) if _is_packed(batch) else padded_response(batch, length)

    def _evaluate(
        self, hidden_states: Tensor, logits: Tensor | ProjectedLogits, labels: Tensor,
        temperature: Tensor, batch: TensorDict
    ) -> Tensor:  # fmt: skip
        """1 where a token stays in the loss, at the position that predicts it; float32 in the
        layout of the model.
        """
        assert self._step is not None
        response = self._response(labels.shape[1], batch)
        return self._step.evaluate(
            hidden_states, logits, labels, temperature, response, self._learning_rate()
        )

    def _find_lm_head(self) -> LMHead:
        # Also through the wrappers of FSDP and PEFT, which forward what they do not have
        # themselves. The weight is sharded, so its sizes are asked of the module.
        module: Any = self.module.get_output_embeddings()
        vocab_size = int(self.model_config.hf_config.get_text_config().vocab_size)
        return LMHead(
            module,
            module,
            VocabShard(vocab_size, int(module.out_features), 0),
            int(module.in_features),
            dp_group=self.get_data_parallel_group(),
            cp_group=self.ulysses_parallel_group,
        )

    def _check_supported(self, config: CapoConfig) -> None:
        if self.scaler is not None:
            raise ValueError(
                "CAPO does not support float16 with FSDP: the loss scaler skips optimizer steps "
                "that CAPO would count; set "
                "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"
            )

    def _has_dropout(self) -> bool:
        # transformers keeps the rates of functional dropout in the configuration, and those of the
        # noise that training adds for a router of experts.
        rates = vars(self.model_config.hf_config.get_text_config()).items()
        kinds = ("dropout", "pdrop", "jitter_noise", "jitter_eps")
        functional = any(name.endswith(kinds) and rate for name, rate in rates)
        return functional or has_dropout([self.module])

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()
            reshard(self.module)

    def _optimised(self) -> list[Tensor]:
        # verl gives it all parameters; those without gradients, as around LoRA's, stay as they are.
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        parameters = (p for group in groups for p in group["params"] if p.requires_grad)
        return [p.to_local().detach() if isinstance(p, DTensor) else p.data for p in parameters]

    def _spread_parameters(self) -> None:
        # Nothing to send; but no gathered copy of the weights may outlive the change.
        reshard(self.module)

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

    def _state_path(self, checkpoint_path: str) -> Path:
        return checkpoint.path_of(checkpoint_path)

    def _load_state(self, checkpoint_path: str) -> State | None:
        head = self.lm_head
        assert head is not None
        shape = (head.shard.rows, head.hidden_size)
        return checkpoint.load(checkpoint_path, shape, torch.device(get_device_id()))


def reshard(module: nn.Module) -> None:
    """Free gathered weights: both generations of FSDP keep the root's after a forward pass without
    a backward pass.

    The next forward pass would use them whatever has become of the shards.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FullyShardedDataParallel):
            handle = part._handle
            if handle is not None and handle.uses_sharded_strategy:
                handle.reshard(True)


def _is_fused(batch: TensorDict) -> bool:
    return bool(tu.get_non_tensor_data(data=batch, key="use_fused_kernels", default=False))


def _is_packed(batch: TensorDict) -> bool:
    return bool(tu.get_non_tensor_data(data=batch, key="use_remove_padding", default=True))
