# SPDX-License-Identifier: Apache-2.0
"""Rewards for what ``capo-verl data`` writes.

``math_answers``  the reward function that verl calls
``extraction``    the final answer in a response
``pool``          worker processes, killed and replaced when an answer takes too long
``worker``        what runs in them
``guard``         what they may not do
``equivalence``   whether two answers are equal, by math-verify
"""
