# SPDX-License-Identifier: Apache-2.0
"""Scores of a checkpoint: completions by verl's generation server, rewards by
``capo_verl.data.rewards``.

``checkpoint``   where the Hugging Face weights of a checkpoint are
``problems``     what is asked
``completions``  what was answered, on disk, so that a run that ended can go on
``generation``   verl's rollout servers
``scoring``      the reward of every completion
``statistics``   avg@n, pass@k and their confidence intervals
``run``          the order of all this, and the command line of ``scripts/evaluate.py``
"""
