"""What passes between stages: the same value gives the same bytes, and other bytes are refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from fedpeer import artifact
from fedpeer.errors import DataError
from fedpeer.stage import Model, Report, Rows, Table

TABLE = Table(
    pa.table(
        {"key": ["a", "b", "ü"], "x": [1.5, None, -0.0], "sick": [True, None, False], "empty": pa.nulls(3, pa.string())}
    ),
    id="key",
    label="sick",
)
MODEL = Model(
    "horizontal.logistic",
    {"columns": ["x", "y"], "n_samples": np.int64(12), "scale": 0.1, "note": None, "ü": {"deep": [1, 2]}},
    {
        "weights": np.array([[1.0, -0.0], [np.pi, np.inf]]),
        "bias": np.array(0.5),
        "none": np.empty((0, 3), dtype=np.int32),
        **{f"of_{dtype[1:]}": np.arange(3).astype(dtype) for dtype in artifact.TENSOR_TYPES.values()},
    },
)


def test_a_table_comes_back_with_its_values_types_and_marks() -> None:
    kind, data = artifact.dump(TABLE)
    back = artifact.load(kind, data)
    assert isinstance(back, Table)
    assert (kind, back.id, back.label) == ("table", "key", "sick")
    assert back.data.equals(TABLE.data)
    assert back.data.schema.types == TABLE.data.schema.types


def test_a_table_without_marks_columns_or_rows_comes_back() -> None:
    for data in (pa.table({"x": [1.0]}), pa.table({"x": pa.array([], pa.float64())}), pa.table({})):
        back = artifact.load(*artifact.dump(Table(data)))
        assert isinstance(back, Table)
        assert (back.id, back.label, back.data.equals(data)) == (None, None, True)


def test_nothing_is_kept_under_a_null() -> None:
    data = pa.Array.from_buffers(pa.float64(), 2, [pa.py_buffer(b"\1"), pa.py_buffer(np.array([1.0, 4711.0]))])
    back = artifact.load(*artifact.dump(Table(pa.table({"x": data}))))
    assert isinstance(back, Table)
    assert np.frombuffer(back.data.column("x").chunk(0).buffers()[1]).tolist() == [1.0, 0.0]


def test_a_loaded_table_is_not_a_copy() -> None:
    data = artifact.dump(Table(pa.table({"x": np.arange(1000.0)})))[1]
    back = artifact.load("table", data)
    assert isinstance(back, Table)
    start = np.frombuffer(data, dtype=np.uint8).__array_interface__["data"][0]
    assert start < back.data.column("x").chunk(0).buffers()[1].address < start + len(data)


def test_equal_tables_have_equal_bytes_however_their_rows_arrived(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(20):
        rows = [
            (chance.choice([None, 0.5, -1.0]), chance.choice([None, "", "abc"]), chance.choice([None, True, False]))
            for _ in range(chance.randrange(20))
        ]
        schema = pa.schema([("x", pa.float64()), ("t", pa.string()), ("b", pa.bool_())])
        whole = pa.Table.from_pylist([dict(zip("xtb", row, strict=True)) for row in rows], schema=schema)
        cut = chance.randrange(len(rows) + 1)
        chunked = pa.concat_tables([whole.slice(0, cut), whole.slice(cut)])
        surrounded = pa.concat_tables([whole, whole, whole]).combine_chunks().slice(len(rows), len(rows))
        marked = whole.replace_schema_metadata({"pandas": "{}"})
        garbage = whole
        if rows and whole.column("x").null_count:
            missing = whole.column("x").is_null().to_numpy()
            under = np.where(missing, 4711.0, whole.column("x").fill_null(0).to_numpy())
            bitmap = pa.array(~missing).buffers()[1]
            garbage = whole.set_column(
                0, "x", pa.Array.from_buffers(pa.float64(), len(rows), [bitmap, pa.py_buffer(under)])
            )
        assert {artifact.dump(Table(table)) for table in (chunked, surrounded, marked, garbage)} == {
            artifact.dump(Table(whole))
        }


@pytest.mark.parametrize(
    "table",
    [
        Table(pa.table({"n": [1, 2]})),
        Table(pa.table({"t": pa.array(["a"]).dictionary_encode()})),
        Table(pa.table({"t": pa.array([[1.0]])})),
        Table(pa.table([pa.array([1.0]), pa.array([2.0])], names=["x", "x"])),
        Table(pa.table({"x": [1.0]}), id="key"),
        Table(pa.table({"x": [1.0]}), label="y"),
    ],
)
def test_a_table_that_others_could_not_read_is_refused(table: Table) -> None:
    with pytest.raises(DataError):
        artifact.dump(table)


def foreign_table(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return bytes(sink.getvalue())


def test_a_table_whose_offsets_point_outside_is_refused() -> None:
    data = foreign_table(pa.table({"t": pa.array(["a", "b"])}))
    at = (
        data.index(np.array([0, 1, 2], dtype=np.int32).tobytes()) + 4
    )  # the one in the middle: only a full check sees it
    broken = data[:at] + (1 << 20).to_bytes(4, "little") + data[at + 4 :]
    with pytest.raises(DataError):
        artifact.load("table", broken)


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([b"x", b"y"]), pa.array(["a", "b"]).dictionary_encode()])
def test_a_table_of_other_types_is_refused(column: pa.Array) -> None:
    with pytest.raises(DataError, match="is of type"):
        artifact.load("table", foreign_table(pa.table({"x": column})))


def test_a_table_with_a_mark_for_no_column_is_refused() -> None:
    for key, name in (("fedpeer.id", "no"), ("fedpeer.other", "x"), ("pandas", "{}")):
        with pytest.raises(DataError, match="id or label"):
            artifact.load("table", foreign_table(pa.table({"x": [1.0]}).replace_schema_metadata({key: name})))


def test_rows_come_back() -> None:
    for index in ([], [0], [5, 3, 3, 2**40]):
        rows = Rows(np.array(index, dtype=np.int64))
        kind, data = artifact.dump(rows)
        back = artifact.load(kind, data)
        assert isinstance(back, Rows)
        assert (kind, back.index.tolist(), back.index.dtype) == ("rows", index, np.int64)


@pytest.mark.parametrize("index", [np.array([-1]), np.array([1.0]), np.array([[1]]), np.array([1], dtype=np.int32)])
def test_rows_that_are_no_row_numbers_are_refused(index: Any) -> None:
    with pytest.raises(DataError):
        artifact.dump(Rows(index))


def test_a_model_comes_back_bit_for_bit() -> None:
    kind, data = artifact.dump(MODEL)
    back = artifact.load(kind, data)
    assert isinstance(back, Model)
    assert (kind, back.algorithm, back.facts) == ("model", MODEL.algorithm, {**MODEL.facts, "n_samples": 12})
    assert back.arrays.keys() == MODEL.arrays.keys()
    for name, array in MODEL.arrays.items():
        assert (back.arrays[name].dtype, back.arrays[name].shape) == (array.dtype, array.shape)
        assert back.arrays[name].tobytes() == array.tobytes()
        assert not back.arrays[name].flags.writeable
    assert artifact.dump(back)[1] == data


def test_a_model_is_a_file_that_safetensors_reads() -> None:
    read = safetensors.numpy.load(artifact.dump(MODEL)[1])
    assert np.array_equal(read["weights"], MODEL.arrays["weights"])


def test_a_model_has_the_same_bytes_in_every_process_and_order() -> None:
    turned = Model(MODEL.algorithm, dict(reversed(MODEL.facts.items())), dict(reversed(MODEL.arrays.items())))
    assert artifact.dump(turned) == artifact.dump(MODEL)
    other_layout = {"weights": np.asfortranarray(MODEL.arrays["weights"]).astype(">f8")}
    assert artifact.dump(Model("a", {}, other_layout)) == artifact.dump(
        Model("a", {}, {"weights": MODEL.arrays["weights"]})
    )
    program = (
        "import numpy as np; from fedpeer import artifact; from fedpeer.stage import Model;"
        "m = Model('a', {str(i): i for i in range(20)}, {str(i): np.arange(i) for i in range(20)});"
        "print(artifact.digest(artifact.dump(m)[1]).hex())"
    )
    run = [subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(2)]
    assert run[0] == run[1] != b""


@pytest.mark.parametrize(
    "model",
    [
        Model("a", {"x": float("nan")}),
        Model("a", {"x": object()}),
        Model("a", {}, {"x": np.array(["text"])}),
        Model("a", {}, {"x": np.array([1j])}),
        Model("a", {}, {"x": np.array([1], dtype=np.float16)}),
    ],
)
def test_a_model_that_cannot_be_written_is_refused(model: Model) -> None:
    with pytest.raises(DataError):
        artifact.dump(model)


def model_file(header: Any, rest: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


FACTS = {"__metadata__": {"fedpeer": '{"algorithm":"a","facts":{}}'}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        model_file(b"[" * 100_000),
        model_file({}),
        model_file({"__metadata__": {}}),
        model_file({"__metadata__": {"fedpeer": "{}"}}),
        model_file({"__metadata__": {"fedpeer": '{"algorithm":1,"facts":{}}'}}),
        model_file({"__metadata__": {"fedpeer": '{"algorithm":"a","facts":[]}'}}),
        model_file({"__metadata__": {"fedpeer": '{"facts":{},"algorithm":"a"}'}}),
        model_file({"__metadata__": {"fedpeer": '{"algorithm":"a","facts":{}}', "more": ""}}),
        model_file({**FACTS, "x": {"dtype": "F64", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        model_file({**FACTS, "x": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, bytes(16)),
        model_file({**FACTS, "x": {"dtype": "F64", "shape": [1], "data_offsets": [8, 16]}}, bytes(16)),
        model_file({**FACTS, "x": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}, bytes(2)),
        model_file({**FACTS, "x": {"dtype": "F64", "shape": [1] * 9, "data_offsets": [0, 8]}}, bytes(8)),
    ],
)
def test_what_is_not_a_model_is_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        artifact.load("model", data)
    assert isinstance(artifact.load("model", model_file(FACTS)), Model)


def test_a_report_comes_back_as_plain_values() -> None:
    values = {"b": np.float64(0.1), "a": [1, (True, None)], "ü": {"n": np.arange(3)}, "big": 2**80}
    kind, data = artifact.dump(Report(values))
    assert (kind, data) == (
        "report",
        '{"a":[1,[true,null]],"b":0.1,"big":1208925819614629174706176,"ü":{"n":[0,1,2]}}'.encode(),
    )
    assert artifact.load(kind, data) == Report({"a": [1, [True, None]], "b": 0.1, "big": 2**80, "ü": {"n": [0, 1, 2]}})


def nested(depth: int) -> Any:
    return {"x": nested(depth - 1)} if depth else 1


@pytest.mark.parametrize(
    "values", [{1: 2}, {"x": float("inf")}, {"x": b"bytes"}, {"x": {1}}, nested(40), {"x": np.array([np.nan])}]
)
def test_a_report_that_others_could_not_read_is_refused(values: Any) -> None:
    with pytest.raises(DataError):
        artifact.dump(Report(values))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"1",
        b'{"b":1,"a":2}',
        b'{"a": 1}',
        b'{"a":1,"a":1}',
        b'{"a":NaN}',
        b'{"a":1.00}',
        b'{"a":"\xff"}',
        b"[" * 100_000,
    ],
)
def test_a_report_that_is_not_in_canonical_form_is_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        artifact.load("report", data)


@pytest.mark.parametrize("value", [TABLE, Rows(np.arange(9)), MODEL, Report({"a": [1.5, None, {"b": "text"}]})])
def test_no_damaged_bytes_raise_anything_but_data_errors(value: Any, seed: int) -> None:
    chance = random.Random(seed)
    kind, data = artifact.dump(value)
    refused = 0
    for _ in range(2000):
        broken = bytearray(data[: chance.randrange(len(data))] if chance.random() < 0.2 else data)
        for _ in range(chance.randrange(1, 4)):
            if broken:
                broken[chance.randrange(len(broken))] = chance.randrange(256)
        try:
            artifact.load(kind, bytes(broken))
        except DataError:
            refused += 1
    assert refused > 500


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(DataError):
        artifact.load("pickle", b"")
    with pytest.raises(DataError):
        artifact.dump({"a": 1})  # type: ignore[arg-type]
