"""What a rank of ``everyrank.launch`` runs."""

from __future__ import annotations

import os
import pickle

import cloudpickle

from everyrank.diagnosis.rank import reporter
from everyrank.diagnosis.rank.record import record_error
from everyrank.errors import EXIT_FAILURE


def call(folder: str) -> None:
    """Call the function in ``folder`` and leave this rank's result, or its exception, there."""
    rank = int(os.environ["RANK"])
    reporter.start()
    try:
        with open(os.path.join(folder, "function"), "rb") as file:
            function, args, kwargs = pickle.load(file)
        result = function(*args, **kwargs)
        _write(os.path.join(folder, f"result-{rank}"), result)
        reporter.ended()
    except Exception as error:
        record = record_error(error, rank, EXIT_FAILURE)
        try:
            _write(os.path.join(folder, f"exception-{rank}"), error)
        except Exception as second:  # an exception that cannot be pickled is still in the record, as text
            print(f"rank {rank}: {type(error).__name__} cannot be sent to the caller: {second}")
        reporter.told(record)
        raise SystemExit(EXIT_FAILURE) from error


def _write(path: str, value: object) -> None:
    data = cloudpickle.dumps(value)  # before the file is made: a value that cannot be pickled leaves no file
    with open(path, "wb") as file:
        file.write(data)
