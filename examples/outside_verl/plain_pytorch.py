# SPDX-License-Identifier: Apache-2.0
"""CAPO in plain PyTorch and transformers: a small random model learns on a CPU to count upward from
its prompt.

python examples/outside_verl/plain_pytorch.py
python examples/outside_verl/plain_pytorch.py --kl-budget 2e-3
"""

import argparse

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core.kl_budget import KLBudget, KLBudgetConfig
from capo_verl.core.logits import VocabShard
from capo_verl.core.token_kl import token_kl

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--policy-shift-max", type=float, default=2e-2, help="tau_F; 0 = no such test")
parser.add_argument(
    "--objective-shift-max", type=float, default=0.3, help="tau_H; 0 = no such test"
)
parser.add_argument(
    "--kl-budget", type=float, help="nats per token that an optimizer step should cause"
)
args = parser.parse_args()

VOCAB, HIDDEN, EOS, PROMPT, RESPONSE, PROMPTS, GROUP, TEMPERATURE = 32, 64, 0, 3, 8, 16, 8, 1.2
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
THRESHOLDS = {
    "policy_shift_max": args.policy_shift_max,
    "objective_shift_max": args.objective_shift_max,
}

torch.set_num_threads(1)  # more of them only wait for each other on a model this small
torch.manual_seed(args.seed)
model = Qwen2ForCausalLM(
    Qwen2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=EOS, pad_token_id=EOS,
    )
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, **ADAM)
capo = CapoFilter(CapoConfig(top_k=8, **THRESHOLDS, **ADAM), vocab_size=VOCAB, hidden_size=HIDDEN)
budget = KLBudget(KLBudgetConfig(delta=args.kl_budget)) if args.kl_budget else None


def forward(tokens):
    """Where each response token is predicted: the LM head's input [B, T, H], and its output over
    the temperature [B, T, V].
    """
    out = model(tokens, output_hidden_states=True)
    return out.hidden_states[-1][:, PROMPT - 1 : -1], out.logits[:, PROMPT - 1 : -1] / TEMPERATURE


for step in range(args.steps):
    prompts = torch.randint(1, 8, (PROMPTS, PROMPT)).repeat_interleave(GROUP, 0)
    tokens = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=RESPONSE, do_sample=True,
        top_k=0, temperature=TEMPERATURE,
    )  # fmt: skip
    actions = tokens[:, PROMPT:]
    mask = (actions == EOS).cumsum(-1) - (
        actions == EOS
    ).int() == 0  # up to the first EOS: the rest is padding
    reward = (actions > tokens[:, PROMPT - 1 : -1]).sum(-1) / RESPONSE
    groups = reward.view(PROMPTS, GROUP)
    advantages = (
        (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    ).view(-1, 1)

    learning_rate = args.learning_rate
    if budget:
        learning_rate = budget.begin_step(
            learning_rate, learning_rate, step / args.steps, PROMPTS * GROUP
        )
    optimizer.param_groups[0]["lr"] = learning_rate
    hidden, logits = forward(tokens)
    decision = capo.evaluate(hidden, logits, actions, advantages, mask, learning_rate)
    log_probs = logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)
    loss = -(advantages * log_probs * decision.accepted).sum() / mask.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    capo.step()

    rejected, policy_shift = (
        1 - decision.accepted.sum() / mask.sum(),
        decision.policy_shift[mask].mean(),
    )
    line = (
        f"step {step:3d}  reward {reward.mean():.3f}  rejected {rejected:.3f}  m_F "
        f"{policy_shift:.2e}"
    )
    if budget:
        with torch.no_grad():
            new_logits = forward(tokens)[1]
        kl = (
            token_kl(logits[mask].detach(), new_logits[mask], VocabShard(VOCAB, VOCAB, 0))
            .mean()
            .item()
        )
        budget.end_step(kl)
        line += f"  KL {kl:.2e}  learning rate {learning_rate:.2e}"
    print(line, flush=True)
