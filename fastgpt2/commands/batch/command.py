"""`fastgpt2 batch`: lines become jobs, jobs' ends become records.

A record is written only for an end that counts. A job that was lost, cancelled or stopped has none: its line is run
again, by this run or the next one.
"""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fastgpt2.api.client.bulk import BULK_RESULT_TTL_SECONDS, BulkRun, Item, ProgressBar, run_bulk
from fastgpt2.api.client.enqueue import plan_job
from fastgpt2.api.client.flow import Driver, Flow, Pause
from fastgpt2.api.client.outcome import Outcome
from fastgpt2.api.client.session import Session
from fastgpt2.commands.batch.formats import Format, output_format
from fastgpt2.commands.batch.lines import Line, mark_of_options
from fastgpt2.commands.batch.output import FileOutput, Reader, StreamOutput, is_device
from fastgpt2.commands.batch.records import LINE_RECORDS, Record, RecordForm
from fastgpt2.commands.batch.report import Report, one_line
from fastgpt2.commands.batch.source import Source, peeked, read_ahead
from fastgpt2.commands.prompts import note_idle_options, request_fields
from fastgpt2.errors import BadRequest, FastGPT2Error, JobCancelled, JobFailed, JobLost, JobNotFound, JobStopped
from fastgpt2.process import on_stop_signals
from fastgpt2.protocol.request_context import take_from_environment
from fastgpt2.system.own_pool import OwnPool, RunningPool, pool_of_run

# How often a pool without workers is looked at.
WORKER_POLL_SECONDS = 0.2

# If the first lines all fail, what is wrong is wrong with all.
FIRST_LINES = 20

# How often lines are run again, after all others, whose jobs have ended for a reason that passes; and how many of them.
ROUNDS_AGAIN = 3
MOST_AGAIN = 1000

# What RQ's clean-up and its own worker write if a worker ended while it ran the job: in a sentence (rq/registry.py,
# `StartedJobRegistry.cleanup`), or as the name of an error.
_ABANDONED = "due to AbandonedJobError"
_PASSING_KINDS = ("AbandonedJobError", "ShutDownImminentException", "StopRequested")


def run(values: dict[str, Any]) -> int:
    """Run the command.

    Returns:
        0, 1 if some lines are errors or have no result, 130 if interrupted.

    Raises:
        BadRequest: an option is out of bounds, a file has another format, or the output holds something else.
        FastGPT2Error: a file cannot be read or written, or the first lines all fail.
        QueueUnavailable: Redis stays away, or does not become as durable as asked for; what has been written stays.
        JobNotFound: a job is gone; what has been written stays.
    """
    # However the command is told to end, what is in flight is cancelled.
    on_stop_signals(signal.default_int_handler)
    path = None if values["file"] == "-" else Path(values["file"])
    target = None if values["output"] in (None, "-") else Path(values["output"])
    if path is not None and target is not None and target.exists() and path.exists() and path.samefile(target):
        raise BadRequest(f"{path} is both input and output; name another file with -o")
    take_from_environment()
    pool = pool_of_run(values)
    fields = _job_fields(values, pool.model)
    plan = plan_job("", fields)
    with closing(Source(path, values)) as source:
        kind = output_format(target, values["output_format"], source.form)
        reader = source.make_reader(kind, values, fields)
        if source.is_table or source.form.name == "txt":  # a line of JSON may say more
            note_idle_options(plan.request)
        mark = mark_of_options(fields)
        with closing(_open_output(target, kind, mark, values["restart"])) as output:
            lines = _lines(source, reader, output)
            total = source.total(reader)
            is_done = _is_done(source, reader, output, total, values["retry_errors"])
            if is_done:  # a pool of the run's own would be started for nothing
                pool = RunningPool(values["redis_url"], pool.model)
            try:
                with (
                    pool,
                    closing(Report(total, sys.stderr.isatty())) as report,
                    closing(Batch(pool, values, reader, output, report, mark, source.names_models)) as batch,
                ):
                    if is_done:
                        batch.keep_all(lines)
                    else:
                        batch.run(lines)
                    notes = output.finish(reader)
            except KeyboardInterrupt:
                print(f"\ninterrupted: {output.where}", file=sys.stderr)
                return 130
            except FastGPT2Error as error:
                if output.count and not isinstance(error, BadRequest):
                    print(output.where, file=sys.stderr)
                raise
            print(*notes, *report.summary(output.name, output.is_continued), sep="\n", file=sys.stderr)
    return 1 if report.errors.total() or report.unfinished else 0


