"""The keys of a config: their types, defaults, allowed values, and the meaning that `hyperprior config` prints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

DOWNSAMPLING = 64  # pixels per element of z along each side: four strides of 2 in g_a, two in h_a
SOURCES = ("train", "val", "test")  # the keys of `data` that list sources
MS_SSIM_MIN_SIDE = 161  # five scales of an 11 x 11 window


def field(default: Any, doc: str, *, may_change: bool = False, **constraints: Any) -> Any:
    """A config field with its meaning. With `may_change` a resumed run may have another value."""
    return Field(default, description=doc, json_schema_extra={"may_change": may_change}, **constraints)


def parse_interval(value: Any) -> Any:
    """Steps become an int. Epochs become text such as "2 epochs"."""
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
Share = Annotated[float, Field(ge=0, lt=1)]
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
    def refuse_bool_as_number(cls, values: Any) -> Any:
        for name, info in cls.model_fields.items() if isinstance(values, dict) else ():
            name = info.alias or name
            if isinstance(values.get(name), bool) and info.annotation is not bool:
                raise ValueError(f"{name} is {str(values[name]).lower()}; a number or text is expected")
        return values


class Data(Section):
    """The sources of images, and how patches are cut."""

    train: Sources = field([], "sources: tars (also nested), directories, brace patterns, URLs", may_change=True)
    val: Sources = field([], "validation sources; if empty: val_split of train", may_change=True)
    test: Sources = field([], "test sources; if empty: test_split of train, or else val", may_change=True)
    extensions: list[str] = field(
        [],
        "extensions of the images to take, as in WebDataset: `jpg` takes 0000.jpg and leaves its mask 0000.seg.png "
        "(default: all images)",
    )
    val_split: Optional[Share] = field(
        None,
        "share of train held out for validation, by hash of the key (default: 0.1 if val and test are empty, else 0)",
    )
    test_split: Optional[Share] = field(
        None, "share of train held out for testing, by hash of the key (default: 0.1 if val and test are empty, else 0)"
    )
    max_images: Optional[int] = field(
        None, "use at most this many images of train; a hash of the key chooses them before the split", ge=1
    )
    patch_size: int = field(
        256,
        "side of the square training patches in pixels, a multiple of 64; in small patches h_a and h_s see mostly "
        "borders, and then they spend more bits on whole images",
        ge=64,
    )
    patches_per_image: int = field(1, "random patches cut from each decoded image; they go to successive batches", ge=1)
    min_scale: float = field(
        1.0,
        "each patch is a larger window scaled down by a random factor between this and 1, which removes JPEG "
        "artifacts; small images are scaled less",
        gt=0,
        le=1,
    )
    flip: bool = field(False, "mirror a random half of the patches, left to right")
    eval_crop: Union[int, Literal["full"]] = field(
        256, "side of the centre crop in validation and test, a multiple of 64; `full`: the whole image"
    )
    small_images: Literal["skip", "upscale"] = field(
        "skip", "images with a side below patch_size: skip and count them, or enlarge them to fit"
    )
    shuffle_buffer: int = field(256, "samples in the shuffle buffer of a shard; 1: keep the order of the tar", ge=1)
    max_bad_fraction: float = field(
        0.01, "stop when more than this share of at least 1,000 samples is unusable", may_change=True, ge=0, le=1
    )
    allow_pipe: bool = field(False, "allow `pipe:` sources, which run a shell command", may_change=True)
    decode_threads: Optional[int] = field(None, "decoding threads (default: one per core)", may_change=True, ge=1)

    @model_validator(mode="after")
    def check(self) -> Data:
        if self.patch_size % DOWNSAMPLING:
            raise ValueError(explain_multiples("patch_size", self.patch_size, DOWNSAMPLING))
        if isinstance(self.eval_crop, int) and (self.eval_crop < 64 or self.eval_crop % DOWNSAMPLING):
            raise ValueError(explain_multiples("eval_crop", self.eval_crop, DOWNSAMPLING))
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
    """The dimensions of the scale hyperprior, with the paper's names."""

    num_filters: int = field(128, "N: channels inside g_a and g_s", ge=1, le=4096)
    latent_channels: int = field(192, "M: channels of y", ge=1, le=4096)
    hyper_channels: int = field(128, "channels of z, and inside h_a and h_s", ge=1, le=4096)
    density: Literal["gaussian", "logistic"] = field(
        "gaussian", "the density of y around 0; logistic: with heavier tails, for fewer bits than the paper's Gaussian"
    )
    num_scales: int = field(64, "number of scales in the table, which is log-spaced", ge=2, le=4096)
    scale_min: float = field(0.11, "smallest standard deviation of y", gt=0)
    scale_max: float = field(256.0, "largest standard deviation of y", gt=0)

    @model_validator(mode="after")
    def check(self) -> Model:
        if self.scale_max <= self.scale_min:
            raise ValueError(f"scale_max is {self.scale_max}; it must exceed scale_min ({self.scale_min})")
        return self


class Loss(Section):
    """loss = bpp + lambda · 255² · mse, or bpp + lambda · (1 − ms_ssim); images in [0, 1]."""

    lmbda: float = field(0.013, "weight of the distortion; larger: more bits, better images", alias="lambda", gt=0)
    metric: Literal["mse", "ms-ssim"] = field("mse", "the distortion")


