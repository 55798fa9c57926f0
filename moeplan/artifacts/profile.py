"""Hardware profiles: a directory of measured tables with where each number is from.

::

    DIR/profile.json            device, versions, date, command, sources, licence, rows set aside
    DIR/<table>.parquet|.csv    one file per table; columns in :mod:`moeplan.artifacts.profile_tables`

Tables are read when they are first asked for and checked against their hash.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from moeplan.artifacts.profile_tables import TABLES, columns_of, measure_command
from moeplan.errors import InputError, ProfileError, UnknownNameError
from moeplan.files import atomic_directory, read_json, sha256_bytes, sha256_file
from moeplan.specs.base import refused

__all__ = [
    "PROFILE_PLACE",
    "SCHEMA_VERSION",
    "USABLE_MARKS",
    "HardwareProfile",
    "ProfileMeta",
    "Source",
    "TableMeta",
    "load_profile",
    "shipped_profile_for",
    "shipped_profiles",
]

SCHEMA_VERSION = 1
PROFILE_PLACE = ("a profile", ("profile.json", *(f"{table}.{end}" for table in TABLES for end in ("parquet", "csv"))))
"""What ``--out`` may hold before: see :func:`moeplan.files.require_place`."""
BUSY = 0.1  # share of the CPU that went to other programs, above which a CPU's times say little of the machine
USABLE_MARKS = ("", "copied")  # a copied row is a measurement, of another machine: its source says so

# Tables that one device cannot measure, and what tells places in them apart.
_EXCHANGES = {"alltoall": ("nodes",), "collectives": ("op", "ranks", "nodes")}
_ARROW = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}


class _Paper(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(_Paper):
    """Where numbers are from."""

    kind: Literal["measured", "imported"]
    title: str = Field(description="package and file, or what was run")
    version: str = Field("", description="of the package or framework")
    device: str = Field("", description="as the device names itself")
    date: str = Field("", description="of the measurement, where published")
    licence: str = ""
    note: str = ""


class TableMeta(_Paper):
    """One table file."""

    file: str = Field(description="beside profile.json: .parquet or .csv")
    rows: int = Field(ge=0)
    sha256: str = Field(description="of the file")


class _Numbers(BaseModel):
    """All of ``system`` that something reads as a number; its other facts are shown as they stand."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    multiprocessors: float | None = Field(None, ge=1)
    launch_latency_us: float | None = Field(None, gt=0)
    threads: float | None = Field(None, ge=1)
    realtime: float | None = Field(None, ge=0, le=1)
    foreign_cpu_share: float | None = Field(None, ge=0, le=1)


def _readable(facts: dict[str, float | str]) -> dict[str, float | str]:
    _Numbers.model_validate(facts)
    return facts


class ProfileMeta(_Paper):
    """What a profile says of itself, beside its tables."""

    schema_version: int = SCHEMA_VERSION
    name: str = Field(description="in notes and results")
    accelerator: str = Field(description="name in the accelerator registry, or the device's own where it is not there")
    device: str = Field("", description="as the device names itself")
    driver: str = Field("", description="its version; of a CPU the kernel's")
    libraries: dict[str, str] = Field(default_factory=dict, description="name -> version")
    date: str = Field(description="ISO 8601 day or time, UTC")
    command: str = Field(description="what makes this profile again")
    licence: str = ""
    note: str = ""
    left_out: list[str] = Field(default_factory=list, description="what was asked for and not measured, and why")
    sources: dict[str, Source] = Field(
        default_factory=dict, description="word of the tables' column source -> where its numbers are from"
    )
    system: Annotated[dict[str, float | str], AfterValidator(_readable)] = Field(
        default_factory=dict, description="machine facts, unit in the key: launch_latency_us, clock_mhz, ..."
    )
    rejected: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="table -> reason -> rows dropped or marked by the sanity pass"
    )
    tables: dict[str, TableMeta] = Field(default_factory=dict, description="table -> its file")