def _job_fields(values: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Return the `JobFields` that the options give.

    Args:
        model: the name of the model that lines ask for which name none.
    """
    return {
        **request_fields(values),
        "model": model,
        "timeout": values["deadline"],
        "priority": values["priority"],
        "result_ttl": BULK_RESULT_TTL_SECONDS,
    }


def _open_output(target: Path | None, kind: Format, mark: str, restart: bool) -> FileOutput | StreamOutput:
    form = _record_form(kind)
    if (target is None or is_device(target)) and not kind.is_table and not kind.compression:
        return StreamOutput(target, form)
    return FileOutput(target, kind, form, mark, restart)


def _record_form(kind: Format) -> RecordForm:
    if kind.name != "openai":
        return LINE_RECORDS
    from fastgpt2.commands.batch.openai_lines import OPENAI_RECORDS

    return OPENAI_RECORDS


def _lines(source: Source, reader: Reader, output: FileOutput | StreamOutput) -> Iterator[Line | None]:
    """Return the lines to run, once it is seen that the results that are there belong to them.

    Raises:
        BadRequest: they do not.
    """
    lines = source.lines(reader)
    if output.journal is None or not output.journal.results:
        return lines if source.is_file else read_ahead(lines)
    if source.is_file:
        with closing(source.lines(reader)) as looked_at:
            output.journal.check(looked_at)
        return lines
    first = peeked(lines)
    output.journal.check(first)
    return read_ahead(chain(first, lines))


def _is_done(
    source: Source, reader: Reader, output: FileOutput | StreamOutput, total: int | None, retries_errors: bool
) -> bool:
    """Tell whether no line is to be run, so that no pool is needed; False if that is not plain."""
    journal = output.journal
    if journal is None or not source.is_file or total not in (None, journal.count):
        return False
    with closing(source.lines(reader)) as lines:
        return journal.has_all(lines, with_errors=not retries_errors)


@dataclass(frozen=True, slots=True)
class Pending:
    """A line that is to be run.

    Attributes:
        index: its place in the input, from 0.
        replaces: the record of an error, of which the line's new one takes the place.
    """

    line: Line
    index: int
    replaces: int | None = None


class Batch:
    """One run: sends the jobs of lines, and writes their records in the order of the lines.

    Args:
        pool: runs the jobs; it has been entered.
        values: of the command's options.
        mark: see `mark_of_options`.
        names_models: lines may name the model that they are for.
    """

    def __init__(
        self,
        pool: OwnPool | RunningPool,
        values: dict[str, Any],
        reader: Reader,
        output: FileOutput | StreamOutput,
        report: Report,
        mark: str,
        names_models: bool,
    ) -> None:
        self._session = Session(pool.redis_url, values["queue"], values["max_queue"], values["durability"])
        self._driver = Driver(pool.redis_url, pool.check)
        self._is_own = pool.is_own
        self._names_models = names_models or pool.model is not None
        self._in_flight: int = values["in_flight"]
        self._retries_errors: bool = values["retry_errors"]
        self._reader = reader
        self._output = output
        self._journal = output.journal
        self._report = report
        self._form = output.form
        self._mark = mark
        self._sent: deque[Pending] = deque()
        self._again: list[Pending] = []
        # The errors of the first lines, which are written into a file once a line has a result, or when all have ended.
        # None as soon as one has, and where it has been asked to go on regardless.
        has_results = self._journal is not None and self._journal.results
        self._first_errors: list[tuple[Pending, Record]] | None = None if values["keep_going"] or has_results else []

    def run(self, lines: Iterator[Line | None]) -> None:
        """Run the lines, but for those that have records.

        Raises:
            FastGPT2Error: see `fastgpt2.commands.batch.command.run`.
        """
        self._look_at_pool()
        self._send(self._missing(lines))
        for _ in range(ROUNDS_AGAIN):
            if not self._again:
                break
            again, self._again = self._again, []
            self._send(iter(again))
        for pending in self._again:
            self._leave(pending)
        self._write_first_errors()

    def keep_all(self, lines: Iterator[Line | None]) -> None:
        """Take the records that all lines have, without the pool; see `_is_done`.

        Raises:
            FastGPT2Error: a line has none.
        """
        if any(self._missing(lines)):
            raise FastGPT2Error("the input has changed since it was read; run the same command again")

    def _look_at_pool(self) -> None:
        if not self._driver.run(self._session.workers()):
            self._report.say(
                f"no worker listens on the queue {self._session.queue!r} yet; waiting for `fastgpt2 up` or `pool` "
                "(--model ID starts workers for this run alone)"
            )
            if self._names_models:  # a job for a model that nobody serves would be refused
                self._driver.run(_wait_for_worker(self._session))

    def _missing(self, lines: Iterator[Line | None]) -> Iterator[Pending | None]:
        """Yield the lines that are to be run; None where the input has nothing yet."""
        index = 0
        for line in lines:
            if line is None:
                yield None
                continue
            if self._journal is None or (at := self._journal.match(line)) is None:
                yield Pending(line, index)
            elif self._retries_errors and self._journal.is_error(at):
                yield Pending(line, index, at)
            else:
                self._keep(line, index, at)
            index += 1

    def _keep(self, line: Line, index: int, at: int) -> None:
        assert self._journal is not None
        if self._form.has_rows and not self._reader.is_joined and not self._journal.has_row(at, line):
            self._journal.renew_row(at, line, index)
        failed = self._journal.is_error(at)
        self._report.keep(self._form.error(self._journal.read(self._journal.order[index])) if failed else None)

    def _send(self, pending: Iterator[Pending | None]) -> None:
        """Send the jobs of lines, and write the lines' records as they end."""
        bulk = BulkRun(self._session, self._items(pending), self._in_flight, ordered=True, forgets=self._is_own)
        outcomes: list[Outcome] = []
        with closing(run_bulk(self._driver, bulk, ProgressBar(None, False))) as ends:
            for _, outcome in ends:
                outcomes.append(outcome)
                if len(outcomes) == len(self._sent[0].line.items):
                    self._end(self._sent.popleft(), outcomes)
                    outcomes = []

    def _items(self, pending: Iterable[Pending | None]) -> Iterator[Item]:
        """Yield the jobs of each line, and note the line as sent."""
        for one in pending:
            if one is None:
                yield None
            else:
                self._sent.append(one)
                yield from one.line.items

    def _end(self, pending: Pending, outcomes: list[Outcome]) -> None:
        """Write the record of a line whose jobs have ended, if that is an end that counts."""
        for outcome in outcomes:
            if isinstance(outcome, JobLost) or (self._journal is None and _is_passing(outcome)):
                assert isinstance(outcome, FastGPT2Error)
                raise outcome
        if any(isinstance(outcome, JobCancelled | JobStopped) for outcome in outcomes):
            self._leave(pending)
        elif any(map(_is_passing, outcomes)):
            if len(self._again) < MOST_AGAIN:
                self._again.append(pending)
            else:
                self._leave(pending)
        else:
            self._note(pending, self._form.make(pending.line, pending.index, self._mark, outcomes))

    def _leave(self, pending: Pending) -> None:
        """Leave a line to the next run; an error that it had before stays."""
        if pending.replaces is None:
            self._report.unfinished += 1
        else:
            self._keep(pending.line, pending.index, pending.replaces)

    def _note(self, pending: Pending, record: Record) -> None:
        failed = self._form.origin(record).failed
        error = self._form.error(record) if failed else None
        self._report.add(pending.line.number, error, self._form.tokens(record))
        if self._first_errors is None or error is None:
            self._write_first_errors()
            self._output.write(record, pending.index, pending.replaces)
            return
        self._first_errors.append((pending, record))
        if self._journal is None:  # whoever reads the output may wait for this line before writing the next
            self._output.write(record, pending.index, pending.replaces)
        if len(self._first_errors) == FIRST_LINES:
            first, its_record = self._first_errors[0]
            raise FastGPT2Error(
                f"the first {FIRST_LINES} lines all fail, line {first.line.number} so: "
                f"{one_line(self._form.error(its_record)[1])}; mend what is wrong and run the same command again, or "
                "go on regardless with --keep-going"
            )

    def _write_first_errors(self) -> None:
        for pending, record in self._first_errors or ():
            if self._journal is not None:
                self._output.write(record, pending.index, pending.replaces)
        self._first_errors = None

    def close(self) -> None:
        self._driver.close()


def _wait_for_worker(session: Session) -> Flow[None]:
    while not (yield from session.workers()):
        yield Pause(WORKER_POLL_SECONDS)


def _is_passing(outcome: Outcome) -> bool:
    """Tell whether a job has ended for a reason that passes, so that its line is to be run again."""
    if isinstance(outcome, JobFailed):
        is_abandoned = outcome.kind in _PASSING_KINDS or _ABANDONED in outcome.reason
        return is_abandoned or isinstance(outcome, JobCancelled | JobStopped)
    return isinstance(outcome, JobNotFound)
