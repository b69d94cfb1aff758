"""What is publicly known of the models and GPUs of public measurements, and how a profile is put together from it.

Sources stand beside the figures. What no source gives (start-up, overheads around the steps) is assumed here, once, and
every profile says so in its origin. Knows nothing of the files that step times come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pdserve.cluster.planner.profile import (
    DecodeRegion,
    Domain,
    LinkCost,
    MixedSteps,
    Overheads,
    Power,
    PrefillRegion,
    Profile,
)
from pdserve.proto.errors import ConfigError

DTYPE_BYTES = 2
"""All of the measurements are of fp16 or bf16 weights and KV."""

MEMORY_SHARE = 0.9
"""Of a GPU's memory for weights and KV: the default of vLLM's gpu_memory_utilization."""

STARTUP_S = 120.0
"""Assumed: a cold start of a server with a model of tens of GB; no source measures it."""

FLIP_S = 0.007
"""TetriInfer (arXiv 2401.11181) reports 5 to 7 ms to flip an instance's role."""

LINK_LATENCY_S = 30e-6
"""Assumed: the order of one point-to-point transfer's launch, intra-node or RDMA."""

ASSUMED = (
    f"Assumed, not measured: start-up {STARTUP_S:.0f} s, link latency {LINK_LATENCY_S * 1e6:.0f} us, "
    "links at their nominal rate, no overhead around the steps unless given, no overlap in mixed steps."
)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Shape of a decoder-only model. All attend in full, with keys and values of `head_dim` for each KV head."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_parameters: float
    max_model_len: int

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES

    @property
    def weight_bytes(self) -> float:
        return self.num_parameters * DTYPE_BYTES


# config.json and safetensors metadata of the models' Hugging Face repositories.
MODELS = {
    "llama2-70b": ModelFacts(80, 8, 128, 68.98e9, 4096),  # meta-llama/Llama-2-70b-hf
    "bloom-176b": ModelFacts(70, 112, 128, 176.25e9, 2048),  # bigscience/bloom; ALiBi, trained at 2048
    "facebook/opt-13b": ModelFacts(40, 40, 128, 12.85e9, 2048),
    "facebook/opt-66b": ModelFacts(64, 72, 128, 65.72e9, 2048),
    "Qwen/Qwen3-0.6B": ModelFacts(28, 8, 128, 0.596e9, 40960),
    "Qwen/Qwen3-1.7B": ModelFacts(28, 8, 128, 1.72e9, 40960),
    "Qwen/Qwen3-8B": ModelFacts(36, 8, 128, 8.19e9, 40960),
    "Qwen/Qwen3-32B": ModelFacts(64, 8, 128, 32.76e9, 40960),
    "meta-llama/Meta-Llama-3.1-8B": ModelFacts(32, 8, 128, 8.03e9, 131072),
}


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU of a server with eight. Rates are of one direction; `power` is idle, prefill and decode watts."""

    memory_bytes: float
    tdp_w: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    power: tuple[float, float, float] | None = None
    price_per_hour: float | None = None


MIB = 1 << 20

# Memory: what nvidia-smi reports. TDP, NVLink: NVIDIA's data sheets (600 and 900 GB/s are both directions together).
# Network: one InfiniBand port for each GPU, HDR 200 Gb/s in a DGX A100, NDR 400 Gb/s in a DGX H100 and H200.
# Power and price: Mutinifni/splitwise-sim, configs/power_model/constant.yaml and notebooks/utils.py (2023 prices).
GPUS = {
    "a100-80gb": GpuFacts(81_920 * MIB, 400, 300e9, 25e9, (63, 400, 250), 2.21),
    "h100-80gb": GpuFacts(81_559 * MIB, 700, 450e9, 50e9, (75, 700, 380), 4.76),
    # Capped at half of its power (Splitwise, section VI); what it then draws is not in the data.
    "h100-80gb-pcap": GpuFacts(81_559 * MIB, 350, 450e9, 50e9, None, 4.76),
    "h200": GpuFacts(143_771 * MIB, 700, 450e9, 50e9),
}


@dataclass(frozen=True, slots=True)
class Conversion:
    """A profile, and what a reader should know of how it came about."""

    profile: Profile
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The part of a profile that a public file gives."""

    prefill: tuple[PrefillRegion, ...]
    decode: tuple[DecodeRegion, ...]
    domain: Domain
    source: Literal["measured", "fitted", "predicted"]
    origin: str


@dataclass(frozen=True, slots=True)
class Kind:
    """Model, hardware and degree of one profile; `file` is what messages call the file, `suffix` ends the name."""

    model: str
    hardware: str
    tensor_parallel_size: int
    file: str
    suffix: str = ""

    @property
    def name(self) -> str:
        return f"{self.model.rpartition('/')[2].lower()}-{self.hardware}-tp{self.tensor_parallel_size}{self.suffix}"

    @property
    def gpu(self) -> GpuFacts:
        if self.hardware not in GPUS:
            raise ConfigError(f"{self.file}: hardware {self.hardware!r} is not known here; known: {', '.join(GPUS)}")
        return GPUS[self.hardware]

    @property
    def facts(self) -> ModelFacts:
        if self.model not in MODELS:
            raise ConfigError(f"{self.file}: model {self.model!r} is not known here; known: {', '.join(MODELS)}")
        return MODELS[self.model]

    @property
    def kv_capacity_tokens(self) -> int:
        memory_bytes = MEMORY_SHARE * self.gpu.memory_bytes * self.tensor_parallel_size
        capacity = int((memory_bytes - self.facts.weight_bytes) / self.facts.kv_bytes_per_token)
        if capacity < 1:
            raise ConfigError(f"{self.file}: {self.name}: the weights leave no memory for KV")
        return capacity


def assemble(
    kind: Kind,
    costs: StepCosts,
    *,
    overheads: Overheads | None = None,
    longest_run_tokens: int = 0,
    power: Power | None = None,
) -> Profile:
    """A profile of public costs and facts. The context limit is the model's, or what was run if that is longer."""
    gpu, degree = kind.gpu, kind.tensor_parallel_size
    # The links of a worker that run on the fabric: NVLink within a machine, the network between machines.
    rates = {"cuda_ipc": gpu.nvlink_bytes_per_s, "nccl": gpu.network_bytes_per_s}
    if power is None and gpu.power is not None:
        idle_w, prefill_w, decode_w = (watts * degree for watts in gpu.power)
        power = Power(idle_w=idle_w, prefill_w=prefill_w, decode_w=decode_w)
    return Profile(
        format=1,
        name=kind.name,
        model=kind.model,
        hardware=kind.hardware,
        tensor_parallel_size=degree,
        source=costs.source,
        origin=f"{costs.origin} {ASSUMED}",
        num_gpus=degree,
        kv_bytes_per_token=kind.facts.kv_bytes_per_token,
        kv_capacity_tokens=kind.kv_capacity_tokens,
        max_model_len=max(kind.facts.max_model_len, longest_run_tokens),
        prefill=costs.prefill,
        decode=costs.decode,
        mixed=MixedSteps(),
        domain=costs.domain,
        # Every GPU of a worker moves its own share of the heads.
        links={
            name: LinkCost(latency_s=LINK_LATENCY_S, bandwidth_bytes_per_s=rate * degree)
            for name, rate in rates.items()
        },
        overheads=overheads or Overheads(),
        startup_s=STARTUP_S,
        flip_s=FLIP_S,
        power=power,
        price_per_gpu_hour=gpu.price_per_hour,
    )
