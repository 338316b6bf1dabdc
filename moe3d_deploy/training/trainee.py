"""What a run trains: the model, its optimizer and its averaged weights; how they are saved and restored."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe3d_deploy.checkpoint import WeightSource, load_model, save_checkpoint
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import CheckpointError, InputError
from moe3d_deploy.model import MoE3D
from moe3d_deploy.training.compiled import compile_blocks
from moe3d_deploy.training.ema import Ema
from moe3d_deploy.training.feature_cache import FeatureCache
from moe3d_deploy.training.forward import trainable_parameters
from moe3d_deploy.training.initialise import new_model
from moe3d_deploy.training.optimizers import Optimizers
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.run_folder import RunFolder
from moe3d_deploy.training.scene_loss import SceneLoss
from moe3d_deploy.training.state import State, load_state, part, save_state
from moe3d_deploy.weight_sources import model_shapes, sha256_text

FROM_SCRATCH_LICENCE = "trained from scratch on procedural scenes, licence not said"


class Trainee:
    def __init__(self, options: TrainOptions, source: WeightSource, device: torch.device, folder: RunFolder) -> None:
        self.options, self.source, self.folder, self.device = options, source, folder, device
        # From scratch no weight is read: whatever the source comes to hold, the run stays the same while its sizes do.
        self.digest = sha256_text(str(source.config)) if options.from_scratch else source.sha256()
        self.model = new_model(source.config, options.seed) if options.from_scratch else load_model(source)
        self.model.to(device)
        self.trained = trainable_parameters(self.model, options.train)
        if options.compile:
            compile_blocks(self.model, device)
        self.features: FeatureCache | None = None
        if options.train == "head":
            self.features = FeatureCache.choose(options, source.config, self.digest, folder.path / "features")
        self.loss = SceneLoss(self.model, options, self.features.levels if self.features else None).to(device)
        if self.loss.aids is not None:
            self.trained |= {f"aids.{name}": parameter for name, parameter in self.loss.aids.named_parameters()}
        self.optimizers = Optimizers(self.trained, options)
        self.ema = Ema(self.model, options.ema)
        own = 1.0 if options.from_scratch or source.config.moe is None else source.config.moe.temperature
        self.temperatures = options.temperature or (own, own)  # at the first and the last step
        self.temperature = self.temperatures[0]

    @property
    def learning_rate(self) -> float:
        return self.optimizers.learning_rate

    def describe(self) -> str:
        count = sum(p.numel() for p in self.trained.values())
        head = "experts and gate" if self.source.config.moe else "the last two convolutions of the depth head"
        what = {"head": head, "backbone": "backbone and cameras", "all": "all"}[self.options.train]
        text = f"{what}, {count / 1e6:.3g} M parameters, {self.options.steps} steps on {self.device}"
        return f"{text}; features {self.features.describe()}" if self.features else text

    def update(self, learning_rate: float) -> Tensor:
        """A step along the gradient, limited to `options.clip`; its norm as it was, still on the device."""
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.options.clip)
        self.optimizers.learning_rate = learning_rate
        for optimizer in self.optimizers.parts:
            optimizer.step()
        self.optimizers.zero_grad()
        self.ema.update(self.model)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[MoE3D]:
        """The model with the averaged weights and the gate's present temperature, for a validation."""
        with self.ema.applied(self.model), _temperature(self.model, self.temperature):
            yield self.model

    def save_state(self, step: int) -> None:
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.trained.items()}
        average = self.ema.state_dict()
        tensors |= {f"ema.{name}": tensor for name, tensor in average["average"].items()}
        tensors |= {f"optimizer.{key}.{name}": tensor for key, name, tensor in self.optimizers.state()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        values = {
            "options": self.options.to_dict(),
            "source_sha256": self.digest,
            "ema_updates": average["updates"],
            "config": self.source.config.to_dict(),
            "temperature": self.temperature,
        }
        save_state(self.folder.state, State(step, tensors, values))

    def restore(self) -> int:
        """Go on from the newest state, and return its step; 0 without one. Raises CheckpointError for a foreign one."""
        state = load_state(self.folder.state)
        if state is None:
            return 0
        where = f"{self.folder.state}/step-{state.step:08d}"
        try:
            self._take_over(state, where)
        except (KeyError, InputError) as error:
            what = f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"{where} is not of this version ({what}); remove it, or choose another folder"
            ) from error
        return state.step

    def _take_over(self, state: State, where: str) -> None:
        """Raises CheckpointError for another run's state, KeyError and InputError for one that lacks something."""
        stored = TrainOptions.from_dict(state.values["options"])
        if name := stored.first_difference(self.options):
            raise CheckpointError(f"{where} is of a run with another {name}; remove it, or choose another folder")
        config = self.source.config.to_dict()
        if state.values["source_sha256"] != self.digest or state.values.get("config", config) != config:
            what = "sizes" if self.options.from_scratch or state.values["source_sha256"] == self.digest else "weights"
            raise CheckpointError(
                f"{where} was trained from other {what} than {self.source.name} now holds; bring those back, or start "
                f"a new phase: moe3d train {self.folder.checkpoint} -o OTHER"
            )
        own = part(state.tensors, "model.")
        expected = {name: tuple(p.shape) for name, p in self.trained.items()}
        if {name: tuple(tensor.shape) for name, tensor in own.items()} != expected:
            raise CheckpointError(
                f"{where} holds other tensors than this run trains; remove it or choose another folder"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(own[name])
            self.optimizers.restore(part(state.tensors, "optimizer."))
        average = {"updates": state.values["ema_updates"], "average": part(state.tensors, "ema.")}
        self.ema.load_state_dict(average)
        self.temperature = state.values["temperature"]
        torch.set_rng_state(state.tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in state.tensors:
            torch.cuda.set_rng_state(state.tensors["random.cuda"], self.device)

    def save_checkpoint(self, step: int) -> None:
        """The averaged weights as a checkpoint folder."""
        o, source = self.options, self.source
        scratch = ", from scratch" if o.from_scratch else ""
        licence = o.licence or (FROM_SCRATCH_LICENCE if o.from_scratch else source.licence)
        base = source.name if o.from_scratch else source.origin
        trained = TrainedSource(
            config=at_temperature(source.config, self.temperature),
            name=source.name,
            origin=f"{base}{scratch}; trained {o.train} {step} steps seed {o.seed}",
            licence=licence,
            weights={**self.model.state_dict(), **self.ema.state_dict()["average"]},
        )
        save_checkpoint(trained, self.folder.checkpoint, overwrite=True)

    def finish(self) -> None:
        if self.features:
            self.features.remove()


@dataclass(frozen=True, eq=False)
class TrainedSource(WeightSource):
    """The weights of a run in the form that `save_checkpoint` takes."""

    weights: Mapping[str, Tensor]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return model_shapes(self.config)

    def tensor(self, name: str) -> Tensor:
        return self.weights[name].detach().cpu().clone(memory_format=torch.contiguous_format)

    def sha256(self) -> str:
        raise NotImplementedError("the weights of a run have no digest before they are stored")


def at_temperature(config: ModelConfig, temperature: float) -> ModelConfig:
    """The config with the gate's temperature that the run has reached."""
    if config.moe is None:
        return config
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, temperature=temperature))


@contextmanager
def _temperature(model: MoE3D, temperature: float) -> Iterator[None]:
    head = model.depth_head
    before = head.moe
    if before is not None:
        head.moe = dataclasses.replace(before, temperature=temperature)
    try:
        yield
    finally:
        head.moe = before
