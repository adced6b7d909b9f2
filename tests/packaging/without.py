# SPDX-License-Identifier: Apache-2.0
"""Runs a module as if a package were not installed: ``python without.py PACKAGE MODULE
[ARGUMENT…]``.
"""

import runpy
import sys
from importlib.machinery import PathFinder

package, module, *arguments = sys.argv[1:]
find_spec = PathFinder.find_spec


def find_all_but_one(name, path=None, target=None):
    return None if name.partition(".")[0] == package else find_spec(name, path, target)


PathFinder.find_spec = staticmethod(find_all_but_one)
sys.argv = [module, *arguments]
sys.path.pop(0)  # this folder
runpy.run_module(module, run_name="__main__", alter_sys=True)
