"""A typed record that is read from one strict YAML file.

Every mistake of a file is reported at once, unknown keys with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from potstill.errors import OTHER_NAMES, RecipeError, nearest, one_line
from potstill.files import write_text
from potstill.losses.declared import Declared, is_tag
from potstill.runs.config.inputs import changed_inputs, write_inputs

UNKNOWN_KEY = "unknown key."
MOST_CHARACTERS = 2**20  # of a recipe
MOST_VALUES = 100_000  # in a recipe
PRESETS = Path(__file__).parent / "presets"


Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]  # to write to


class Part(BaseModel):
    """A part of a recipe: unknown keys are mistakes, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Document(Part):
    """A whole file."""

    kinds_known: ClassVar[int] = 0

    @classmethod
    def load(cls, path: str | Path, sets: Iterable[str] = ()) -> Self:
        """Read a YAML file, or `preset:NAME`; a RecipeError has all that is wrong with it, a line each.

        `sets` are changes as KEY=VALUE, with dots between keys: `train.max_steps=100`, `objective.0.weight=0.5`.
        """
        return cls.parse(read(Path(path)), str(path), sets)

    @classmethod
    def parse(cls, values: Any, origin: str = "recipe", sets: Iterable[str] = ()) -> Self:
        """Read values that are already loaded; `origin` is their name in errors."""
        cls.know_all_kinds()
        values = apply(values, sets, origin)
        errors = _booleans_for_numbers(cls, values)
        try:
            document = cls.model_validate(values)
        except ValidationError as error:
            errors += error.errors()
        if not errors:
            return document
        lines = [_with_place(cls, line) for one in _joined(cls, errors) for line in _explain(cls, one)]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise RecipeError("\n  ".join([f"{origin}: {count}", *lines]))

    @classmethod
    def mapping_keys(cls) -> Iterable[str]:
        """The keys, from the top, of parts that are plain mappings."""
        return ()

    @classmethod
    def know_all_kinds(cls) -> None:
        """Rebuild the schemas where kinds were declared since they were built, as a user's own are."""
        if cls.kinds_known != Declared.count:
            for part in [*_subclasses(Part), cls]:  # parts before what holds them
                part.model_rebuild(force=True)
            cls.kinds_known = Declared.count

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        cls.kinds_known = Declared.count

    def dump(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    def check_directory(self, directory: Path, resume: bool, undecided: Iterable[str] = ()) -> None:
        """Check that a run directory holds no training, or one of the same recipe to resume.

        Keys that are `undecided` may differ: the run has not made its choices yet.
        """
        record = directory / "recipe.yaml"
        if not record.exists() or not (directory / "metrics.jsonl").exists():
            return
        if not resume:
            raise RecipeError(
                f"output: expected an empty or new directory, got {directory}, which holds a run. "
                "Resume it with --resume, or choose another with --set output=DIR."
            )
        earlier = self.load(record)
        if changed := [key for key in self.changes(earlier) if key not in undecided]:
            raise RecipeError(
                f"output: expected the recipe that the run in {directory} began with, got another "
                f"{', '.join(changed)}. Use {record}, or choose another directory with --set output=DIR."
            )
        if changed := changed_inputs(directory, self.model_dump(mode="json")):
            raise RecipeError(
                f"output: expected {changed[0]} as it was when the run in {directory} began, got another content. "
                "Restore it, or choose another directory with --set output=DIR."
            )

    def changes(self, earlier: Self) -> list[str]:
        """The keys with other values than in the recipe that a training began with, which it cannot go on with."""
        return [key for key, value in self if value != getattr(earlier, key)]

    def start(self, directory: Path) -> None:
        """Make a run directory, and write this recipe and the checksums of its files into it."""
        directory.mkdir(parents=True, exist_ok=True)
        write_inputs(directory, self.model_dump(mode="json"))
        write_text(directory / "recipe.yaml", self.dump())


def _subclasses(kind: type[Part]) -> list[type[Part]]:
    return [part for child in kind.__subclasses__() for part in (child, *_subclasses(child))]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two repairs: 1e-3 is a number, and a key that stands twice is a mistake.

    Aliases may not stand for more than MOST_VALUES in all: ten lines of aliases of aliases can mean billions.
    """

    def get_single_node(self) -> Any:
        root = super().get_single_node()
        if root is not None and _values_in(root, {}) > MOST_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MOST_VALUES} values, with what aliases stand for"
            )
        return root

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key that is a {type(key).__name__}", node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _values_in(node: Any, counts: dict[int, int | None]) -> int:
    """The number of values in a node, what an alias stands for at each place where it does."""
    if id(node) not in counts:
        counts[id(node)] = None  # while it is counted
        inner = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else ()
        parts = (part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,)))
        counts[id(node)] = 1 + sum(_values_in(part, counts) for part in parts)
    count = counts[id(node)]
    if count is None:
        raise yaml.composer.ComposerError(None, None, "an alias within what it stands for", node.start_mark)
    return count


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str) -> Any:
    """Read YAML, safely; whatever cannot be read is a YAMLError."""
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("values that are nested too deeply") from None
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # a date, a number or a tag that cannot be one
        raise yaml.YAMLError(f"a value that its type does not have: {error}") from None


def locate_recipe(path: Path) -> Path:
    """Return the file of a recipe; `preset:NAME` is one that is part of the package."""
    kind, _, name = str(path).partition(":")
    if kind != "preset":
        return path
    if not (file := PRESETS / f"{name}.yaml").is_file():
        names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
        raise RecipeError(f"recipe: expected preset {', '.join(names)}, got {name}.{nearest(name, names)}")
    return file


def read(path: Path) -> Any:
    path = locate_recipe(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
        if len(text) > MOST_CHARACTERS:
            raise RecipeError(
                f"recipe: expected at most {MOST_CHARACTERS} characters, got more in {path}. Name a recipe."
            )
        return load_yaml(text)
    except FileNotFoundError:
        names = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = nearest(path.name, names)
        raise RecipeError(f"recipe: expected a file, got {path}, which is not there.{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe: expected a readable YAML file, got {path}: {error}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: expected YAML, got: {one_line(error)}") from None


def apply(values: Any, sets: Iterable[str], origin: str = "recipe") -> dict[str, Any]:
    """Change the values of a file in place as `Document.load` says, and return them."""
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: expected a mapping of keys, got {type(values).__name__}.")
    for change in sets:
        _set(values, change)
    return values


def read_list(text: str, key: str = "values") -> list[Any]:
    """Values with commas between them, each as YAML reads it; `key` is for the error.

    >>> read_list("2, 1e-3, {hidden_size: 8, num_hidden_layers: 1}")
    [2, 0.001, {'hidden_size': 8, 'num_hidden_layers': 1}]
    """
    try:
        return list(load_yaml(f"[{text}]"))
    except yaml.YAMLError:
        wrong = f"{key}: expected values with commas between them, got {text}. Brackets and quotes must close."
        raise RecipeError(wrong) from None


def _set(values: dict[str, Any], change: str) -> None:
    """Apply KEY=VALUE in place; the value is read as YAML."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set: expected KEY=VALUE such as train.max_steps=100, got {change}.")
    *path, last = key.split(".")
    here: Any = values
    for name in path:
        here = here[_index(here, name, change)] if isinstance(here, list) else here.setdefault(name, {})
        if not isinstance(here, dict | list):
            raise RecipeError(f"--set {change}: expected {name} to hold keys, got {here!r}.")
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        value = text
    here[_index(here, last, change)] = value


