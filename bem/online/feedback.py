"""The log of feedback: durable, append-only, idempotent, in one order, erasable by user.

    log = FeedbackLog("runs/feedback.db")                # SQLite; or any URL of SQLAlchemy
    log.record(Served("r1", version, prompt, answer, user="key-4"))
    receipt = log.add(Feedback("e1", "r1", "score", user="key-4", score=0.8))
    for event in log.read(after=0): ...                  # feedback, joined with its request
    log.erase("key-4", id="erase-1")

What `add` has returned for is on disk. Sequence numbers are given under a lock that is held until
the event is committed: whoever has read up to n has missed nothing before n. No clock is asked.

Erasing takes the content of a user's requests and feedback out of the database and puts a tombstone
into the log, so that a learner that has read them forgets them too. Numbers and ids stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bem.errors import ConfigError, DataError, MissingExtra, OnlineError
from bem.files import sha256_json, whole
from bem.online.events import (
    LONGEST_NAME,
    Event,
    Feedback,
    Receipt,
    Served,
    feedback_from_dict,
    served_from_dict,
)

try:
    import sqlalchemy as sa
    import sqlalchemy.event
    import sqlalchemy.exc
except ImportError:
    raise MissingExtra("sqlalchemy", "online", "Keeping feedback") from None

ERASE, ERASED = "erase", "erased"
BUSY_S = 30
"""Seconds for which SQLite waits for another writer."""

_META = sa.MetaData()
_COUNTER = sa.Table(
    "bem_counter",
    _META,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)
_REQUESTS = sa.Table(
    "bem_requests",
    _META,
    sa.Column("id", sa.String(LONGEST_NAME), primary_key=True),
    sa.Column("user", sa.String(LONGEST_NAME), nullable=False, index=True),
    sa.Column("digest", sa.String(64)),
    sa.Column("body", sa.Text),  # NULL: erased
)
_EVENTS = sa.Table(
    "bem_events",
    _META,
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", sa.String(LONGEST_NAME), nullable=False, unique=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("user", sa.String(LONGEST_NAME), nullable=False, index=True),
    sa.Column("request", sa.String(LONGEST_NAME)),
    sa.Column("over", sa.String(LONGEST_NAME)),
    sa.Column("digest", sa.String(64)),
    sa.Column("body", sa.Text),  # NULL: erased, or a tombstone
)


class FeedbackLog:
    """A log of feedback in a database. Safe to use from many threads and processes."""

    def __init__(self, where: str | Path):
        """
        Args:
            where: path of an SQLite file, made if missing; or a URL of SQLAlchemy (`postgresql+psycopg://...`).
        Raises:
            ConfigError: a URL that SQLAlchemy does not take, or a database in memory, which is not durable.
            MissingExtra: the database's driver is not installed.
            OnlineError: it cannot be opened.
        """
        self.url = _url(where)
        if self.url.get_backend_name() == "sqlite" and self.url.database in (None, "", ":memory:"):
            raise ConfigError("a database in memory forgets what it acknowledged: name a file.")
        self._is_sqlite = self.url.get_backend_name() == "sqlite"
        if self._is_sqlite:
            Path(self.url.database or "").parent.mkdir(parents=True, exist_ok=True)
        with self._trouble("opened"):
            arguments = {"timeout": BUSY_S} if self._is_sqlite else {}
            try:  # a server may have been started anew since a connection was made: ask first
                self._engine = sa.create_engine(
                    self.url, connect_args=arguments, pool_pre_ping=not self._is_sqlite
                )
            except ModuleNotFoundError as missing:
                purpose = f"Feedback on {self.url.get_backend_name()}"
                raise MissingExtra(missing.name or "a driver", "postgres", purpose) from None
            if (durable := _DURABLE.get(self.url.get_backend_name())) is not None:
                sqlalchemy.event.listen(self._engine, "connect", durable)
            self._make()

    def __repr__(self) -> str:
        return f"FeedbackLog({self.url.render_as_string(hide_password=True)!r})"

    def close(self) -> None:
        """Close all connections; what was acknowledged is on disk whether this is called or not."""
        self._engine.dispose()

    # --- writing ----------------------------------------------------------------------------------

    def record(self, served: Served) -> bool:
        """Keep the record of an answered request, before its id is handed out; False: it is kept already.

        Raises:
            DataError: another request of the same id is on record.
            OnlineError: the database cannot be written.
        """
        digest, body = sha256_json(served.to_dict()), _json(served.to_dict())
        with self._writing() as connection:
            known = connection.execute(
                sa.select(_REQUESTS.c.digest).where(_REQUESTS.c.id == served.id)
            ).first()
            if known is not None:
                if known.digest not in (None, digest):
                    raise DataError(
                        f"another request {served.id!r} is on record: ids must be unique."
                    )
                return False
            row = {"id": served.id, "user": served.user, "digest": digest, "body": body}
            connection.execute(sa.insert(_REQUESTS).values(row))
        return True

    def add(self, feedback: Feedback) -> Receipt:
        """Append feedback; the same id again changes nothing and gives the same number.

        Raises:
            DataError: no request of that id is on record, or other feedback has the same id.
            OnlineError: the database cannot be written; nothing was acknowledged.
        """
        with self._writing() as connection:
            if (known := self._known(connection, feedback.id, feedback.digest)) is not None:
                return Receipt(known, new=False)
            for name in filter(None, (feedback.request, feedback.over)):
                found = connection.execute(
                    sa.select(_REQUESTS.c.id).where(_REQUESTS.c.id == name)
                ).first()
                if found is None:
                    raise DataError(f"no request {name!r:.60} is on record: nothing was kept.")
            row = {
                "id": feedback.id,
                "kind": feedback.kind,
                "user": feedback.user,
                "request": feedback.request,
                "over": feedback.over,
                "digest": feedback.digest,
                "body": _json(feedback.to_dict()),
            }
            return Receipt(self._append(connection, row))

    def erase(self, user: str, id: str) -> Receipt:
        """Erase what a user asked and said, and put a tombstone into the log.

        What others said of that user's requests stays, without the requests.

        Args:
            user: not empty.
            id: of the tombstone; the same again changes nothing.
        Raises:
            DataError: no user is named, or the id belongs to something else.
            OnlineError: the database cannot be written.
        """
        if not user:
            raise DataError("name the user whose requests and feedback are to be erased.")
        with self._writing() as connection:
            digest = sha256_json([ERASE, user])
            if (known := self._known(connection, id, digest)) is not None:
                return Receipt(known, new=False)
            gone = {"body": None, "digest": None, "user": ""}
            connection.execute(sa.update(_REQUESTS).where(_REQUESTS.c.user == user).values(gone))
            own = (_EVENTS.c.user == user) & (_EVENTS.c.kind != ERASE)
            connection.execute(sa.update(_EVENTS).where(own).values({**gone, "kind": ERASED}))
            row = {"id": id, "kind": ERASE, "user": user, "digest": digest}
            receipt = Receipt(self._append(connection, row))
        if self._is_sqlite:
            with self._trouble("cleaned"), self._engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        return receipt

    # --- reading ----------------------------------------------------------------------------------

    def last(self) -> int:
        """Number of the newest event; 0: there is none."""
        with self._reading() as connection:
            return connection.execute(sa.select(_COUNTER.c.value)).scalar_one()

    def read(self, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events behind a number, in order, `limit` at most.

        Raises:
            OnlineError: the database cannot be read, or what it holds was changed by hand.
        """
        mine, other = _REQUESTS.alias("mine"), _REQUESTS.alias("other")
        chosen = (
            sa.select(_EVENTS, mine.c.body.label("asked"), other.c.body.label("lost"))
            .outerjoin(mine, mine.c.id == _EVENTS.c.request)
            .outerjoin(other, other.c.id == _EVENTS.c.over)
            .where(_EVENTS.c.sequence > after)
            .order_by(_EVENTS.c.sequence)
            .limit(limit)
        )
        with self._reading() as connection:
            return [self._event(row) for row in connection.execute(chosen)]

    def request(self, id: str) -> Served | None:
        """The record of a request; None: unknown or erased."""
        with self._reading() as connection:
            body = connection.execute(
                sa.select(_REQUESTS.c.body).where(_REQUESTS.c.id == id)
            ).scalar()
        return None if body is None else self._parsed(body, served_from_dict, f"request {id!r}")

    def events(self, after: int = 0) -> Iterator[Event]:
        """All events behind a number, read in pieces."""
        while batch := self.read(after):
            yield from batch
            after = batch[-1].sequence

    def export(self, path: str | Path) -> int:
        """Write all events as JSON Lines, whole or not at all; how many. `read_export` reads them."""
        written, path = 0, Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as draft, open(draft, "w", encoding="utf-8") as file:
            for event in self.events():
                file.write(_json(event.to_dict()) + "\n")
                written += 1
        return written

    # --- inside -----------------------------------------------------------------------------------

    def _make(self) -> None:
        try:
            _META.create_all(self._engine)
        except sqlalchemy.exc.DBAPIError:  # another process made them just now, or it fails again
            _META.create_all(self._engine)
        try:
            with self._engine.begin() as connection:
                if connection.execute(sa.select(_COUNTER.c.value)).first() is None:
                    connection.execute(sa.insert(_COUNTER).values(name="sequence", value=0))
        except (
            sqlalchemy.exc.IntegrityError
        ):  # another process opened it for the first time just now
            return

    def _append(self, connection: sa.Connection, row: Mapping[str, Any]) -> int:
        connection.execute(sa.update(_COUNTER).values(value=_COUNTER.c.value + 1))
        sequence = connection.execute(sa.select(_COUNTER.c.value)).scalar_one()
        connection.execute(sa.insert(_EVENTS).values({"sequence": sequence, **row}))
        return sequence

    def _known(self, connection: sa.Connection, id: str, digest: str) -> int | None:
        """Number of the event of this id, if it says the same, or nothing any more."""
        found = connection.execute(
            sa.select(_EVENTS.c.sequence, _EVENTS.c.digest).where(_EVENTS.c.id == id)
        ).first()
        if found is None:
            return None
        if found.digest not in (None, digest):
            raise DataError(
                f"event {found.sequence} has the id {id!r:.60} and says something else: events are never changed. "
                "Send it under an id of its own."
            )
        return found.sequence

    def _event(self, row: sa.Row) -> Event:
        if row.kind == ERASE:
            return Event(row.sequence, None, erase=row.user)
        what = f"event {row.sequence}"
        said = None if row.body is None else self._parsed(row.body, feedback_from_dict, what)
        if said is not None and said.digest != row.digest:
            raise OnlineError(f"{self!r}: {what} was changed after it was written.")
        asked, lost = (
            None if body is None else self._parsed(body, served_from_dict, f"a request of {what}")
            for body in (row.asked, row.lost)
        )
        return Event(row.sequence, said, asked, lost)

    def _parsed(self, body: str, make: Any, what: str) -> Any:
        try:
            return make(json.loads(body))
        except (ValueError, DataError) as failed:
            raise OnlineError(f"{self!r}: {what} was changed by hand: {failed}.") from None

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """One transaction, which begins by taking the counter's lock: writers wait for one another."""
        with self._trouble("written"), self._engine.begin() as connection:
            connection.execute(sa.update(_COUNTER).values(value=_COUNTER.c.value))
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._trouble("read"), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _trouble(self, done: str) -> Iterator[None]:
        try:
            yield
        except (sqlalchemy.exc.SQLAlchemyError, OSError) as failed:
            reason = getattr(failed, "orig", None) or failed
            raise OnlineError(
                f"{self!r} could not be {done}: {reason}. What was acknowledged is whole."
            ) from failed


def _url(where: str | Path) -> sa.URL:
    text = str(where)
    try:
        return sa.make_url(text) if "://" in text else sa.URL.create("sqlite", database=text)
    except sqlalchemy.exc.ArgumentError:
        raise ConfigError(
            f"{text!r:.80} is neither a path nor a URL of SQLAlchemy, as sqlite:///runs/feedback.db."
        ) from None


def _durable_sqlite(connection: Any, _: Any) -> None:
    """Readers do not wait for the writer; a commit is on disk; what is erased is overwritten."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _durable_postgresql(connection: Any, _: Any) -> None:
    """A commit is on disk, whatever the server's or the role's default is."""
    cursor = connection.cursor()
    cursor.execute("SHOW synchronous_commit")
    if cursor.fetchone()[0] == "off":
        cursor.execute("SET synchronous_commit = on")
    connection.commit()


_DURABLE = {"sqlite": _durable_sqlite, "postgresql": _durable_postgresql}


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))
