"""Statements that run on every request: compiled once, then run by the driver itself.

SQLAlchemy takes ten times as long to build, look up and execute a short statement as SQLite takes
to run it. Tables, types and the SQL are SQLAlchemy's all the same.
"""

from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BindParameter, Dialect, Float, Table, bindparam
from sqlalchemy.sql.expression import Executable
from sqlalchemy.types import TypeEngine

from app.db import Tx

_Process = Callable[[Any], Any]


def given(table: Table, *names: str) -> dict[str, BindParameter[Any]]:
    """For `values()`: these columns, each as the parameter of its name."""
    return {name: bindparam(name, type_=table.c[name].type) for name in names}


class Prepared:
    """A statement whose parameters are its `bindparam`s: `prepared.all(tx, file_id=...)`.

    Rows have the selected columns as attributes, as SQLAlchemy's have. Raises what SQLAlchemy
    raises. A parameter is one value: no `IN` over a list.
    """

    def __init__(self, statement: Executable) -> None:
        self._statement = statement
        self._compiled: dict[str, _Compiled] = {}

    def all(self, tx: Tx, **parameters: Any) -> list[Any]:
        compiled = self._for(tx)
        return compiled.rows(compiled.execute(tx, parameters).fetchall())

    def one_or_none(self, tx: Tx, **parameters: Any) -> Any:
        """The first row, of a statement that has at most one."""
        compiled = self._for(tx)
        values = compiled.execute(tx, parameters).fetchone()
        return None if values is None else compiled.rows([values])[0]

    def run(self, tx: Tx, **parameters: Any) -> None:
        self._for(tx).execute(tx, parameters)

    def _for(self, tx: Tx) -> "_Compiled":
        compiled = self._compiled.get(tx.dialect.name)
        if compiled is None:
            compiled = self._compiled[tx.dialect.name] = _compile(self._statement, tx.dialect)
        return compiled


@dataclass(frozen=True, slots=True)
class _Compiled:
    """names: of the parameters in their order; null where the driver takes them by name."""

    sql: str
    names: Sequence[str] | None
    constants: dict[str, Any]
    bind: tuple[tuple[str, _Process], ...]
    result: tuple[tuple[int, _Process], ...]
    make_row: Callable[[Iterable[Any]], Any]

    def execute(self, tx: Tx, parameters: dict[str, Any]) -> Any:
        """The driver's cursor."""
        values = {**self.constants, **parameters}
        for name, process in self.bind:
            values[name] = process(values[name])
        arguments = values if self.names is None else [values[name] for name in self.names]
        return tx.execute_driver(self.sql, arguments)

    def rows(self, fetched: Sequence[Sequence[Any]]) -> list[Any]:
        """Column by column: a processor runs faster over many values than once in each row."""
        if not fetched:
            return []
        columns: list[Iterable[Any]] = list(zip(*fetched, strict=True))
        for index, process in self.result:
            columns[index] = map(process, columns[index])
        return list(map(self.make_row, zip(*columns, strict=True)))


def _compile(statement: Any, dialect: Dialect) -> _Compiled:
    compiled = statement.compile(dialect=dialect)
    columns = getattr(statement, "exported_columns", ())
    names = [column.key for column in columns]
    row_class: Any = namedtuple("Row", names)  # type: ignore[misc]
    binders = {
        name: parameter.type.dialect_impl(dialect).bind_processor(dialect)
        for name, parameter in compiled.binds.items()
    }
    return _Compiled(
        sql=str(compiled),
        names=compiled.positiontup,
        constants={
            name: parameter.value
            for name, parameter in compiled.binds.items()
            if not parameter.required
        },
        bind=tuple((name, process) for name, process in binders.items() if process),
        result=tuple(
            (index, process)
            for index, column in enumerate(columns)
            if (process := _reader(column.type, dialect))
        ),
        make_row=row_class._make,
    )


def _reader(kind: TypeEngine[Any], dialect: Dialect) -> _Process | None:
    """Null where the driver's own value will do; a float always does."""
    if isinstance(kind, Float):
        return None  # SQLAlchemy would first ask for the database's type of each column
    return kind.dialect_impl(dialect).result_processor(dialect, None)
