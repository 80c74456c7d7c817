"""The URI of a table or a query in a database: SCHEME://USER@HOST:PORT/DATABASE?table=NAME, or ?query=SELECT …

Rules
* Exactly one of `table` (with its schema before a dot) and `query`; then the options that the source's module knows,
  separated by &. Values are percent-encoded where they hold & or %; + is a plus.
* No password: --secret names it (source.py refuses one in the user's place, and there is no option for it).
* What errors call the source is its URI without query and options.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from fedpeer.errors import DataError


class Address(NamedTuple):
    base: str
    """the URI up to the question mark"""
    user: str
    host: str
    port: int | None
    database: str
    table: str
    query: str
    options: Mapping[str, str]

    @property
    def place(self) -> str:
        return f"{self.base}?table={self.table}" if self.table else f"{self.base} (its query)"

    @classmethod
    def parse(cls, uri: str, known: Collection[str]) -> Address:
        """Raises DataError, which repeats no option's value."""
        base, _, rest = uri.partition("?")
        given: dict[str, str] = {}
        for part in filter(None, rest.split("&")):
            name, _, value = part.partition("=")
            if name not in ("table", "query", *known) or name in given:
                raise DataError(
                    f"{base}: after the question mark it says {name!r}"[:200],
                    hint=f"known, each once: table or query, {', '.join(known)}; & within a query is written %26",
                )
            given[name] = unquote(value)
        try:
            parts = urlsplit(base)
            port = parts.port
        except ValueError:
            raise DataError(f"{base} is not the URI of a database", hint="SCHEME://USER@HOST:PORT/DATABASE") from None
        table, query = given.pop("table", ""), given.pop("query", "").strip().rstrip(";").rstrip()
        if bool(table) == bool(query):
            raise DataError(
                f"{base}: it must say which table or which query", hint="add ?table=NAME or ?query=SELECT …"
            )
        if any("\0" in value for value in (base, table, query, *given.values())):
            raise DataError("the URI of the database holds a zero byte")
        user, host = unquote(parts.username or ""), parts.hostname or ""
        return cls(base, user, host, port, unquote(parts.path.removeprefix("/")), table, query, given)
