# SPDX-License-Identifier: Apache-2.0
"""``python vllm_weights.py MODEL``: vLLM on a CPU takes new weights as verl's worker loads them.

Prints, as JSON, the largest difference of log-probabilities from Hugging Face's for the new
weights: after loading alone, and after the packing that verl ends an update with. It is a program
because vLLM starts process groups and sets variables.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# Registers this project's plugin, as in verl's worker.
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension  # isort: skip

import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.utils import process_weights_after_loading

PROMPT = [5, 6, 7, 8]


def largest_difference(llm: LLM, reference: torch.nn.Module) -> float:
    """Over twelve sampled tokens of each of four completions, nats."""
    llm.reset_prefix_cache()
    sampling = SamplingParams(max_tokens=12, logprobs=0, temperature=1.0, ignore_eos=True, seed=1)
    worst = 0.0
    for output in llm.generate([{"prompt_token_ids": PROMPT}] * 4, sampling, use_tqdm=False):
        (completion,) = output.outputs
        with torch.no_grad():
            logits = reference(torch.tensor([[*PROMPT, *completion.token_ids]])).logits[0]
        expected = logits.log_softmax(-1)[len(PROMPT) - 1 :]
        for i, token in enumerate(completion.token_ids):
            given = completion.logprobs[i][token].logprob
            worst = max(worst, abs(given - expected[i, token].item()))
    return worst


def main(model: str) -> None:
    extension = vLLMColocateWorkerExtension
    llm = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=8,
        kv_cache_memory_bytes=16 << 20, logprobs_mode="processed_logprobs",
        worker_extension_cls=f"{extension.__module__}.{extension.__name__}",
    )  # fmt: skip
    worker = llm.llm_engine.model_executor.driver_worker.worker
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = {"before": largest_difference(llm, reference)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    weights = [(name, tensor.detach()) for name, tensor in reference.named_parameters()]
    worker._update_weights(weights, peft_config=None, base_sync_done=True)
    found["loaded"] = largest_difference(llm, reference)
    process_weights_after_loading(
        worker.model_runner.model, worker.model_config, torch.device("cpu")
    )
    found["packed"] = largest_difference(llm, reference)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