def _conform(name: str, table: pa.Table, where: str, sources: Collection[str] | None = None) -> pa.Table:
    """The table in its schema's columns and types; defaults filled in, strings but vectors dictionary-encoded."""
    schema = columns_of(name)
    unknown = sorted(set(table.column_names) - set(schema))
    missing = sorted(c for c, column in schema.items() if column.default is None and c not in table.column_names)
    if unknown or missing:
        raise ProfileError(
            f"{where}: table {name} "
            + " and ".join(
                [f"lacks column {', '.join(missing)}"] * bool(missing)
                + [f"has unknown column {', '.join(unknown)}"] * bool(unknown)
            )
            + "; the columns are listed in docs/reference/profile-tables.json"
        )
    arrays = []
    for column, spec in schema.items():
        if column not in table.column_names:
            values = pa.repeat(pa.scalar(spec.default, _ARROW[spec.kind]), table.num_rows)
        else:
            try:
                values = table[column].combine_chunks().cast(_ARROW[spec.kind])
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ProfileError(f"{where}: column {column} of table {name} is not {spec.kind}: {error}") from error
        if values.null_count:
            raise ProfileError(f"{where}: column {column} of table {name} has {values.null_count} empty cells")
        arrays.append(values.dictionary_encode() if spec.kind == "str" and column != "vector" else values)
    result = pa.table(dict(zip(schema, arrays, strict=True)))
    _require_sense(name, result, where, sources)
    return result


def _require_sense(name: str, table: pa.Table, where: str, sources: Collection[str] | None) -> None:
    """Times above 0, spreads from 0, sizes that can be, known words, ``sources`` that are listed, vectors of counts; or
    the first row that is not so."""
    latency = table["latency_us"]
    known = pc.or_(pc.is_nan(table["spread"]), pc.greater_equal(table["spread"], 0.0))
    good = [
        ("latency_us", pc.and_(pc.is_finite(latency), pc.greater(latency, 0.0)), "finite and above 0"),
        ("spread", known, "0 or above, or nan"),
    ]
    for part, whole in (("top_k", "num_experts"), ("kv_heads", "heads")):
        if whole in table.column_names and name != "elementwise":  # of which either may not apply
            good.append((part, pc.less_equal(table[part], table[whole]), f"no more than {whole}"))
    for column, spec in columns_of(name).items():
        if spec.least is not None:
            good.append((column, pc.greater_equal(table[column], spec.least), f"{spec.least} or above"))
        elif spec.words:
            *others, last = (word or "empty" for word in spec.words)
            fits = partial(pc.match_substring_regex, pattern=spec.pattern)
            good.append((column, _by_word(table[column], fits), f"{', '.join(others)} or {last}"))
        elif column == "source" and sources is not None:
            listed = partial(pc.is_in, value_set=pa.array(list(sources), pa.string()))
            good.append((column, _by_word(table[column], listed), "a key of sources in profile.json"))
        elif column == "vector":
            counts = pc.match_substring_regex(table[column], "^[0-9 ]*$")
            good.append((column, counts, "whole numbers with spaces between"))
    for column, rows, what in good:
        row = pc.index(rows, False).as_py()
        if row >= 0:
            value = table[column][row].as_py()
            shown = "is not a number" if value != value else f"holds {value!r}"
            raise ProfileError(f"{where}: {column} of table {name} must be {what}; row {row + 1} {shown}")


