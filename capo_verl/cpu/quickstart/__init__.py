# SPDX-License-Identifier: Apache-2.0
"""The quickstart: a real task, a small warm-started model and the display around a verl run on a
CPU.

``cache``   build a folder once, keep it under a hash of its recipe
``task``    reasoning-gym problems as verl parquet, and the reward
``model``   a small Qwen2 with a character tokenizer
``sft``     the warm start
``records`` what one line of verl's metrics file says
``display`` progress on the terminal
``figure``  the three curves
``runner``  the launcher as a child process, and the order of all this
"""
