# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the filter: time, memory and bandwidth against the formulation as published.

``workload``   presets: sizes, dtypes, how many tokens
``batch``      random logits with a realistic support, hidden states, actions
``naive``      the method as published, with tensors ``[tokens, k, H]``, in two forms
``contenders`` who is measured, under one interface
``agreement``  before anything is timed, all contenders must give the same numbers
``memory``     exact peak and held memory of a call
``measure``    seconds of each stage
``machine``    what was measured on, its copy bandwidth, its free memory
``report``     the numbers and what follows from them; JSON
``targets``    what the filter has to reach
``markdown``   tables, and their place in docs/performance.md
``figure``     the picture
``profiling``  where the time of a call goes
``runner``     the order of all this
"""
