# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the filter: time, memory and bandwidth against the formulation as published.

``workload``   presets: sizes, dtypes, how many tokens
``batch``      random logits with a realistic support, hidden states, actions
``naive``      the method as published, with tensors ``[tokens, k, H]``, in two forms
``contenders`` the formulations that are measured, under one interface
``agreement``  before anything is timed, all contenders must give the same numbers
``memory``     exact peak and held memory of a call
``measure``    seconds of each stage
``machine``    the machine of the measurements, its copy bandwidth, its free memory
``results``    the numbers and what follows from them; JSON
``targets``    the targets of the filter
``markdown``   tables, and their place in docs/performance.md
``chart``      the picture
``profiling``  the time of a call by operator
``runner``     the order of all this
"""
