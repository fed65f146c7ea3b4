"""Latent diffusion language models trained jointly with their latent space (arXiv 2605.07933).

The names below are the public ones. Each is imported when it is first used, so that ``import ldlm`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldlm import metrics as metrics
    from ldlm import testing as testing
    from ldlm.checkpoints.resume import last_checkpoint as last_checkpoint
    from ldlm.data.corpus import lm1b_detokenizer as lm1b_detokenizer
    from ldlm.data.datamodule import PackedTextDataModule as PackedTextDataModule
    from ldlm.diffusion.grids import AdaptedGrid as AdaptedGrid
    from ldlm.diffusion.grids import LogSNRGrid as LogSNRGrid
    from ldlm.diffusion.grids import MixedGrid as MixedGrid
    from ldlm.diffusion.grids import TimeGrid as TimeGrid
    from ldlm.diffusion.grids import UniformGrid as UniformGrid
    from ldlm.diffusion.samplers import DDIM as DDIM
    from ldlm.diffusion.samplers import Ancestral as Ancestral
    from ldlm.diffusion.samplers import DPMSolver2M as DPMSolver2M
    from ldlm.diffusion.samplers import EulerMaruyama as EulerMaruyama
    from ldlm.diffusion.samplers import Sampler as Sampler
    from ldlm.diffusion.schedules import CosineSchedule as CosineSchedule
    from ldlm.diffusion.schedules import NoiseSchedule as NoiseSchedule
    from ldlm.diffusion.schedules import TangentSchedule as TangentSchedule
    from ldlm.diffusion.timesteps import AdaptiveTimesteps as AdaptiveTimesteps
    from ldlm.diffusion.timesteps import TimestepSampler as TimestepSampler
    from ldlm.diffusion.timesteps import UniformTimesteps as UniformTimesteps
    from ldlm.likelihood import likelihood_terms as likelihood_terms
    from ldlm.model import LDLM as LDLM
    from ldlm.nn.denoiser import Denoiser as Denoiser
    from ldlm.nn.denoiser import DiT as DiT
    from ldlm.nn.latent_coders import IdentityDecoder as IdentityDecoder
    from ldlm.nn.latent_coders import IdentityEncoder as IdentityEncoder
    from ldlm.nn.latent_coders import LatentDecoder as LatentDecoder
    from ldlm.nn.latent_coders import LatentEncoder as LatentEncoder
    from ldlm.nn.latent_coders import PerceiverResamplerDecoder as PerceiverResamplerDecoder
    from ldlm.nn.latent_coders import PerceiverResamplerEncoder as PerceiverResamplerEncoder
    from ldlm.nn.latent_coders import SelfAttentionDecoder as SelfAttentionDecoder
    from ldlm.nn.latent_coders import SelfAttentionEncoder as SelfAttentionEncoder
    from ldlm.nn.layers import Block as Block
    from ldlm.nn.token_decoders import LinearTokenDecoder as LinearTokenDecoder
    from ldlm.nn.token_decoders import TokenDecoder as TokenDecoder
    from ldlm.nn.token_decoders import TransformerTokenDecoder as TransformerTokenDecoder
    from ldlm.nn.token_encoders import EmbeddingTokenEncoder as EmbeddingTokenEncoder
    from ldlm.nn.token_encoders import FrozenTokenEncoder as FrozenTokenEncoder
    from ldlm.nn.token_encoders import PretrainedTokenEncoder as PretrainedTokenEncoder
    from ldlm.nn.token_encoders import ShallowTokenEncoder as ShallowTokenEncoder
    from ldlm.nn.token_encoders import TokenEncoder as TokenEncoder
    from ldlm.objective import JointObjective as JointObjective
    from ldlm.objective import Losses as Losses
    from ldlm.objective import Objective as Objective
    from ldlm.objective import TokenObjective as TokenObjective
    from ldlm.objective import denoising_loss as denoising_loss
    from ldlm.objective import normal_like as normal_like
    from ldlm.tokenizer import load_tokenizer as load_tokenizer
    from ldlm.training.callbacks.efficiency import CompileBlocks as CompileBlocks
    from ldlm.training.callbacks.efficiency import RecomputeActivations as RecomputeActivations
    from ldlm.training.callbacks.ema import EMA as EMA
    from ldlm.training.callbacks.hidden_state_cache import CacheHiddenStates as CacheHiddenStates
    from ldlm.training.callbacks.likelihood_bound import LikelihoodBound as LikelihoodBound
    from ldlm.training.callbacks.predictions import ReconstructionWriter as ReconstructionWriter
    from ldlm.training.callbacks.sample_scores import ScoreSamples as ScoreSamples
    from ldlm.training.callbacks.timesteps import AdaptiveTimestepUpdate as AdaptiveTimestepUpdate
    from ldlm.training.callbacks.visualisation import FigureLogger as FigureLogger
    from ldlm.training.callbacks.visualisation import SampleLogger as SampleLogger
    from ldlm.training.callbacks.visualisation import SaveAtEnd as SaveAtEnd
    from ldlm.training.callbacks.visualisation import ShowSamples as ShowSamples
    from ldlm.training.callbacks.visualisation import Throughput as Throughput
    from ldlm.training.callbacks.warmup import DiffusionToEncoderWarmup as DiffusionToEncoderWarmup
    from ldlm.training.preemption import StopOnSignal as StopOnSignal
    from ldlm.training.records import Recorded as Recorded
    from ldlm.training.stability import LatentMonitor as LatentMonitor
    from ldlm.training.stability import SkippedSteps as SkippedSteps
    from ldlm.training.stages import FixedLatents as FixedLatents
    from ldlm.training.stages import replace_token_decoder as replace_token_decoder
    from ldlm.training.task import LDLMTask as LDLMTask

__version__ = "0.1.0"

_PLACES = {
    "ldlm.checkpoints.resume": "last_checkpoint",
    "ldlm.data.corpus": "lm1b_detokenizer",
    "ldlm.data.datamodule": "PackedTextDataModule",
    "ldlm.diffusion.grids": "TimeGrid UniformGrid LogSNRGrid AdaptedGrid MixedGrid",
    "ldlm.diffusion.samplers": "Sampler EulerMaruyama Ancestral DDIM DPMSolver2M",
    "ldlm.diffusion.schedules": "NoiseSchedule TangentSchedule CosineSchedule",
    "ldlm.diffusion.timesteps": "TimestepSampler UniformTimesteps AdaptiveTimesteps",
    "ldlm.likelihood": "likelihood_terms",
    "ldlm.model": "LDLM",
    "ldlm.nn.denoiser": "Denoiser DiT",
    "ldlm.nn.latent_coders": "LatentEncoder LatentDecoder PerceiverResamplerEncoder PerceiverResamplerDecoder "
    "SelfAttentionEncoder SelfAttentionDecoder IdentityEncoder IdentityDecoder",
    "ldlm.nn.layers": "Block",
    "ldlm.nn.token_decoders": "TokenDecoder LinearTokenDecoder TransformerTokenDecoder",
    "ldlm.nn.token_encoders": "TokenEncoder FrozenTokenEncoder PretrainedTokenEncoder ShallowTokenEncoder "
    "EmbeddingTokenEncoder",
    "ldlm.objective": "JointObjective Losses Objective TokenObjective denoising_loss normal_like",
    "ldlm.tokenizer": "load_tokenizer",
    "ldlm.training.callbacks.efficiency": "CompileBlocks RecomputeActivations",
    "ldlm.training.callbacks.ema": "EMA",
    "ldlm.training.callbacks.hidden_state_cache": "CacheHiddenStates",
    "ldlm.training.callbacks.likelihood_bound": "LikelihoodBound",
    "ldlm.training.callbacks.predictions": "ReconstructionWriter",
    "ldlm.training.callbacks.sample_scores": "ScoreSamples",
    "ldlm.training.callbacks.timesteps": "AdaptiveTimestepUpdate",
    "ldlm.training.callbacks.visualisation": "FigureLogger SampleLogger ShowSamples Throughput SaveAtEnd",
    "ldlm.training.callbacks.warmup": "DiffusionToEncoderWarmup",
    "ldlm.training.preemption": "StopOnSignal",
    "ldlm.training.records": "Recorded",
    "ldlm.training.stability": "SkippedSteps LatentMonitor",
    "ldlm.training.stages": "FixedLatents replace_token_decoder",
    "ldlm.training.task": "LDLMTask",
}
_MODULES = ("metrics", "testing")
_HOMES = {name: module for module, names in _PLACES.items() for name in names.split()}

__all__ = sorted([*_HOMES, *_MODULES])


if not TYPE_CHECKING:  # which would take any name for a public one

    def __getattr__(name: str) -> Any:
        """A public name, imported now."""
        if name in _MODULES:
            return import_module(f"ldlm.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'ldlm' has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The public names, for an interactive shell's completion."""
    return [*__all__, "__version__"]