def _index(holder: dict[str, Any] | list[Any], name: str, change: str) -> Any:
    if isinstance(holder, dict):
        return name
    if not name.isdigit() or int(name) >= len(holder):
        raise RecipeError(f"--set {change}: expected an index in 0..{len(holder) - 1}, got {name}.")
    return int(name)


# In a message of pydantic, beside what it expects.
_BESIDE_WANTED = re.compile("^(Input should be|Value error, expected|Input is not) |, (unable to|got) .*$| for <.*$")


class _Spelled(str):
    """A truth value of a recipe, which pydantic would read as a number, as its text, which it does not."""


def _booleans_for_numbers(document: type[Part], values: Any) -> list[Any]:
    """Find truth values where a recipe has numbers; return errors as pydantic has them."""

    def spelled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spelled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [spelled(inner) for inner in value]
        return _Spelled(str(value).lower()) if isinstance(value, bool) else value

    try:
        document.model_validate(spelled(values))
    except ValidationError as error:
        kinds = ("int_parsing", "float_parsing")
        return [one for one in error.errors() if one["type"] in kinds and isinstance(one["input"], _Spelled)]
    return []


def _joined(document: type[Part], errors: Iterable[Any]) -> Iterator[Any]:
    """Make one error of those that the arms of a union have about one value."""
    by_key: dict[Any, list[Any]] = {}
    for number, error in enumerate(errors):
        keys = _follow(document, error["loc"])[0]
        in_arm = len(keys) < len([step for step in error["loc"] if not is_tag(step)])
        by_key.setdefault(tuple(keys) if in_arm else number, []).append(error)
    for same in by_key.values():
        arms = [_BESIDE_WANTED.sub("", one["msg"]).replace("greater than or equal to", "a number >=") for one in same]
        arms = [arm.replace("' or '", "', '") for arm in arms]
        yield same[0] if len(same) == 1 else {**same[0], "type": "union", "msg": f"expected {' or '.join(arms)}"}


