# SPDX-License-Identifier: Apache-2.0
"""The quickstart: a real task and a small warm-started model, trained by verl on a CPU.

``cache``   build a folder once, keep it under a hash of its recipe
``task``    reasoning-gym problems as verl parquet, and the reward
``model``   a small Qwen2 with a character tokenizer
``sft``     the warm start
``records`` one line of verl's metrics file
``display`` progress on the terminal
``curves``  the three curves
``runner``  the launcher as a child process, and the order of all this
"""
