# SPDX-License-Identifier: Apache-2.0
"""The server of the rollout backend "hf".

A Ray actor owns a Hugging Face model and answers ``generate``.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from verl.utils import normalize_token_ids
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.replica import TokenOutput

from capo_verl.cpu.expert_weights import one_by_one
from capo_verl.cpu.rollout import NAME
from capo_verl.cpu.rollout.expert_choices import ExpertChoices
from capo_verl.cpu.rollout.sampling import Completion, SamplingRequest, generate_batch

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.02
"""A batch starts once no further request has arrived for this long."""

# Sampling parameters, as verl and vLLM name them, that would change the result and are not
# implemented: the value with which they change nothing, and the key of the config that sets them,
# where there is one.
NEUTRAL = {
    "repetition_penalty": (1.0, "actor_rollout_ref.rollout.repetition_penalty"),
    "presence_penalty": (0.0, None),
    "frequency_penalty": (0.0, None),
    "min_p": (0.0, None),
    "n": (1, "actor_rollout_ref.rollout.n (verl sends one request per sample)"),
    "stop": (None, None),
    "bad_words": (None, None),
    "min_tokens": (0, None),
    "prompt_logprobs": (None, None),
}
KNOWN = {
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "max_new_tokens",
    "logprobs",
    "ignore_eos",
    "stop_token_ids",
}


def check_sampling_params(params: dict[str, Any]) -> None:
    """Refuse sampling parameters that are not implemented.

    Raises:
        ValueError: naming a sampling parameter that this backend would have to ignore.
    """
    for name, value in params.items():
        if name in KNOWN:
            continue
        neutral, key = NEUTRAL.get(name, (None, None))
        if value != neutral and value not in (None, [], ""):
            where = f" (set {key}={neutral})" if key else ""
            raise ValueError(
                f"sampling parameter {name}={value!r} is not supported by the rollout backend "
                f"'{NAME}'{where}"
            )


def check_rollout_config(config: Any) -> None:
    """Refuse settings of the rollout that are not implemented.

    Raises:
        ValueError: naming a key of ``actor_rollout_ref.rollout`` that this backend would have to
            ignore.
    """
    prefix = "actor_rollout_ref.rollout"
    refused = [
        (
            config.repetition_penalty != 1.0,
            f"{prefix}.repetition_penalty={config.repetition_penalty}",
            "1.0",
        ),
        (config.disaggregation.enabled, f"{prefix}.disaggregation.enabled=True", "False"),
        (config.quantization is not None, f"{prefix}.quantization={config.quantization}", "null"),
    ]
    for condition, what, value in refused:
        if condition:
            raise ValueError(
                f"{what} is not supported by the rollout backend '{NAME}'; set it to {value}"
            )


@dataclass
class _Pending:
    request: SamplingRequest
    future: asyncio.Future[Completion] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class HFServer:
    """One model, one queue: requests that arrive while a batch runs make up the next batch.

    The random numbers of a request follow from the server's seed, the step of the weights, the
    prompt, the sampling parameters, and how often just this has been asked for with these weights:
    neither the order of arrival nor other requests, such as those of validation, change them.
    """

    def __init__(self, config: Any, model_config: Any, replica_rank: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.config = omega_conf_to_dataclass(config)
        model_config = omega_conf_to_dataclass(model_config)
        check_rollout_config(self.config)
        path, trust = model_config.local_path, model_config.trust_remote_code
        if self.config.load_format == "dummy":  # verl's default: the trainer sends the weights
            hf_config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
            self.model = AutoModelForCausalLM.from_config(
                hf_config, dtype=torch.float32, trust_remote_code=trust
            )
        else:
            self.model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, trust_remote_code=trust
            )
        self.model.eval().requires_grad_(False)
        self.choices = (
            ExpertChoices(self.model) if self.config.enable_rollout_routing_replay else None
        )
        self.stop_token_ids = self._stop_token_ids(model_config)
        self.pad_id = model_config.tokenizer.pad_token_id or 0

        self.seed = self.config.seed + replica_rank
        self.global_steps: int | None = None
        self._asked: Counter[tuple[tuple[int, ...], float, int, float]] = Counter()
        self._ready = self.config.load_format != "dummy"
        self._missing: set[str] = set()

        self._queue: list[_Pending] = []
        self._work = asyncio.Event()
        self._open = asyncio.Event()  # closed by abort_all_requests, opened by resume_generation
        self._open.set()
        self._rejecting = False
        self._model_lock = asyncio.Lock()
        self._loop: asyncio.Task[None] | None = None

    def _stop_token_ids(self, model_config: Any) -> list[int]:
        """Stop tokens of the tokenizer and of the generation config, which may name several."""
        ids = [model_config.tokenizer.eos_token_id]
        for generation_config in (self.model.generation_config, model_config.generation_config):
            eos = getattr(generation_config, "eos_token_id", None)
            ids += eos if isinstance(eos, list) else [eos]
        return sorted({i for i in ids if i is not None})

    # Requests.

    async def generate(
        self,
        request_id: str,
        *,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        audio_data: list[Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> TokenOutput:
        """Sample one completion.

        The arguments are those of verl's client. A failure is logged, then raised.
        """
        try:
            if image_data or video_data or audio_data:
                raise ValueError(f"the rollout backend '{NAME}' takes text only")
            request = self._make_request(normalize_token_ids(prompt_ids), sampling_params)
            while not self._open.is_set():
                if self._rejecting:
                    return self._output(Completion([], [], "aborted"), sampling_params)
                await self._open.wait()
            if not self._ready:
                raise RuntimeError(
                    "the rollout server was asked to generate before it received weights"
                )
            request.generator = self._generator(request)
            pending = _Pending(request)
            self._queue.append(pending)
            self._work.set()
            if self._loop is None or self._loop.done():
                self._loop = asyncio.get_running_loop().create_task(self._serve())
            return self._output(await pending.future, sampling_params)
        except Exception:
            logger.exception("request %s failed in the rollout server", request_id)
            raise

    def _make_request(self, prompt_ids: list[int], params: dict[str, Any]) -> SamplingRequest:
        check_sampling_params(params)
        config = self.config
        limit = params.get("max_tokens") or params.get("max_new_tokens")
        if limit is None:
            # As verl's vLLM server: verl/workers/rollout/vllm_rollout/vllm_async_server.py:611.
            limit = min(
                config.response_length,
                config.prompt_length + config.response_length - len(prompt_ids),
            )
        if config.max_model_len is not None:
            if len(prompt_ids) >= config.max_model_len:
                raise ValueError(
                    f"a prompt of {len(prompt_ids)} tokens leaves no room in "
                    f"actor_rollout_ref.rollout.max_model_len={config.max_model_len}"
                )
            limit = min(limit, config.max_model_len - len(prompt_ids))
        stops = [] if params.get("ignore_eos", config.ignore_eos) else self.stop_token_ids
        return SamplingRequest(
            prompt_ids=prompt_ids,
            max_new_tokens=max(1, limit),
            temperature=params.get("temperature", config.temperature),
            top_k=params.get("top_k", config.top_k),
            top_p=params.get("top_p", config.top_p),
            stop_token_ids=[*stops, *(params.get("stop_token_ids") or [])],
        )

    def _generator(self, request: SamplingRequest) -> torch.Generator:
        asked = (
            tuple(request.prompt_ids),
            float(request.temperature),
            int(request.top_k),
            float(request.top_p),
        )
        key = repr((self.seed, self.global_steps, asked, self._asked[asked])).encode()
        self._asked[asked] += 1
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def _output(self, completion: Completion, params: dict[str, Any]) -> TokenOutput:
        """A completion in verl's terms.

        verl documents "completed" and "aborted", and writes "length" itself where the budget ran
        out (``verl/workers/rollout/llm_server.py:333``).
        """
        reason = {"stop": "completed"}.get(completion.finish_reason, completion.finish_reason)
        return TokenOutput(
            token_ids=completion.token_ids,
            log_probs=completion.log_probs if params.get("logprobs") else None,
            routed_experts=None if completion.experts is None else completion.experts.numpy(),
            stop_reason=reason,
            num_preempted=0,
            extra_fields={"global_steps": self.global_steps},
        )

    async def _serve(self) -> None:
        """Run batches for as long as the actor lives.

        The model runs in a thread, so that requests keep arriving.
        """
        while True:
            await self._work.wait()
            waiting = -1
            while waiting < len(self._queue) < self.config.max_num_seqs:
                waiting = len(self._queue)
                await asyncio.sleep(GATHER_SECONDS)
            batch, self._queue = (
                self._queue[: self.config.max_num_seqs],
                self._queue[self.config.max_num_seqs :],
            )
            if not self._queue:
                self._work.clear()
            if not batch:
                continue
            try:
                async with self._model_lock:
                    completions = await asyncio.to_thread(
                        generate_batch,
                        self.model,
                        [pending.request for pending in batch],
                        pad_id=self.pad_id,
                        should_stop=lambda: not self._open.is_set(),
                        choices=self.choices,
                    )
                for pending, completion in zip(batch, completions, strict=True):
                    if not pending.future.done():
                        pending.future.set_result(completion)
            except Exception as error:
                for pending in batch:
                    if not pending.future.done():
                        pending.future.set_exception(error)

    # Weights.

    async def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy some of the weights, under their Hugging Face names.

        `finish_weights` must follow the last of them.

        Raises:
            ValueError: naming weights that the model does not have, or whose shape differs.
        """
        weights = one_by_one(weights)
        async with self._model_lock:
            if not self._missing:
                self._missing = set(one_by_one(dict(self.model.named_parameters())))
                self._ready = False
            own = one_by_one(self.model.state_dict())
            wrong = [
                name
                for name, tensor in weights.items()
                if name not in own or own[name].shape != tensor.shape
            ]
            if wrong:
                raise ValueError(
                    "weights unknown to the rollout model, or of another shape: "
                    f"{sorted(wrong)[:5]}"
                )
            for name, tensor in weights.items():
                own[name].copy_(tensor)
                self._missing.discard(name)

    async def finish_weights(self, global_steps: int | None = None) -> None:
        """End an update of the weights.

        Raises:
            ValueError: naming weights that did not arrive.
        """
        missing, self._missing = self._missing, set()
        if missing:
            raise ValueError(
                f"{len(missing)} weights are missing from the update, for example "
                f"{sorted(missing)[:5]}"
            )
        self._ready = True
        self._asked.clear()
        if global_steps is not None:
            self.global_steps = global_steps

    async def set_global_steps(self, global_steps: int) -> None:
        self.global_steps = global_steps

    # Control, in verl's words (verl/workers/rollout/replica.py:265).

    async def abort_all_requests(
        self, reject_request: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """End what runs and waits, as "aborted" with the tokens sampled so far.

        Requests that come later are held or rejected.
        """
        self._rejecting = reject_request
        self._open.clear()
        waiting, self._queue = self._queue, []
        self._work.clear()
        for pending in waiting:
            if not pending.future.done():
                pending.future.set_result(Completion([], [], "aborted"))
        async with self._model_lock:  # the running batch has seen the closed gate
            return {"aborted_count": len(waiting), "request_ids": []}

    async def resume_generation(self) -> None:
        self._rejecting = False
        self._open.set()

    async def get_server_address(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), os.getpid()

    async def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """The weights stay where they are, and there is no cache between batches."""

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = (
        stop_profile
    ) = _nothing
