"""The configuration of a run: typed, documented fields, read from YAML and `section.key=value`.

Every default lives here, in one field, with its meaning beside it; `hyperprior config` prints them.
Everything that can be checked without TensorFlow is checked here, before anything slow starts.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from hyperprior.errors import ConfigError

DOWNSAMPLING = 64  # pixels per element of z along each side: four strides of 2 in g_a, two in h_a
MS_SSIM_MIN_SIDE = 161  # five scales of an 11 x 11 window


def field(default: Any, doc: str, *, may_change: bool = False, **constraints: Any) -> Any:
    """A documented config field. `may_change`: a resumed run may have another value."""
    return Field(default, description=doc, json_schema_extra={"may_change": may_change}, **constraints)


def parse_interval(value: Any) -> Any:
    if value is None:
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    match = re.fullmatch(r"(\d+)(?: *(steps?|epochs?))?", str(value).strip())
    if not match or int(match[1]) < 1:
        raise ValueError("an interval is a number of steps, or text such as '500 steps' or '2 epochs'")
    number, unit = int(match[1]), (match[2] or "steps").rstrip("s")
    return number if unit == "step" else f"{number} epoch{'s' if number > 1 else ''}"


Interval = Annotated[Union[int, str], BeforeValidator(parse_interval)]
Sources = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        populate_by_name=True,
        frozen=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def no_truth_for_numbers(cls, values: Any) -> Any:
        for name, info in cls.model_fields.items() if isinstance(values, dict) else ():
            name = info.alias or name
            if isinstance(values.get(name), bool) and info.annotation is not bool:
                raise ValueError(f"{name} is {str(values[name]).lower()}; a number or text is expected")
        return values


class Data(Section):
    """Where images come from and how they are cut."""

    train: Sources = field([], "sources: tars (also nested), directories, brace patterns, URLs", may_change=True)
    val: Sources = field([], "validation sources; left out: val_split of train", may_change=True)
    test: Sources = field([], "test sources; left out: test_split of train, else val", may_change=True)
    val_split: Optional[float] = field(
        None,
        "share of train held out for validation, by hash of the key (0.1 if val and test have no source)",
        ge=0,
        lt=1,
    )
    test_split: Optional[float] = field(
        None, "share of train held out for testing, by hash of the key (0.1 if val and test have no source)", ge=0, lt=1
    )
    max_images: Optional[int] = field(
        None, "use at most this many images of train, chosen by hash of the key before it is split", ge=1
    )
    patch_size: int = field(
        256,
        "side of the square training patches in pixels, a multiple of 64; on small ones h_a and h_s see little but "
        "borders, and then spend more bits on whole images",
        ge=64,
    )
    patches_per_image: int = field(
        1, "random patches cut from an image each time it is decoded; they go to successive batches", ge=1
    )
    min_scale: float = field(
        1.0,
        "patches are scaled down from larger windows by a random factor between this and 1, which removes traces of "
        "JPEG; in a small image by less",
        gt=0,
        le=1,
    )
    flip: bool = field(False, "mirror half of the patches, left to right")
    eval_crop: Union[int, Literal["full"]] = field(
        256, "side of the centre crop in validation and test, a multiple of 64, or `full`: the whole image"
    )
    small_images: Literal["skip", "upscale"] = field(
        "skip", "images with a side below the patch: skipped and counted, or enlarged to fit"
    )
    shuffle_buffer: int = field(256, "samples a shard's shuffle buffer holds; 1: in the order of the tar", ge=1)
    max_bad_fraction: float = field(
        0.01,
        "stop when more than this share of samples is unusable (judged over at least 1,000)",
        may_change=True,
        ge=0,
        le=1,
    )
    allow_pipe: bool = field(False, "allow `pipe:` sources, which run a shell command", may_change=True)
    decode_threads: Optional[int] = field(
        None, "threads that decode images (default: one per core)", may_change=True, ge=1
    )

    @model_validator(mode="after")
    def check(self) -> Data:
        if self.patch_size % DOWNSAMPLING:
            raise ValueError(nearest("patch_size", self.patch_size, DOWNSAMPLING))
        if isinstance(self.eval_crop, int) and (self.eval_crop < 64 or self.eval_crop % DOWNSAMPLING):
            raise ValueError(nearest("eval_crop", self.eval_crop, DOWNSAMPLING))
        for name, split in (("val", self.val_split), ("test", self.test_split)):
            if split and getattr(self, name):
                raise ValueError(f"{name} and {name}_split are both set; give sources or a share of train")
        if sum(self.splits()) >= 1:
            raise ValueError(f"val_split + test_split is {sum(self.splits())}; nothing is left to train on")
        return self

    def splits(self) -> tuple[float, float]:
        """The shares of `train` held out for (validation, test)."""
        default = 0.0 if self.val or self.test else 0.1
        return (
            default if self.val_split is None else self.val_split,
            default if self.test_split is None else self.test_split,
        )


class Model(Section):
    """The scale hyperprior's dimensions, by the paper's names."""

    num_filters: int = field(128, "N: channels inside g_a and g_s", ge=1, le=4096)
    latent_channels: int = field(192, "M: channels of y", ge=1, le=4096)
    hyper_channels: int = field(128, "channels of z, and inside h_a and h_s", ge=1, le=4096)
    num_scales: int = field(64, "entries of the table of scales, log-spaced", ge=2)
    scale_min: float = field(0.11, "smallest standard deviation of y", gt=0)
    scale_max: float = field(256.0, "largest standard deviation of y", gt=0)

    @model_validator(mode="after")
    def check(self) -> Model:
        if self.scale_max <= self.scale_min:
            raise ValueError(f"scale_max is {self.scale_max}; it must exceed scale_min ({self.scale_min})")
        return self


class Loss(Section):
    """loss = bpp + lambda · 255² · mse, or bpp + lambda · (1 − ms_ssim); images in [0, 1]."""

    lmbda: float = Field(
        0.013,
        alias="lambda",
        gt=0,
        json_schema_extra={"may_change": False},
        description="weight of the distortion; larger: more bits, better images",
    )
    metric: Literal["mse", "ms-ssim"] = field("mse", "the distortion")


class Train(Section):
    """The optimisation and what happens along it."""

    batch_size: int = field(16, "global batch size: patches per step over all replicas", ge=1)
    steps: Optional[int] = field(None, "length in steps", may_change=True, ge=1)
    epochs: Optional[int] = field(None, "length in epochs, instead of steps (default: 100)", may_change=True, ge=1)
    initial: Literal["wavelet", "random"] = field(
        "wavelet", "weights to start from: g_a as a wavelet packet of the image and g_s as its inverse, or random ones"
    )
    start_from: Optional[str] = field(
        None,
        "start from the best weights of this run, or from this model or one in the box (q3), of the same dimensions, "
        "y scaled to this run's lambda",
    )
    proxy: Literal["noise", "rounded"] = field(
        "noise", "what g_s gets in training: y with uniform noise, or y rounded, its gradient passed straight through"
    )
    learning_rate: float = field(1e-4, "Adam's peak learning rate", may_change=True, gt=0)
    schedule: Literal["constant", "cosine", "steps"] = field(
        "constant",
        "cosine: to final_learning_rate at the end; steps: times decay_factor at each of decay_steps",
        may_change=True,
    )
    warmup_steps: int = field(0, "steps over which the learning rate rises from 0", may_change=True, ge=0)
    final_learning_rate: float = field(0.0, "where the cosine ends", may_change=True, ge=0)
    decay_steps: list[int] = field([], "steps at which schedule `steps` decays", may_change=True)
    decay_factor: float = field(0.1, "factor of each decay", may_change=True, gt=0, lt=1)
    clip_norm: Optional[float] = field(1.0, "gradients are scaled to at most this global norm; null: never", gt=0)
    ema: Optional[float] = field(
        None, "decay of a moving average of the weights, used for validation and the result; null: none", gt=0, lt=1
    )
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = field(
        "float32", "of the transforms in training, but for the last layers of g_a, h_a and h_s; all else is float32"
    )
    on_nonfinite: Literal["stop", "skip"] = field(
        "stop", "a loss or gradient that is not finite: stop before it, or skip the step", may_change=True
    )
    max_nonfinite: int = field(10, "with `skip`: stop at this many such steps in a row", may_change=True, ge=1)
    xla: bool = field(False, "compile the forward and backward pass with XLA")
    steps_per_call: int = field(10, "most training steps per call of the graph", may_change=True, ge=1)
    validate_every: Optional[Interval] = field(5000, "steps, or text such as '1 epoch'; null: never", may_change=True)
    checkpoint_every: Interval = field(1000, "steps, or text such as '5 epochs'", may_change=True)
    keep_checkpoints: int = field(5, "how many of the last are kept, beside the best", may_change=True, ge=1)
    early_stopping_patience: Optional[int] = field(
        None, "stop after this many validations without a better loss; null: never", may_change=True, ge=1
    )

    def nonfinite_limit(self) -> int:
        """The number of non-finite steps in a row that ends training."""
        return self.max_nonfinite if self.on_nonfinite == "skip" else 1

    @model_validator(mode="before")
    @classmethod
    def default_length(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps") is None and values.get("epochs") is None:
            return {**values, "epochs": 100}
        return values

    @model_validator(mode="after")
    def check(self) -> Train:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps ({self.steps}) and epochs ({self.epochs}) are both set; keep one")
        if self.schedule == "steps" and not self.decay_steps:
            raise ValueError("schedule is `steps` but decay_steps is empty")
        return self


class Distribute(Section):
    """Which devices train. Several machines: set TF_CONFIG for each, as TensorFlow documents."""

    cpu_devices: Optional[int] = field(
        None,
        "each worker trains on this many logical CPU devices instead of its GPUs (to try distribution out)",
        may_change=True,
        ge=1,
    )
    intra_op_threads: Optional[int] = field(
        None, "threads inside an operation (default: one per core)", may_change=True, ge=1, le=1024
    )
    deterministic: bool = field(True, "on GPUs: deterministic kernels, so that a resume is exact", may_change=True)
    start_timeout: int = field(300, "seconds that workers wait for each other at the start", may_change=True, ge=1)


class Summaries(Section):
    """What TensorBoard, metrics.jsonl and the terminal show."""

    scalars_every: Interval = field(100, "steps, or text such as '1 epoch'", may_change=True)
    images_every: Optional[Interval] = field(
        5000, "pictures and histograms: steps, or text such as '1 epoch'; null: never", may_change=True
    )
    num_images: int = field(4, "validation images shown beside their reconstruction", may_change=True, ge=0)
    profile: Optional[tuple[int, int]] = field(
        None, "[first, end]: a profiler trace of the steps from one to the other, for TensorBoard", may_change=True
    )

    @model_validator(mode="after")
    def check(self) -> Summaries:
        if self.profile and not 0 <= self.profile[0] < self.profile[1]:
            raise ValueError(f"profile is {list(self.profile)}; [100, 110] would trace ten steps")
        return self


class Config(Section):
    """A run is a pure function of this, including `seed`, and the step."""

    seed: int = field(0, "everything random derives from it", ge=0, lt=2**31)
    data: Data = Data()
    model: Model = Model()
    loss: Loss = Loss.model_validate({})
    train: Train = Train()
    distribute: Distribute = Distribute()
    summaries: Summaries = Summaries()

    @model_validator(mode="after")
    def check(self) -> Config:
        if self.loss.metric == "ms-ssim":
            for name, side in (("patch_size", self.data.patch_size), ("eval_crop", self.data.eval_crop)):
                if isinstance(side, int) and side < MS_SSIM_MIN_SIDE:
                    raise ValueError(
                        f"data.{name} is {side}; loss.metric ms-ssim needs at least {MS_SSIM_MIN_SIDE} pixels "
                        f"a side: five scales of an 11 x 11 window (192 is the next multiple of 64)"
                    )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names that YAML uses."""
        return self.model_dump(mode="json", by_alias=True)