def _explain(document: type[Part], error: Any) -> list[str]:
    """Turn one error of pydantic into lines `<key>: <what is wrong>`."""
    keys, known = _follow(document, error["loc"])
    key, kind, context = ".".join(keys), error["type"], error.get("ctx", {})
    if kind in {"extra_forbidden", "unexpected_keyword_argument"}:
        return [f"{key}: {UNKNOWN_KEY}{nearest(keys[-1], known) or _other_kinds(error['loc'])}"]
    if kind == "missing":
        return [f"{key}: expected a value, got none."]
    family = _bare(context.get("discriminator", ""))
    if kind == "union_tag_not_found":
        return [f"{key}: expected a {family}, got {error['input']!r}."]
    if kind == "union_tag_invalid":
        kinds, name = [_bare(name) for name in context["expected_tags"].split(", ")], _bare(context["tag"])
        return [f"{key}: expected a {family} of {', '.join(kinds)}, got {name}.{nearest(name, kinds)}"]
    if kind == "value_error":
        message = str(context["error"])
        names_keys = not key or all(line.startswith(f"{key}.") for line in message.splitlines())  # of several parts
        return message.splitlines() if names_keys else [f"{key}: {message.removesuffix('.')}."]
    if kind in {"model_type", "dataclass_type"}:
        return [f"{key}: expected a mapping of keys, got {error['input']!r}."]
    if isinstance(error["input"], _Spelled):
        return [f"{key}: expected a number, got {error['input']}."]
    return [f"{key}: {error['msg'].lower()}, got {error['input']!r}."]


def _other_kinds(place: tuple[str | int, ...]) -> str:
    """Name the kinds that have a key, where the one of the same family that it was given to has none."""
    kind, key = (_bare(str(place[-2])), place[-1]) if len(place) > 1 and is_tag(place[-2]) else ("", "")
    family = next((family for family in Declared.__subclasses__() if kind in family.kinds), None)
    names = [name for name, other in family.kinds.items() if key in _fields(other)] if family else []
    return f" It is a key of {', '.join(names)}." if names else ""


def _with_place(document: type[Document], line: str) -> str:
    """Add to a line about an unknown key the part of the document that has such a key."""
    if not line.endswith(f": {UNKNOWN_KEY}"):
        return line
    name = line.partition(":")[0].rpartition(".")[2]
    paths = [*document.mapping_keys(), *_paths(document)]
    meant = [path for path in paths if path == OTHER_NAMES.get(name)]
    named = sorted((path.count("."), path) for path in paths if path.rpartition(".")[2] == name)
    places = [*meant, *(path for _, path in named)]
    return f"{line} Did you mean {places[0]}?" if places else line


def _paths(annotation: Any, above: str = "", seen: frozenset[Any] = frozenset()) -> Iterator[str]:
    """The keys of a document from its top, those of a list or of a family of kinds as of one part."""
    for arm in _arms(annotation):
        if get_origin(arm) in (list, tuple):
            yield from _paths(get_args(arm)[0], above, seen)
        for kind in {*getattr(arm, "kinds", {None: arm}).values()} - seen:
            for name, inner in _fields(kind).items():
                yield f"{above}{name}"
                yield from _paths(inner, f"{above}{name}.", seen | {kind})


def _bare(text: str) -> str:
    """Strip what pydantic and `in_tag` put around a name."""
    return text.strip("'").removesuffix("()").strip("<>")


def _follow(document: type[Part], place: tuple[str | int, ...]) -> tuple[list[str], list[str]]:
    """Return the keys of an error's place without the arms of unions, and the keys known at its end."""
    keys: list[str] = []
    known: list[str] = []
    annotation: Any = document
    above: Any = None
    for step in place:
        if is_tag(step):  # the kind of a family of declarations by its name, or an arm of a union without names
            tag = _bare(str(step))
            kinds = (arm.kinds for arm in _arms(annotation) if hasattr(arm, "kinds"))
            annotation = next((names[tag] for names in kinds if tag in names), annotation)
            above = annotation
            continue
        arms = [arm for arm in _arms(annotation) if arm is not types.NoneType]
        if len(arms) > 1 and above is not annotation:  # pydantic names the arm of a union
            above = annotation
            continue
        keys.append(str(step))
        fields = dict(field for arm in arms for field in _fields(arm).items())
        known = list(fields)
        entries = (get_args(arm)[0] for arm in arms if get_origin(arm) in (list, tuple))
        annotation = fields.get(step) if isinstance(step, str) else next(entries, None)
    return keys, known


def _arms(annotation: Any) -> list[Any]:
    """Return the types of a union, or the one type that an annotation is."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Annotated, Union, types.UnionType):
        return [arm for part in (parts[:1] if origin is Annotated else parts) for arm in _arms(part)]
    return [annotation]


def _fields(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if not dataclasses.is_dataclass(kind):
        return {}
    hints = get_type_hints(kind, include_extras=True)  # of class variables too, which are no keys
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