class Train(Section):
    """The optimisation, its length, validation and checkpoints."""

    batch_size: int = field(16, "global batch size: patches per step over all replicas", ge=1)
    steps: Optional[int] = field(None, "length in steps", may_change=True, ge=1)
    epochs: Optional[int] = field(None, "length in epochs, instead of steps (default: 100)", may_change=True, ge=1)
    initial: Literal["wavelet", "random"] = field(
        "wavelet", "initial weights: `wavelet`: g_a is a wavelet packet of the image and g_s its inverse; or random"
    )
    start_from: Optional[str] = field(
        None,
        "start from the best weights of a run, from a model file, or from a model in the box such as q3; y is scaled "
        "to this run's lambda; dimensions must be the same, but num_filters may be larger",
    )
    proxy: Literal["noise", "rounded"] = field(
        "noise",
        "what replaces quantisation in training: uniform noise, or y as the encoder rounds it; the gradient passes "
        "this rounding unchanged in g_s, and is that of noise in the rate",
    )
    learning_rate: float = field(1e-4, "Adam's peak learning rate", may_change=True, gt=0)
    schedule: Literal["constant", "cosine", "steps", "plateau"] = field(
        "constant",
        "`cosine`: falls to final_learning_rate at the end; `steps`: multiplied by decay_factor at each of "
        "decay_steps; `plateau`: each time decay_patience validations bring no better loss",
        may_change=True,
    )
    warmup_steps: int = field(0, "steps over which the learning rate rises from 0", may_change=True, ge=0)
    final_learning_rate: float = field(0.0, "learning rate at the end of `cosine`", may_change=True, ge=0)
    decay_steps: list[Annotated[int, Field(ge=1)]] = field(
        [], "steps at which schedule `steps` applies decay_factor", may_change=True
    )
    decay_patience: int = field(10, "see schedule `plateau`", may_change=True, ge=1)
    decay_factor: float = field(0.1, "factor of the schedules `steps` and `plateau`", may_change=True, gt=0, lt=1)
    clip_norm: Optional[float] = field(1.0, "gradients are scaled to at most this global norm; null: never", gt=0)
    ema: Optional[float] = field(
        None, "decay of a moving average of the weights, used for validation and the result; null: none", gt=0, lt=1
    )
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = field(
        "float32", "type of the transforms in training; the last layers of g_a, h_a and h_s, and all else, are float32"
    )
    on_nonfinite: Literal["stop", "skip"] = field(
        "stop", "if a loss or gradient is not finite: stop before the step, or skip the step", may_change=True
    )
    max_nonfinite: int = field(10, "with `skip`: stop at this many such steps in a row", may_change=True, ge=1)
    xla: bool = field(False, "compile the forward and backward pass with XLA")
    steps_per_call: int = field(10, "maximum number of training steps per call of the graph", may_change=True, ge=1)
    validate_every: Optional[Interval] = field(5000, "steps, or text such as '1 epoch'; null: never", may_change=True)
    checkpoint_every: Interval = field(1000, "steps, or text such as '5 epochs'", may_change=True)
    keep_checkpoints: int = field(5, "number of latest checkpoints to keep, beside the best one", may_change=True, ge=1)
    early_stopping_patience: Optional[int] = field(
        None, "stop after this many validations without a better loss; null: never", may_change=True, ge=1
    )

    def nonfinite_limit(self) -> int:
        """The number of successive non-finite steps that ends training."""
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
        if self.schedule == "plateau" and self.validate_every is None:
            raise ValueError("schedule is `plateau` but validate_every is null; it follows the validations")
        return self


class Distribute(Section):
    """The devices that train. For several machines set TF_CONFIG on each, as TensorFlow documents."""

    cpu_devices: Optional[int] = field(
        None, "logical CPU devices of each worker, in place of its GPUs (to try distribution)", may_change=True, ge=1
    )
    intra_op_threads: Optional[int] = field(
        None, "threads of an operation (default: TF_NUM_INTRAOP_THREADS or all cores)", may_change=True, ge=1, le=1024
    )
    deterministic: bool = field(True, "on GPUs: deterministic kernels, so that a resume is exact", may_change=True)
    start_timeout: int = field(300, "seconds that workers wait for each other at the start", may_change=True, ge=1)


class Summaries(Section):
    """The output in TensorBoard, metrics.jsonl and the terminal."""

    scalars_every: Interval = field(100, "steps, or text such as '1 epoch'", may_change=True)
    images_every: Optional[Interval] = field(
        5000, "pictures and histograms: steps, or text such as '1 epoch'; null: never", may_change=True
    )
    num_images: int = field(4, "number of validation images shown beside their reconstructions", may_change=True, ge=0)
    profile: Optional[tuple[int, int]] = field(
        None, "[first, end]: trace the steps from first to end with the profiler, for TensorBoard", may_change=True
    )

    @model_validator(mode="after")
    def check(self) -> Summaries:
        if self.profile and not 0 <= self.profile[0] < self.profile[1]:
            raise ValueError(f"profile is {list(self.profile)}; [100, 110] would trace ten steps")
        return self


class Config(Section):
    """A run is a pure function of its config, including `seed`, and the step."""

    seed: int = field(0, "the seed of everything random", ge=0, lt=2**31)
    data: Data = Data()
    model: Model = Model()
    loss: Loss = Loss()
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


def explain_multiples(name: str, value: int, multiple: int) -> str:
    below, above = value // multiple * multiple, (value // multiple + 1) * multiple
    sizes = f"{below} and {above} are" if below else f"{above} is"
    return f"{name} is {value}; it must be a multiple of {multiple} ({sizes})"


def find_section(path: list[str]) -> type[Section]:
    section: type[Section] = Config
    for name in path:
        section = section.model_fields[name].annotation  # type: ignore[assignment]
    return section


def list_fields(section: type[Section]) -> list[tuple[str, FieldInfo]]:
    """(name in YAML, field) of a section."""
    return [(info.alias or name, info) for name, info in section.model_fields.items()]
