# SPDX-License-Identifier: Apache-2.0
"""Rewards for what ``capo-verl data`` writes.

``math_answers``  the reward function that verl calls
``extraction``    the final answer in a response
``pool``          worker processes, killed and replaced when an answer takes too long
``worker``        what runs in them
``guard``         what they may not do

Equality of two answers, from the outside in:

``equivalence``   the whole: lists, equations, single values
``notation``      one notation for what may be written in many; its steps are there,
``decoration``    for letters and what is around them, and
``numerals``      for numbers
``final_form``    refusal of answers that restate the question
``structure``     lists, tuples, sets and relations in a text
``quantities``    units, percent signs, bases, times, ratios
``values``        numbers and expressions
"""
