"""Runs: the folder of a run, and operations on a whole run. No screen output.

folder.py          RunDir: files of a run, and how they are written       records.py   hashes of a run's records
session.py         one session of training: lock, data, steps, records    publish.py   copy the best checkpoint to adapter/
loading.py         plan -> model and examples                             resume.py    conditions for resuming a run
memory_record.py   memory.json: planned and measured memory               verify.py    compare every file with its hash
adapters.py        adapters of runs: rank, shorten, mix, serve several on one base
"""