def nearest(name: str, value: int, multiple: int) -> str:
    below, above = value // multiple * multiple, (value // multiple + 1) * multiple
    sizes = f"{below} and {above} are" if below else f"{above} is"
    return f"{name} is {value}; it must be a multiple of {multiple} ({sizes})"


# Reading YAML ---------------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a number, `010` ten, `off` and `1:30` are text, a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in seen:
                raise ConfigError(
                    f"{node.start_mark.name}: `{key}` stands on line {seen[key]} and again on line {line}; keep one"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rpartition(":")[2] not in ("bool", "int", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789"))
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, name: str) -> Any:
    loader = Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # such as a key that is a mapping
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def load_config(path: Optional[Path], overrides: list[str]) -> Config:
    """The config of a YAML file (or the defaults) with `section.key=value` overrides on top.

    Raises ConfigError naming the key, the value received and what is allowed.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
            tree = {} if tree is None else tree
        except UnicodeDecodeError as error:
            raise ConfigError(f"config {path} is no text: {error}") from error
        except OSError as error:
            others = [str(other) for other in path.parent.glob("*.yaml")]
            close = difflib.get_close_matches(str(path), others, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"config {path} cannot be read: {error.strerror}{hint}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: a config is a mapping of sections; found {type(tree).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"`{override}` is not an override; write section.key=value, as in train.steps=1000")
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                names = [name for name in Config.model_fields if name != "seed"]
                raise ConfigError(f"`{override}`: `{section}` is not a section; {', '.join(names)} are")
        node[leaf] = parse_yaml(value, f"`{override}`")
        if leaf == "steps" and sections == ["train"]:  # the latest word on the length wins
            node.pop("epochs", None)
        if leaf == "epochs" and sections == ["train"]:
            node.pop("steps", None)
    return validate(tree, str(path) if path else "config")


def validate(tree: dict[str, Any], origin: str) -> Config:
    """A Config from plain values; raises ConfigError that lists everything wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [describe(e) for e in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(problems)) from error


def describe(error: Any) -> str:
    path = [str(p) for p in error["loc"]]
    if error["type"] == "extra_forbidden":
        *sections, key = path
        names = [name for name, _ in fields_of(section_at(sections))]
        close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = f"did you mean `{'.'.join([*sections, close[0]])}`?" if close else f"known here: {', '.join(names)}"
        return f"unknown key `{'.'.join(path)}`; {hint}"
    # A union reports one error per member, with the member's name at the end of the location.
    path = [p for p in path if not re.fullmatch(r"int|str|literal\[.*\]|function-.*", p)]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{'.'.join(path)}: {message}" if path else message
    try:
        found = json.dumps(error["input"], default=str)
    except ValueError:
        found = "a value that holds itself"
    return f"`{'.'.join(path)}` is {found}: {message[0].lower()}{message[1:]}"


def section_at(path: list[str]) -> type[Section]:
    section: type[Section] = Config
    for name in path:
        section = section.model_fields[name].annotation  # type: ignore[assignment]
    return section


def fields_of(section: type[Section]) -> list[tuple[str, FieldInfo]]:
    """(name in YAML, field) of a section."""
    return [(info.alias or name, info) for name, info in section.model_fields.items()]


# Writing and comparing ------------------------------------------------------------------------------------


def render(config: Config) -> str:
    """The config as YAML with each key's meaning as a comment: readable by `load_config`."""
    lines: list[str] = []

    def put(indent: str, name: str, value: Any, info: FieldInfo) -> None:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        text = text.removesuffix("\n").removesuffix("\n...").strip()
        lines.append(f"{indent + name + ': ' + text:<38} # {info.description}")

    tree = config.to_dict()
    for name, info in fields_of(Config):
        if not isinstance(tree[name], dict):
            put("", name, tree[name], info)
            continue
        section = section_at([name])
        lines += ["", f"{name}:  # {section.__doc__}"]
        for key, key_info in fields_of(section):
            put("  ", key, tree[name][key], key_info)
    return "\n".join(lines) + "\n"


def schema() -> dict[str, Any]:
    """JSON schema of the YAML, for editors."""
    return Config.model_json_schema(by_alias=True)


def flat(settings: Config) -> dict[str, Any]:
    """Every value under its key, such as `train.steps`."""
    found: dict[str, Any] = {}
    for name, value in settings.to_dict().items():
        found.update({f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value})
    return found


def differences(old: Config, new: Config) -> Iterator[tuple[str, Any, Any, bool]]:
    """(key, old value, new value, whether a resumed run may change it) for every key that differs."""
    before, after = old.to_dict(), new.to_dict()
    for name, info in fields_of(Config):
        rows = [(name, info, before[name], after[name])]
        if isinstance(before[name], dict):
            rows = [
                (f"{name}.{key}", key_info, before[name][key], after[name][key])
                for key, key_info in fields_of(section_at([name]))
            ]
        for key, key_info, was, now in rows:
            if was != now:
                extra = key_info.json_schema_extra
                yield key, was, now, isinstance(extra, dict) and bool(extra.get("may_change"))