def _by_word(column: pa.ChunkedArray, good: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """Which rows are ``good``: each word of the column's dictionary is looked at once."""
    coded = column.combine_chunks()
    return good(coded.dictionary).take(coded.indices)


def _places(table: pa.Table, columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
    return list(zip(*(table[column].to_pylist() for column in columns), strict=True))


class HardwareProfile:
    """Metadata and tables of one machine. Immutable; tables load when first used."""

    def __init__(self, meta: ProfileMeta, tables: Mapping[str, pa.Table] | None = None, directory: Path | None = None):
        self.meta = meta
        self.directory = directory
        where = str(directory) if directory else f"profile {meta.name}"
        self.lent: dict[str, tuple[str, frozenset[int]]] = {}  # table -> like machine, and nodes that it stands in for
        self._tables: dict[str, pa.Table] = {}
        for name, table in (tables or {}).items():
            if name not in TABLES:
                raise UnknownNameError("profile table", name, TABLES)
            self._tables[name] = _conform(name, table, where)

    # ------------------------------------------------------------------ reading

    @classmethod
    def open(cls, directory: Path) -> HardwareProfile:
        """Open a profile directory; reads ``profile.json`` only.

        Raises:
            ProfileError: no profile, malformed, or of another schema version.
        """
        path = directory / "profile.json"
        if not path.is_file():
            raise ProfileError(f"{directory} has no profile.json: it is not a profile; see moeplan profile --help")
        try:
            document = read_json(path)
        except InputError as error:
            raise ProfileError(f"{error}; the profile is corrupt, restore it or measure it again") from error
        if not isinstance(document, dict):
            raise ProfileError(f"{path} is not a profile document, which is an object; restore it or measure it again")
        version = document.get("schema_version")
        if type(version) is not int:
            raise ProfileError(f"{path}: schema_version ({version!r}) must be a whole number; restore the file")
        if version != SCHEMA_VERSION:
            again, older = document.get("command"), version < SCHEMA_VERSION
            raise ProfileError(
                f"{path}: schema_version ({version}) is {'older' if older else 'newer'} than this moeplan's"
                f" ({SCHEMA_VERSION}); "
                + (f"measure again: {again}" if older and again else "use a moeplan that fits it")
            )
        try:
            meta = ProfileMeta.model_validate(document)
        except ValidationError as error:
            raise refused(ProfileError, str(path), error, None, "correct or restore the file") from error
        unknown = sorted(set(meta.tables) - set(TABLES))
        if unknown:
            raise ProfileError(f"{path}: tables ({', '.join(unknown)}) are not known; known: {', '.join(TABLES)}")
        return cls(meta, directory=directory)

    @property
    def table_names(self) -> tuple[str, ...]:
        """Tables this profile has."""
        return tuple(name for name in TABLES if name in self._tables or name in self.meta.tables)

    def table(self, name: str) -> pa.Table:
        """A table, marked rows included; strings are dictionary-encoded.

        Raises:
            ProfileError: the profile has no such table, or its file is missing, changed or corrupt.
        """
        if name in self._tables:
            return self._tables[name]
        meta = self.meta.tables.get(name)
        if meta is None or self.directory is None:
            raise ProfileError(
                f"profile {self.meta.name} has no table {name}; measure it: {self.measure_command(name, {})}"
            )
        path = self.directory / meta.file
        if path.parent != self.directory:
            raise ProfileError(f"{self.directory}: tables.{name}.file ({meta.file}) must be a plain file name")
        try:
            if sha256_file(path) != meta.sha256:
                raise ProfileError(
                    f"{path} is not the file that profile.json names (sha256 differs): it is truncated or"
                    f" was edited; restore it or measure again: {self.meta.command}"
                )
            if path.suffix == ".csv":
                types = {c: _ARROW[spec.kind] for c, spec in columns_of(name).items()}
                options = pa_csv.ConvertOptions(column_types=types, strings_can_be_null=False, null_values=[""])
                raw = pa_csv.read_csv(path, convert_options=options)
            else:
                raw = pq.ParquetFile(path).read()  # read_table would load its data sets' half second of library
        except OSError as error:
            raise ProfileError(
                f"cannot read {path}: {error.strerror or error}; restore it or measure again: {self.meta.command}"
            ) from error
        except pa.ArrowException as error:
            raise ProfileError(f"{path} cannot be read as a table: {error}") from error
        if raw.num_rows != meta.rows:
            raise ProfileError(
                f"{path} has {raw.num_rows} rows, profile.json says tables.{name}.rows ({meta.rows}); restore both or"
                f" measure again: {self.meta.command}"
            )
        self._tables[name] = _conform(name, raw, str(path), self.meta.sources)
        return self._tables[name]

    @cached_property
    def sha256(self) -> str:
        """Digest of all table hashes: what results made with this profile name."""
        return sha256_bytes("".join(f"{k}:{v.sha256}\n" for k, v in sorted(self.meta.tables.items())).encode())

    def measure_command(self, table: str, region: Mapping[str, Any]) -> str:
        """The command that measures a region, into this very profile where it was measured and not imported."""
        own: dict[str, Any] = {}
        if self.directory is not None and any(source.kind == "measured" for source in self.meta.sources.values()):
            own["out"] = shlex.quote(str(self.directory))
            if threads := int(float(self.meta.system.get("threads", 0))):
                own["threads"] = threads
        return measure_command(table, {**region, **own})

    @property
    def warnings(self) -> list[str]:
        """What speaks against every time of a CPU profile: that other programs ran meanwhile. One sentence, or none."""
        share = float(self.meta.system.get("foreign_cpu_share", 0.0))
        if self.meta.accelerator != "cpu" or share <= BUSY:
            return []
        return [
            f"profile {self.meta.name} was measured while other programs took {share:.0%} of the CPU"
            f" (foreign_cpu_share {share:g}, above {BUSY:g}): its times are too long; measure it again on an idle"
            " machine, into another --out"
        ]

    # ------------------------------------------------------------------ coverage

    def with_rows(self, name: str, rows: pa.Table) -> HardwareProfile:
        """This profile with further ``rows`` in its table ``name``, as of a like machine that was measured."""
        answer = HardwareProfile(self.meta, directory=self.directory)
        answer._tables = self._tables | {name: pa.concat_tables((self.table(name), rows))}
        answer.lent = self.lent
        return answer

    def with_exchanges_of(self, other: HardwareProfile) -> HardwareProfile:
        """This profile with exchanges between ranks of ``other``, of a like machine, on numbers of nodes (collectives:
        also of ranks) where it has none of its own: one device cannot measure them. Their rows keep their sources."""
        tables, metas, lent = dict(self._tables), dict(self.meta.tables), {}
        for name, place in _EXCHANGES.items():
            if name not in other.table_names:
                continue
            rows, own = other.table(name), self.table(name) if name in self.table_names else None
            if own is not None:
                mine = set(_places(self.select(name), place))  # of rows that serve
                rows = rows.filter(pa.array([each not in mine for each in _places(rows, place)], pa.bool_()))
            if not rows.num_rows:
                continue
            lent[name] = other.meta.name, frozenset(rows["nodes"].to_pylist())
            tables[name] = rows if own is None else pa.concat_tables((own, rows)).unify_dictionaries()
            sums = [metas[name].sha256 for metas in (metas, other.meta.tables) if name in metas]
            file = f"{name} of {self.meta.name} and {other.meta.name}"
            metas[name] = TableMeta(file=file, rows=tables[name].num_rows, sha256=sha256_bytes("".join(sums).encode()))
        if not lent:
            return self
        meta = self.meta.model_copy(update={"tables": metas, "sources": other.meta.sources | self.meta.sources})
        answer = HardwareProfile(meta, directory=self.directory)
        answer._tables, answer.lent = tables, lent
        return answer

    def select(self, name: str, usable: bool = True, **where: Any) -> pa.Table:
        """Rows of a table whose columns equal ``where`` (a value, or a collection of allowed ones).

        An empty table where nothing matches or the profile lacks the table; rows set aside by the sanity pass
        are left out unless ``usable`` is False.
        """
        if name not in self.table_names:
            return pa.table({c: pa.array([], _ARROW[spec.kind]) for c, spec in columns_of(name).items()})
        table = self.table(name)
        mask: Any = pc.is_in(table["mark"], value_set=pa.array(USABLE_MARKS)) if usable else None
        for column, value in where.items():
            if column not in table.column_names:
                raise UnknownNameError(f"column of table {name}", column, table.column_names)
            allowed = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
            hit = pc.is_in(table[column], value_set=pa.array(list(allowed), type=_ARROW[columns_of(name)[column].kind]))
            mask = hit if mask is None else pc.and_(mask, hit)
        return table if mask is None else table.filter(mask)

    def require(self, name: str, command: Mapping[str, Any] | None = None, **where: Any) -> pa.Table:
        """Like :meth:`select`, but an empty answer is an error that names the missing region.

        ``command``: further columns that the command which measures it must be given.

        Raises:
            ProfileError: nothing matches; says which column first leaves nothing, what there is, and the
                command that measures it.
        """
        found = self.select(name, **where)
        if found.num_rows:
            return found
        said = {c: v if isinstance(v, (str, int, float)) else " or ".join(map(str, v)) for c, v in where.items()}
        region = ", ".join(f"{column}={value}" for column, value in said.items())
        reason = f"it has no table {name}"
        kept: dict[str, Any] = {}
        if name in self.table_names:
            for column, value in where.items():
                before = self.select(name, **kept)
                kept[column] = value
                if not self.select(name, **kept).num_rows:
                    there = sorted(pc.unique(before[column]).to_pylist())
                    shown = ", ".join(map(str, there[:12])) + (", ..." if len(there) > 12 else "")
                    reason = f"{column}={said[column]} is not there (there is: {shown or 'nothing'})"
                    break
        raise ProfileError(
            f"profile {self.meta.name} does not cover {name} at {region}: {reason};"
            f" measure it: {self.measure_command(name, {**where, **(command or {})})}"
        )

    # ------------------------------------------------------------------ writing

    def save(self, directory: Path, file_format: Literal["parquet", "csv"] = "parquet") -> HardwareProfile:
        """Write the profile as a directory, whole or not at all, and return it as read back.

        Raises:
            ProfileError: rows name a source that the profile does not; InputError: the directory holds something
                else, or cannot be written.
        """
        with atomic_directory(directory, *PROFILE_PLACE) as target:
            metas = {}
            for name in self.table_names:
                path = target / f"{name}.{file_format}"
                table = self.table(name)
                _require_sense(name, table, f"profile {self.meta.name}", self.meta.sources)
                if file_format == "csv":
                    plain = {c: table[c].cast(_ARROW[spec.kind]) for c, spec in columns_of(name).items()}
                    pa_csv.write_csv(pa.table(plain), path)
                else:
                    pq.write_table(table, path, compression="zstd", compression_level=15, store_schema=False)
                metas[name] = TableMeta(file=path.name, rows=table.num_rows, sha256=sha256_file(path))
            meta = self.meta.model_copy(update={"tables": metas})
            (target / "profile.json").write_text(meta.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return HardwareProfile.open(directory)


def _shipped_root() -> Path:
    return Path(__file__).parents[1] / "data" / "profiles"


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    root = _shipped_root()
    return sorted(path.parent.name for path in root.glob("*/profile.json")) if root.is_dir() else []


def load_profile(name_or_path: str | Path) -> HardwareProfile:
    """Open a profile by directory, or by the name of a shipped one.

    Raises:
        ProfileError: the directory is no usable profile; UnknownNameError: neither directory nor shipped.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return HardwareProfile.open(path)
    if str(name_or_path) in shipped_profiles():
        return HardwareProfile.open(_shipped_root() / str(name_or_path))
    raise UnknownNameError("profile (neither a directory nor a shipped one)", str(name_or_path), shipped_profiles())


@cache
def shipped_profile_for(accelerator: str) -> HardwareProfile | None:
    """The shipped profile of an accelerator, by its name in the registry; None where there is none."""
    for name in shipped_profiles():
        profile = HardwareProfile.open(_shipped_root() / name)
        if profile.meta.accelerator == accelerator:
            return profile
    return None
