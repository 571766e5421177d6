"""Runs: a run's folder, and what is done with a whole run. No screen.

    folder.py          RunDir: its files, and how they are written        records.py         the hash of each record
    session.py         a sitting of training: lock, rows, steps, records  publish.py         the best checkpoint becomes adapter/
    loading.py         plan -> model and rows                             resume.py          when a run may continue
    memory_record.py   memory.json: planned and measured                  verify.py          every file against its hash
    adapters.py        adapters of runs: ranked, shortened, added up, tried on one base
"""
