# SPDX-License-Identifier: Apache-2.0
"""Scores of a checkpoint on data sets of verl's schema.

verl's generation server answers, ``capo_verl.data.rewards`` judges.

``model_folder`` the folder with the Hugging Face weights of a checkpoint
``problems``     the questions
``completions``  the answers, on disk, so that a run that ended can go on
``generation``   verl's rollout servers
``scoring``      the reward of every completion
``estimates``    avg@n, pass@k and their confidence intervals
``pipeline``     the order of all this
"""
