# SPDX-License-Identifier: Apache-2.0
"""Policy losses and advantage estimators. ``registration`` makes them known to verl; ``rivals`` does without it."""
