"""Where a tracking store is: checked without connecting."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pipelines.files.working_copies import main_copy

DEFAULT_URI = "sqlite:///mlflow.db"


_WEB_SCHEMES = ("http", "https")


_DATABASE_SCHEMES = ("mssql", "mysql", "postgresql", "sqlite")


_PLAIN_FILE = re.compile(r"sqlite:///(/?\w[\w./-]*)", re.ASCII)  # a path that stands in a URI as it is


_URI_EXAMPLES = "sqlite:///mlflow.db, postgresql://user:password@host/database or http://host:5000"


def checked_uri(uri: str | None) -> str:
    """Check a tracking URI without connecting, and make a SQLite path absolute: all working copies of a repository have
    one store, that of the main one.

    Args:
        uri: `sqlite:///<file>`, another database, or a server; None for `mlflow.db` in the repository's main copy.

    Raises:
        ValueError: unknown scheme (among them `file:`, a store that MLflow 3 refuses), no host, no database file, or a
            database driver that is not installed.
    """
    uri = uri or DEFAULT_URI
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme in _WEB_SCHEMES:
        try:
            urlsplit(uri).port  # noqa: B018 (raises for what is no port)
        except ValueError as error:
            raise _bad_uri(uri, str(error)) from error
        if not urlsplit(uri).hostname:
            raise _bad_uri(uri, "no host")
        return uri
    if plain := _PLAIN_FILE.fullmatch(uri):
        return f"sqlite:///{_in_main_copy(plain[1])}"
    import sqlalchemy  # slow, and of no use for what is usual

    if scheme not in _DATABASE_SCHEMES:
        raise _bad_uri(uri, f"scheme {scheme!r} is not one of {', '.join(_WEB_SCHEMES + _DATABASE_SCHEMES)}")
    try:
        url = sqlalchemy.make_url(uri)
        url.get_dialect().import_dbapi()
    except ImportError as error:
        raise _bad_uri(uri, f"its database driver is not installed ({error})") from error
    except (ValueError, sqlalchemy.exc.ArgumentError) as error:
        raise _bad_uri(uri, str(error)) from error

    if scheme != "sqlite":
        return uri
    if url.host or url.database in (None, "", ":memory:"):
        raise _bad_uri(uri, "no database file (three slashes come before a relative path, four make it absolute)")
    return url.set(database=_in_main_copy(url.database)).render_as_string(hide_password=False)


def _in_main_copy(path: str) -> str:
    return str((main_copy() / path).absolute())


def _bad_uri(uri: str, problem: str) -> ValueError:
    return ValueError(without_password(f"MLflow tracking URI {uri!r}: {problem}") + f"; use {_URI_EXAMPLES}")


def without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", text)
