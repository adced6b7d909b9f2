# SPDX-License-Identifier: Apache-2.0
"""An engine as somebody may have written it for verl, and one step of it, for docs/extending.md."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace

os.environ["VERL_PLATFORM"] = "cpu"  # before verl is imported

import torch
import torch.distributed as dist
import verl  # noqa: F401  (plugins first)
from torch import nn
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import BaseEngine

from capo_verl import CapoConfig
from capo_verl.engines.response import accepted_response


class PlainEngine(BaseEngine):
    """One process, one micro-batch, all sequences in one row."""

    use_ulysses_sp = False

    def __init__(self):
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        self.steps = 0

    def parameters(self):
        return [self.embed.weight, self.head.weight]

    def is_mp_src_rank_with_outputs(self):
        return True

    def _get_packed_pad_size(self, total):  # packed_response asks for it
        return 0

    def model_output(self, logits, batch):
        """Logits ``[1, total, V]`` to what the loss sees."""
        ids = batch["input_ids"]
        labels = ids.values().roll(-1)[:, None]
        log_probs = logits[0].log_softmax(-1).gather(-1, labels)[:, 0]
        return {"log_probs": torch.nested.nested_tensor_from_jagged(log_probs, ids.offsets())}

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        logits = self.head(self.embed(data["input_ids"].values())[None])
        loss, metrics = loss_function(model_output=self.model_output(logits, data), data=data)
        loss.backward()
        return {"metrics": metrics}

    def optimizer_zero_grad(self):
        self.optimizer.zero_grad()

    def optimizer_step(self):
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        return float(norm)


def policy_gradient(model_output, data, config=None):
    """Like verl's losses: log-probabilities of whole sequences, the mask of the responses."""
    log_probs = accepted_response(model_output["log_probs"], data).values()
    mask, advantages = data["response_mask"].values(), data["advantages"].values()
    loss = -(log_probs * advantages * mask).sum() / mask.sum().clamp(min=1)
    return loss, {"actor/pg_loss": loss.item()}


def train(engine, knobs):
    """The LM head after one step of verl's own ``train_batch``, and the metrics."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tensors = {
        "input_ids": _jagged([1, 2, 3, 4, 5], [6, 7, 8, 9]),
        "response_mask": _jagged([1, 1, 1], [1, 1]),  # a response is the end of its sequence
        "advantages": _jagged([1.0, 1.0, 1.0], [-1.0, -1.0]),
    }
    capo = None if knobs is None else CapoConfig(top_k=None, **knobs)
    config = SimpleNamespace(policy_loss=SimpleNamespace(capo=capo))  # as verl's worker keeps them
    output = engine.train_batch(
        tu.get_tensordict(tensors, {}), partial(policy_gradient, config=config)
    )
    return engine.head.weight.detach(), output["metrics"]


def _jagged(*rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)
